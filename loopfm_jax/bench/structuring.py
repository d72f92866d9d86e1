"""The row `structure`: histories of a whole log, and a plain-Python loop over its events.

That they agree is tested (tests/test_structure.py).
"""

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from loopfm_jax.bench.protocol import Measured, Spec, timed
from loopfm_jax.history.slices import SliceConfig
from loopfm_jax.history.store import Exported, HistoryConfig
from loopfm_jax.history.structure import structure, write_store
from loopfm_jax.units import DAY_MS


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
    events: Events,
    config: HistoryConfig,
    directory: Path,
    *,
    outcome: np.ndarray | None = None,
    write: Callable[..., None] = write_store,
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
        outcome=np.zeros(rows, np.uint8) if outcome is None else outcome.astype(np.uint8),
        config=config,
        directory=directory,
        write=write,
    )
    return facts["keys"]["key"]


class Structure:
    """Whole calls, files written; a step is the log."""

    def __init__(self, spec: Spec):
        self._log, self._config = _log(spec)
        self.facts: dict[str, Any] = {"events": len(self._log.key)}

    def run(self, *, seconds: float, steps: int) -> Measured:
        told: dict[str, float] = {}

        def step() -> None:
            with TemporaryDirectory() as folder:
                told.update(call_structure(self._log, self._config, Path(folder)))

        found = timed(step, lambda: None, seconds=seconds, steps=steps, examples=len(self._log.key))
        return replace(found, more=told)


class StructureLoop:
    """The plain loop over some whole keys of the same log; their codes gathered as arrays."""

    def __init__(self, spec: Spec):
        log, self._config = _log(spec)
        self._log = log.head(max(1, spec["loop_events"] // (2 * spec["mean_history"])))
        self.facts: dict[str, Any] = {"events": len(self._log.key)}

    def run(self, *, seconds: float, steps: int) -> Measured:
        def step() -> None:
            for rows in structure_by_loop(self._log, self._config):
                np.array([self._log.codes[row] for row in rows])

        return timed(step, lambda: None, seconds=seconds, steps=steps, examples=len(self._log.key))


def _log(spec: Spec) -> tuple[Events, HistoryConfig]:
    """Histories are as long as they come."""
    mean = spec["mean_history"]
    config = HistoryConfig(length=100 * mean, retention_days=36_500)
    return draw_events(spec["events"], mean_history=mean), config
