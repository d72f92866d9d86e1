"""Metrics against scikit-learn and float64 formulas; what the report makes of them (R15)."""

import numpy as np
import pytest
from sklearn.metrics import log_loss, roc_auc_score

from loopfm_jax import evaluate, metrics
from loopfm_jax.errors import UserError
from loopfm_jax.metrics import auc, entropy, gauc, logloss, measure

CASES = 40  # per click rate
every_rate = pytest.mark.parametrize("rate", [0.5, 0.05, 0.005])


def draw(rate: float, seed: int, *, rows: int = 0, keys: int = 12):
    """Labels with both classes, float32 probabilities of three kinds of ties, keys of any size."""
    rng = np.random.default_rng((seed, round(1000 * rate)))
    rows = rows or int(rng.integers(20, 3000))
    label = (rng.random(rows) < rate).astype(np.uint8)
    label[:2] = 0, 1
    logit = np.log(rate / (1 - rate)) + rng.normal(size=rows) + label
    p = (1 / (1 + np.exp(-logit))).astype(np.float32)
    kind = seed % 3
    p = p if kind == 0 else np.round(p, 2 if kind == 1 else 1).clip(0.01, 0.99).astype(np.float32)
    return label, p, rng.integers(0, keys, rows) * 10**12


def gauc_by_hand(label, p, key) -> float:
    """Row-weighted mean of scikit-learn's AUC of every key that has both classes."""
    parts = [(label[key == k], p[key == k]) for k in np.unique(key)]
    known = [(roc_auc_score(y, s), len(y)) for y, s in parts if 0 < y.mean() < 1]
    return sum(a * n for a, n in known) / sum(n for _, n in known) if known else float("nan")


# -------------------------------------------------------------------------------- metrics


@every_rate
def test_against_scikit_learn_and_float64(rate):
    for seed in range(CASES):
        label, p, key = draw(rate, seed)
        found, exact = measure(label, p, key), p.astype(np.float64)
        loss = log_loss(label, exact)
        mean = label.mean(dtype=np.float64)
        chance = -mean * np.log(mean) - (1 - mean) * np.log(1 - mean)
        expected = {
            "auc": roc_auc_score(label, exact),
            "gauc": gauc_by_hand(label, exact, key),
            "logloss": loss,
            "ne": loss / chance,
            "calibration": exact.mean() / mean,
        }
        for name, value in expected.items():
            np.testing.assert_allclose(getattr(found, name), value, atol=1e-9, err_msg=name)


def test_auc_of_ties_is_half():
    label = np.array([0, 1, 0, 1])
    assert auc(label, np.full(4, 0.3)) == 0.5
    assert auc(label, np.array([0.1, 0.9, 0.1, 0.9])) == 1
    assert auc(label, np.array([0.9, 0.1, 0.9, 0.1])) == 0
    assert auc(label, np.array([0.1, 0.5, 0.5, 0.9])) == 0.875


@pytest.mark.parametrize("value", [0, 1])
def test_auc_of_one_class_is_unknown(value):
    label = np.full(3, value)
    assert np.isnan(auc(label, np.array([0.1, 0.2, 0.3])))
    assert np.isnan(gauc(label, np.array([0.1, 0.2, 0.3]), np.array([0, 0, 1])))


def test_gauc_leaves_out_keys_of_one_class_and_weights_by_rows():
    """Key 5: four rows, AUC 1. Key 6: two rows, AUC 0. Keys 7, 8: one class, whatever the score."""
    key = np.array([5, 7, 6, 5, 8, 5, 6, 7, 5])
    label = np.array([0, 1, 1, 0, 0, 1, 0, 1, 1])
    score = np.array([0.1, 0.0, 0.2, 0.2, 0.9, 0.8, 0.7, 0.1, 0.9])
    assert gauc(label, score, key) == pytest.approx((4 * 1 + 2 * 0) / 6)
    everything = measure(label, score, key)
    assert everything.gauc == gauc(label, score, key) != everything.auc


