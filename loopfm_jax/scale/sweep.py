"""Running points, each in a process of its own; what was measured is kept and found again."""

import json
import os
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from loopfm_jax.bench.child import PACKAGES, Child, Failed, versions
from loopfm_jax.bench.data import write_log
from loopfm_jax.bench.make import LIMITS, device_name
from loopfm_jax.bench.measure import Watch
from loopfm_jax.bench.rows import LogSpec
from loopfm_jax.errors import UserError
from loopfm_jax.identity import digest
from loopfm_jax.progress import say
from loopfm_jax.report import finite, replace_file
from loopfm_jax.scale.config import ScaleConfig
from loopfm_jax.scale.plan import Point, schema_of
from loopfm_jax.units import GIB, short

MODULE = "loopfm_jax.scale.worker"
ON_ACCELERATOR = {"gemm": [4096, 8192]}
"""Products that are large enough to reach its peak."""
SHARE = 0.85
"""Of what is free, for a point: the compiler's account leaves out its own work and the C library's,
a seventh of a model of 100M parameters on CPU."""

Result = dict[str, Any]


@dataclass(frozen=True)
class LeftOut:
    """A point that was not measured."""

    point: Point
    reason: str


@dataclass
class Machine:
    """Where points run, and where what they came to is kept."""

    facts: dict[str, Any]
    folder: Path
    config: ScaleConfig
    dtype: str
    force: bool = False
    examples: dict[tuple[int, int], dict[str, Any]] = field(default_factory=dict)
    """By table rows and number: what the processes read, written when one needs it."""

    @cached_property
    def limits(self) -> dict[str, Any]:
        """Peaks, measured when the first point needs them: then they are of the same run."""
        say("scale: measuring the machine's peak")
        spec = LIMITS | ({} if self.facts["platform"] == "cpu" else ON_ACCELERATOR)
        with start() as child:
            return child.setup({**spec, "dtype": self.dtype})

    def read(self, point: Point, scratch: Path) -> dict[str, Any]:
        """Facts of whole batches of examples over the point's schema, in the folder `scratch`."""
        batch = point.spec["batch"]
        asked = point.table_rows, self.config.examples // batch * batch
        if asked not in self.examples:
            path = scratch / f"{len(self.examples)}.npz"
            log = LogSpec(schema_of(point.table_rows), rows=asked[1])
            written = write_log(path, log.schema, rows=log.rows, fill=log.fill)
            self.examples[asked] = {"log": str(path), **written}
        return self.examples[asked]

    def kept(self, point: Point) -> Path:
        """The file of a point's result, named by everything that decides it."""
        asked = (point.spec, self.config.examples, self.config.seconds, self.config.steps)
        told = digest((*asked, point.table_rows, self.facts, versions(PACKAGES)))
        return self.folder / f"{point.sweep}-{short(point.target)}-{told}.json"


def start() -> Child:
    return Child(MODULE, python=Path(sys.executable), env={})


def ask_machine() -> dict[str, Any]:
    """Device, platform and how many there are, asked in a process: this one must not take them."""
    try:
        with start() as child:
            facts = child.setup({"job": "machine"})
    except Failed as error:
        raise UserError(f"scale: the process of a point does not start: {error}") from None
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
    return facts | {"device": device_name(facts), "cores": cores}


def run(machine: Machine, points: Iterable[Point]) -> tuple[list[Result], list[LeftOut]]:
    """Results of the points that fit, in order, and the others."""
    points, results, left_out = list(points), [], []
    with tempfile.TemporaryDirectory(prefix="loopfm-scale-") as scratch:
        for i, point in enumerate(points, start=1):
            at = f"scale: {point.name} ({i} of {len(points)})"
            found = None if machine.force else _find(machine.kept(point))
            if found is not None:
                say(f"{at}: done before")
            else:
                found = _attempt(machine, point, Path(scratch), at)
            if isinstance(found, LeftOut):
                say(f"{at}: left out: {found.reason}")
                left_out.append(found)
            else:
                results.append(found)
    return results, left_out


