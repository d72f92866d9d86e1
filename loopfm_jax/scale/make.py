"""The whole of `loopfm scale`: plan, points, laws, then files."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import date
from typing import Any

import jax

from loopfm_jax.bench.child import PACKAGES, versions
from loopfm_jax.config import Config
from loopfm_jax.errors import UserError
from loopfm_jax.progress import say
from loopfm_jax.report import finite
from loopfm_jax.scale import report
from loopfm_jax.scale.law import Law, fit
from loopfm_jax.scale.plan import plan
from loopfm_jax.scale.sweep import Machine, Result, ask_machine, run
from loopfm_jax.units import short


def make(config: Config, *, command: str) -> dict[str, Any]:
    """Measures what is not there yet, writes `<workdir>/scale/`, returns its JSON.

    Raises:
      UserError: a backbone or size that cannot be swept, or processes that do not start.
    """
    jax.config.update("jax_platforms", "cpu")  # here only shapes: the devices are the points' own
    started, facts = time.monotonic(), ask_machine()
    wanted = config.mesh.data * config.mesh.model
    if wanted > facts["devices"]:
        raise UserError(
            f"mesh.data {config.mesh.data} x mesh.model {config.mesh.model} needs {wanted} "
            f"devices, but there are {facts['devices']} ({facts['platform']}): lower one of them"
        )
    dtype = _dtype(config, facts["platform"])
    points = plan(config, dtype=dtype)
    folder = config.workdir / "scale"
    machine = Machine(facts, folder / "points", config.scale, dtype, config.force)
    results, left_out = run(machine, points)
    found = finite(
        {
            "device": facts["device"],
            "devices": wanted,
            "cores": facts["cores"],
            "date": date.today().isoformat(),
            "command": command,
            "minutes": (time.monotonic() - started) / 60,
            "versions": versions(PACKAGES),
            "dtype": dtype,
            "sweeps": {sweep: _sweep(sweep, results) for sweep in config.scale.sweeps},
            "left_out": [
                {"sweep": x.point.sweep, "size": short(x.point.target), "reason": x.reason}
                for x in left_out
            ],
        }
    )
    report.write(found, folder)
    for line in report.notes(found):
        say(line)
    return found


def _dtype(config: Config, platform: str) -> str:
    if config.scale.dtype != "auto":
        return config.scale.dtype
    return "float32" if platform == "cpu" else "bfloat16"


def size_of(result: Mapping[str, Any]) -> float:
    """What the sweep's law is in."""
    return result["table_rows" if result["sweep"] == "tables" else "dense"]


def _sweep(sweep: str, results: Sequence[Result]) -> dict[str, Any]:
    points = [r for r in results if r["sweep"] == sweep]
    law = fit([size_of(p) for p in points], [p["examples_s"] for p in points])
    return {"points": points, "law": None if law is None else told(law)}


def told(law: Law) -> dict[str, Any]:
    """As JSON."""
    return {**asdict(law), "poor": law.poor}


def headline(found: Mapping[str, Any]) -> dict[str, Any]:
    """The last line of stdout: every sweep's rates by size, its exponent, and what is left out."""
    return {
        "device": found["device"],
        "dtype": found["dtype"],
        "minutes": round(found["minutes"], 1),
        "sweeps": {
            name: {
                "size": [size_of(p) for p in sweep["points"]],
                **{
                    key: [p[key] for p in sweep["points"]]
                    for key in ("examples_s", "tokens_s", "step_s", "mfu", "memory_bytes")
                },
                "law": sweep["law"] and {k: sweep["law"][k] for k in ("b", "low", "high", "r2")},
            }
            for name, sweep in found["sweeps"].items()
        },
        "left_out": found["left_out"],
    }
