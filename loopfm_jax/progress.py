"""Progress of long work on stderr: a bar in a terminal, plain lines elsewhere."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from loopfm_jax import processes
from loopfm_jax.units import short

LINE_EVERY_S = 10.0
console = Console(stderr=True, highlight=False)


def say(message: str) -> None:
    """One line for people, from process 0 only."""
    if processes.leads():
        console.print(message, markup=False, soft_wrap=True)


@contextmanager
def track(title: str, *, total: int, unit: str) -> Iterator[Callable[[int], None]]:
    """Yields `advance(n)`; shows rate and remaining time."""
    if sys.stderr.isatty() and processes.leads():
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}% {task.fields[rate]}"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=console, transient=True) as progress:
            task, started = progress.add_task(title, total=total or None, rate=""), time.monotonic()

            def advance(n: int) -> None:
                progress.update(task, advance=n)
                rate = progress.tasks[task].completed / (time.monotonic() - started + 1e-9)
                progress.update(task, rate=f"{short(rate)} {unit}/s")

            yield advance
    else:
        yield _Lines(title, total, unit).advance


class _Lines:
    """A plain line now and then."""

    def __init__(self, title: str, total: int, unit: str):
        self._title, self._total, self._unit = title, total, unit
        self._done, self._started = 0, time.monotonic()
        self._next = self._started + LINE_EVERY_S

    def advance(self, n: int) -> None:
        self._done += n
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + LINE_EVERY_S
        rate = self._done / (now - self._started)
        left = (self._total - self._done) / rate if rate else 0
        of = f" of {short(self._total)}" if self._total else ""
        eta = f", {left:.0f} s left" if self._total else ""
        say(f"{self._title}: {short(self._done)}{of} {self._unit}, {short(rate)}/s{eta}")
