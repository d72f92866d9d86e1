"""`loopfm analyse`: what is in the codes, and what a VM attends to."""

import json

import numpy as np
import pytest

from loopfm_jax.flow import Flow
from loopfm_jax.history.encoders import Attentive
from loopfm_jax.options import parse
from loopfm_jax.sharding import make_mesh
from loopfm_jax.study import analyse, codes
from loopfm_jax.study.attention import Attended, attend, classes
from loopfm_jax.vm.train import load_vm


@pytest.fixture(autouse=True)
def few_points(monkeypatch):
    monkeypatch.setattr(analyse, "SHOWN", 100)  # or t-SNE takes longer than all the rest


def test_effective_rank_counts_directions():
    rng = np.random.default_rng(0)
    flat = rng.normal(size=(4000, 6))
    assert codes.spectrum(flat)["effective_rank"] == pytest.approx(6, abs=0.05)
    thin = flat[:, :2] @ rng.normal(size=(2, 6))
    found = codes.spectrum(thin)
    assert found["effective_rank"] < 2.01 and found["top_4"] == pytest.approx(1)
    facts = codes.spread(np.c_[np.ones(10), np.arange(10) / 10])
    assert (facts["width"], facts["used"], facts["low"], facts["high"]) == (2, 1, 0, 1)


def test_profiles_are_correlations_of_every_dimension():
    rng = np.random.default_rng(0)
    soft, z = rng.random(500), rng.normal(size=(500, 4))
    z[:, 0] += 3 * soft
    outcome = (rng.random(500) < soft).astype(float)
    found = codes.profiles(z, soft, outcome)
    expected = [np.corrcoef(z[:, d], soft)[0, 1] for d in range(4)]
    np.testing.assert_allclose(found["with_soft_label"], expected)
    assert found["with_soft_label"][0] > 0.5 and -1 <= found["profiles_agree"] <= 1


def test_an_analysis_of_an_export(exported):
    line = exported.succeed("analyse", "--vm.encoder.name", "din")
    assert set(line["taps"]) == {"hidden_0"}
    found = json.loads((exported.workdir / "analysis.json").read_text())["taps"]["hidden_0"]
    assert found["width"] == 4 and len(found["singular_values"]) == 4
    assert 0 < found["losses"]["quantised"] < 1
    assert "effective rank" in (exported.workdir / "analysis.md").read_text()
    assert (exported.workdir / "analysis.html").read_text().count("<svg") >= 3
    whole = json.loads((exported.workdir / "analysis.json").read_text())
    assert "run `loopfm train-vm` first" in whole["attention"]["missing"]


def test_an_analysis_of_a_trained_vm(exported):
    options = ("--methods", "base", "loopfm", "--vm.encoder.name", "din")
    for command in ("train-vm", "analyse"):
        exported.succeed(command, *options)
    found = json.loads((exported.workdir / "analysis.json").read_text())["attention"]
    assert (found["method"], found["encoder"]) == ("loopfm", "din")
    assert {c["by"] for c in found["classes"]} == {"age", "item_id", "topic", "outcome"}
    assert "same topic" in (exported.workdir / "analysis.md").read_text()
    assert "Attention by the age" in (exported.workdir / "analysis.html").read_text()
    message = exported.fail(exported.argv("analyse", *options, "--vm.encoder.score-hidden", "9"))
    assert "made with another configuration (vm.encoder.score_hidden was" in message
    exported.succeed("analyse", "--methods", "loopfm")
    found = json.loads((exported.workdir / "analysis.json").read_text())["attention"]
    assert found == {"missing": "the encoder mean has no attention"}


# ------------------------------------------------------------------------------- attention


