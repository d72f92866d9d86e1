"""An FM that goes on learning while it logs: a fresh checkpoint per day, and codes that stay put.

The paper freezes the FM or takes a fresh checkpoint per split, whose codes drift (section 3, table
5), and names the cures without building them. Here every day's rows are logged by a checkpoint
that has learned the days before, of them what has its label by then (a late label is learned with
a later day), and the codes are

    fresh      taken as they come;
    linear     mapped back into the first checkpoint's space, by a least-squares map fitted on
               the rows learned last, which both have run over;
    ema        those of an average of the checkpoints so far;
    anchored   of a compressor that is pulled towards the first checkpoint's codes while the day is
               learned; the FM itself is not (no gradient passes from a code into it).

Learned codes (k-means, residual) keep the books of the first checkpoint, linear compressors its
directions; the activations they are applied to move on.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from loopfm_jax import checkpoint, loop
from loopfm_jax.data.batches import Order, OrderConfig
from loopfm_jax.fm.exporter import ExportConfig, Exporter
from loopfm_jax.fm.teacher import FMConfig, Teacher, loss
from loopfm_jax.fm.train import sample
from loopfm_jax.history.codes import Codec
from loopfm_jax.history.reader import Past
from loopfm_jax.history.rowfile import After, RowFile
from loopfm_jax.packing import Parts

RIDGE = 1e-3
ORDER: Order = "shuffled"
"""How a day is learned."""


def run(
    first: Exporter,
    config: ExportConfig,
    fm_config: FMConfig,
    rows: np.ndarray,
    writers: Mapping[str, RowFile],
    *,
    cutoff_ms: int,
    seed: int,
    directory: Path,
) -> dict[str, Any]:
    """Logs `rows` day by day, each day by the checkpoint of that day.

    Args:
      first: the frozen FM.
      rows: consecutive rows of the log, in time order; `writers` [rows] are filled.
      cutoff_ms: the last label that `first` has seen.
      directory: for checkpoints on the way.

    Returns:
      `cutoffs` as in `export`, and `drift`: per checkpoint `centroid`, the distance between the
      mean codes of the first checkpoint and its own, and `cosine`, the mean cosine of both codes
      of a row, on the rows learned last. A day before which no label came has no checkpoint.
    """
    log = first.lessons.inputs.log
    starts = day_starts(log["time"][rows], hours=config.refresh_hours)
    cutoffs, drift, exporter = [], [], replace(first, learner=first.model)
    # For their labels: those of before, too, whom the frozen FM did not learn.
    waiting = np.flatnonzero(log["logged_time"][: rows[0]] >= log["time"][rows[0]])
    for day, (start, stop) in enumerate(zip(starts, [*starts[1:], len(rows)], strict=True)):
        now_ms = int(log["time"][rows[start]])
        if day:
            waiting = np.concatenate([waiting, rows[starts[day - 1] : start]])
            labelled = log["logged_time"][waiting] < now_ms
            known, waiting = waiting[labelled], waiting[~labelled]
        if day and len(known):
            exporter = _learn(
                first, exporter, known, config, fm_config, day=day, seed=seed, directory=directory
            )
            cutoff_ms = max(cutoff_ms, int(log["logged_time"][known].max()))
            drift.append({"day": day, **_drift(first, exporter, known)})
        cutoffs.append([now_ms, cutoff_ms])
        part = {name: After(file, start) for name, file in writers.items()}
        exporter.run(rows[start:stop], part, title=f"export, day {day + 1}")
    return {"cutoffs": cutoffs, "drift": drift}


def day_starts(time: np.ndarray, *, hours: float) -> list[int]:
    """First row of every span of so many hours that has rows."""
    day = (time - time[0]) // round(hours * 3_600_000)
    return [0, *(np.flatnonzero(np.diff(day)) + 1).tolist()]


def _learn(
    first: Exporter,
    before: Exporter,
    rows: np.ndarray,
    config: ExportConfig,
    fm_config: FMConfig,
    *,
    day: int,
    seed: int,
    directory: Path,
) -> Exporter:
    """The checkpoint after one pass over these rows, and how its codes are taken."""
    lessons, folder = first.lessons, directory / f"day_{day}"
    order = OrderConfig(order=ORDER, epochs=1, batch=fm_config.train.order.batch)
    held = config.refresh == "anchored"
    weight, anchors = (config.anchor, _codes(first, rows)) if held else (0.0, {})

    def assemble(batch_rows: np.ndarray, parts: Parts) -> dict[str, Any]:
        at = np.searchsorted(rows, parts.mine(batch_rows))
        batch = lessons.batch(batch_rows, parts)
        return batch | {"anchor": {tap: z[at] for tap, z in anchors.items()}}

    trained = loop.train(
        loop.Trainable(
            lessons.builder(fm_config), partial(anchored, config=fm_config, weight=weight)
        ),
        rows,
        assemble,
        config=replace(fm_config.train, order=order),
        mesh=first.mesh,
        seed=seed + day,
        directory=folder,
        constants=first.past,
        start=before.learner,
        title=f"refresh, day {day}",
    )
    checkpoint.discard(folder)
    fresh = replace(first, model=trained.model, learner=trained.model)
    if config.refresh == "ema":
        return replace(fresh, model=average(before.model, trained.model, kept=config.ema))
    if config.refresh == "linear":
        return replace(fresh, align=_alignment(first, fresh, rows))
    return fresh


def anchored(
    model: Teacher,
    batch: dict[str, Any],
    past: Past | None,
    key: jax.Array,
    *,
    config: FMConfig,
    weight: float,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The teacher's loss plus `weight` times the mean squared distance to the anchor's codes, of
    codes as they are exported: by running statistics, which are read and not moved again."""
    total, numbers = loss(model, batch, past, key, config=config)
    if not weight:
        return total, numbers
    codes = model(batch, past).codes
    apart_B = sum(
        jnp.square(codes[tap][:, : z.shape[1]] - z).mean(axis=1)
        for tap, z in batch["anchor"].items()
    )
    numbers["anchor"] = apart_B @ batch["weight_B"] / batch["weight_B"].sum()
    return total + weight * numbers["anchor"], numbers


