"""An npy file that several processes fill together, each with rows of its own."""

from pathlib import Path

import numpy as np
from jax.typing import DTypeLike

from loopfm_jax import processes


class RowFile:
    """Rows [N, ...] of a file: `file[low:high] = values` writes their bytes and no others.

    A memory map would write whole pages, and machines that share a file do not share its pages.
    """

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
