"""The records of a prepared log, read as they are needed: for logs larger than memory.

A record is a block of consecutive rows. What is one number a row (label, times, keys, lengths)
stays in memory; ids, floats and sequences wait in the blocks. A model that reads rows in time
order, or in an order that mixes few blocks at a time (`batches`), decodes every block once a pass.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

BLOCK_ROWS = 4096
WINDOW_BLOCKS = 16
"""Blocks whose rows a `mixed` pass permutes together."""
HELD_BLOCKS = 2 * WINDOW_BLOCKS
"""Decoded blocks that stay: a batch may lie in two windows."""
WIDE = ("ids", "floats", "example_id")
LENGTHS = ("length", "lengths")


@dataclass(frozen=True)
class Blocks:
    """Blocks by number, in time order."""

    read: Callable[[int], dict[str, np.ndarray]]
    """Number -> the block's columns."""
    bounds: np.ndarray
    """[blocks + 1] the first row of every block, and the end."""

    def groups(self, rows: np.ndarray) -> tuple[list[tuple[int, np.ndarray]], np.ndarray]:
        """(block, row numbers within it) of the blocks that hold `rows`, and the place of every
        row of `rows` among those, one block after the other."""
        block_B = np.searchsorted(self.bounds, rows, side="right") - 1
        order = np.argsort(block_B, kind="stable")
        numbers, starts = np.unique(block_B[order], return_index=True)
        parts = np.split((rows - self.bounds[block_B])[order], starts[1:])
        place_B = np.empty(len(rows), np.int64)
        place_B[order] = np.arange(len(rows))
        return list(zip(numbers.tolist(), parts, strict=True)), place_B


def is_wide(name: str) -> bool:
    """Whether a stored column waits in its blocks: all that only batches read, but for how long
    sequences are, of which every process that makes a part of a batch knows all."""
    return name in WIDE or ("/" in name and name.rsplit("/")[-1] not in LENGTHS)
