"""Judging the trained methods on the test window: what the report is made of."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from loopfm_jax.metrics import (
    Metrics,
    auc,
    entropy,
    logloss,
    measure,
    row_loss,
    transfer_ratio,
)

LENGTH_EDGES = (0, 1, 3, 6, 11, 21, 51)  # history lengths 0, 1-2, 3-5, 6-10, 11-20, 21-50, 51+
CLEAR = 2.0  # a difference counts as clear above this many standard errors


def compare(
    predictions: Mapping[str, np.ndarray], *, label: np.ndarray, key: np.ndarray
) -> dict[str, dict[str, float]]:
    """Metrics of every method, and its paired difference to `base`.

    Args:
      predictions: method -> [seeds, rows]; seed s of every method is paired with seed s of `base`.

    Returns:
      method -> means over seeds; with several seeds also `auc_std`, `delta_auc_se`, `seeds_won`.
    """
    scores = {m: [measure(label, p, key) for p in seeds] for m, seeds in predictions.items()}
    base = np.array([s.auc for s in scores["base"]])
    table = {}
    for method, seeds in scores.items():
        row = {f: float(np.mean([getattr(s, f) for s in seeds])) for f in Metrics._fields}
        own = np.array([s.auc for s in seeds])
        if len(own) > 1:
            row["auc_std"] = float(own.std(ddof=1))
        if method != "base" and len(own) == len(base):
            row |= _paired(own - base)
        table[method] = row
    return table


def _paired(difference: np.ndarray) -> dict[str, float]:
    row = {"delta_auc": float(difference.mean())}
    if len(difference) > 1:
        row["delta_auc_se"] = float(difference.std(ddof=1) / np.sqrt(len(difference)))
        row["seeds_won"] = int((difference > 0).sum())
    return row


def transfer_ratios(
    table: Mapping[str, Mapping[str, float]],
    predictions: Mapping[str, np.ndarray],
    fm: np.ndarray,
    label: np.ndarray,
) -> dict[str, dict[str, Any]]:
    """TR of every method on first launch: the base VM stands for the FM and the VM before.

    Where the FM is not clearly better than the base VM (two standard errors of the paired
    difference of row losses), the ratio has no meaning and is reported with the reason instead.
    """
    base = np.mean([row_loss(label, p) for p in predictions["base"]], axis=0)
    difference = base - row_loss(label, fm)
    scale = entropy(label)
    ne_fm = logloss(label, fm) / scale
    gain = table["base"]["ne"] - ne_fm
    noise = float(difference.std(ddof=1) / np.sqrt(len(label)) / scale)
    if not gain > CLEAR * noise:
        reason = (
            f"on the evaluated window the frozen FM's NE is {ne_fm:.4f}, the base VM's "
            f"{table['base']['ne']:.4f}: the gain {gain:+.4f} is not above {CLEAR:.0f} standard "
            f"errors ({noise:.4f})"
        )
        return {m: {"value": None, "reason": reason} for m in table if m != "base"}
    ratios = {}
    for method, row in table.items():
        if method != "base":
            ratio = transfer_ratio(
                ne_vm_before=table["base"]["ne"],
                ne_vm_after=row["ne"],
                ne_fm_before=table["base"]["ne"],
                ne_fm_after=ne_fm,
            )
            ratios[method] = {"value": ratio}
    return ratios


def by_history_length(
    predictions: Mapping[str, np.ndarray], *, label: np.ndarray, length: np.ndarray
) -> dict[str, Any]:
    """AUC (mean over seeds) of the rows whose history has so many entries; cold start first."""
    place = np.digitize(length, LENGTH_EDGES) - 1
    bins = [i for i in range(len(LENGTH_EDGES)) if (place == i).any()]
    masks = [place == i for i in bins]
    return {
        "bins": [_bin_name(i) for i in bins],
        "rows": [int(mask.sum()) for mask in masks],
        "auc": {
            method: [_number(float(np.mean([auc(label[m], p[m]) for p in seeds]))) for m in masks]
            for method, seeds in predictions.items()
        },
    }


def _bin_name(i: int) -> str:
    low = LENGTH_EDGES[i]
    if i + 1 == len(LENGTH_EDGES):
        return f"{low}+"
    high = LENGTH_EDGES[i + 1] - 1
    return str(low) if low == high else f"{low}-{high}"


def _number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def calibration_curve(
    predictions: Mapping[str, np.ndarray], *, label: np.ndarray, parts: int = 10
) -> dict[str, dict[str, list[float]]]:
    """Mean prediction and click rate in equally full parts of the sorted first-seed predictions."""
    curves = {}
    for method, seeds in predictions.items():
        order = np.array_split(np.argsort(seeds[0], kind="stable"), parts)
        curves[method] = {
            "predicted": [float(seeds[0][rows].mean()) for rows in order if len(rows)],
            "observed": [float(label[rows].mean()) for rows in order if len(rows)],
        }
    return curves


def history_lengths(length: np.ndarray) -> dict[str, list[int]]:
    """How many test rows have a history of each length."""
    counts = np.bincount(length)
    return {"length": list(range(len(counts))), "rows": [int(c) for c in counts]}


def bayes(truth: np.ndarray, names: tuple[str, ...], label: np.ndarray) -> dict[str, float]:
    """NE of the known click probabilities of a simulated log: no model can beat them."""
    return {name: logloss(label, truth[:, i]) / entropy(label) for i, name in enumerate(names)}
