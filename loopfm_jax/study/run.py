"""Running the cells of a study: shared stages once, every cell and seed once, all of it resumable.

A cell's result is a few numbers per seed; what made it stays in its stage folders, so a study that
was interrupted, or one with more tables, goes on where it stopped.
"""

import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np

from loopfm_jax import stages
from loopfm_jax.auto import AUTO, resolve
from loopfm_jax.config import as_json
from loopfm_jax.data.log import Log, load
from loopfm_jax.flow import Flow
from loopfm_jax.identity import digest
from loopfm_jax.metrics import Metrics, measure, row_loss
from loopfm_jax.progress import say
from loopfm_jax.study.cells import Table, changed
from loopfm_jax.vm.methods import find_method


@dataclass(frozen=True)
class Result:
    """What a cell came to."""

    seeds: list[Metrics]
    loss: np.ndarray
    """Negative log likelihood of every judged row, mean over seeds, nats; float32."""
    fm: Metrics
    fm_loss: np.ndarray
    """The same of the FM's soft labels."""
    facts: dict[str, Any]
    """bytes_per_row, params, needs_fm, examples_per_s, drift, losses of the codes."""


Results = dict[tuple[str, tuple[str, str]], Result]
"""(table, (row, column)) -> result."""


def run(flow: Flow, tables: Iterable[Table]) -> Results:
    """Every cell's result.

    Args:
      flow: of the study's own configuration, with shared stages.
    """
    cells = [(table.name, cell) for table in tables for cell in table.cells]
    results: Results = {}
    found: dict[str, Result] = {}
    started = time.monotonic()
    for i, (name, cell) in enumerate(cells):
        own = replace(flow, config=changed(flow.config, cell.changes))
        told = (as_json(own.config.vm), as_json(own.config.history))
        same = f"{own.history} {digest(told)} {cell.method}"
        if same not in found:
            say(f"study: {name}, {cell.row} {cell.column} ({i + 1} of {len(cells)} cells)")
            found[same] = _run(own, cell.method)
            jax.clear_caches()  # hundreds of programs would fill the memory
        results[name, cell.place] = found[same]
    say(f"study: {len(found)} experiments in {(time.monotonic() - started) / 60:.1f} min")
    return results


def _run(flow: Flow, asked: str) -> Result:
    flow.prepare()
    flow.teach()
    own, method = resolve(flow, asked)
    if own.taught_by != flow.taught_by:
        own.teach()
    flow, config = own, own.config
    seeds = range(config.seed, config.seed + config.seeds)
    manifests = [flow.train_vm(method, seed) for seed in seeds]
    log, splits = load(flow.data)
    rows = splits[config.holdout]
    label = log["label"][rows].astype(np.float64)
    paths = [flow.vm(method, seed) / "prediction.npy" for seed in seeds]
    predictions = [np.load(path, allow_pickle=False) for path in paths]
    exported = stages.verify(flow.exported)["facts"]
    soft = np.load(flow.exported / "soft.npy", allow_pickle=False)
    judged = soft[rows.start - exported["first"] : rows.stop - exported["first"]]
    chosen = f"{method}, gamma {config.vm.distil.gamma:g}" if asked == AUTO else method
    loss = np.mean([row_loss(label, p) for p in predictions], axis=0)
    return Result(
        seeds=[_measure(log, rows, p) for p in predictions],
        loss=loss.astype(np.float32),
        fm=_measure(log, rows, judged),
        fm_loss=row_loss(label, judged).astype(np.float32),
        facts={
            "params": manifests[0]["facts"]["params"],
            "examples_per_s": float(
                np.median([m["measured"]["examples_per_s"] for m in manifests])
            ),
            "bytes_per_row": stages.verify(flow.history)["facts"]["bytes_per_row"],
            "losses": exported["losses"],
            "drift": exported.get("drift", []),
            "chosen": chosen,
            "needs_fm": find_method(method).needs_fm,
        },
    )


def _measure(log: Log, rows: slice, prediction: np.ndarray) -> Metrics:
    return measure(log["label"][rows].astype(np.float64), prediction, log["key"][rows])


def limits(flow: Flow) -> dict[str, np.ndarray]:
    """Row losses of the known click probabilities of a simulated log; empty for a real one."""
    log, splits = load(flow.data)
    rows = splits[flow.config.holdout]
    label = log["label"][rows].astype(np.float64)
    return {name: row_loss(label, log["truth"][rows][:, i]) for i, name in enumerate(log.truth)}
