"""Metrics of click prediction, exact, in float64 on the host (PAPER section 1).

AUC is exact by rank with ties at half (a 200-bin AUC is off by .02 at a CTR of .005).
"""

from typing import NamedTuple

import numpy as np

from loopfm_jax.errors import UserError


class Metrics(NamedTuple):
    """`ne` = LogLoss / entropy of the mean label; `calibration` = mean prediction / mean label."""

    auc: float
    gauc: float
    logloss: float
    ne: float
    calibration: float


def measure(label: np.ndarray, probability: np.ndarray, key: np.ndarray) -> Metrics:
    """All metrics of predictions [rows] against labels 0/1 [rows]; `key` groups rows for gAUC.

    Raises:
      UserError: a prediction that is not finite, which has no rank.
    """
    bad = len(probability) - int(np.isfinite(probability).sum())
    if bad:
        raise UserError(
            f"{bad:,} of {len(probability):,} predictions are not finite: lower the learning rate, "
            "or look for extreme values among the inputs"
        )
    loss = logloss(label, probability)
    return Metrics(
        auc=auc(label, probability),
        gauc=gauc(label, probability, key),
        logloss=loss,
        ne=loss / entropy(label),
        calibration=float(probability.mean(dtype=np.float64) / label.mean(dtype=np.float64)),
    )


def row_loss(label: np.ndarray, probability: np.ndarray) -> np.ndarray:
    """Negative log likelihood of every row, nats."""
    p = np.clip(probability.astype(np.float64), 1e-12, 1 - 1e-12)
    return -np.where(label > 0, np.log(p), np.log1p(-p))


def logloss(label: np.ndarray, probability: np.ndarray) -> float:
    """Mean negative log likelihood, nats."""
    return float(row_loss(label, probability).mean())


def entropy(label: np.ndarray) -> float:
    """Entropy of the mean label, nats: the LogLoss of a constant prediction."""
    return logloss(label, np.full(len(label), label.mean(dtype=np.float64)))


def auc(label: np.ndarray, score: np.ndarray) -> float:
    """Probability that a positive is ranked above a negative; NaN where a class is missing."""
    return float(_group_auc(label, score, np.zeros(len(label), np.int64))[0][0])


def gauc(label: np.ndarray, score: np.ndarray, key: np.ndarray) -> float:
    """Per-key AUC weighted by the key's row count; keys with one class are left out."""
    value, rows = _group_auc(label, score, key)
    known = np.isfinite(value)
    return float(np.average(value[known], weights=rows[known])) if known.any() else float("nan")


def _group_auc(
    label: np.ndarray, score: np.ndarray, key: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """AUC and row count of every key, by mid-ranks within the key (Mann-Whitney)."""
    order = np.lexsort((score, key))
    label, score, key = label[order] > 0, score[order], key[order]
    new_key = np.r_[True, key[1:] != key[:-1]]
    new_score = new_key | np.r_[True, score[1:] != score[:-1]]
    tie = np.cumsum(new_score) - 1
    tie_start = np.flatnonzero(new_score)
    tie_stop = np.r_[tie_start[1:], len(score)]
    group = np.cumsum(new_key) - 1
    group_start = np.flatnonzero(new_key)
    mid_rank = (tie_start + tie_stop + 1)[tie] / 2 - group_start[group]
    rows = np.bincount(group).astype(np.float64)
    positives = np.bincount(group, weights=label)
    rank_sum = np.bincount(group, weights=mid_rank * label)
    with np.errstate(invalid="ignore", divide="ignore"):
        value = (rank_sum - positives * (positives + 1) / 2) / (positives * (rows - positives))
    return value, rows


def transfer_ratio(
    *, ne_vm_before: float, ne_vm_after: float, ne_fm_before: float, ne_fm_after: float
) -> float:
    """TR = dNE of the VM / dNE of the FM (PAPER section 1)."""
    return (ne_vm_before - ne_vm_after) / (ne_fm_before - ne_fm_after)
