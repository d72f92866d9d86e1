"""Rows of npy files: read as they are asked for, or filled by several processes together.

A memory map would count what it has shown as this process's memory, and write whole pages; and
machines that share a file do not share its pages.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from jax.typing import DTypeLike

from loopfm_jax import processes


class Column(Protocol):
    """Rows [N, ...] in memory, in a file, or computed from such: what is asked for is read."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> np.dtype: ...
    def __len__(self) -> int: ...
    def __getitem__(self, part: slice, /) -> np.ndarray: ...


@dataclass(frozen=True)
class Rows:
    """A `Column` in a file. Travels to other machines as its path."""

    path: Path
    shape: tuple[int, ...]
    dtype: np.dtype
    start: int
    """Bytes before the first row."""

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, part: slice, /) -> np.ndarray:
        low, high, _ = part.indices(len(self))
        width = int(np.prod(self.shape[1:]))
        found = np.fromfile(
            self.path,
            self.dtype,
            count=(high - low) * width,
            offset=self.start + low * width * self.dtype.itemsize,
        )
        return found.reshape(-1, *self.shape[1:])


def open_rows(path: Path) -> Rows:
    """The rows of an npy file."""
    values = np.load(path, mmap_mode="r", allow_pickle=False)
    return Rows(path, values.shape, values.dtype, path.stat().st_size - values.nbytes)


def write_at(path: Path, low: int, values: np.ndarray) -> None:
    """Rows from `low` on of an npy file that is there."""
    rows = open_rows(path)
    row_bytes = rows.dtype.itemsize * int(np.prod(rows.shape[1:]))
    with path.open("r+b") as file:
        file.seek(rows.start + low * row_bytes)
        file.write(np.ascontiguousarray(values, rows.dtype).data)


class RowFile:
    """Rows [N, ...] of a file: `file[low:high] = values` writes their bytes and no others."""

    def __init__(self, path: Path, *, shape: tuple[int, ...], dtype: DTypeLike):
        """All processes open a file together; the first makes it, of zeros."""
        if processes.leads():
            np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
        processes.wait()
        self._dtype = np.dtype(dtype)
        self._row_bytes = self._dtype.itemsize * int(np.prod(shape[1:]))
        self._start = path.stat().st_size - shape[0] * self._row_bytes
        self._file = path.open("r+b")

    def __setitem__(self, rows: slice, values: np.ndarray) -> None:
        self._file.seek(self._start + rows.start * self._row_bytes)
        self._file.write(np.ascontiguousarray(values, self._dtype).data)

    def close(self) -> None:
        """What was written is seen by others once they, too, have closed and waited for it."""
        self._file.close()


class After:
    """Rows of a file from row `start` on, counted from there."""

    def __init__(self, file: RowFile, start: int):
        self._file, self._start = file, start

    def __setitem__(self, rows: slice, values: np.ndarray) -> None:
        self._file[self._start + rows.start : self._start + rows.stop] = values
