"""A store split over the shards of batches, whose examples stand where their histories lie: a step
looks them up without a word to another device.

A store is sorted by key, so a cut between keys gives parts that are nearly even, unless one key
owns more than a part. A batch has one size for all its parts: that of the fullest one, up to the
next eighth of an octave; places that are left over weigh nothing. Whoever has no history stands
anywhere.
"""

import math
from dataclasses import dataclass

import numpy as np

from loopfm_jax.history.store import Store

STEPS = 8
"""Sizes of a part from one to twice that: few, so that few programs compile."""


@dataclass(frozen=True)
class Partition:
    """Where a store is cut."""

    bounds: np.ndarray
    """[P+1] its rows."""

    @property
    def rows(self) -> int:
        """Of a part; shorter ones are filled up."""
        return int(np.diff(self.bounds).max())

    def spread(self, values: np.ndarray) -> np.ndarray:
        """[S, ...] -> [P * rows, ...]."""
        parts = len(self.bounds) - 1
        found = np.zeros((parts, self.rows, *values.shape[1:]), values.dtype)
        for part, low, high in zip(found, self.bounds[:-1], self.bounds[1:], strict=True):
            part[: high - low] = values[low:high]
        return found.reshape(-1, *values.shape[1:])

    def owner(self, end_B: np.ndarray) -> np.ndarray:
        """The part that a history which ends there lies in."""
        inner = self.bounds[1:-1]
        return np.searchsorted(inner, end_B, side="left")

    def within(self, end_B: np.ndarray) -> np.ndarray:
        """Ends as rows of their part."""
        return end_B - self.bounds[self.owner(end_B)]

    def seat(self, end_B: np.ndarray, length_B: np.ndarray) -> np.ndarray:
        """The place of every example: [P * C] their numbers, part after part, -1 for nobody."""
        parts = len(self.bounds) - 1
        owner_B = np.where(length_B > 0, self.owner(end_B), parts)
        bound, free = (np.flatnonzero(owner_B < parts), np.flatnonzero(owner_B == parts))
        count_P = np.bincount(owner_B[bound], minlength=parts)
        size = room(int(count_P.max()), len(end_B) / parts)
        found = np.full((parts, size), -1)
        by_owner = bound[np.argsort(owner_B[bound], kind="stable")]
        found[np.arange(size) < count_P[:, None]] = by_owner
        empty = np.argwhere(found.T == -1)[: len(free), ::-1]  # every part's first, then the next
        found[empty[:, 0], empty[:, 1]] = free
        return found.reshape(-1)


def cut(store: Store, parts: int) -> Partition:
    """Near even parts, no history across a cut."""
    rows = len(store.row)
    within = np.zeros(rows + 2, np.int64)  # histories that have rows on both sides of a row's start
    long = store.length > 1
    np.add.at(within, store.end[long] - store.length[long] + 1, 1)
    np.add.at(within, store.end[long], -1)
    between = np.flatnonzero(np.cumsum(within)[: rows + 1] == 0)
    wanted = np.arange(1, parts) * rows // parts
    inner = between[np.minimum(np.searchsorted(between, wanted), len(between) - 1)]
    return Partition(np.concatenate([[0], inner, [rows]]))


def room(count: int, even: float) -> int:
    """The least of few sizes that holds so many; at least `even`, that of evenly dealt parts."""
    steps = math.ceil(STEPS * math.log2(max(count / even, 1)) - 1e-9)
    return max(count, math.ceil(even * 2 ** (steps / STEPS) - 1e-9))
