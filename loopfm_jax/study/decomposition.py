"""Gain decomposition: what histories of the FM's codes add to raw ones (PAPER section 4).

`I_LoopFM = I_temporal + I_cross - I_residual`, each a difference of Bayes risks, estimated by the
LogLoss (nats) of four VMs: x alone, with raw histories, with codes, with both:

    I_loopfm   = L(x) - L(loopfm)        I_temporal = L(x) - L(raw)
    I_cross    = L(raw) - L(both)        I_residual = L(loopfm) - L(both)

Trained models are above the Bayes risk, each by another amount: the estimate is of what these VMs
gained, and comes as near to the information as they come to their limits. Standard errors are of
the paired differences of rows (mean over seeds) within the judged window.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

TERMS = {
    "I_loopfm": ("x", "loopfm"),
    "I_temporal": ("x", "raw"),
    "I_cross": ("raw", "both"),
    "I_residual": ("loopfm", "both"),
    "L_quantised": ("loopfm", "fp32"),
}
"""Term -> (loss before, loss after); the last is no information, but what storing a code costs."""
LIMITS = {
    "plain": {
        "x": "bayes_vm",
        "raw": "bayes_vm_items",
        "loopfm": "bayes_vm_codes",
        "both": "bayes_vm_codes",
        "fp32": "bayes_vm_codes",
    },
    "with outcomes": {
        "x": "bayes_vm",
        "raw": "bayes_vm_raw_history",
        "loopfm": "bayes_vm_history",
        "both": "bayes_vm_history",
        "fp32": "bayes_vm_history",
    },
}
"""Column of the table `decomposition` -> its VM -> the known probabilities of the simulator that
are its limit. A code may hold all that the FM saw of a row: item and signal, but no click."""


def decompose(
    losses: Mapping[str, np.ndarray], limits: Mapping[str, np.ndarray] | None = None
) -> dict[str, dict[str, Any]]:
    """Term -> `estimate`, `se` and, where limits are known, `truth`, in nats.

    Args:
      losses: x, raw, loopfm, both -> negative log likelihood of every judged row.
      limits: the same of the known click probabilities.
    """
    terms = {}
    for name, (before, after) in TERMS.items():
        rows = losses[before].astype(np.float64) - losses[after]
        terms[name] = {
            "estimate": float(rows.mean()),
            "se": float(rows.std(ddof=1) / np.sqrt(len(rows))),
        }
        if limits:
            terms[name]["truth"] = float((limits[before] - limits[after]).mean())
    return terms