def average(old: nnx.Module, new: nnx.Module, *, kept: float) -> Any:
    """A model whose every number is `kept` of the old and the rest of the new."""
    graphdef, state = nnx.split(new)
    mixed = jax.tree.map(
        lambda o, n: kept * o + (1 - kept) * n if jnp.issubdtype(n.dtype, jnp.floating) else n,
        nnx.to_pure_dict(nnx.state(old)),
        nnx.to_pure_dict(state),
    )
    return nnx.merge(graphdef, mixed)


def fit_map(new: np.ndarray, old: np.ndarray) -> np.ndarray:
    """[Z+1, Z]: the affine map of `new` codes [rows, Z] that comes nearest to `old` ones."""
    design = np.concatenate([new, np.ones((len(new), 1))], axis=1).astype(np.float64)
    gram = design.T @ design + RIDGE * len(new) * np.eye(design.shape[1])
    towards = design.T @ old.astype(np.float64)
    return np.linalg.solve(gram, towards).astype(np.float32)


def _alignment(first: Exporter, fresh: Exporter, rows: np.ndarray) -> dict[str, np.ndarray]:
    rows = sample(rows)
    old, new = _codes(first, rows), _codes(fresh, rows)
    return {tap: fit_map(new[tap], old[tap]) for tap in old}


def _drift(first: Exporter, now: Exporter, rows: np.ndarray) -> dict[str, float]:
    """Of the first tap."""
    rows, tap = sample(rows), next(iter(first.codecs))
    old, new = _codes(first, rows)[tap], _codes(now, rows)[tap]
    product = (old * new).sum(axis=1)
    length = np.linalg.norm(old, axis=1) * np.linalg.norm(new, axis=1)
    return {
        "centroid": float(np.linalg.norm(old.mean(axis=0) - new.mean(axis=0))),
        "cosine": float((product / np.maximum(length, 1e-9)).mean()),
    }


def _codes(exporter: Exporter, rows: np.ndarray) -> dict[str, np.ndarray]:
    """Codes of these rows at full precision, by tap."""
    plain = {tap: Codec("fp32", codec.width) for tap, codec in exporter.codecs.items()}
    found = {f"codes_{tap}": np.zeros((len(rows), c.width), np.float32) for tap, c in plain.items()}
    soft = {"soft": np.zeros(len(rows), np.float32)}
    whole = replace(exporter, codecs=plain)
    whole.run(rows, found | soft, title="codes of yesterday", written="everywhere")
    return {tap: found[f"codes_{tap}"] for tap in plain}
