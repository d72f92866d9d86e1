"""Which stored rows an example may see: two integers per example (PAPER section 1, stage 3).

Entries are sorted by (key, time). The history of an example is the slice of its key's entries that
were available strictly before it, inside the retention window, the most recent `length` of them:
`store[end - length : end]`. Whatever the width of a code, an example carries only (end, length).
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from loopfm_jax.errors import UserError, check_limits


@dataclass(frozen=True)
class SliceConfig:
    """Who may be seen."""

    length: int = 50
    """L: the most recent entries kept (50 on TaobaoAd)."""
    delay_s: float = 0.0
    """Availability delay: an entry counts only if its time + delay < the example's time."""
    retention_days: float = 30.0
    """Entries older than this are forgotten."""

    def __post_init__(self) -> None:
        check_limits("history", {"length": self.length}, low=1)
        if not 0 <= self.delay_s < math.inf:
            raise UserError(
                f"history.delay_s is {self.delay_s:g}; it must be 0 or more: an entry that counts "
                "before it was logged is a leak"
            )
        if not 0 < self.retention_days < math.inf:
            raise UserError(
                f"history.retention_days is {self.retention_days:g}; it must be above 0 (and "
                "finite: 36500 keeps everything)"
            )


class Slices(NamedTuple):
    """`order` [S]: entry numbers sorted by (key, time); `end`, `length` [examples] int32/int64."""

    order: np.ndarray
    end: np.ndarray
    length: np.ndarray


def slices(
    *,
    entry_key: np.ndarray,
    entry_time: np.ndarray,
    query_key: np.ndarray,
    query_time: np.ndarray,
    config: SliceConfig,
) -> Slices:
    """Sorts the entries and finds every example's slice.

    Args:
      entry_key, entry_time: [S] int64; when an entry was logged, ms.
      query_key, query_time: [examples] int64; when an example must be answered, ms.
    """
    delay = round(config.delay_s * 1000)
    retention = round(config.retention_days * 86_400_000)
    pack = _Packing(np.concatenate([entry_key, query_key]), entry_time)
    packed = pack(entry_key, entry_time)
    order = np.argsort(packed, kind="stable")
    packed = packed[order]
    end = np.searchsorted(packed, pack(query_key, query_time - delay), side="left")
    start = np.searchsorted(packed, pack(query_key, query_time - retention), side="left")
    length = np.minimum(np.maximum(end - start, 0), config.length)
    return Slices(order, end.astype(np.int64), length.astype(np.int32))


class _Packing:
    """(key, time) -> one integer in the same order: sorts and searches run on plain int64.

    Entry times become ranks, so any keys times any times fit as long as their counts' product
    does; a queried time becomes the number of entry times strictly below it.
    """

    def __init__(self, keys: np.ndarray, times: np.ndarray):
        self._keys = np.unique(keys)
        self._times = np.unique(times)

    def __call__(self, key: np.ndarray, time: np.ndarray) -> np.ndarray:
        rank = np.searchsorted(self._times, time, side="left")
        return np.searchsorted(self._keys, key) * (len(self._times) + 1) + rank
