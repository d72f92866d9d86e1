"""The TFDS data set behind every prepared log: ArrayRecord files whose records are columnar blocks.

One record holds some thousand consecutive rows (a thousand times faster to read than one record a
row), in time order, and never straddles a window: the splits are the windows. TensorFlow is not
needed, neither to build nor to read. Blocks are written one after another, compressed at zstd level
1: a builder's own `download_and_prepare` holds a whole split in memory, needs TensorFlow beyond 1
GB of it, and takes four times as long at its level 3, for files that are no smaller.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice, pairwise
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter
from tensorflow_datasets.core.example_serializer import ExampleSerializer

from loopfm_jax.data.blocks import BLOCK_ROWS, Blocks, is_wide
from loopfm_jax.data.raw import Card
from loopfm_jax.errors import UserError

SHARD_BLOCKS = 1000
OPTIONS = "group_size:1,zstd:1"
VERSION = "1.0.0"

Columns = np.ndarray | tuple[np.ndarray, ...]
"""A column [rows, ...]; several of one type are stored as one, [rows, len]."""
Ragged = tuple[np.ndarray, np.ndarray]
"""Values of all rows, and how many each row has."""


def write(
    name: str,
    directory: Path,
    *,
    columns: Mapping[str, Columns],
    ragged: Mapping[str, Ragged],
    bounds: Mapping[str, tuple[int, int]],
    card: Card,
) -> Path:
    """Writes the data set `name` under `directory`; returns the folder TFDS can read it from.

    Args:
      bounds: first and last row (exclusive) of every split.
    """
    info = describe(name, directory, columns=columns, ragged=ragged, card=card)
    written: dict[str, list[Shard]] = {}
    for split, (start, stop) in bounds.items():
        blocks, shards = row_blocks(columns, ragged, start, stop), []
        for first in blocks:
            few = chain([first], islice(blocks, SHARD_BLOCKS - 1))
            shards.append(write_shard(info, split, len(shards), few))
        written[split] = shards
    return finish(info, written)


class Shard(NamedTuple):
    """One file of a split."""

    records: int
    size: int
    """Bytes."""


def describe(
    name: str,
    directory: Path,
    *,
    columns: Mapping[str, Columns],
    ragged: Mapping[str, Ragged],
    card: Card,
) -> tfds.core.DatasetInfo:
    """The data set of such columns (any rows of them), none of it written."""
    folder = directory / name / VERSION
    folder.mkdir(parents=True, exist_ok=True)
    features = {n: _feature(_part(v, 0, 0)) for n, v in columns.items()}
    for n, (values, lengths) in ragged.items():
        features |= {f"{n}/values": _feature(values), f"{n}/lengths": _feature(lengths)}
    identity = tfds.core.DatasetIdentity(
        name=name, version=tfds.core.Version(VERSION), data_dir=str(folder), module_name=__name__
    )
    info = tfds.core.DatasetInfo(
        builder=identity,
        description=card.description,
        homepage=card.homepage or None,
        citation=card.citation or None,
        license=card.license or None,
        features=tfds.features.FeaturesDict(features),
        disable_shuffling=True,  # keeps the time order
    )
    info.set_file_format("array_record")
    return info


def write_shard(
    info: tfds.core.DatasetInfo, split: str, number: int, blocks: Iterable[dict[str, np.ndarray]]
) -> Shard:
    """File `number` of a split, which holds `SHARD_BLOCKS` records; the last one fewer."""
    path = Path(str(_template(info, split).sharded_filepath(shard_index=number, num_shards=None)))
    features: Any = info.features
    serializer = ExampleSerializer(features.get_serialized_info())
    unfinished = path.with_name(f".{uuid4().hex}")  # of workers that do the same, each has its own
    writer = ArrayRecordWriter(str(unfinished), OPTIONS)
    records = size = 0
    try:
        for block in blocks:
            example = serializer.get_tf_example(features.encode_example(block))
            record = example.SerializeToString(deterministic=True)  # by name, in every process
            writer.write(record)
            records, size = records + 1, size + len(record)
    finally:
        writer.close()
    unfinished.rename(path)
    return Shard(records, size)


def finish(info: tfds.core.DatasetInfo, written: Mapping[str, Sequence[Shard]]) -> Path:
    """Writes what the data set says of itself, and returns its folder."""
    splits = [
        tfds.core.SplitInfo(
            name=split,
            shard_lengths=[shard.records for shard in shards],
            num_bytes=sum(shard.size for shard in shards),
            filename_template=_template(info, split),
        )
        for split, shards in written.items()
    ]
    info.set_splits(tfds.core.SplitDict(splits))
    info.write_to_directory(info.data_dir)
    return Path(info.data_dir)


def _template(info: tfds.core.DatasetInfo, split: str) -> tfds.core.ShardedFileTemplate:
    folder: Any = Path(info.data_dir)
    return tfds.core.ShardedFileTemplate(
        dataset_name=info.name,
        data_dir=folder,
        split=split,
        filetype_suffix="array_record",
        template="{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_INDEX}",
    )


def row_blocks(
    columns: Mapping[str, Columns], ragged: Mapping[str, Ragged], start: int, stop: int
) -> Iterator[dict[str, np.ndarray]]:
    """The records of some rows."""
    ends = {name: np.cumsum(lengths) for name, (_, lengths) in ragged.items()}
    for low in range(start, stop, BLOCK_ROWS):
        high = min(low + BLOCK_ROWS, stop)
        block = {name: _part(values, low, high) for name, values in columns.items()}
        for name, (values, lengths) in ragged.items():
            first = ends[name][low - 1] if low else 0
            block[f"{name}/values"] = values[first : ends[name][high - 1]]
            block[f"{name}/lengths"] = lengths[low:high]
        yield block


def _feature(values: np.ndarray) -> tfds.features.Tensor:
    """Plain bytes: six times faster to write than the default, a list of numbers."""
    return tfds.features.Tensor(
        shape=(None, *values.shape[1:]),
        dtype=values.dtype,
        encoding=tfds.features.Encoding.BYTES,
    )


def _part(values: Columns, low: int, high: int) -> np.ndarray:
    if isinstance(values, tuple):
        parts = [v[low:high] for v in values]
        return np.stack(parts, axis=1) if parts else np.zeros((high - low, 0), np.int32)
    return values[low:high]


def read(directory: Path, rows: Mapping[str, int], *, wide: bool = True) -> dict[str, np.ndarray]:
    """All columns of the given splits (name -> rows), concatenated in time order.

    Columns of one value a row are filled in place, so that a log is in memory once.

    Args:
      wide: False leaves out `is_wide`.
    """
    whole: dict[str, np.ndarray] = {}
    many: dict[str, list[np.ndarray]] = {}
    blocks = open_blocks(directory, rows)
    for number, (low, high) in enumerate(pairwise(blocks.bounds)):
        for name, values in blocks.read(number).items():
            if not wide and is_wide(name):
                continue
            if name.endswith("/values"):
                many.setdefault(name, []).append(values)
                continue
            if name not in whole:
                whole[name] = np.empty((sum(rows.values()), *values.shape[1:]), values.dtype)
            whole[name][low:high] = values
    return whole | {name: np.concatenate(parts) for name, parts in many.items()}


def open_blocks(directory: Path, rows: Mapping[str, int]) -> Blocks:
    """The records of the given splits (name -> rows), read one by one.

    Raises:
      UserError: they are not cut as this version cuts them.
    """
    builder = tfds.builder_from_directory(directory)
    places: list[tuple[Any, int]] = []
    bounds = [0]
    for split, count in rows.items():
        source: Any = builder.as_data_source(split)  # pyright: ignore[reportCallIssue]
        start = bounds[-1]
        bounds.extend(
            min(low + BLOCK_ROWS, start + count) for low in range(start, start + count, BLOCK_ROWS)
        )
        places.extend((source, i) for i in range(len(source)))
    if len(places) != len(bounds) - 1:
        raise UserError(
            f"{directory} holds {len(places)} records where {len(bounds) - 1} of {BLOCK_ROWS} rows "
            "are due: another version wrote it; prepare the log again"
        )

    def read_block(number: int) -> dict[str, np.ndarray]:
        source, i = places[number]
        return source[i]

    return Blocks(read_block, np.array(bounds, np.int64))


def columns(directory: Path) -> tuple[str, ...]:
    """Names of what the records hold."""
    features: Any = tfds.builder_from_directory(directory).info.features
    return tuple(features)


def size(directory: Path, rows: Mapping[str, int]) -> int:
    """Bytes of the given splits in memory, as far as their records tell."""
    splits = tfds.builder_from_directory(directory).info.splits
    return sum(splits[name].num_bytes for name in rows)
