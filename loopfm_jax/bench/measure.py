"""Interleaved rounds: ours, peer, ours, peer, ..; medians and quartiles of what each round says."""

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from loopfm_jax.bench.child import Child
from loopfm_jax.bench.protocol import Measured

PAUSE_S = 0.3
"""Between slices: idle OpenMP threads spin for 0.2 s."""
QUIET = 0.05
"""A round in which other processes used more of the cores than this is taken again, if it can."""
EXTRA = 1 / 3
"""Repeats at most, as a share of the rounds."""


@dataclass(frozen=True)
class Round:
    """One slice of every side, by name."""

    measured: Mapping[str, Measured]
    others: float
    """Largest share of the cores that other processes used during a slice."""


@dataclass(frozen=True)
class Spread:
    """Median and quartiles over rounds."""

    median: float
    low: float
    high: float


def spread(values: Sequence[float]) -> Spread:
    low, median, high = np.percentile(np.asarray(values, np.float64), [25, 50, 75])
    return Spread(float(median), float(low), float(high))


def ratios(rounds: Sequence[Round], name: str, other: str, *, more_is_better: bool) -> list[float]:
    """How many times better `name` is than `other`, of every round; above 1 it is better."""
    pairs = [(r.measured[name].value, r.measured[other].value) for r in rounds]
    return [a / b if more_is_better else b / a for a, b in pairs]


def take_rounds(
    sides: Mapping[str, Child], *, rounds: int, seconds: float, batch: int | None = None
) -> list[Round]:
    """So many rounds; of at most a third more, those in which others disturbed least."""
    taken: list[Round] = []
    allowed = rounds + int(np.ceil(EXTRA * rounds))
    while len(taken) < allowed and sum(r.others <= QUIET for r in taken) < rounds:
        taken.append(take_round(sides, seconds=seconds, batch=batch))
    best = sorted(range(len(taken)), key=lambda i: (max(taken[i].others, QUIET), i))[:rounds]
    return [taken[i] for i in sorted(best)]


def take_round(sides: Mapping[str, Child], *, seconds: float, batch: int | None = None) -> Round:
    measured, others = {}, 0.0
    for name, child in sides.items():
        time.sleep(PAUSE_S)
        # Not timed: who waited finds caches cold, and memory taken away.
        first = child.run(seconds=0, batch=batch)
        own = 0 if first.seconds > seconds else seconds  # a step as long as a slice is one
        watch = Watch(list(sides.values()))
        measured[name] = child.run(seconds=own, batch=batch)
        others = max(others, watch.others())
    return Round(measured, others)


class Watch:
    """From when it is made: the share of the cores that went to processes not ours."""

    def __init__(self, children: Sequence[Child]):
        self._children, self._started = children, time.monotonic()
        self._busy, self._own = _busy_s(), self._own_s()

    def others(self) -> float:
        """0 where there is no /proc."""
        elapsed = time.monotonic() - self._started
        busy, own = _busy_s() - self._busy, self._own_s() - self._own
        return max(0.0, busy - own) / (max(elapsed, 1e-9) * len(_cores()))

    def _own_s(self) -> float:
        used = os.times()
        return sum(c.cpu_seconds() for c in self._children) + used.user + used.system


def _cores() -> set[int]:
    if hasattr(os, "sched_getaffinity"):
        return set(os.sched_getaffinity(0))
    return set(range(os.cpu_count() or 1))


def _busy_s() -> float:
    """CPU seconds that were not idle so far, of all processes, on the cores we may use."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return 0.0
    names, total = {f"cpu{i}" for i in _cores()}, 0
    for line in stat.read_text().splitlines():
        name, *counts = line.split()
        if name in names:
            user, nice, system, _, _, irq, softirq, *_ = (int(c) for c in counts)
            total += user + nice + system + irq + softirq
    return total / os.sysconf("SC_CLK_TCK")