def test_gauc_ignores_the_level_of_a_key():
    label, p, key = draw(0.5, 0)
    level = np.random.default_rng(1).normal(size=12)[(key // 10**12)]
    assert gauc(label, p + level, key) == pytest.approx(gauc(label, p.astype(float), key))


@every_rate
def test_order_of_rows_and_monotone_scores_do_not_matter(rate):
    label, p, key = draw(rate, 1)
    order = np.random.default_rng(0).permutation(len(p))
    moved = measure(label[order], p[order], key[order])
    np.testing.assert_allclose(moved, measure(label, p, key), rtol=1e-12)
    assert auc(label, np.log(p)) == pytest.approx(auc(label, p), abs=1e-12)


def test_a_constant_prediction_of_the_mean_has_ne_and_calibration_one():
    label = np.array([1, 0, 0, 0, 1])
    found = measure(label, np.full(5, 0.4), np.zeros(5, int))
    assert found.ne == pytest.approx(1) and found.calibration == pytest.approx(1)
    assert found.logloss == pytest.approx(entropy(label))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_prediction_that_is_not_finite_is_refused(value):
    label, p, key = draw(0.5, 0)
    p[3] = value
    with pytest.raises(UserError, match=f"1 of {len(p):,} predictions are not finite"):
        measure(label, p, key)


def test_certain_and_wrong_is_bad_but_finite():
    assert logloss(np.array([1, 0]), np.array([0.0, 1.0], np.float32)) == pytest.approx(
        -np.log(1e-12), rel=1e-4
    )


def test_means_are_taken_in_float64():
    label = np.zeros(2**20, np.float32)
    label[: 2**18] = 1
    found = measure(label, np.full(2**20, 0.1, np.float32), np.arange(2**20) % 7)
    assert found.calibration == pytest.approx(float(np.float32(0.1)) / 0.25, abs=1e-12)


def test_transfer_ratio():
    ratio = metrics.transfer_ratio(
        ne_vm_before=0.9, ne_vm_after=0.8, ne_fm_before=0.9, ne_fm_after=0.7
    )
    assert ratio == pytest.approx(0.5)


# ------------------------------------------------------------------------------- evaluate


def predict(seeds: int, lift: float, *, rows: int = 4000, first: int = 0, blur: float = 0.2):
    """Labels, keys and the predictions of `seeds` models that know `lift` of the truth."""
    rng = np.random.default_rng(7)
    known, hidden = rng.normal(size=(2, rows))
    label = (rng.random(rows) < 1 / (1 + np.exp(1 - known - hidden))).astype(np.float64)
    noise = np.random.default_rng(first).normal(size=(seeds, rows))
    logits = -1 + known + lift * hidden + blur * noise
    return label, rng.integers(0, 9, rows), (1 / (1 + np.exp(-logits))).astype(np.float32)


def test_compare_pairs_seeds_with_base():
    label, key, base = predict(4, 0.0)
    better = predict(4, 0.5, first=9)[2]
    table = evaluate.compare({"base": base, "kd": better}, label=label, key=key)
    aucs = {m: [roc_auc_score(label, p) for p in x] for m, x in {"b": base, "k": better}.items()}
    difference = np.subtract(aucs["k"], aucs["b"])
    assert table["kd"]["auc"] == pytest.approx(np.mean(aucs["k"]))
    assert table["kd"]["auc_std"] == pytest.approx(np.std(aucs["k"], ddof=1))
    assert table["kd"]["delta_auc"] == pytest.approx(difference.mean())
    assert table["kd"]["delta_auc_se"] == pytest.approx(difference.std(ddof=1) / 2)
    assert table["kd"]["seeds_won"] == 4
    losses = [log_loss(label, p.astype(np.float64)) for p in better]
    assert table["kd"]["ne"] == pytest.approx(np.mean(losses) / entropy(label))
    assert not {"delta_auc", "delta_auc_se", "seeds_won"} & set(table["base"])
    worse_once = np.concatenate([better[:3], 1 - better[3:]])
    row = evaluate.compare({"base": base, "kd": worse_once}, label=label, key=key)["kd"]
    assert row["seeds_won"] == 3


def test_compare_of_one_seed_claims_no_error():
    label, key, base = predict(1, 0.0)
    table = evaluate.compare({"base": base, "kd": 1 - base}, label=label, key=key)
    assert table["kd"]["delta_auc"] == pytest.approx(table["kd"]["auc"] - table["base"]["auc"])
    assert not {"auc_std", "delta_auc_se", "seeds_won"} & set(table["kd"])


def ratios(fm_lift: float, *, base_lift: float = 0.0, rows: int = 4000):
    label, key, base = predict(2, base_lift, rows=rows)
    predictions = {"base": base, "loopfm": predict(2, 0.4, rows=rows, first=5)[2]}
    fm = predict(1, fm_lift, rows=rows, first=6)[2][0]
    table = evaluate.compare(predictions, label=label, key=key)
    found = evaluate.transfer_ratios(table, predictions, fm, label)
    assert set(found) == {"loopfm"}
    return found["loopfm"], table, fm, label


def test_transfer_ratio_is_the_share_of_the_gain_that_arrives():
    found, table, fm, label = ratios(1.0)
    gain = table["base"]["ne"] - logloss(label, fm) / entropy(label)
    expected = (table["base"]["ne"] - table["loopfm"]["ne"]) / gain
    assert found == {"value": pytest.approx(expected)} and 0.2 < expected < 1


@pytest.mark.parametrize(("fm_lift", "rows"), [(-0.5, 4000), (0.05, 200)])
def test_transfer_ratio_without_a_clear_gain_of_the_fm_is_undefined(fm_lift, rows):
    """The FM is worse than the base VM, or better by less than its noise."""
    found, table, fm, label = ratios(fm_lift, rows=rows)
    assert found["value"] is None
    ne_fm, ne_base = logloss(label, fm) / entropy(label), table["base"]["ne"]
    assert found["reason"].startswith(
        f"on the evaluated window the frozen FM's NE is {ne_fm:.4f}, the base VM's {ne_base:.4f}: "
        f"the gain {ne_base - ne_fm:+.4f} is not above 2 standard errors"
    )


def test_transfer_ratio_of_an_fm_that_is_the_base_is_undefined():
    label, key, base = predict(1, 0.0)
    predictions = {"base": base, "kd": predict(1, 0.3)[2]}
    table = evaluate.compare(predictions, label=label, key=key)
    assert evaluate.transfer_ratios(table, predictions, base[0], label)["kd"]["value"] is None


def test_noise_of_the_gain_is_that_of_the_mean_over_seeds():
    """Base seeds that disagree: their mean loss counts, not the (better) loss of their mean."""
    label, key, base = predict(3, 0.0, blur=1.0)
    fm = predict(1, -0.5, first=6)[2][0]
    table = evaluate.compare({"base": base, "kd": base}, label=label, key=key)
    found = evaluate.transfer_ratios(table, {"base": base}, fm, label)["kd"]
    per_row = np.mean([metrics.row_loss(label, p) for p in base], axis=0)
    per_row = (per_row - metrics.row_loss(label, fm)) / entropy(label)
    assert table["base"]["ne"] - logloss(label, fm) / entropy(label) == pytest.approx(
        per_row.mean()
    )
    noise = per_row.std(ddof=1) / np.sqrt(len(label))
    assert found["reason"].endswith(f"2 standard errors ({noise:.4f})")


def test_history_length_bins_cover_every_row_once():
    length = np.concatenate([np.arange(61), [300]])
    label = np.arange(62) % 2
    p = np.stack([np.linspace(0, 1, 62), np.linspace(1, 0, 62)])
    table = evaluate.by_history_length({"base": p}, label=label, length=length)
    edges = [(0, 0), (1, 2), (3, 5), (6, 10), (11, 20), (21, 50), (51, 10**9)]
    assert table["bins"] == ["0", "1-2", "3-5", "6-10", "11-20", "21-50", "51+"]
    for i, (low, high) in enumerate(edges):
        rows = (length >= low) & (length <= high)
        assert table["rows"][i] == rows.sum()
        if i == 0:
            assert table["auc"]["base"][i] is None  # a single row has one class
            continue
        expected = np.mean([roc_auc_score(label[rows], s[rows]) for s in p])
        assert table["auc"]["base"][i] == pytest.approx(expected)
    assert sum(table["rows"]) == 62


def test_empty_history_length_bins_are_left_out():
    p = np.array([[0.1, 0.2, 0.3, 0.4]])
    table = evaluate.by_history_length(
        {"base": p}, label=np.array([0, 1, 0, 1]), length=np.array([0, 0, 7, 7])
    )
    assert table == {"bins": ["0", "6-10"], "rows": [2, 2], "auc": {"base": [1.0, 1.0]}}


def test_calibration_curve_is_of_equal_parts_in_order():
    rng = np.random.default_rng(0)
    p = rng.permutation(np.linspace(0.01, 0.99, 40))
    label = (rng.random(40) < p).astype(int)
    curve = evaluate.calibration_curve({"base": p[None]}, label=label, parts=4)["base"]
    order = np.argsort(p)
    for i in range(4):
        part = order[10 * i : 10 * i + 10]
        assert curve["predicted"][i] == pytest.approx(p[part].mean())
        assert curve["observed"][i] == pytest.approx(label[part].mean())
    few = evaluate.calibration_curve({"base": p[None, :3]}, label=label[:3])["base"]
    assert len(few["predicted"]) == len(few["observed"]) == 3


def test_history_lengths_count_every_row():
    table = evaluate.history_lengths(np.array([0, 3, 3, 1]))
    assert table == {"length": [0, 1, 2, 3], "rows": [1, 1, 0, 2]}


def test_bayes_is_the_ne_of_the_known_probabilities():
    label, truth = np.array([0, 1, 1]), np.array([[0.2, 0.5], [0.7, 0.5], [0.6, 0.5]])
    found = evaluate.bayes(truth, ("a", "b"), label)
    assert found["a"] == pytest.approx(log_loss(label, truth[:, 0]) / entropy(label))
    assert found["b"] == pytest.approx(np.log(2) / entropy(label))
