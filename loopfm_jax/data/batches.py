"""Grain input: a source whose item is one whole global batch, so that its state is one integer.

Assembling a batch is a handful of vectorised gathers (records one by one are a thousand times
slower). Two orders: one pass in time order (the paper's streaming protocol) and shuffled epochs.
The last batch of a pass is filled up with repeats of weight 0: no row is dropped, no shape changes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import grain
import numpy as np

from loopfm_jax.errors import UserError

Batch = dict[str, Any]
"""Arrays [B, ...] by name; histories are nested by key."""
Assemble = Callable[[np.ndarray], Batch]


@dataclass(frozen=True)
class OrderConfig:
    """How training walks over its window."""

    order: Literal["time", "shuffled"] = "time"
    """`time`: the paper's streaming protocol; `shuffled`: a new permutation every epoch."""
    epochs: int = 1
    batch: int = 1024
    """Global batch size."""

    def __post_init__(self) -> None:
        for name in ("epochs", "batch"):
            if getattr(self, name) < 1:
                raise UserError(f"order.{name} is {getattr(self, name)}; at least 1 is needed")


class GlobalBatches(grain.sources.RandomAccessDataSource):
    """Item `step` is the batch of that step: a function of (rows, config, seed, step) alone.

    Args:
      rows: row numbers of the window in time order.
      assemble: row numbers [B] -> columns; `weight_B` is added here.
    """

    def __init__(self, rows: np.ndarray, assemble: Assemble, *, config: OrderConfig, seed: int = 0):
        self._rows, self._assemble = rows, assemble
        self._config, self._seed = config, seed
        self._steps_per_epoch = -(-len(rows) // config.batch)
        self._epoch_rows = lru_cache(maxsize=2)(self._order)

    def __len__(self) -> int:
        return self._steps_per_epoch * self._config.epochs

    def __repr__(self) -> str:  # Grain writes it into checkpoints: no addresses, no data
        return f"GlobalBatches(rows={len(self._rows)}, {self._config}, seed={self._seed})"

    def _order(self, epoch: int) -> np.ndarray:
        if self._config.order == "time":
            return self._rows
        return np.random.default_rng((self._seed, epoch)).permutation(self._rows)

    def __getitem__(self, record_key) -> Batch:
        epoch, step = divmod(int(record_key), self._steps_per_epoch)
        size = self._config.batch
        rows = self._epoch_rows(epoch)[step * size : (step + 1) * size]
        filled = np.resize(rows, size)
        batch = self._assemble(filled)
        batch["weight_B"] = (np.arange(size) < len(rows)).astype(np.float32)
        return batch


def iterate(source: GlobalBatches, *, ahead: int = 2) -> grain.DatasetIterator:
    """Batches in order, `ahead` of them prepared by one thread; state: the next step's number."""
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=ahead)
    return iter(grain.MapDataset.source(source).to_iter_dataset(options))