def _attempt(machine: Machine, point: Point, scratch: Path, at: str) -> Result | LeftOut:
    started = time.monotonic()
    try:
        found = _measure(machine, point, scratch)
    except Failed as error:
        return LeftOut(point, f"failed: {error}")
    if isinstance(found, LeftOut):
        return found
    share = f"MFU {found['mfu']:.0%}, " if found["mfu"] else ""
    say(
        f"{at}: {found['examples_s']:,.0f} examples/s, {share}"
        f"{found['memory_bytes'] / GIB:.1f} GiB ({time.monotonic() - started:.0f} s)"
    )
    return found


def _find(path: Path) -> Result | None:
    """A kept result that is as it was written; one that is damaged is measured again."""
    try:
        kept = json.loads(path.read_text())
        return kept["result"] if kept["seal"] == digest(kept["result"]) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _measure(machine: Machine, point: Point, scratch: Path) -> Result | LeftOut:
    peak = machine.limits["flops"]
    spec = {**point.spec, **machine.read(point, scratch)}
    with start() as child:
        needs = child.setup({**spec, "job": "needs"})
        reason = refusal(needs, machine.config.memory_gib)
        if reason:
            return LeftOut(point, reason)
        facts = child.setup({**spec, "job": "pace"})
        watch = Watch([child])
        measured = child.run(seconds=machine.config.seconds, steps=machine.config.steps)
        result = finite(
            {
                **_rates(facts, measured.more["step_s"], peak * _devices(point)),
                "sweep": point.sweep,
                "target": point.target,
                "dense": point.size.dense,
                "table_rows": point.table_rows,
                "table_params": point.size.tables,
                "params": facts["params"],
                "hidden": point.spec["backbone"]["hidden"],
                "backbone": point.spec["backbone"]["name"],
                "updates": "exact" if point.spec["optim"]["tables"] == "adam" else "fast",
                "batch": facts["batch"],
                "dtype": point.spec["dtype"],
                "steps": measured.steps,
                "memory_bytes": measured.more.get("peak_device_bytes", child.peak_rss_bytes),
                "estimated_bytes": needs["needs_bytes"],
                "disturbed": watch.others(),
            }
        )
    kept = {"result": result, "seal": digest(result)}
    replace_file(machine.kept(point), json.dumps(kept, indent=1) + "\n")
    return result


def _devices(point: Point) -> int:
    mesh = point.spec["mesh"]
    return mesh["data"] * mesh["model"]


def _rates(facts: dict[str, Any], step_s: float, peak: float) -> Result:
    """Per second, all devices together."""
    examples_s = facts["batch"] / step_s
    return {
        "step_s": step_s,
        "examples_s": examples_s,
        "tokens_s": examples_s * facts["tokens"],
        "tokens_per_example": facts["tokens"],
        "flops_per_example": facts["flops_per_example"],
        "flops_s": examples_s * facts["flops_per_example"],
        "peak_flops_s": peak,
        "mfu": examples_s * facts["flops_per_example"] / peak,
    }


def refusal(needs: dict[str, Any], allowed_gib: float) -> str | None:
    """Why a point does not fit; None where it does.

    Args:
      needs: facts of `job.Needs`.
      allowed_gib: instead of what the machine has free; 0: that.
    """
    limit = allowed_gib * GIB if allowed_gib else SHARE * (needs["limit_bytes"] or float("inf"))
    if needs["needs_bytes"] <= limit:
        return None
    whose = "--scale.memory-gib" if allowed_gib else f"{SHARE:.0%} of the memory that is free"
    return (
        f"a step needs {needs['needs_bytes'] / GIB:.2f} GiB (parameters, moments, gradients and "
        f"activations), and {whose} is {limit / GIB:.2f} GiB"
    )
