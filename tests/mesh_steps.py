"""Steps of a small DMIN on any mesh, and what they send."""

import re
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from bench_cases import SCHEMA, backbone

from loopfm_jax import loop, sharding
from loopfm_jax.bench import rows
from loopfm_jax.bench.model import make_subject
from loopfm_jax.data.batches import GlobalBatches
from loopfm_jax.optim import TableRule, make_optimiser

MESHES = ((1, 1), (8, 1), (4, 2), (1, 8))
MANY = replace(
    SCHEMA,
    fields=tuple(replace(f, rows=5_000 if "item" in f.name else f.rows) for f in SCHEMA.fields),
)
"""More table rows than a step looks up, so that what is of a table's size is seen to be."""
CONFIG = backbone("dmin", heads=2, attention_dropout=0.0, dropout=0.0, hidden=(16, 8))
CONFIG = replace(CONFIG, tables=replace(CONFIG.tables, width=4, row_multiple=128))


class Steps(NamedTuple):
    losses: list[float]
    hlo: str
    state: Any


@cache
def steps(
    shape: tuple[int, int],
    folder: Path,
    *,
    fsdp: bool = False,
    tables: TableRule = "adam",
    count: int = 20,
) -> Steps:
    """The first steps of (data, model) devices; `folder` is for their examples."""
    facts = rows.LogSpec(MANY, rows=640)(folder)
    mesh = {"data": shape[0], "model": shape[1]}
    subject = make_subject({**rows.describe(MANY, CONFIG, 64), **facts, "mesh": mesh})
    optim = replace(subject.config.train.optim, tables=tables)
    optimiser = make_optimiser(optim, steps=count)
    graphdef, state, shardings = loop.create(subject.build, optimiser, subject.mesh, 0, fsdp=fsdp)
    step = Compiled(loop.make_step(subject.task, optimiser, graphdef, shardings))
    source = GlobalBatches(
        subject.rows,
        subject.examples.batch,
        config=subject.config.train.order,
        parts=sharding.parts(subject.mesh),
    )
    losses = []
    for n in range(count):
        batch = loop.put(source[n], subject.mesh)
        state, numbers = step(state, batch, subject.past)
        losses.append(float(numbers["logloss"]))
    return Steps(losses, step.text, state)


class Compiled:
    """A jitted step, compiled once for every shape of its batches."""

    def __init__(self, step: Any):
        self.step, self.programs = step, {}

    def __call__(self, state: Any, batch: Any, past: Any) -> Any:
        shapes = str(jax.tree.map(np.shape, batch))
        if shapes not in self.programs:
            self.programs[shapes] = self.step.lower(state, batch, past).compile()
        return self.programs[shapes](state, batch, past)

    @property
    def text(self) -> str:
        """Of the first program."""
        return next(iter(self.programs.values())).as_text()


def collectives(hlo: str) -> list[int]:
    """Numbers that each of them leaves on a device."""
    kinds = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
    found = re.findall(rf"= (.*?) (?:{kinds})(?:-start)?\(", hlo)
    return [sum(map(_size, re.findall(r"\w+\d+\[([\d,]*)\]", shapes))) for shapes in found]


def _size(shape: str) -> int:
    return int(np.prod([int(n) for n in shape.split(",") if n]))
