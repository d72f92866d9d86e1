"""The picture of `loopfm compile`: memory and collectives of a device as the slice grows."""

from collections.abc import Mapping
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator

from loopfm_jax.svg import RC, SERIES, WIDTH, render, standalone
from loopfm_jax.units import GIB, short


def draw(found: Mapping[str, Any]) -> str | None:
    """A whole SVG file, a row of panels per program; None where no program fits."""
    rows = [row for row in found["programs"] if "bytes" in row]
    programs = list(dict.fromkeys(row["program"] for row in rows))
    if not rows:
        return None
    with matplotlib.rc_context(RC):
        size = (2 * WIDTH, 0.75 * WIDTH * len(programs))
        figure = Figure(figsize=size, layout="constrained")
        every = figure.subplots(len(programs), 2, squeeze=False)
        for name, (memory, links) in zip(programs, every, strict=True):
            own = [row for row in rows if row["program"] == name]
            _lines(memory, own, "total_bytes", GIB, f"{name}: GiB a device")
            _lines(links, own, "collective_bytes", 1e6, f"{name}: MB received a step")
            _limit(memory, own)
        handles, labels = every[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper left", ncols=4)
        svg = render(figure, "compile")
    return standalone(svg)


def _lines(axes: Axes, rows: list[Mapping[str, Any]], key: str, unit: float, name: str) -> None:
    """A line per size of the FM."""
    sizes = list(dict.fromkeys(row["dense"] for row in rows))
    for i, dense in enumerate(sizes):
        own = sorted((r for r in rows if r["dense"] == dense), key=lambda r: r["devices"])
        colour, _, marker = SERIES[i % len(SERIES)]
        x, y = [r["devices"] for r in own], [r[key] / unit for r in own]
        axes.plot(x, y, marker=marker, color=colour, label=f"FM of {short(dense)}")
    axes.set_xscale("log", base=2)
    if any(row[key] for row in rows):  # one device sends nothing
        axes.set_yscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("devices")
    axes.set_title(name, fontsize="medium", loc="left")


def _limit(axes: Axes, rows: list[Mapping[str, Any]]) -> None:
    """HBM, where there is one for all."""
    limits = {row["memory_bytes"] for row in rows if "memory_bytes" in row}
    if len(limits) == 1:
        axes.axhline(limits.pop() / GIB, color=RC["text.color"], linestyle=":", label="HBM")
