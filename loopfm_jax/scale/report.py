"""A sweep's files: scale.json, scale.csv, scale.md and scale.svg, from one dict of numbers."""

import csv
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loopfm_jax.bench.report import number
from loopfm_jax.report import pipes, replace_file, text_of
from loopfm_jax.report_parts import DASH, Grid
from loopfm_jax.scale import picture
from loopfm_jax.units import GIB, short

Found = Mapping[str, Any]
COLUMNS = (
    "sweep", "target", "dense", "table_rows", "table_params", "params", "backbone", "hidden",
    "updates", "dtype", "batch", "examples_s", "tokens_s", "step_s", "mfu", "flops_per_example",
    "flops_s", "peak_flops_s", "tokens_per_example", "memory_bytes", "estimated_bytes", "steps",
    "disturbed",
)  # fmt: skip
TITLES = {
    "fm": "FM by dense parameters",
    "vm": "VM with histories by dense parameters",
    "tables": "FM by table rows",
}
HEAD = (
    "size", "widths", "table rows", "updates", "examples/s", "tokens/s", "ms a step", "MFU", "GiB",
)  # fmt: skip
DISTURBED = 0.1


def write(found: Found, folder: Path) -> None:
    """Writes the files, each complete or not at all."""
    texts = {
        "scale.json": json.dumps(found, indent=1, allow_nan=False) + "\n",
        "scale.csv": table(found),
        "scale.md": markdown(found),
        "scale.svg": picture.draw(found),
    }
    for name, text in texts.items():
        if text is not None:
            replace_file(folder / name, text)
        else:
            (folder / name).unlink(missing_ok=True)  # of an earlier sweep


def table(found: Found) -> str:
    """A line per point, numbers in SI units."""
    file = io.StringIO()
    lines = csv.DictWriter(file, COLUMNS, lineterminator="\n")
    lines.writeheader()
    for sweep in found["sweeps"].values():
        for point in sweep["points"]:
            hidden = " ".join(map(str, point["hidden"]))
            lines.writerow({**{k: point[k] for k in COLUMNS}, "hidden": hidden})
    return file.getvalue()


def markdown(found: Found) -> str:
    """Tables, laws and what was left out."""
    parts = [f"# Throughput against size on {text_of(found['device'])}"]
    parts.append(f"{found['date']}, dense layers in {found['dtype']}.")
    for name, sweep in found["sweeps"].items():
        if sweep["points"]:
            parts += [f"## {TITLES[name]}", pipes(_grid(name, sweep)), text_of(law(sweep["law"]))]
    parts += [f"> {text_of(note)}" for note in notes(found)]
    parts += ["## How the numbers came about", "    " + " ".join(found["command"].split())]
    return "\n\n".join(parts) + "\n"


def _grid(name: str, sweep: Found) -> Grid:
    return Grid(list(HEAD), [_line(name, point) for point in sweep["points"]])


def _line(name: str, point: Found) -> list[str]:
    mfu, memory = point["mfu"], point["memory_bytes"]
    return [
        short(point["table_rows" if name == "tables" else "dense"]),
        "-".join(map(str, point["hidden"])),
        short(point["table_rows"]),
        point["updates"],
        number(point["examples_s"]),
        number(point["tokens_s"]),
        number(1e3 * point["step_s"]),
        DASH if mfu is None else f"{mfu:.0%}",
        DASH if memory is None else f"{memory / GIB:.2f}",
    ]


def law(found: Found | None) -> str:
    """The fitted law in words."""
    if found is None:
        return "No law: it takes three sizes."
    said = (
        f"examples/s ~ size^{-found['b']:.2f}: b = {found['b']:.2f}, 95 % interval "
        f"{found['low']:.2f} to {found['high']:.2f}, R2 {found['r2']:.3f}, {found['n']} sizes."
    )
    poor = " A poor fit: the points do not lie on one line, see the picture."
    return said + (poor if found["poor"] else "")


def notes(found: Found) -> list[str]:
    """What a reader must know of the numbers."""
    points = [p for sweep in found["sweeps"].values() for p in sweep["points"]]
    said = [f"{x['sweep']} {x['size']} left out: {x['reason']}" for x in found["left_out"]]
    loud = [f"{p['sweep']} {short(p['target'])}" for p in points if p["disturbed"] > DISTURBED]
    if loud:
        said.append(f"other processes used more than a tenth of the cores during {', '.join(loud)}")
    return said
