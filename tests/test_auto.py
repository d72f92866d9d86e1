"""`--transfer auto`: chosen on the validation window, never far below base."""

import json

import numpy as np
import pytest

from loopfm_jax import auto
from loopfm_jax.metrics import auc


def draws(seed: int, rows: int = 4000, knows: float = 0.0, seeds: int = 3):
    """(labels, predictions [seeds, rows] that know so much of a hidden cause)."""
    rng = np.random.default_rng(0)
    cause = rng.normal(size=rows)
    label = (rng.random(rows) < 1 / (1 + np.exp(-cause))).astype(np.float64)
    noise = np.random.default_rng(seed).normal(size=(seeds, rows))
    return label, 1 / (1 + np.exp(-(knows * cause + 0.5 * noise)))


def test_a_gain_has_the_error_of_rows_and_seeds():
    label, base = draws(1, knows=0.2)
    _, own = draws(2, knows=0.8)
    gain, error = auto.auc_gain(label, own, base)
    expected = np.mean([auc(label, o) - auc(label, b) for o, b in zip(own, base, strict=True)])
    assert gain == pytest.approx(expected) and gain > 5 * error > 0
    _, twin = draws(3, knows=0.2)
    gain, error = auto.auc_gain(label, twin, base)
    assert abs(gain) < 3 * error
    assert auto.auc_gain(label, base, base)[0] == 0


@pytest.mark.parametrize(
    ("skill", "choice"),
    [
        ({}, ("base", 1.0)),  # nobody is better
        ({("kd", 1.0): 0.9, ("loopfm", 1.0): 1.5}, ("loopfm", 1.0)),
    ],
)
def test_the_best_that_is_clearly_above_base_or_base(exported, monkeypatch, skill, choice):
    """Of candidates whose predictions are made up."""
    label, _ = draws(0)

    def predictions(flow, method, gamma):
        assert flow.config.holdout == "validation"
        seed = 1 + auto.METHODS.index(method) if method != "base" else 0
        return draws(seed, knows=skill.get((method, gamma), 0.2))[1]

    monkeypatch.setattr(auto, "_predictions", predictions)
    log, splits = {"label": label}, {"validation": slice(0, len(label))}
    monkeypatch.setattr(auto, "load", lambda _, residency: (log, splits))
    exported.succeed("run", "--transfer", "auto")
    facts = json.loads((exported.workdir / "auto/choice/manifest.json").read_text())["facts"]
    assert (facts["method"], facts["gamma"]) == choice
    assert {(t["method"], t["gamma"]) for t in facts["trials"]} >= set(skill)
    method, gamma = choice
    folder = exported.workdir / f"auto/gamma_{gamma:g}/vm/{method}/seed_0"
    config = json.loads((folder / "manifest.json").read_text())["config"]
    assert config["vm"]["distil"]["gamma"] == gamma and config["holdout"] == "test"


def test_candidates_are_trained_and_judged_before_the_test_window(exported, monkeypatch):
    monkeypatch.setattr(auto, "METHODS", ("kd",))
    line = exported.succeed("run", "--transfer", "auto", "--seeds", "2")
    assert set(line["methods"]) == {"base", "auto"}
    trials = sorted(
        (exported.workdir / "auto").glob("gamma_*/validation/vm/*/seed_*/manifest.json")
    )
    assert len(trials) == 6  # base once, kd at two weights, two seeds each
    for path in trials:
        assert json.loads(path.read_text())["config"]["holdout"] == "validation"
    before = {path: path.stat().st_mtime_ns for path in trials}
    exported.succeed("run", "--transfer", "auto", "--seeds", "2")
    assert before == {path: path.stat().st_mtime_ns for path in trials}
