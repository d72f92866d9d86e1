"""Training the teacher on the FM window."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from loopfm_jax import checkpoint, infer, loop, stages
from loopfm_jax.data.batches import Order
from loopfm_jax.data.log import LogResidency
from loopfm_jax.fm.compressor import Projection
from loopfm_jax.fm.teacher import FMConfig, Teacher, loss
from loopfm_jax.history.encoders import TIMED
from loopfm_jax.history.join import Join
from loopfm_jax.history.reader import Past, Reading
from loopfm_jax.history.store import Residency, open_histories
from loopfm_jax.inputs import Inputs, open_inputs
from loopfm_jax.packing import WHOLE, Parts

Labels = Literal["true", "shuffled"]
Span = Literal["whole", "first-half"]
SAMPLE = 20_000
"""Rows that are enough to fit a compressor or a code, or to measure what it is like."""
FIT_BATCH = 4096
SHUFFLE = 2**32 - 1
"""Of what is drawn to shuffle labels: no epoch, which orders rows (`data.batches`)."""


@dataclass(frozen=True)
class Lessons:
    """What a teacher reads: rows of the log and, in a second round, their histories."""

    inputs: Inputs
    join: Join | None

    def batch(self, rows: np.ndarray, parts: Parts = WHOLE) -> dict[str, Any]:
        batch: dict[str, Any] = dict(self.inputs.batch(rows, parts))
        return batch | self.join.batch(rows, parts) if self.join else batch

    def past(self, mesh: Mesh) -> Past | None:
        return self.join.past(mesh) if self.join else None

    def builder(self, config: FMConfig) -> Callable[[nnx.Rngs], Teacher]:
        reading = self.join.reading if self.join else None
        return lambda rngs: Teacher(self.inputs.schema, config, reading, rngs=rngs)


def open_lessons(
    data: Path,
    config: FMConfig,
    history: Path | None = None,
    residency: Residency = "auto",
    log_residency: LogResidency = "auto",
    order: Order = "time",
) -> Lessons:
    """The prepared log `data` as the teacher reads it, with the histories of a first round."""
    inputs = open_inputs(
        data,
        reader="fm",
        behaviours=config.backbone.reads_behaviours,
        timed=config.backbone.reads_times,
        residency=log_residency,
        order=order,
    )
    if history is None:
        return Lessons(inputs, None)
    facts = stages.verify(history)["facts"]
    histories = open_histories(history, facts)
    reading = Reading(
        contents=("loopfm",),
        keys=tuple(histories.stores),
        side=(),
        codecs=histories.codecs,
        tap=facts["taps"][0],
    )
    timed = config.encoder.name in TIMED
    return Lessons(inputs, Join(inputs, histories, reading, facts["first"], timed, residency))


def train_fm(
    data: Path,
    config: FMConfig,
    *,
    mesh: Mesh,
    seed: int,
    directory: Path,
    labels: Labels = "true",
    span: Span = "whole",
    history: Path | None = None,
    residency: Residency = "auto",
    log_residency: LogResidency = "auto",
) -> dict[str, Any]:
    """Trains on the FM window of the prepared log `data`; writes the model into `directory`.

    Args:
      labels: `shuffled` permutes the FM window's labels (a control: the FM learns nothing true).
      span: `first-half` leaves the later half of the window's rows to a second round.
      history: `structure` folder of a first round's codes, which this FM reads.
      residency: where these wait.
      log_residency: where the log waits.
    """
    lessons = open_lessons(
        data, config, history, residency, log_residency, config.train.order.order
    )
    first = first_unseen(lessons.inputs, span)
    rows = lessons.inputs.known(np.arange(first), before=first)
    assemble = lessons.batch if labels == "true" else _shuffled(lessons, rows, seed)
    past = lessons.past(mesh)
    trained = loop.train(
        loop.Trainable(lessons.builder(config), partial(loss, config=config)),
        rows,
        assemble,
        config=config.train,
        mesh=mesh,
        seed=seed,
        directory=directory,
        constants=past,
        pretrained=lessons.inputs.log.pretrained,
        title="train-fm",
    )
    if config.compressor.kind != "autoencoder":
        fit_projections(trained.model, lessons, sample(rows), mesh=mesh, past=past)
    checkpoint.save_model(trained.model, directory)
    checkpoint.discard(directory)
    return {
        "params": trained.params,
        "curve": trained.curve,
        "first": first,
        "cutoff_ms": int(lessons.inputs.log["logged_time"][rows].max()),
        "measured": trained.measured,
    }


def fit_projections(
    model: Any, lessons: Lessons, rows: np.ndarray, *, mesh: Mesh, past: Past | None
) -> None:
    """Fits the linear compressors of a trained `model` to its activations of these rows."""

    def step(model: Teacher, batch: dict[str, Any], past: Past | None) -> dict[str, jax.Array]:
        return model(batch, past).activations

    compressors: dict[str, Projection] = dict(zip(model.taps, model.compressors, strict=True))
    found = {tap: np.zeros((len(rows), c.inputs), np.float32) for tap, c in compressors.items()}
    infer.run(
        model,
        infer.make_step(step, model, mesh),
        rows,
        lessons.batch,
        found,
        batch=FIT_BATCH,
        mesh=mesh,
        constants=past,
        title="activations of the FM window",
    )
    for tap, compressor in compressors.items():
        compressor.fit(found[tap])


def sample(rows: np.ndarray) -> np.ndarray:
    """At most SAMPLE of these rows, drawn: every k-th might be the first of every slate."""
    if len(rows) <= SAMPLE:
        return rows
    return rows[np.sort(np.random.default_rng(0).choice(len(rows), SAMPLE, replace=False))]


def first_unseen(inputs: Inputs, span: Span) -> int:
    """The first row that the teacher does not learn from, and whose code it may log."""
    stop = inputs.splits["vm"].start
    return stop if span == "whole" else stop // 2


def _shuffled(lessons: Lessons, rows: np.ndarray, seed: int) -> Any:
    label = np.array(lessons.inputs.log["label"], np.float32)
    label[rows] = np.random.default_rng((seed, SHUFFLE)).permutation(label[rows])

    def assemble(batch_rows: np.ndarray, parts: Parts) -> dict[str, Any]:
        return lessons.batch(batch_rows, parts) | {"label_B": label[parts.mine(batch_rows)]}

    return assemble
