"""Which stored rows an example may see: two integers per example (PAPER section 1, stage 3).

Entries are sorted by (key, time). The history of an example is the slice of its key's entries that
were available strictly before it, inside the retention window, the most recent `length` of them:
`store[end - length : end]`. Whatever the width of a code, an example carries only (end, length).
"""

import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from loopfm_jax.errors import UserError, check_limits
from loopfm_jax.units import DAY_MS

PART = 1 << 17
"""Events that one thread works on at a time."""


@dataclass(frozen=True)
class SliceConfig:
    """Who may be seen."""

    length: int = 50
    """L: the most recent entries kept (50 on TaobaoAd)."""
    delay_s: float = 0.0
    """Availability delay: an entry counts only if its time + delay < the example's time."""
    retention_days: float = 30.0
    """Entries older than this are forgotten."""

    @property
    def delay_ms(self) -> int:
        return round(self.delay_s * 1000)

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
    """`order` [S]: entry numbers sorted by (key, time); `end` int64 and `length`
    int32 [examples]."""

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
    """Sorts the entries and finds every example's slice; fastest in time order, as a log stands.

    Examples are asked in the order in which the entries stand, which makes a walk of a random
    search.

    Args:
      entry_key, entry_time: [S] int64; when an entry was logged, ms.
      query_key, query_time: [examples] int64; when an example must be answered, ms.
    """
    delay = config.delay_ms
    retention = round(config.retention_days * DAY_MS)
    room = 64 - max(len(entry_key), len(query_key)).bit_length()
    entry_key, query_key, first = _small(entry_key, query_key, bits=room)
    entries = _Grouped(entry_key, entry_time, first=first)
    asked = _Grouped(query_key, query_time, first=first)
    clock = _Clock(entry_time, bits=64 - max(entries.key_bits, asked.key_bits))
    order, stored = np.empty(len(entry_key), np.int64), np.empty(len(entry_key), np.uint64)
    end, length = np.empty(len(query_key), np.int64), np.empty(len(query_key), np.int32)

    def stand(part: slice) -> None:
        order[part] = entries.rows(part)
        time = clock(entry_time.take(order[part]))
        stored[part] = _pack(entries.keys(part), time, bits=clock.bits)

    def before(key: np.ndarray, time: np.ndarray) -> np.ndarray:
        return np.searchsorted(stored, _pack(key, clock(time), bits=clock.bits), side="left")

    def ask(part: slice) -> None:
        key, rows = asked.keys(part), asked.rows(part)
        time = query_time.take(rows)
        stop, start = before(key, time - delay), before(key, time - retention)
        end[rows] = stop
        length[rows] = np.clip(stop - start, 0, config.length)

    in_parts(stand, len(order))
    in_parts(ask, len(end))
    return Slices(order, end, length)


def in_parts(work: Callable[[slice], None], count: int) -> None:
    """`work` for all parts of `range(count)`, by all cores; what it allocates stays in cache."""
    parts = parts_of(count)
    if len(parts) == 1:
        return work(parts[0])
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(work, parts))


def parts_of(count: int) -> list[slice]:
    """`range(count)` in slices of `PART`."""
    return [slice(low, min(low + PART, count)) for low in range(0, count, PART)]


def stable_order(values: np.ndarray) -> np.ndarray:
    """`np.argsort(values, kind="stable")` of int64, at the speed of a plain sort where it can.

    Values that leave room for it carry their place in their low bits: numpy sorts plain uint64
    much faster than it finds an order.
    """
    bits = len(values).bit_length()
    if not len(values) or int(values.max()) - int(values.min()) >= 1 << (64 - bits):
        return np.argsort(values, kind="stable")
    packed = _sorted_with_places(values, first=values.min(), bits=bits)
    return (packed & _mask(bits)).view(np.int64)


class _Grouped:
    """Events in the stable order of (key, time), each one integer: its key, less `first`, and
    below it its place in the order of time."""

    def __init__(self, key: np.ndarray, time: np.ndarray, *, first: int):
        self._bits = len(key).bit_length()
        self._by_time = None if (time[1:] >= time[:-1]).all() else stable_order(time)
        if self._by_time is not None:
            key = key.take(self._by_time)
        self._packed = _sorted_with_places(key, first=first, bits=self._bits)
        self.key_bits = (
            int(self._packed[-1] >> np.uint64(self._bits)).bit_length() if len(key) else 0
        )

    def keys(self, part: slice) -> np.ndarray:
        return (self._packed[part] >> np.uint64(self._bits)).view(np.int64)

    def rows(self, part: slice) -> np.ndarray:
        place = (self._packed[part] & _mask(self._bits)).view(np.int64)
        return place if self._by_time is None else self._by_time.take(place)


class _Clock:
    """Times -> numbers from 0 that compare to those of entries as the times do, of few `bits`:
    ms since the first entry, or how many times of entries are earlier."""

    def __init__(self, entry_time: np.ndarray, *, bits: int):
        self._first = int(entry_time.min()) if len(entry_time) else 0
        self._last = int(entry_time.max()) + 1 if len(entry_time) else 0
        self.bits = (self._last - self._first).bit_length()
        self._times = None
        if self.bits > bits:
            self._times = np.unique(entry_time)
            self.bits = len(self._times).bit_length()

    def __call__(self, time: np.ndarray) -> np.ndarray:
        if self._times is not None:
            return np.searchsorted(self._times, time)
        return np.clip(time, self._first, self._last) - self._first


def _small(
    entry: np.ndarray, query: np.ndarray, *, bits: int
) -> tuple[np.ndarray, np.ndarray, int]:
    """Both kinds of keys, and the least of them; numbered from 0 in the same order where they
    span more than so many bits."""
    both = [keys for keys in (entry, query) if len(keys)]
    first = min((int(keys.min()) for keys in both), default=0)
    last = max((int(keys.max()) for keys in both), default=0)
    if (last - first).bit_length() <= bits:
        return entry, query, first
    names = np.unique(np.concatenate([entry, query]))
    return np.searchsorted(names, entry), np.searchsorted(names, query), 0


def _sorted_with_places(values: np.ndarray, *, first: int, bits: int) -> np.ndarray:
    """`values - first`, each with its place below it in the last `bits`, sorted."""
    packed = np.empty(len(values), np.uint64)

    def fill(part: slice) -> None:
        packed[part] = _pack(values[part] - first, np.arange(part.start, part.stop), bits=bits)

    in_parts(fill, len(values))
    packed.sort()
    return packed


def _pack(high: np.ndarray, low: np.ndarray, *, bits: int) -> np.ndarray:
    """Two non-negative int64 -> one uint64, of which `low` has the last `bits`."""
    packed = high.astype(np.uint64)
    packed <<= np.uint64(bits)
    packed |= low.astype(np.uint64, copy=False)
    return packed


def _mask(bits: int) -> np.uint64:
    return np.uint64((1 << bits) - 1)
