"""What a training loop notes: means of its numbers, how fast it is, how long it waits for input."""

import itertools
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from loopfm_jax.data.batches import Batch
from loopfm_jax.errors import UserError

CURVE_POINTS = 60


class Waiting:
    """Which share of the wall time a loop waited for its next batch, the first two left out: they
    are before the step is compiled."""

    def __init__(self):
        self._began, self._waited = float("nan"), 0.0

    def watch(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        for n in itertools.count():
            asked = time.monotonic()
            batch = next(batches, None)
            if batch is None:
                return
            if n == 2:
                self._began = asked
            self._waited += (time.monotonic() - asked) if n >= 2 else 0.0
            yield batch

    def share(self) -> float:
        return self._waited / (time.monotonic() - self._began)


class Curve:
    """Means of the step's numbers, read one step late so that the device never waits."""

    def __init__(self, steps: int, batch: int, past: dict[str, Any] | None):
        self.points: list[dict[str, float]] = (past or {}).get("points", [])
        self._sums: list[dict[str, float]] = (past or {}).get("sums", [])
        self._every, self._batch = max(1, steps // CURVE_POINTS), batch
        self._waiting: list[tuple[int, Any]] = []
        self._ticks: list[float] = []

    def add(self, n: int, numbers: Any) -> None:
        self._waiting.append((n, numbers))
        if len(self._waiting) > 1:
            self._read()

    def flush(self) -> dict[str, Any]:
        """Reads what is still waiting; returns all that a resumed run needs, which stays as it is
        while it is being written."""
        while self._waiting:
            self._read()
        return {"points": list(self.points), "sums": list(self._sums)}

    def _read(self) -> None:
        n, numbers = self._waiting.pop(0)
        values = {name: float(v) for name, v in jax.device_get(numbers).items()}
        self._ticks.append(time.monotonic())
        if not all(np.isfinite(v) for v in values.values()):
            raise UserError(
                f"the loss is not finite at step {n} ({values}): lower the learning rate or look "
                "at the inputs; no checkpoint of this state was written"
            )
        self._sums.append(values)
        if (n + 1) % self._every == 0:
            mean = {k: float(np.mean([s[k] for s in self._sums])) for k in values}
            self.points.append({"step": n + 1, **mean})
            self._sums = []

    def examples_per_s(self) -> float:
        """By the median time between steps: compilation does not count. NaN below two steps."""
        gaps = np.diff(self._ticks)
        return self._batch / float(np.median(gaps)) if len(gaps) else float("nan")
