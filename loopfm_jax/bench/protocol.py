"""What a benchmark's sides answer to: one JSON object a line, over stdin and stdout.

    {"do": "setup", "spec": {..}}                 ->  facts about what was built
    {"do": "run", "seconds": s, "steps": n, ..}   ->  `Measured`, and the process's peak memory
    {"do": "close"}                               ->  the end

The first line of a worker, unasked, is its versions. {"error": text} answers what failed. This file
is all that a peer's worker imports of the measuring side: it needs no JAX.
"""

import json
import os
import re
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

Spec = Mapping[str, Any]
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Measured:
    """What a side did in one slice of time; `value` is in the unit of the row."""

    value: float
    steps: int
    examples: int
    seconds: float
    cpu_seconds: float
    losses: Sequence[float] = ()
    """One per step, before the step's update."""
    more: Mapping[str, float] = field(default_factory=dict)


class Job(Protocol):
    """One side of a row, ready to be timed."""

    facts: dict[str, Any]
    """JSON values, for the result."""

    def run(self, *, seconds: float, steps: int) -> Measured:
        """At least `steps` steps and at least `seconds`, whole steps, nothing left in flight. A job
        of requests of several sizes is told `batch`, which of them."""
        ...


def timed(
    step: Callable[[], None],
    finish: Callable[[], Any],
    *,
    seconds: float,
    steps: int,
    examples: int,
    losses: list[float] | None = None,
) -> Measured:
    """Times steps of so many examples; the value is examples/s.

    Args:
      step: may return before its work is done.
      finish: waits for all of it.
      losses: filled by the steps, emptied here.
    """
    taken = [] if losses is None else losses
    taken.clear()
    started, cpu, done = time.perf_counter(), time.process_time(), 0
    while done < max(steps, 1) or time.perf_counter() - started < seconds:
        step()
        done += 1
    finish()
    elapsed, cpu = time.perf_counter() - started, time.process_time() - cpu
    count = done * examples
    return Measured(count / elapsed, done, count, elapsed, cpu, tuple(taken))


def timed_each(step: Callable[[], None], *, seconds: float, steps: int, examples: int) -> Measured:
    """Times every step alone, each of which ends with its answer; the value is p50 in ms."""
    took: list[float] = []

    def one() -> None:
        started = time.perf_counter()
        step()
        took.append(time.perf_counter() - started)

    all_of_them = timed(one, lambda: None, seconds=seconds, steps=steps, examples=examples)
    p50_ms = 1e3 * statistics.median(took)
    return replace(all_of_them, value=p50_ms)


def serve(make: Callable[[Spec], Job], *, versions: Mapping[str, str]) -> None:
    """Answers until `close` or the end of stdin. What libraries print goes to stderr.

    make: the job that a specification names.
    """
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    out.write(json.dumps({"versions": dict(versions)}) + "\n")
    job: Job | None = None
    for line in sys.stdin:
        asked = json.loads(line)
        if asked["do"] == "close":
            break
        try:
            if asked["do"] == "setup":
                job = make(asked["spec"])
                reset_peak()
                answer = {"facts": job.facts}
            else:
                assert job is not None, "run before setup"
                found = job.run(**{name: value for name, value in asked.items() if name != "do"})
                answer = asdict(found) | {"peak_rss_bytes": peak_rss_bytes()}
        except Exception as error:
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"}
        out.write(json.dumps(answer) + "\n")


def refuse(message: str) -> None:
    """Says instead of the versions why there is no worker."""
    print(json.dumps({"error": message}), flush=True)


def peak_rss_bytes() -> int | None:
    """Most memory this process held since `reset_peak`; None where there is no /proc."""
    if not STATUS.exists():
        return None
    found = re.search(r"VmHWM:\s+(\d+) kB", STATUS.read_text())
    return 1024 * int(found[1]) if found else None


def reset_peak() -> None:
    """Leaves out what only building took (reading weights, making batches)."""
    try:
        CLEAR.write_text("5")
    except OSError:  # not Linux, or not allowed: then it counts
        pass
