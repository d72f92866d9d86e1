"""The TFDS builder behind every prepared log: ArrayRecord files whose records are columnar blocks.

One record holds some thousand consecutive rows (a thousand times faster to read than one record a
row), in time order, and never straddles a window: the splits are the windows. TensorFlow is not
needed, neither to build nor to read.
"""

import io
from collections.abc import Iterator, Mapping
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from loopfm_jax.data.raw import Card

BLOCK_ROWS = 4096
VERSION = "1.0.0"


class LogBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Writes columns into blocks, one split per window."""

    VERSION = tfds.core.Version(VERSION)

    def __init__(
        self,
        *,
        columns: Mapping[str, np.ndarray],
        ragged: Mapping[str, tuple[np.ndarray, np.ndarray]],
        bounds: Mapping[str, tuple[int, int]],
        card: Card,
        **kwargs: Any,
    ):
        self._columns, self._ragged = columns, ragged
        self._bounds, self._card = bounds, card
        super().__init__(file_format="array_record", **kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        features = {
            name: tfds.features.Tensor(shape=(None, *values.shape[1:]), dtype=values.dtype)
            for name, values in self._columns.items()
        }
        for name, (values, lengths) in self._ragged.items():
            features[f"{name}/values"] = tfds.features.Tensor(shape=(None,), dtype=values.dtype)
            features[f"{name}/lengths"] = tfds.features.Tensor(shape=(None,), dtype=lengths.dtype)
        return tfds.core.DatasetInfo(
            builder=self,
            description=self._card.description,
            homepage=self._card.homepage or None,
            citation=self._card.citation or None,
            license=self._card.license or None,
            features=tfds.features.FeaturesDict(features),
            disable_shuffling=True,  # keeps the time order
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[Any]]:
        del dl_manager  # sources fetch their own files: they know how to check them
        return {name: self._generate_examples(*rows) for name, rows in self._bounds.items()}

    def _generate_examples(self, start: int, stop: int) -> Iterator[tuple[int, dict[str, Any]]]:
        ends = {name: np.cumsum(lengths) for name, (_, lengths) in self._ragged.items()}
        for low in range(start, stop, BLOCK_ROWS):
            high = min(low + BLOCK_ROWS, stop)
            block = {name: values[low:high] for name, values in self._columns.items()}
            for name, (values, lengths) in self._ragged.items():
                first = ends[name][low - 1] if low else 0
                block[f"{name}/values"] = values[first : ends[name][high - 1]]
                block[f"{name}/lengths"] = lengths[low:high]
            yield low, block


def write(name: str, directory: Path, **contents: Any) -> Path:
    """Builds the data set `name` under `directory`; returns the folder TFDS can read it from."""
    tfds.disable_progress_bar()
    builder_class = type(name, (LogBuilder,), {"name": name}, skip_registration=True)
    builder = builder_class(data_dir=directory, **contents)
    with redirect_stdout(io.StringIO()):  # it speaks of downloads that do not take place
        builder.download_and_prepare()
    return Path(builder.data_dir)


def read(directory: Path, splits: tuple[str, ...]) -> dict[str, np.ndarray]:
    """All columns of the given splits, concatenated in time order."""
    builder = tfds.builder_from_directory(directory)
    sources = [
        builder.as_data_source(split)  # pyright: ignore[reportCallIssue]
        for split in splits
    ]
    blocks = [source[i] for source in sources for i in range(len(source))]
    return {name: np.concatenate([b[name] for b in blocks]) for name in blocks[0]}
