"""`--transfer auto`: which channels, and how strongly distilled, judged on the validation window.

A frozen FM goes stale where items turn over fast; its soft labels then lower the VM, while other
channels may still help. So every candidate is trained before the validation window and judged on
it. The best one is taken only if it is above `base` by more than the standard error of that
difference; else nothing is transferred. The test window is never looked at.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np

from loopfm_jax.config import Config, as_json
from loopfm_jax.data.log import load
from loopfm_jax.flow import Flow
from loopfm_jax.metrics import auc
from loopfm_jax.stages import Report
from loopfm_jax.vm.methods import find_method

AUTO = "auto"
METHODS = ("kd", "adapter", "loopfm", "kd+loopfm", "adapter+loopfm")
GAMMAS = (0.25, 1.0)
"""Times the configured weight of what is distilled."""
DRAWS = 200


def resolve(flow: Flow, method: str) -> tuple[Flow, str]:
    """The flow and the method behind a name; for `auto` what was chosen, trained now if need be."""
    if method != AUTO:
        return flow.for_method(method), method
    choice = choose(flow)["facts"]
    return with_gamma(flow, choice["gamma"]), choice["method"]


def choose(flow: Flow) -> Report:
    """The stage of the choice: trains every candidate, unless that is up to date."""
    candidates = [(m, g) for m in METHODS for g in (GAMMAS if find_method(m).heads else (1.0,))]
    stage = flow.stage(
        "choose",
        "auto/choice",
        {
            "candidates": candidates,
            "vm": as_json(flow.config.vm),
            "tap": flow.config.history.tap,
            "side": list(flow.config.history.side),
            "seeds": [flow.config.seed, flow.config.seeds],
        },
        inputs={"data": flow.data, "export": flow.exported, "history": flow.history},
    )

    def work(directory: Path) -> Report:
        del directory
        return _choose(replace(flow, config=replace(flow.config, holdout="validation")), candidates)

    return flow.make(stage, work, together=True)


def _choose(flow: Flow, candidates: list[tuple[str, float]]) -> Report:
    log, splits = load(flow.data, residency="blocks")
    label = log["label"][splits["validation"]].astype(np.float64)
    base = _predictions(flow, "base", 1.0)
    trials = []
    for method, gamma in candidates:
        own = _predictions(flow, method, gamma)
        gain, error = auc_gain(label, own, base)
        trials.append({"method": method, "gamma": gamma, "gain": gain, "se": error})
    clear = [trial for trial in trials if trial["gain"] > trial["se"]]
    best = max(clear, key=lambda trial: trial["gain"], default={"method": "base", "gamma": 1.0})
    return {"method": best["method"], "gamma": best["gamma"], "trials": trials}


def _predictions(flow: Flow, method: str, gamma: float) -> np.ndarray:
    """[seeds, rows] on the validation window."""
    trial, config = with_gamma(flow, gamma), flow.config
    found = []
    for seed in range(config.seed, config.seed + config.seeds):
        trial.train_vm(method, seed)
        found.append(np.load(trial.vm(method, seed) / "prediction.npy", allow_pickle=False))
    return np.stack(found)


def with_gamma(flow: Flow, times: float) -> Flow:
    """The flow whose VMs distil so many times as strongly, in a folder of its own."""
    vm = flow.config.vm
    distil = replace(vm.distil, gamma=times * vm.distil.gamma)
    config: Config = replace(flow.config, vm=replace(vm, distil=distil))
    return replace(flow, config=config, trial=f"auto/gamma_{times:g}")


def auc_gain(label: np.ndarray, own: np.ndarray, base: np.ndarray) -> tuple[float, float]:
    """AUC of `own` above that of `base`, both [seeds, rows], mean over seeds, and its standard
    error: over rows by the bootstrap, over seeds by their spread."""
    gains = np.array([auc(label, o) - auc(label, b) for o, b in zip(own, base, strict=True)])
    rng, draws = np.random.default_rng(0), []
    for _ in range(DRAWS):
        rows = rng.integers(len(label), size=len(label))
        draws.append(auc(label[rows], own[0][rows]) - auc(label[rows], base[0][rows]))
    by_seed = gains.var(ddof=1) / len(gains) if len(gains) > 1 else 0.0
    return float(gains.mean()), float(np.sqrt(np.nanvar(draws, ddof=1) + by_seed))
