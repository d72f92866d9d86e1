"""Feature batches of a model: the log's own columns, and behaviour sequences made from the log.

Where a data set has no behaviour sequences, a backbone that reads them (DMIN) gets the key's
earlier positive items, found by the same structuring code as LoopFM's histories.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from loopfm_jax.data.batches import Batch
from loopfm_jax.data.log import Log, load, pad_front
from loopfm_jax.data.schema import Schema
from loopfm_jax.history.slices import SliceConfig, Slices, slices


@dataclass(frozen=True)
class Inputs:
    """Rows of a prepared log as one model reads them. Call `batch(rows)`."""

    log: Log
    splits: dict[str, slice]
    past: Slices | None
    """Behaviours: slices over the log's positive rows."""
    past_ids: np.ndarray
    """[positive rows in (key, time) order, behaviour columns] fused ids."""

    @property
    def schema(self) -> Schema:
        return self.log.schema

    def rows(self, *splits: str) -> np.ndarray:
        return np.concatenate([np.arange(len(self.log))[self.splits[s]] for s in splits])

    def batch(self, rows: np.ndarray) -> Batch:
        """`ids_BC`, `floats_BN`, `label_B` of the given row numbers."""
        parts = [self.log["ids"][rows]]
        for f in self.schema.sequences:
            if not f.from_log:
                parts.append(self.log.padded(f.name, rows, length=f.length))
        if self.past is not None:
            past_BLK = pad_front(
                self.past_ids,
                self.past.end[rows],
                self.past.length[rows],
                length=self.schema[self.schema.behaviours[0].history[0]].length,
            )
            parts.extend(np.moveaxis(past_BLK, 2, 0))
        floats = self.log.columns.get("floats")
        return {
            "ids_BC": np.concatenate(parts, axis=1),
            "floats_BN": np.zeros((len(rows), 0), np.float32) if floats is None else floats[rows],
            "label_B": self.log["label"][rows].astype(np.float32),
        }


def open_inputs(directory: Path, *, reader: str, behaviours: bool) -> Inputs:
    """Opens a prepared log for the `fm` or the `vm` (which does not see FM-only columns).

    Args:
      directory: a prepared log.
      reader: `fm` or `vm`.
      behaviours: whether the model reads sequences of earlier positive items.
    """
    log, splits = load(directory)
    schema = log.schema if reader == "fm" else log.schema.for_vm()
    log = log.select(schema if behaviours else schema.without_behaviours())
    made = [f for f in log.schema.sequences if f.from_log]
    if not made:
        return Inputs(log, splits, None, np.zeros((0, 0), np.int32))
    positive = np.flatnonzero(log["label"])
    past = slices(
        entry_key=log["key"][positive],
        entry_time=log["logged_time"][positive],
        query_key=log["key"],
        query_time=log["time"],
        config=SliceConfig(length=made[0].length, retention_days=365 * 100),
    )
    names = [f.name for f in log.schema.categorical]
    columns = [names.index(f.shares or f.name) for f in made]
    return Inputs(log, splits, past, log["ids"][positive[past.order]][:, columns])
