"""The whole of `loopfm bench`: limits, then every chosen case, then JSON, card and picture."""

import difflib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from datetime import date
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile, gettempdir
from typing import Any

import tyro
from rich.console import Console

from loopfm_jax.bench import picture, report, rows
from loopfm_jax.bench.case import Bench, run_case
from loopfm_jax.bench.child import PACKAGES, ROOT, Child, Failed, find_python, ours, versions
from loopfm_jax.bench.config import BenchConfig
from loopfm_jax.bench.terms import Case
from loopfm_jax.errors import UserError, writing
from loopfm_jax.progress import say
from loopfm_jax.report import finite, replace_file

LIMITS = {
    "job": "limits",
    "gemm": [1024, 1536, 2048],
    "stream": 2**25,
    "rows": 1_300_000,
    "ids": 2_000_000,
    "repeats": 7,
}
INSTALL = (
    "python -m venv .venv-peers && .venv-peers/bin/pip install torch fuxictr, then "
    "--peer-python .venv-peers/bin/python"
)


def bench(options: Sequence[str]) -> dict[str, Any]:
    """rates beside a peer and the machine's limits: --peer fuxictr"""
    config = tyro.cli(
        BenchConfig, args=options, prog="loopfm bench", config=(tyro.conf.AvoidSubcommands,)
    )
    where = (config.out, "--out") if config.out else (Path(gettempdir()), "TMPDIR")
    with writing(*where):
        return make(config, command=" ".join(["loopfm bench", *options]))


def make(config: BenchConfig, *, command: str) -> dict[str, Any]:
    """Runs the chosen cases, writes what `config.out` asks for, returns the JSON.

    Raises:
      UserError: a row that is none, or no interpreter at --peer-python.
      OSError: nothing can be written to `config.out`; before anything is measured.
    """
    started, cases = time.monotonic(), _cases(config.rows)
    if config.out is not None:
        config.out.mkdir(parents=True, exist_ok=True)
        TemporaryFile(dir=config.out).close()
    python, peer_versions = _find_peer(config)
    with ExitStack() as stack:
        folder = stack.enter_context(TemporaryDirectory(prefix="loopfm-bench-"))
        limits = _limits()
        say(report.limits_line(limits))
        bench = Bench(Path(folder), config.rounds, config.seconds, python, limits)
        stack.callback(lambda: bench.ended.close())
        found = {
            "device": device_name(limits),
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
            "date": date.today().isoformat(),
            "command": command,
            "minutes": 0.0,
            "versions": versions(PACKAGES) | {"python": sys.version.split()[0]} | peer_versions,
            "commit": _commit(),
            "limits": limits,
            "results": [],
        }
        for case in cases:
            found["results"] += finite(_run(case, bench))
            found["minutes"] = (time.monotonic() - started) / 60
            if config.out is not None:
                _write(found, config.out)  # after every row: a run that is cut off keeps the others
    _show(found)
    return found


def _run(case: Case, bench: Bench) -> list[dict[str, Any]]:
    started = time.monotonic()
    try:
        found = run_case(case, bench)
    except Failed as error:
        say(f"{case.name}: failed: {error}")
        return [{"name": case.name, "mode": "exact", "error": str(error), "valid": False}]
    for result in found:
        beside = f", {result['ratio']:.2f}x {result['peer']}" if result["peer"] else ""
        value = f"{report.number(result['value'])} {case.unit}"
        took_s = time.monotonic() - started
        say(f"{result['name']} {report.how(result)}: {value}{beside} ({took_s:.0f} s)")
    return found


def _cases(wanted: tuple[str, ...]) -> tuple[Case, ...]:
    try:
        return rows.choose(rows.CASES, wanted)
    except KeyError as error:
        known = sorted({c.name.split("/")[0] for c in rows.CASES} | {c.name for c in rows.CASES})
        close = difflib.get_close_matches(error.args[0], known, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise UserError(
            f"bench --rows {error.args[0]}: no such row; there are {', '.join(known)}{hint}"
        ) from None


def _find_peer(config: BenchConfig) -> tuple[Path | None, dict[str, str]]:
    """Its interpreter and versions; None and what to do about it where it is not there."""
    if config.peer == "none":
        return None, {}
    python = find_python(config.peer_python)
    if not (ROOT / "benchmarks" / "peers").is_dir():
        say("no peer: benchmarks/peers is in the repository, not in the package; rows run alone")
        return None, {}
    try:
        with Child("benchmarks.peers.worker", python=python, env={}) as child:
            return python, child.versions()
    except Failed as error:
        say(f"no peer, rows run without ratio: {error}. To have it: {INSTALL}")
        return None, {}


def _limits() -> dict[str, Any]:
    try:
        with ours() as child:
            return child.setup(LIMITS)
    except Failed as error:
        raise UserError(f"bench: our own worker does not start: {error}") from None


def device_name(limits: dict[str, Any]) -> str:
    """What JAX calls it; a CPU by its name."""
    info = Path("/proc/cpuinfo")
    if limits["platform"] == "cpu" and info.exists():
        found = re.search(r"model name\s*: (.+)", info.read_text())
        if found:
            return found[1].strip()
    return str(limits["device"])


def _commit() -> str | None:
    """Of the checkout, `+` where it has changes; None outside one."""
    try:
        head = subprocess.run(
            ["git", "describe", "--always", "--dirty=+", "--exclude=*"],
            cwd=ROOT, capture_output=True, text=True, check=True,
        )  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip()


def _show(found: dict[str, Any]) -> None:
    console = Console(stderr=True, highlight=False)
    if not console.is_terminal:
        console.width = 160
    console.print(report.card(found["results"]))
    for note in (report.limits_line(found["limits"]), *report.notes(found["results"])):
        say(note)


def _write(found: dict[str, Any], folder: Path) -> None:
    name = re.sub(r"[^a-z0-9]+", "-", found["device"].lower()).strip("-")
    path = folder / f"{name}-{found['date']}.json"
    replace_file(path, json.dumps(found, indent=1, allow_nan=False) + "\n")
    svg = picture.draw(found["results"])
    if svg is not None:
        replace_file(path.with_suffix(".svg"), svg)
    say(f"bench: {path.resolve()}")
