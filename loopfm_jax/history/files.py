"""Array files in another order: `values[rows]` as npy, whatever fits into memory.

Reading at random is fastest while the source stays in memory. A larger one is read from front to
back and dealt out to parts of the result, each of which is put in order in memory afterwards: two
sequential passes, and memory that does not grow with the width of a row.
"""

from io import BufferedRandom
from pathlib import Path

import numpy as np

from loopfm_jax.history.rowfile import Column
from loopfm_jax.history.slices import stable_order

HELD_BYTES = 1 << 29
"""A file up to this is held as a whole."""
PART_BYTES = 1 << 27
"""What is held at a time of a larger one."""
BLOCK_BYTES = 1 << 23


def write_rows(path: Path, values: Column, rows: np.ndarray) -> None:
    """Writes `values[rows]`, byte for byte as `np.save` would.

    Args:
      values: [V, ...], in a file if it is large.
      rows: [S] which of them, each at most once.
    """
    with path.open("w+b") as file:
        shape = (len(rows), *values.shape[1:])
        descr = np.lib.format.dtype_to_descr(values.dtype)
        header = {"descr": descr, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        row_bytes = values.dtype.itemsize * int(np.prod(shape[1:]))
        if len(values) * row_bytes > HELD_BYTES:
            pieces = np.array_split(rows, max(1, -(-len(rows) * row_bytes // PART_BYTES)))
            start = file.tell()
            _deal(file, values, pieces, row_bytes=row_bytes)
            file.seek(start)
            _put_in_order(file, values, pieces)
            return
        step, held = max(1, BLOCK_BYTES // max(row_bytes, 1)), values[:]
        for low in range(0, len(rows), step):
            file.write(held.take(rows[low : low + step], axis=0).data)


def _deal(
    file: BufferedRandom, values: Column, pieces: list[np.ndarray], *, row_bytes: int
) -> None:
    """Appends every value to the part of the file that its place is in."""
    part = np.full(len(values), len(pieces), np.uint16)  # the last one: no part at all
    for number, rows in enumerate(pieces):
        part[rows] = number
    lengths = [len(rows) * row_bytes for rows in pieces]
    free = file.tell() + np.concatenate([[0], np.cumsum(lengths[:-1], dtype=np.int64)])
    step = max(1, BLOCK_BYTES // row_bytes)
    for low in range(0, len(values), step):
        to = part[low : low + step]
        stops = np.cumsum(np.bincount(to, minlength=len(pieces)))
        dealt = values[low : low + step].take(np.argsort(to, kind="stable"), axis=0)
        for number, mine in enumerate(np.split(dealt, stops)[: len(pieces)]):
            file.seek(free[number])
            free[number] += file.write(mine.data)


def _put_in_order(file: BufferedRandom, values: Column, pieces: list[np.ndarray]) -> None:
    """Values of a part stand in the order of the source: moves them to their places."""
    for rows in pieces:
        start = file.tell()
        dealt = np.empty((len(rows), *values.shape[1:]), values.dtype)
        file.readinto(dealt.data)
        place = np.empty(len(rows), np.int64)
        place[stable_order(rows.astype(np.int64))] = np.arange(len(rows))
        file.seek(start)
        file.write(dealt.take(place, axis=0).data)
