"""The auxiliary heads: what they learn, and that they serve nothing."""

import jax
import numpy as np
import pytest
from noise import parts
from student_cases import make, make_batch, run, same

from loopfm_jax.vm.student import DistilConfig


def cross_entropy(logits, target, weight) -> float:
    p = 1 / (1 + np.exp(-logits.astype(np.float64)))
    losses = -(target * np.log(p) + (1 - target) * np.log1p(-p))
    return float((losses * weight).sum() / weight.sum())


@pytest.mark.parametrize("alpha", [0.5, 3.0])
def test_loss_is_labels_plus_gamma_times_scaled_soft_labels(alpha):
    """At alpha = 3 most of alpha * y_F is above 1 and is cut there."""
    batch = make_batch()
    value, terms, answer, _ = run("kd", distil=DistilConfig(alpha=alpha, gamma=2.5))
    soft = np.minimum(alpha * batch["teacher_B"], 1)
    assert (soft == 1).sum() == (4 if alpha == 3 else 0)
    label = cross_entropy(answer.logits_B, batch["label_B"], batch["weight_B"])
    taught = cross_entropy(answer.kd_B, soft, batch["weight_B"])
    np.testing.assert_allclose(terms["logloss"], label, rtol=1e-5)
    np.testing.assert_allclose(terms["distillation"], taught, rtol=1e-5)
    np.testing.assert_allclose(value, label + 2.5 * taught, rtol=1e-5)


def test_the_adapter_learns_from_labels_and_teaches_the_third_head():
    """ExFM's student adapter: its own loss is of labels; the head's gradient stops before it."""
    batch = make_batch()
    value, terms, answer, slopes = run("adapter", distil=DistilConfig(gamma=2.5))
    weight = batch["weight_B"]
    adapted = 1 / (1 + np.exp(-answer.adapter_B))
    corrected = cross_entropy(answer.adapter_B, batch["label_B"], weight)
    taught = cross_entropy(answer.adapted_B, adapted, weight)
    label = cross_entropy(answer.logits_B, batch["label_B"], weight)
    np.testing.assert_allclose(value, label + corrected + 2.5 * taught, rtol=1e-5)
    _, _, _, untaught = run("adapter", distil=DistilConfig(gamma=0))
    same(slopes["adapter"], untaught["adapter"])


def test_fitnets_is_the_squared_error_to_the_code_of_the_row():
    batch = make_batch()
    value, terms, answer, _ = run("fitnets", distil=DistilConfig(fitnets=3.0))
    error = np.square(answer.code_BZ - batch["codes"]["hidden_0"]).mean(axis=1)
    expected = (error * batch["weight_B"]).sum() / batch["weight_B"].sum()
    np.testing.assert_allclose(terms["fitnets"], expected, rtol=1e-5)
    np.testing.assert_allclose(value, terms["logloss"] + 3 * expected, rtol=1e-5)


def test_beta_scales_the_gradient_of_the_distillation_head_into_the_trunk():
    def slopes(beta: float, gamma: float = 1.0):
        return run("kd", distil=DistilConfig(beta=beta, gamma=gamma))[3]

    label_only, plain = slopes(1, 0), slopes(1)
    taught = jax.tree.map(np.subtract, plain["backbone"], label_only["backbone"])
    assert max(abs(g).max() for g in jax.tree.leaves(taught)) > 1e-3
    for beta, gamma in ((0.0, 1.0), (5.0, 1.0), (5.0, 10.0)):
        found = slopes(beta, gamma)
        into_trunk = jax.tree.map(np.subtract, found["backbone"], label_only["backbone"])
        same(into_trunk, taught, scale=beta * gamma, rtol=1e-3, atol=1e-4 * gamma)
        same(found["kd"], plain["kd"], scale=gamma)  # the head itself learns in full
    same(run("kd", distil=DistilConfig(beta=5))[2], run("kd")[2], atol=1e-6)  # no logit changes


def test_the_distillation_head_is_not_in_the_serving_logits():
    _, _, answer, _ = run("kd")
    _, params, _ = parts(make("kd"))
    params["kd"] = jax.tree.map(lambda x: x + 1, params["kd"])
    _, _, other, _ = run("kd", params=params)
    np.testing.assert_array_equal(other.logits_B, answer.logits_B)
    assert (np.abs(other.kd_B - answer.kd_B) > 0.1).all()
    base = run("base", params={"backbone": params["backbone"]})[2]
    np.testing.assert_allclose(base.logits_B, answer.logits_B, rtol=1e-6)