def test_attention_of_a_class_is_against_an_even_share():
    real_NL = np.array([[True, True, False], [True, True, True]])
    attended = Attended(
        row_N=np.arange(2),
        weight_NL=np.array([[0.8, 0.2, 0], [0.5, 0.25, 0.25]]),
        real_NL=real_NL,
        age_NL=np.array([[30, 90, 0], [30, 90, 1e6]]),
        outcome_NL=np.array([[True, False, True], [False, False, True]]),
        same_NL={"topic": np.ones((2, 3), bool)},
    )
    found = {c["entries"]: c for c in classes(attended)}
    assert found["under 1 minute"]["attention"] == pytest.approx((0.8 + 0.5) / (1 / 2 + 1 / 3))
    assert found["1 to 10 minutes"]["attention"] == pytest.approx((0.2 + 0.25) / (1 / 2 + 1 / 3))
    assert found["positive"]["attention"] == pytest.approx((0.8 + 0.25) / (1 / 2 + 1 / 3))
    assert found["same topic"]["attention"] == pytest.approx(1)
    assert found["same topic"]["se"] == pytest.approx(0)
    assert found["older"]["share"] == pytest.approx(1 / 5)
    assert not found.keys() & {"other topic", "1 to 8 hours"}  # nothing there


def test_weights_stand_beside_the_entries_they_are_paid_to(exported, monkeypatch):
    options = ("--methods", "loopfm", "--vm.encoder.name", "transformer")
    options += ("--vm.encoder.width", "8", "--history.side", "outcome")
    exported.succeed("train-vm", *options)
    flow = Flow(parse(exported.config, exported.argv("", *options)[2:]))
    examples, mesh = flow.examples("loopfm", 0), make_mesh(flow.config.mesh)
    model = load_vm(examples, flow.config.vm, flow.vm("loopfm", 0), mesh)

    def look():
        return attend(model, examples, holdout="test", mesh=mesh)

    as_trained = look()
    np.testing.assert_allclose(as_trained.weight_NL.sum(axis=1), 1, rtol=1e-5)
    assert not as_trained.weight_NL[~as_trained.real_NL].any()

    # An encoder that attends to the clicked ones alone, and one that does so to old ones.
    monkeypatch.setattr(Attentive, "weigh", by(lambda x_TX, _: 1e3 * x_TX[:, -1]))
    clicked = look()
    some_N = (clicked.outcome_NL & clicked.real_NL).any(axis=1)
    assert some_N.any() and (clicked.real_NL & ~clicked.outcome_NL).any()
    np.testing.assert_allclose((clicked.weight_NL * clicked.outcome_NL).sum(axis=1)[some_N], 1)
    monkeypatch.setattr(Attentive, "weigh", by(lambda _, tokens: tokens.age_T / 100))
    score_NL = np.where(clicked.real_NL, clicked.age_NL / 100, -np.inf)
    old_NL = np.exp(score_NL - score_NL.max(axis=1, keepdims=True))
    expected_NL = old_NL / old_NL.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(look().weight_NL, expected_NL, atol=0.02)  # age_T: whole seconds

    # What is said of the entries, against the log itself.
    log, join = examples.inputs.log, examples.join
    names = [f.name for f in log.schema.categorical]
    key, time = log["key"][join.first :], log["time"][join.first :]
    for n in range(0, len(clicked.row_N), 7):
        now = clicked.row_N[n] - join.first
        past = np.flatnonzero((key == key[now]) & (time < time[now]))[::-1][
            : join.histories.longest
        ]
        real = clicked.real_NL[n]
        assert real.sum() == len(past) > 1
        ages = (time[now] - time[past]) / 1000
        np.testing.assert_allclose(clicked.age_NL[n][real], ages, atol=1.001)
        outcomes = log["label"][join.first + past] == 1
        np.testing.assert_array_equal(clicked.outcome_NL[n][real], outcomes)
        for name, same_NL in clicked.same_NL.items():
            ids = log["ids"][join.first :, names.index(name)]
            if log.schema[name].rows - 1 + log.schema.offsets[name] != ids[now]:
                np.testing.assert_array_equal(same_NL[n][real], ids[past] == ids[now])


def by(score):
    """`weigh` of an encoder whose attention is this function of values and tokens."""

    def weigh(self, value_TX, query_BQ, tokens):
        return [(tokens.softmax(score(value_TX, tokens)), value_TX)]

    return weigh
