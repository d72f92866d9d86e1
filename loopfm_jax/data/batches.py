"""Grain input: a source whose item is one whole global batch, so that its state is one integer.

Assembling a batch is a handful of vectorised gathers (records one by one are a thousand times
slower). Three orders: passes in time order (the paper's streaming protocol), epochs in a full
permutation, and epochs that mix: blocks in random order, the rows of 16 of them permuted together.
Mixing reads a log that is larger than memory block by block; the price is that rows which are
neighbours in time stay within some 16 batches of 4,096 of one another. The last batch of a pass is
filled up with rows of weight 0: no row is dropped, no shape changes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import grain
import numpy as np

from loopfm_jax.data.blocks import BLOCK_ROWS, WINDOW_BLOCKS
from loopfm_jax.errors import UserError
from loopfm_jax.packing import WHOLE, Parts

Order = Literal["time", "shuffled", "mixed"]
AHEAD, MOST_AHEAD = 2, 64
Batch = dict[str, Any]
"""Arrays [B, ...] by name; histories are nested by key."""
Seating = Callable[[np.ndarray], np.ndarray]
"""Rows of a batch -> which of them stands at every place of it, part after part; -1: nobody."""
Assemble = Callable[[np.ndarray, Parts], Batch]
"""Row numbers [B], and how their batch is laid out -> what this process has of it."""


@dataclass(frozen=True)
class OrderConfig:
    """How training walks over its window."""

    order: Order = "time"
    """`time`: the paper's streaming protocol; `shuffled`: a new permutation every epoch; `mixed`:
    the same for logs larger than memory, blocks permuted and the rows of 16 of them together."""
    epochs: int = 1
    batch: int = 1024
    """Global batch size."""

    def __post_init__(self) -> None:
        for name in ("epochs", "batch"):
            if getattr(self, name) < 1:
                raise UserError(f"order.{name} is {getattr(self, name)}; at least 1 is needed")


class GlobalBatches(grain.sources.RandomAccessDataSource):
    """Item `step` is the batch of that step: a function of (rows, config, seed, step) alone, of
    which every process takes its own parts.

    Args:
      rows: row numbers of the window in time order.
      assemble: row numbers [B] -> columns; `weight_B` is added here, 0 of rows that fill a batch
        up, in the last batch those of the one before: what a model notes of a batch (a running
        mean) is of them, too, and rules that touch the rows of a step (`row_rules`) touch theirs.
      parts: how batches are laid out.
      seating: who stands where; default: rows as they come, in parts of one size.
    """

    def __init__(
        self,
        rows: np.ndarray,
        assemble: Assemble,
        *,
        config: OrderConfig,
        seed: int = 0,
        parts: Parts = WHOLE,
        seating: Seating | None = None,
    ):
        self._rows, self._assemble, self._parts = rows, assemble, parts
        self._config, self._seed, self._seating = config, seed, seating
        self._steps_per_epoch = -(-len(rows) // config.batch)
        self._epoch_rows = lru_cache(maxsize=2)(self._permuted)
        self._mixture = Mixture(rows, seed=seed) if config.order == "mixed" else None

    def __len__(self) -> int:
        return self._steps_per_epoch * self._config.epochs

    def __repr__(self) -> str:  # Grain writes it into checkpoints: no addresses, no data
        return f"GlobalBatches(rows={len(self._rows)}, {self._config}, seed={self._seed})"

    @property
    def ahead(self) -> int:
        """Batches worth preparing ahead: the blocks of a window are decoded at its first batch, so
        a window's worth where rows are mixed."""
        if self._mixture is None:
            return AHEAD
        return min(max(AHEAD, WINDOW_BLOCKS * BLOCK_ROWS // self._config.batch), MOST_AHEAD)

    def _permuted(self, epoch: int) -> np.ndarray:
        return np.random.default_rng((self._seed, epoch)).permutation(self._rows)

    def _part(self, epoch: int, low: int, high: int) -> np.ndarray:
        """Rows `low` to `high` of an epoch."""
        if self._mixture is not None:
            return self._mixture.part(epoch, low, high)
        return (self._rows if self._config.order == "time" else self._epoch_rows(epoch))[low:high]

    def _batch(self, record_key: Any, *, before: int = 0) -> np.ndarray:
        """A batch's rows, or those of a batch before it in its epoch."""
        epoch, step = divmod(int(record_key), self._steps_per_epoch)
        low = (step - before) * self._config.batch
        return self._part(epoch, max(low, 0), low + self._config.batch)

    def _seated(self, record_key: Any) -> tuple[np.ndarray, np.ndarray]:
        """A batch's rows, and which of them stands at every place."""
        rows, size = self._batch(record_key), self._config.batch
        if self._seating is not None:
            return rows, self._seating(rows)
        place_B = np.arange(size)
        return rows, np.where(place_B < len(rows), place_B, -1)

    def places(self, step: int) -> np.ndarray:
        """Of a first epoch's batch: the number among all rows of who stands at every place."""
        _, at_B = self._seated(step)
        return np.where(at_B < 0, -1, step * self._config.batch + at_B)

    def __getitem__(self, record_key) -> Batch:
        rows, at_B = self._seated(record_key)
        spare = rows
        if len(rows) < self._config.batch < len(self._rows):
            spare = self._batch(record_key, before=1)  # or its few rows would be all its statistics
        rows_B = np.where(at_B < 0, np.resize(spare, len(at_B)), rows[at_B])
        batch = self._assemble(rows_B, self._parts)
        return batch | {"weight_B": self._parts.mine((at_B >= 0).astype(np.float32))}


class Mixture:
    """Epochs over rows in random order, which read few blocks at a time: the blocks are permuted
    and cut into windows of WINDOW_BLOCKS, and the rows of a window are permuted.

    Args:
      rows: row numbers in time order. Blocks are counted from the first of them: a window of the
        log starts with a block of its own. (Where rows of two windows follow one another, the
        later window's blocks lie across these; they are then decoded up to twice.)
    """

    def __init__(self, rows: np.ndarray, *, seed: int):
        self._rows, self._seed = rows, seed
        block = (rows - rows[0]) // BLOCK_ROWS
        self._starts = np.r_[0, np.flatnonzero(np.diff(block)) + 1, len(rows)]
        self._epoch = lru_cache(maxsize=2)(self._windows)
        self._window = lru_cache(maxsize=2)(self._window_rows)

    def part(self, epoch: int, low: int, high: int) -> np.ndarray:
        """Rows `low` to `high` (or the last one) of an epoch, in the order of time: the parts of a
        batch then come from different blocks, and a process reads those of its own."""
        _, ends = self._epoch(epoch)
        first = int(np.searchsorted(ends, low, side="right"))
        last = int(np.searchsorted(ends, min(high, len(self._rows)), side="left"))
        found = np.concatenate([self._window(epoch, w) for w in range(first, last + 1)])
        start = ends[first - 1] if first else 0
        return np.sort(found[low - start : high - start])

    def _windows(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Blocks in the epoch's order, and how many rows there are up to each window's end."""
        sizes = np.diff(self._starts)
        blocks = np.random.default_rng((self._seed, epoch)).permutation(len(sizes))
        total = np.cumsum(sizes[blocks])
        return blocks, np.r_[total[WINDOW_BLOCKS - 1 : -1 : WINDOW_BLOCKS], total[-1]]

    def _window_rows(self, epoch: int, window: int) -> np.ndarray:
        blocks, _ = self._epoch(epoch)
        own = blocks[window * WINDOW_BLOCKS : (window + 1) * WINDOW_BLOCKS]
        rows = np.concatenate([self._rows[slice(*self._starts[b : b + 2])] for b in own])
        return np.random.default_rng((self._seed, epoch, 1 + window)).permutation(rows)


def iterate(source: GlobalBatches) -> grain.DatasetIterator:
    """Batches in order, some prepared ahead by one thread; state: the next step's number."""
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=source.ahead)
    return iter(grain.MapDataset.source(source).to_iter_dataset(options))
