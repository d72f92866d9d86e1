"""Slices of a log that does not fit into memory: some keys, or some time of one key, at a time.

The order by (key, time) is cut into ranges of about equal size. A range holds the entries between
two cuts and the examples whose history ends there, and is worked on alone: by `slices`, which knows
who may be seen. Where a cut goes through a key, the range behind it is told when the latest entries
before the cut were logged: no history is longer than these. So a key that owns a quarter of the log
is never in memory at once.
"""

import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from loopfm_jax.history.rowfile import Column
from loopfm_jax.history.slices import SliceConfig, Slices, in_parts, parts_of, slices

RANGE = 12 << 20
"""Events of a range, about: some 80 bytes of memory each."""
SAMPLES, SAMPLE = 256, 256
"""Places in the log that are looked at to find cuts, and rows at each."""
MOST = (1 << 16) - 1
"""Ranges."""


@dataclass(frozen=True)
class Asked:
    """Examples of a log [examples] and who may become an entry, for one kind of key."""

    key: Column
    time: Column
    """When an example must be answered, ms."""
    logged_time: Column
    """When its row may enter histories, ms."""
    kept: Column | None = None
    """Entries are the rows where this is not 0; None: all."""

    def __len__(self) -> int:
        return len(self.key)


@dataclass(frozen=True)
class Ranges:
    """Cuts, in the order by (key, time): every range but the first begins at one."""

    key: np.ndarray
    time: np.ndarray

    def __len__(self) -> int:
        return len(self.key) + 1

    @property
    def numbers(self) -> np.dtype:
        """The smallest type; `len(self)` stands for nowhere."""
        return np.min_scalar_type(len(self))

    def of(self, key: np.ndarray, time: np.ndarray) -> np.ndarray:
        """Numbers of the ranges that (key, time) are in, of type `numbers`."""
        number = np.searchsorted(self.key, key).astype(self.numbers)
        if not len(self.key):
            return number
        tied = np.flatnonzero(self.key.take(number, mode="clip") == key)
        for name in np.unique(key[tied]):
            mine = tied[key[tied] == name]
            cuts = self.time[self.key == name]
            number[mine] += np.searchsorted(cuts, time[mine], side="right").astype(self.numbers)
        return number

    def begins_within(self, number: int) -> int | None:
        """The key that the cut before a range goes through."""
        return int(self.key[number - 1]) if number else None


