"""The picture of a sweep: rates with their fitted laws, share of the peak, memory."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from loopfm_jax.scale.law import Law
from loopfm_jax.svg import RC, SERIES, WIDTH, render, standalone
from loopfm_jax.units import GIB, short

Sweep = Mapping[str, Any]
LOOKS = {"fm": SERIES[0], "vm": SERIES[3], "tables": SERIES[4]}
NAMES = {"fm": "FM", "vm": "VM with histories", "tables": "FM, fast updates"}


def draw(found: Mapping[str, Any]) -> str | None:
    """A whole SVG file; None where nothing was measured."""
    sweeps = {name: s for name, s in found["sweeps"].items() if s["points"]}
    dense = {name: s for name, s in sweeps.items() if name != "tables"}
    rows = {name: s for name, s in sweeps.items() if name == "tables"}
    if not sweeps:
        return None
    with matplotlib.rc_context(RC):
        figure = Figure(figsize=(2 * WIDTH, 1.6 * WIDTH), layout="constrained")
        figure.get_layout_engine().set(wspace=0.06, hspace=0.06)  # pyright: ignore
        figure.suptitle(f"{found['device']}, {found['dtype']}", fontsize="medium")
        axes = figure.subplot_mosaic(_places(bool(dense), bool(rows)))
        if dense:
            _rates(axes["D"], dense, "dense", "dense parameters")
            _shares(axes["M"], dense)
            _memory(axes["G"], dense)
        if rows:
            _rates(axes["R"], rows, "table_rows", "table rows")
        svg = render(figure, "scale")
    return standalone(svg)


def _places(dense: bool, rows: bool) -> str:
    """A letter per panel: dense parameters, table rows, MFU, gibibytes."""
    if not dense:
        return "R"
    return "DR;MG" if rows else "DD;MG"


def _rates(axes: Axes, sweeps: Mapping[str, Sweep], key: str, unit: str) -> None:
    for name, sweep in sweeps.items():
        colour, _, marker = LOOKS[name]
        size, rate = _columns(sweep, key, "examples_s")
        axes.plot(size, rate, marker, color=colour, label=NAMES[name] + _exponent(sweep["law"]))
        if sweep["law"]:
            law = Law(**{k: v for k, v in sweep["law"].items() if k != "poor"})
            x = np.geomspace(min(size), max(size), 60)
            middle, low, high = law.at(x)
            axes.plot(x, middle, color=colour, linestyle="--" if law.poor else "-")
            axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
    every = [rate for sweep in sweeps.values() for rate in _columns(sweep, "examples_s")[0]]
    _log_y(axes, min(every), max(every), lambda y, _: short(y))  # a wide band may run out of it
    _log_x(axes, unit)
    axes.set_ylabel("examples/s")
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1))


def _exponent(law: Mapping[str, Any] | None) -> str:
    if law is None:
        return ""
    fit = f", R² {law['r2']:.2f}: poor fit" if law["poor"] else f", R² {law['r2']:.2f}"
    return f"\nsize^{-law['b']:.2f} (b {law['low']:.2f} to {law['high']:.2f}{fit})"


def _shares(axes: Axes, sweeps: Mapping[str, Sweep]) -> None:
    for name, sweep in sweeps.items():
        size, share = _columns(sweep, "dense", "mfu")
        _line(axes, name, size, 100 * share)
    _log_x(axes, "dense parameters")
    axes.set_ylim(0, max(100, axes.get_ylim()[1]))
    axes.set_ylabel("MFU, % of the measured peak")


def _memory(axes: Axes, sweeps: Mapping[str, Sweep]) -> None:
    every: list[float] = []
    for name, sweep in sweeps.items():
        size, held = _columns(sweep, "dense", "memory_bytes")
        _line(axes, name, size, held / GIB)
        every += list(held / GIB)
    _log_x(axes, "dense parameters")
    if every:
        _log_y(axes, min(every), max(every), lambda y, _: f"{y:g}")
    axes.set_ylabel("peak memory, GiB")


def _line(axes: Axes, name: str, x: np.ndarray, y: np.ndarray) -> None:
    colour, _, marker = LOOKS[name]
    axes.plot(x, y, color=colour, marker=marker)


def _columns(sweep: Sweep, *names: str) -> Sequence[np.ndarray]:
    """Of the points that have them all."""
    points = [p for p in sweep["points"] if all(p[name] is not None for name in names)]
    return [np.array([p[name] for p in points], np.float64) for name in names]


def _log_x(axes: Axes, unit: str) -> None:
    axes.set_xscale("log")
    _ticks(axes.xaxis, *axes.get_xlim(), lambda x, _: short(x))
    axes.set_xlabel(unit)


def _log_y(axes: Axes, low: float, high: float, say: Callable[[float, int], str]) -> None:
    """At least a decade around the values, so that what is nearly flat looks so."""
    around = max(1.6, (10 * low / high) ** 0.5)
    axes.set_yscale("log")
    axes.set_ylim(low / around, high * around)
    _ticks(axes.yaxis, low / around, high * around, say)


def _ticks(axis: Axis, low: float, high: float, say: Callable[[float, int], str]) -> None:
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 100 else (1,)))
    axis.set_major_formatter(FuncFormatter(say))
    axis.set_minor_formatter(NullFormatter())
