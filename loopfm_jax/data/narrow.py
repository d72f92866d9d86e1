"""Columns of a prepared log as files of their own, for what reads them from front to back."""

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np

from loopfm_jax.data import builder


def stored_columns(directory: Path) -> tuple[str, ...]:
    """Names of the columns of a prepared log."""
    return builder.columns(_folder(directory))


def write_columns(
    directory: Path, names: Sequence[str], *, first: int, folder: Path
) -> dict[str, Path]:
    """Columns of one number a row, from row `first` on, as npy files in `folder`.

    The log is decoded block by block and never in memory.
    """
    facts = json.loads((directory / "schema.json").read_text())
    blocks = builder.open_blocks(_folder(directory), facts["rows"])
    paths = {name: folder / f"{name}.npy" for name in names}
    files = {name: path.open("wb") for name, path in paths.items()}
    try:
        for number, (low, high) in enumerate(pairwise(blocks.bounds.tolist())):
            if high <= first:
                continue
            block = blocks.read(number)
            for name, file in files.items():
                if not file.tell():
                    _begin(file, block[name], rows=int(blocks.bounds[-1]) - first)
                file.write(np.ascontiguousarray(block[name][max(first - low, 0) :]).data)
    finally:
        for file in files.values():
            file.close()
    return paths


def _begin(file, values: np.ndarray, *, rows: int) -> None:
    descr = np.lib.format.dtype_to_descr(values.dtype)
    header = {"descr": descr, "fortran_order": False, "shape": (rows,)}
    np.lib.format.write_array_header_1_0(file, header)


def _folder(directory: Path) -> Path:
    return directory / json.loads((directory / "schema.json").read_text())["folder"]
