"""What a finished run says: everything of the report, read from the run directory."""

from collections.abc import Mapping
from datetime import date
from typing import Any

import jax
import numpy as np

from loopfm_jax import evaluate, stages
from loopfm_jax.auto import AUTO, choose, resolve
from loopfm_jax.config import Config
from loopfm_jax.data.log import load
from loopfm_jax.flow import Flow, Histories
from loopfm_jax.metrics import measure
from loopfm_jax.stages import Report
from loopfm_jax.vm.methods import find_method

CONTROL_METHOD = "loopfm"


def collect(flow: Flow, *, command: str = "") -> Report:
    """The report of a run whose stages are complete."""
    config = flow.config
    log, splits = load(flow.data, residency="blocks")
    judged = splits[config.holdout]
    label, key = log["label"][judged].astype(np.float64), log["key"][judged]
    found = {row: resolve(flow, row) for row in rows(config)}
    manifests = {row: _manifests(own, method) for row, (own, method) in found.items()}
    predictions = {row: _predictions(own, method) for row, (own, method) in found.items()}
    table = evaluate.compare(predictions, label=label, key=key)
    for method, row in table.items():
        row |= _training(manifests[method]) | {"needs_fm": find_method(found[method][1]).needs_fm}
    exported = slice(judged.start - splits["vm"].start, judged.stop - splits["vm"].start)
    soft = np.load(flow.exported / "soft.npy", allow_pickle=False)[exported]
    shown = flow.history / config.history.keys[0] / "length.npy"
    lengths = np.load(shown, allow_pickle=False)[exported]
    prepared = stages.verify(flow.data)["facts"]
    teacher = stages.verify(flow.teacher)
    return {
        "workdir": str(config.workdir),
        "dataset": config.data.name,
        "date": date.today().isoformat(),
        "command": command,
        "rows": prepared["rows"],
        "windows": prepared["windows"],
        "holdout": config.holdout,
        "seeds": config.seeds,
        "fm": measure(label, soft, key)._asdict() | _training([teacher]),
        "methods": table,
        "auto": choose(flow)["facts"] if AUTO in found else None,
        "transfer_ratio": evaluate.transfer_ratios(table, predictions, soft, label),
        "controls": _controls(flow, predictions["base"], label, key),
        "history": _history(flow, lengths),
        "bayes": evaluate.bayes(log["truth"][judged], log.truth, label) if log.truth else {},
        "seconds": _seconds(flow, manifests),
        "learning_curves": {
            "fm": teacher["facts"]["curve"],
            **{m: runs[0]["facts"]["curve"] for m, runs in manifests.items()},
        },
        "by_history_length": evaluate.by_history_length(predictions, label=label, length=lengths),
        "calibration_curve": evaluate.calibration_curve(predictions, label=label),
        "history_lengths": evaluate.history_lengths(lengths),
        "versions": teacher["versions"],
        "mesh": {"data": config.mesh.data, "model": config.mesh.model},
        "device": jax.devices()[0].device_kind,
    }


def rows(config: Config) -> list[str]:
    """Rows of the comparison: `base`, the listed methods, and `auto` if it is asked for."""
    auto = (AUTO,) if config.transfer == "auto" else ()
    return list(dict.fromkeys(("base", *config.methods, *auto)))


def headline(report: Report) -> Report:
    """The part of the report that a run prints as its last line."""
    names = ("workdir", "dataset", "rows", "seeds", "fm", "methods", "transfer_ratio", "history")
    more = [name for name in ("auto", "bayes", "controls") if report[name]]
    return {name: report[name] for name in (*names, *more, "seconds")}


def _seeds(flow: Flow) -> range:
    return range(flow.config.seed, flow.config.seed + flow.config.seeds)


def _manifests(flow: Flow, method: str, histories: Histories = "own") -> list[Report]:
    return [stages.verify(flow.vm(method, seed, histories)) for seed in _seeds(flow)]


def _predictions(flow: Flow, method: str, histories: Histories = "own") -> np.ndarray:
    """[seeds, test rows]."""
    paths = [flow.vm(method, seed, histories) / "prediction.npy" for seed in _seeds(flow)]
    return np.stack([np.load(path, allow_pickle=False) for path in paths])


def _training(manifests: list[Report]) -> dict[str, float]:
    rates = [m["measured"]["examples_per_s"] for m in manifests]
    return {
        "params": manifests[0]["facts"]["params"],
        "train_examples_per_s": float(np.median(rates)),
    }


def _controls(
    flow: Flow, base: np.ndarray, label: np.ndarray, key: np.ndarray
) -> dict[str, Mapping[str, Any]]:
    found = {}
    for control in flow.config.control:
        other, histories = controlled(flow, control)
        own = _predictions(other, CONTROL_METHOD, histories)
        table = evaluate.compare({"base": base, CONTROL_METHOD: own}, label=label, key=key)
        found[control] = {CONTROL_METHOD: table[CONTROL_METHOD]}
    return found


def controlled(flow: Flow, control: str) -> tuple[Flow, Histories]:
    """Where a control's VM comes from: other histories, or another FM."""
    if control == "swapped-histories":
        return flow, "swapped"
    return flow.of("shuffled-labels"), "own"


def _history(flow: Flow, test_lengths: np.ndarray) -> dict[str, Any]:
    facts = stages.verify(flow.history)["facts"]
    names = ("entries", "store_bytes", "bytes_per_row", "code", "width")
    test = {
        "mean_length": float(test_lengths.mean()),
        "empty_share": float((test_lengths == 0).mean()),
    }
    return test | {name: facts[name] for name in names}


def _seconds(flow: Flow, manifests: Mapping[str, list[Report]]) -> dict[str, float]:
    one = {
        "prepare": flow.data,
        "train-fm": flow.teacher,
        "export": flow.exported,
        "structure": flow.history,
    }
    seconds = {name: stages.verify(path)["measured"]["seconds"] for name, path in one.items()}
    for method, runs in manifests.items():
        seconds[f"train-vm {method}"] = sum(r["measured"]["seconds"] for r in runs)
    return {name: round(s, 1) for name, s in seconds.items()}