def cut(log: Asked, *, size: int) -> Ranges:
    """Ranges of about `size` entries, by samples of the log."""
    count = min(-(-len(log) // size), MOST)
    starts = np.linspace(0, max(0, len(log) - SAMPLE), SAMPLES if count > 1 else 0).astype(int)
    parts = [slice(low, low + SAMPLE) for low in starts.tolist()]
    key, time = (
        np.concatenate([np.zeros(0, np.int64), *(column[part] for part in parts)])
        for column in (log.key, log.logged_time)
    )
    order = np.lexsort((time, key))
    at = order[len(order) * np.arange(1, count) // count]
    cuts = np.unique(np.stack([key[at], time[at]], axis=1), axis=0)
    return Ranges(cuts[:, 0], cuts[:, 1])


class Part(NamedTuple):
    """Rows of a log within one range, in the log's order."""

    row: np.ndarray
    key: np.ndarray
    time: np.ndarray
    """Of entries: when they were logged; of examples: when they are asked."""


def entry_ranges(log: Asked, ranges: Ranges, part: slice) -> np.ndarray:
    """Where rows are as entries; `len(ranges)`: they are none."""
    number = ranges.of(log.key[part], log.logged_time[part])
    return number if log.kept is None else np.where(log.kept[part], number, len(ranges))


def asked_ranges(log: Asked, ranges: Ranges, part: slice, config: SliceConfig) -> np.ndarray:
    """Where rows are as examples: in the range that their histories end in."""
    return ranges.of(log.key[part], log.time[part] - config.delay_ms)


def latest(time: np.ndarray, count: int) -> np.ndarray:
    """The last `count` times, sorted."""
    if len(time) > count:
        time = np.partition(time, len(time) - count)[-count:]
    return np.sort(time)


def tail(ranges: Ranges, number: int, entries: Part, length: int) -> np.ndarray:
    """Times of the latest `length` entries of a range whose key the cut behind it goes through."""
    if number + 1 == len(ranges):
        return np.zeros(0, np.int64)
    return latest(entries.time[entries.key == ranges.key[number]], length)


def earlier(
    ranges: Ranges, number: int, tails: Mapping[int, np.ndarray], length: int
) -> np.ndarray:
    """Times of the latest `length` entries before a range, of the key that it begins within.

    Args:
      tails: by range, of all before it that have one.
    """
    key = ranges.begins_within(number)
    mine = [times for n, times in tails.items() if n < number and ranges.key[n] == key]
    return latest(np.concatenate([np.zeros(0, np.int64), *mine]), length)


def slices_within(
    past: np.ndarray, entries: Part, asked: Part, *, key: int | None, config: SliceConfig
) -> Slices:
    """`slices` of a range; `order` and `end` count from its first entry.

    Args:
      past: times of the latest entries before it, of the key that it begins within.
      key: that key.
    """
    entry_key, entry_time, told = entries.key, entries.time, len(past)
    if told:
        entry_key = np.concatenate([np.full(told, key), entry_key])
        entry_time = np.concatenate([past, entry_time])
    order, end, length = slices(
        entry_key=entry_key,
        entry_time=entry_time,
        query_key=asked.key,
        query_time=asked.time,
        config=config,
    )
    return Slices(order[told:] - told, end - told, length)


def slices_of(log: Asked, config: SliceConfig) -> Slices:
    """`slices` of a whole log, range by range; `order` holds rows of the log, int32."""
    ranges = cut(log, size=RANGE)
    if len(ranges) == 1 and log.kept is None:
        return _slices_at_once(log, config)
    entry, asked = np.empty(len(log), ranges.numbers), np.empty(len(log), ranges.numbers)

    def find(part: slice) -> None:
        entry[part] = entry_ranges(log, ranges, part)
        asked[part] = asked_ranges(log, ranges, part, config)

    in_parts(find, len(log))
    order = np.empty(int((entry < len(ranges)).sum()), np.int32)
    end, length = np.empty(len(log), np.int64), np.empty(len(log), np.int32)
    offset, tails = 0, {}
    for number in range(len(ranges)):
        entries, asking = _within(log, number, entry=entry, asked=asked)
        key = ranges.begins_within(number)
        past = earlier(ranges, number, tails, config.length)
        found = slices_within(past, entries, asking, key=key, config=config)
        order[offset : offset + len(entries.row)] = entries.row[found.order]
        end[asking.row] = found.end + offset
        length[asking.row] = found.length
        offset += len(entries.row)
        tails[number] = tail(ranges, number, entries, config.length)
    return Slices(order, end, length)


def _slices_at_once(log: Asked, config: SliceConfig) -> Slices:
    key = log.key[:]
    found = slices(
        entry_key=key,
        entry_time=log.logged_time[:],
        query_key=key,
        query_time=log.time[:],
        config=config,
    )
    return found._replace(order=found.order.astype(np.int32))


def _within(log: Asked, number: int, *, entry: np.ndarray, asked: np.ndarray) -> tuple[Part, Part]:
    """Entries and examples of one range; the log is read from front to back."""

    def pick(part: slice) -> tuple[np.ndarray, ...]:
        e, a = (np.flatnonzero(x[part] == number) for x in (entry, asked))
        key, logged, time = log.key[part], log.logged_time[part], log.time[part]
        rows = np.arange(part.start, part.stop, dtype=np.int32)
        return rows[e], key[e], logged[e], rows[a], key[a], time[a]

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        pieces = list(pool.map(pick, parts_of(len(log)) or [slice(0, 0)]))
    columns = [list(column) for column in zip(*pieces, strict=True)]
    del pieces
    found = [np.concatenate(columns.pop(0)) for _ in range(6)]  # pieces go as they are joined
    return Part(*found[:3]), Part(*found[3:])
