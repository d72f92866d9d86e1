"""Structuring against a plain-Python loop over events: rates of both, and that they agree."""

import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from loopfm_jax.history.slices import SliceConfig
from loopfm_jax.history.store import Exported, HistoryConfig, structure

DAY_MS = 86_400_000


@dataclass(frozen=True)
class StructureRow:
    """Rates of whole calls, files written."""

    events: int
    mean_history: float
    events_per_s: float
    cpu_s: float
    """Of all cores, for all events."""
    loop_events_per_s: float
    """The loop, which only names the entries of every history."""
    loop_codes_per_s: float
    """The loop, which also gathers their codes."""
    ratio: float
    """To the loop with codes: what a model is fed with."""


@dataclass(frozen=True)
class Events:
    """A log to be structured: examples in time order."""

    key: np.ndarray
    time: np.ndarray
    logged_time: np.ndarray
    codes: np.ndarray

    def head(self, keys: int) -> "Events":
        """The events of the first so many keys."""
        kept = self.key < keys
        return Events(*(x[kept] for x in (self.key, self.time, self.logged_time, self.codes)))


def draw_events(count: int, *, mean_history: int, width: int = 32, seed: int = 0) -> Events:
    """Uniform over 30 days; every key has 2 `mean_history` events, so its examples see half as
    many on average. Int4 codes of `width` numbers; a third of the events is logged late."""
    rng = np.random.default_rng(seed)
    time_ms = np.sort(rng.integers(0, 30 * DAY_MS, count))
    late = rng.integers(0, 60_000, count) * (rng.random(count) < 1 / 3)
    return Events(
        rng.integers(0, max(1, count // (2 * mean_history)), count),
        time_ms,
        time_ms + late,
        rng.integers(0, 256, (count, width // 2), dtype=np.uint8),
    )


def structure_by_loop(events: Events, config: SliceConfig) -> Iterator[list[int]]:
    """The entries of every example's history, newest first: one event after the other."""
    delay, retention = round(config.delay_s * 1000), round(config.retention_days * DAY_MS)
    key, time_ms, logged = (x.tolist() for x in (events.key, events.time, events.logged_time))
    coming = iter(sorted(range(len(key)), key=logged.__getitem__))
    seen: dict[int, list[int]] = defaultdict(list)
    entry = next(coming, None)
    for example in range(len(key)):
        now = time_ms[example]
        while entry is not None and logged[entry] + delay < now:
            seen[key[entry]].append(entry)
            entry = next(coming, None)
        rows: list[int] = []
        for past in reversed(seen[key[example]]):
            if len(rows) == config.length or logged[past] < now - retention:
                break
            rows.append(past)
        yield rows


def call_structure(
    events: Events, config: HistoryConfig, directory: Path, *, outcome: np.ndarray | None = None
) -> dict[str, float]:
    """One call as the stage makes it, over int4 codes; what is told of the histories."""
    rows, columns = events.codes.shape
    exported = Exported(
        codes={"hidden_0": events.codes},
        soft=np.zeros(rows, np.float32),
        facts={"code": "int4", "width": 2 * columns, "taps": ["hidden_0"], "first": 0}
        | {"cutoffs": [[0, 0]]},
        books={},
    )
    facts = structure(
        exported,
        {"key": events.key},
        time=events.time,
        logged_time=events.logged_time,
        outcome=np.zeros(rows, np.uint8) if outcome is None else outcome,
        config=config,
        directory=directory,
    )
    return facts["keys"]["key"]


def measure(
    events: int, *, mean_history: int, loop_events: int = 100_000, repeats: int = 3
) -> StructureRow:
    """The best of several calls, and the loop over some whole keys of the same log."""
    log = draw_events(events, mean_history=mean_history)
    config = HistoryConfig(length=100 * mean_history, retention_days=36_500)
    took, told = [], {}
    for _ in range(repeats):
        with TemporaryDirectory() as folder:
            started, cpu = time.perf_counter(), time.process_time()
            told = call_structure(log, config, Path(folder))
            took.append((time.perf_counter() - started, time.process_time() - cpu))
    few = log.head(max(1, loop_events // (2 * mean_history)))
    started = time.perf_counter()
    histories = list(structure_by_loop(few, config))
    named = time.perf_counter() - started
    started = time.perf_counter()
    for rows in histories:
        np.array([few.codes[row] for row in rows])
    gathered = named + time.perf_counter() - started
    rate, count = events / min(wall for wall, _ in took), len(histories)
    return StructureRow(
        events,
        told["mean_length"],
        rate,
        min(used for _, used in took),
        count / named,
        count / gathered,
        rate / (count / gathered),
    )
