"""The rows `input`: how fast host batches come from a prepared log, and how many bytes it takes.

Batches end as numpy arrays that are ready for the device. Of the first ones both sides tell a
number that depends on every value and its place (`content`); they must agree.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from loopfm_jax import memory
from loopfm_jax.bench import data
from loopfm_jax.bench.protocol import Measured, Spec, timed
from loopfm_jax.data import prepare
from loopfm_jax.data.batches import Batch, GlobalBatches, OrderConfig, iterate
from loopfm_jax.data.blocks import BLOCK_ROWS
from loopfm_jax.data.raw import SPLITS, Card
from loopfm_jax.data.schema import Schema
from loopfm_jax.inputs import Inputs, open_inputs

COMPARED = 4
"""Batches whose content is told."""
EPOCHS = 1_000_000
"""Time ends a run, not the data."""


def write_prepared(folder: Path, schema: Schema, *, rows: int, fill: float) -> dict[str, Any]:
    """Generated examples as an npz (`data.write_log`) and the same as a prepared log: `rows` in the
    FM's window, a block in each of the others, whose tails an npz of the peer leaves out."""
    counts = {"fm": rows, **dict.fromkeys(SPLITS[1:], BLOCK_ROWS)}
    path, prepared = folder / "log.npz", folder / "prepared"
    facts = data.write_log(path, schema, rows=sum(counts.values()), fill=fill)
    log = data.read_log(path, schema).log
    prepared.mkdir()
    prepare.write(
        prepared,
        "generated",
        schema=schema,
        columns=log.columns,
        ragged={name: (r.values, r.lengths) for name, r in log.ragged.items()},
        rows=counts,
        card=Card("generated examples"),
    )
    return {"log": str(path), "prepared": str(prepared), "rows": rows, **facts}


def content(batch: Batch, schema: Schema) -> float:
    """Local ids by field, floats, events by age and the label, weighted by place and row."""
    offsets = schema.offsets
    fields = [offsets[f.name] for f in schema.categorical]
    local_BF = (batch["ids_BF"] - np.array(fields)).astype(np.float64)
    total_B = local_BF @ (1.0 + np.arange(len(fields))) + batch["label_B"]
    total_B += batch["floats_BN"].astype(np.float64).sum(axis=1)
    for group, names in schema.groups.items():
        length_B = batch["events"][group]["length_B"]
        ids_TG = batch["events"][group]["ids_PSG"][0, : length_B.sum()]
        row_T = np.repeat(np.arange(len(length_B)), length_B)
        rank_T = np.arange(len(row_T)) - np.repeat(np.cumsum(length_B) - length_B, length_B)
        local_TG = np.where(ids_TG > 0, ids_TG - np.array([offsets[n] for n in names]), 0)
        total_B += np.bincount(row_T, local_TG.sum(axis=1) * (1.0 + rank_T), len(length_B))
    return float(total_B @ (1.0 + np.arange(len(total_B))) / len(total_B) ** 2)


class Feed:
    """Batches, one after the other, by the thread that prepares them for training."""

    def __init__(self, spec: Spec):
        memory.keep_freed()
        inputs = open_log(spec, residency=spec["residency"])
        order = OrderConfig(spec.get("order", "time"), EPOCHS, spec["batch"])
        self._source = GlobalBatches(inputs.rows("fm"), inputs.batch, config=order)
        self._batches: Iterator[Batch] = iter(iterate(self._source))
        self._schema, self._told = inputs.schema, 0
        self._contents: list[float] = []
        self.facts: dict[str, Any] = {"batch": spec["batch"], "ahead": self._source.ahead}

    def run(self, *, seconds: float, steps: int) -> Measured:
        if self._told >= COMPARED:  # what was prepared between two slices does not count
            for _ in range(self._source.ahead + 1):
                next(self._batches)
        return timed(
            self._one,
            lambda: None,
            seconds=seconds,
            steps=steps,
            examples=self.facts["batch"],
            losses=self._contents,
        )

    def _one(self) -> None:
        batch = next(self._batches)
        if self._told < COMPARED:
            self._contents.append(content(batch, self._schema))
            self._told += 1


class Bytes:
    """Bytes of a row, `where` is `disk` (the records) or `memory` (the arrays)."""

    def __init__(self, spec: Spec):
        self.facts: dict[str, Any] = {}
        if spec["where"] == "disk":
            records = Path(spec["prepared"]).glob("**/*.array_record*")
            total, rows = sum(p.stat().st_size for p in records), 3 * BLOCK_ROWS + spec["rows"]
        else:
            log = open_log(spec, residency="memory").log
            arrays = [*log.columns.values()]
            arrays += [x for r in log.ragged.values() for x in (r.values, r.lengths)]
            total, rows = sum(x.nbytes for x in arrays), len(log)
        self._value = total / rows

    def run(self, *, seconds: float, steps: int) -> Measured:
        del seconds
        return Measured(self._value, max(steps, 1), 1, 0.0, 0.0)


def open_log(spec: Spec, *, residency: Any) -> Inputs:
    return open_inputs(Path(spec["prepared"]), reader="fm", behaviours=True, residency=residency)
