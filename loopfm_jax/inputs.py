"""Feature batches of a model: the log's own columns, and behaviour sequences made from the log.

Where a data set has no behaviour sequences, a backbone that reads them (DMIN) gets the key's
earlier positive items, found by the same structuring code as LoopFM's histories.
"""

import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from loopfm_jax.data.batches import Batch, GlobalBatches, Order, OrderConfig, iterate
from loopfm_jax.data.log import Events, Log, LogResidency, load
from loopfm_jax.data.schema import Schema
from loopfm_jax.errors import UserError
from loopfm_jax.history.slices import SliceConfig, slices
from loopfm_jax.packing import WHOLE, Parts, budget
from loopfm_jax.progress import say


@dataclass(frozen=True)
class Inputs:
    """Rows of a prepared log as one model reads them. Call `batch(rows)`."""

    log: Log
    splits: dict[str, slice]
    past_ms: np.ndarray | None = None
    """When each event of the behaviours that are made from the log was logged; None: nobody looks
    at it, or there are none."""

    @property
    def schema(self) -> Schema:
        return self.log.schema

    def rows(self, *splits: str) -> np.ndarray:
        return np.concatenate([np.r_[self.splits[s]] for s in splits])

    def known(self, rows: np.ndarray, *, before: int) -> np.ndarray:
        """Those of `rows` whose label was there by the time of row `before`, the first that is not
        learned from: an impression group may straddle the cut, and a label of after it would
        leak. How many do is said.

        Raises:
          UserError: no label was there.
        """
        known = rows[self.log["logged_time"][rows] < self.log["time"][before]]
        if not len(known):
            raise UserError(
                f"nothing to learn: the labels of all {len(rows):,} rows came after the window "
                "that they stand in (a group ends with its last row); widen data.windows, or name "
                "a finer group"
            )
        if late := len(rows) - len(known):
            say(f"{late:,} of {len(rows):,} rows had no label by the end of their window: left out")
        return known

    def batch(self, rows: np.ndarray, parts: Parts = WHOLE) -> Batch:
        """`ids_BF`, `floats_BN`, `label_B` of the given row numbers, and `events` by group of
        sequences: `ids_PSG`, filled up to a token budget, `length_B`, and where the model looks at
        it and it is known `age_PS`, seconds since the event.

        Args:
          rows: of the whole batch.
          parts: how it is laid out, and what of it is wanted.
        """
        slots = {
            group: budget(
                self.log.lengths(names, rows),
                longest=self.schema[group].length,
                parts=parts.count,
            )
            for group, names in self.schema.groups.items()
        }
        rows = parts.mine(rows)
        asked_ms = None if self.past_ms is None else self.log["time"][rows]
        log, rows = self.log.near(rows)
        floats = log.columns.get("floats")
        return {
            "ids_BF": log["ids"][rows],
            "floats_BN": np.zeros((len(rows), 0), np.float32) if floats is None else floats[rows],
            "label_B": log["label"][rows].astype(np.float32),
            "events": {
                group: self._filled(group, log.events(names, rows), slots[group], asked_ms, parts)
                for group, names in self.schema.groups.items()
            },
        }

    def _filled(
        self, group: str, events: Events, slots: int, asked_ms: np.ndarray | None, parts: Parts
    ) -> Batch:
        def deal(per_token: np.ndarray) -> np.ndarray:
            return parts.deal(
                lambda tokens, out: np.copyto(out, per_token[tokens]),
                events.length_B,
                slots=slots,
                shape=per_token.shape[1:],
                dtype=per_token.dtype,
            )

        found = {"ids_PSG": deal(events.ids_TG), "length_B": events.length_B}
        if asked_ms is not None and self.past_ms is not None and self.schema[group].from_log:
            age_ms = np.repeat(asked_ms, events.length_B) - self.past_ms[events.index_T]
            found["age_PS"] = deal((age_ms / 1000).astype(np.float32))
        return found


def open_inputs(
    directory: Path,
    *,
    reader: str,
    behaviours: bool,
    timed: bool = False,
    residency: LogResidency = "auto",
    order: Order = "time",
) -> Inputs:
    """Opens a prepared log for the `fm` or the `vm` (which does not see FM-only columns).

    Args:
      directory: a prepared log.
      reader: `fm` or `vm`.
      behaviours: whether the model reads sequences of earlier events.
      timed: whether it looks at how long ago they were.
      residency: where the log waits.
      order: how its rows will be walked over; a full permutation needs memory.

    Raises:
      UserError: of `check_order`.
    """
    check_order(order, residency, reader=reader)
    if order == "shuffled":
        residency = "memory"
    log, splits = load(directory, residency=residency)
    schema = log.schema if reader == "fm" else log.schema.for_vm()
    log = log.select(schema.read(behaviours=behaviours))
    log, past_ms = _with_past(log)
    return Inputs(log, splits, past_ms if timed else None)


def check_order(order: Order, residency: LogResidency, *, reader: str) -> None:
    """Raises UserError where a log is to wait in its blocks, of which a full permutation would read
    every one at every step."""
    if order == "shuffled" and residency == "blocks":
        raise UserError(
            "a full permutation (order shuffled) needs the log in memory, but it waits in its "
            f"blocks: use order mixed (--{reader}.train.order.order mixed), or --log-residency "
            "memory"
        )


def _with_past(log: Log) -> tuple[Log, np.ndarray | None]:
    """Adds the behaviours that are made from the log: slices over its positive rows; and when these
    were logged, in the order of the slices."""
    made = [f for f in log.schema.sequences if f.from_log]
    if not made:
        return log, None
    positive = np.flatnonzero(log["label"])
    logged_ms = log["logged_time"][positive]
    past = slices(
        entry_key=log["key"][positive],
        entry_time=logged_ms,
        query_key=log["key"],
        query_time=log["time"],
        config=SliceConfig(length=made[0].length, retention_days=365 * 100),
    )
    ids_PG = log.ids_of(positive, [f.shares or f.name for f in made])[past.order]
    offsets = log.schema.offsets
    log = replace(
        log,
        columns={
            **log.columns,
            f"{made[0].slices}/end": past.end,
            f"{made[0].slices}/length": past.length,
        },
        sequences={
            **log.sequences,
            **{f.name: ids_PG[:, i] - np.int32(offsets[f.name]) for i, f in enumerate(made)},
        },
    )
    return log, logged_ms[past.order]


def assembly_rate(directory: Path) -> float:
    """Rows/s of a prepared log's FM window, assembled into host batches of a VM."""
    inputs = open_inputs(directory, reader="vm", behaviours=False)
    rows = np.resize(inputs.rows("fm"), 500_000)
    batches = GlobalBatches(rows, inputs.batch, config=OrderConfig(batch=4096))
    started = time.monotonic()
    count = sum(len(batch["label_B"]) for batch in iterate(batches))
    return count / (time.monotonic() - started)
