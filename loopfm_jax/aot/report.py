"""Files of `loopfm compile`: compile.json, compile.md, compile.svg."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loopfm_jax.aot import picture
from loopfm_jax.report import pipes, replace_file, text_of
from loopfm_jax.report_parts import DASH, Grid
from loopfm_jax.units import GIB, short

Found = Mapping[str, Any]
HEAD = [
    "program", "devices", "mesh", "FM, dense", "examples a step", "fits", "GiB a device",
    "of which", "collectives a step", "step, estimate",
]  # fmt: skip
KINDS = {
    "dense": "dense",
    "tables": "tables",
    "optimiser": "optimiser",
    "store": "store",
    "batch": "batch",
    "activations": "activations",
    "padding": "layout",
    "program": "program",
}
"""Kinds of bytes in the order in which they are told."""
FITS = {True: ("yes", "fits, "), False: ("no", "does not fit, "), None: (DASH, "")}
"""None: nobody knows how much memory simulated devices have."""


def write(found: Found, folder: Path) -> None:
    """Writes the files, each complete or not at all."""
    replace_file(folder / "compile.json", json.dumps(found, indent=1, allow_nan=False) + "\n")
    replace_file(folder / "compile.md", markdown(found))
    drawn = picture.draw(found)
    if drawn is not None:
        replace_file(folder / "compile.svg", drawn)


def markdown(found: Found) -> str:
    grid = Grid(HEAD, [_line(row) for row in found["programs"]])
    return (
        "\n\n".join(
            [
                "# What the compiler says of devices that were not there",
                "Bytes and collectives are the compiler's, per device and step. Times are "
                "estimates from published peaks, from full overlap to none; nothing was run.",
                pipes(grid),
                "## How the numbers came about",
                "    " + " ".join(found["command"].split()),
                text_of(", ".join(f"{k} {v}" for k, v in found["versions"].items() if v)),
            ]
        )
        + "\n"
    )


def _line(row: Found) -> list[str]:
    mesh = " x ".join(str(size) for size in row["mesh"].values())
    known = "bytes" in row
    return [
        row["program"],
        f"{row['topology']} ({row['devices']})",
        mesh,
        short(row["dense"]),
        f"{row['examples']:,}",
        FITS[row.get("fits")][0],
        f"{row['total_bytes'] / GIB:.2f}" if known else DASH,
        kinds(row) if known else row.get("reason", DASH),
        sent(row) if known else DASH,
        seconds(row) if "at_best_s" in row else DASH,
    ]


def kinds(row: Found) -> str:
    """The bytes of a device that are more than a hundredth of all."""
    told = [(KINDS[kind], size) for kind, size in row["bytes"].items()]
    large = [(name, size) for name, size in told if size > 0.01 * row["total_bytes"]]
    return ", ".join(f"{name} {size / GIB:.2f}" for name, size in large)


def sent(row: Found) -> str:
    """Collectives with what a device receives."""
    every = [f"{c['kind']} {c['calls']}: {c['bytes'] / 1e6:,.1f} MB" for c in row["collectives"]]
    return ", ".join(every) or "none"


def seconds(row: Found) -> str:
    """A step's estimated time, and what binds it."""
    if row["at_best_s"] is None:
        return DASH
    low, high = 1e3 * row["at_best_s"], 1e3 * row["at_worst_s"]
    return f"{low:.3g} to {high:.3g} ms ({row['bound']})"


def summary(row: Found) -> str:
    """A line for people."""
    held, received = row["total_bytes"] / GIB, row["collective_bytes"] / 1e6
    said = (
        f"{FITS[row.get('fits')][1]}{held:.2f} GiB and {received:,.1f} MB of collectives a device"
    )
    return said + (f", a step {seconds(row)} by estimate" if "at_best_s" in row else "")
