"""The report's figures: what is drawn, and the words under it."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from loopfm_jax.svg import GRID, INK, RC, SERIES, draw_legend, new_axes, render, style
from loopfm_jax.units import short

CURVES = {  # (of the FM?, term) -> title, caption
    (True, "logloss"): ("Training of the FM", "LogLoss on the FM's training window, in order."),
    (False, "logloss"): ("Training of the VMs", "LogLoss on the VMs' training window, in order."),
    (True, "compressor"): (
        "Compressor of the FM",
        "How well the compressed embedding rebuilds the full one; lower is better.",
    ),
    (False, "distillation"): (
        "Distillation into the VMs",
        "Loss of the auxiliary head that learns the FM's soft labels.",
    ),
}

Report = Mapping[str, Any]


class Plot(NamedTuple):
    """A figure with the words around it."""

    title: str
    caption: str
    svg: str


def figures(report: Report) -> list[Plot]:
    """Every figure the report has numbers for."""
    with matplotlib.rc_context(RC):
        found = [_deltas(report), _by_length(report), *_curves(report)]
        found += [_calibration(report), _lengths(report)]
    return [plot for plot in found if plot]


def _deltas(report: Report) -> Plot | None:
    rows = [(name, name, row) for name, row in (report.get("methods") or {}).items()]
    for control, methods in (report.get("controls") or {}).items():
        rows += [(f"{name}\n{control}", name, row) for name, row in methods.items()]
    rows = [(label, m, row) for label, m, row in rows if row.get("delta_auc") is not None]
    if not rows:
        return None
    figure, axes = new_axes(height=0.8 + 0.42 * len(rows))
    axes.axvline(0, color=INK, linewidth=1)
    for y, (label, method, row) in enumerate(rows):
        _delta(axes, y, method, row, hollow="\n" in label)
    axes.set_yticks(range(len(rows)), [label for label, _, _ in rows])
    axes.set_ylim(len(rows) - 0.5, -0.6)
    axes.set_xlim(*_delta_limits([row for _, _, row in rows]))
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.grid(False, axis="y")
    axes.tick_params(length=0)
    axes.set_xlabel("AUC above the base model")
    caption = "There is no standard error of one seed, so no bars are drawn."
    if any(row.get("delta_auc_se") is not None for _, _, row in rows):
        caption = "Bars: one standard error of the mean difference, paired by seed."
    if report.get("controls"):
        caption += " Hollow: controls, which should not lie above zero."
    return Plot("AUC against base", caption, render(figure, "delta"))


def _delta(axes: Axes, y: int, method: str, row: Report, *, hollow: bool) -> None:
    value, error = row["delta_auc"], row.get("delta_auc_se")
    colour, _, marker = SERIES[style(method)]
    axes.hlines(y, 0, value, color=colour, linewidth=2, linestyle=":" if hollow else "-")
    axes.errorbar(
        value,
        y,
        xerr=error,
        color=colour,
        marker=marker,
        markersize=7,
        markerfacecolor="none" if hollow else colour,
        capsize=4,
    )
    axes.annotate(
        f"{value:+.4f}",
        (max(value + (error or 0), 0), y),  # right of the zero line, clear of the method's name
        (9, 0),
        textcoords="offset points",
        va="center",
    )


def _delta_limits(rows: list[Report]) -> tuple[float, float]:
    """Room for zero, the bars, and the number right of each."""
    bars = [(row["delta_auc"], row.get("delta_auc_se") or 0.0) for row in rows]
    low = min(0.0, *(value - error for value, error in bars))
    high = max(0.0, *(value + error for value, error in bars))
    span = (high - low) or 1e-4
    return low - 0.06 * span, high + 0.32 * span


def _by_length(report: Report) -> Plot | None:
    table = report.get("by_history_length")
    if not table or not table["bins"]:
        return None
    bins, place = table["bins"], np.arange(len(table["bins"]))
    figure, axes = new_axes(height=3.3)
    if bins[0] == "0":
        axes.axvspan(-0.5, 0.5, color=GRID, alpha=0.5, linewidth=0)
        axes.text(0, 1.01, "cold start", transform=axes.get_xaxis_transform(), ha="center")
    for method, values in table["auc"].items():
        _line(axes, method, place, _floats(values))
    names = [f"{b}\n{short(n)}" for b, n in zip(bins, table["rows"], strict=True)]
    axes.set_xticks(place, names)
    axes.set_xlim(-0.5, len(bins) - 0.5)
    axes.set_xlabel("entries in the history (below: judged rows)")
    axes.set_ylabel("AUC")
    draw_legend(figure, list(table["auc"]))
    caption = (
        "Rows grouped by how many past impressions of the same user the FM had left behind; a cold "
        "start has none. Compare the methods within a group, not the groups; groups with few rows "
        "are noisy."
    )
    return Plot("AUC by history length", caption, render(figure, "by_length"))


def _curves(report: Report) -> Iterable[Plot]:
    groups: dict[tuple[bool, str], dict[str, list[Report]]] = {}
    for method, points in (report.get("learning_curves") or {}).items():
        for term in sorted({term for point in points for term in point} - {"step"}):
            groups.setdefault((method == "fm", term), {})[method] = points
    known = [key for key in CURVES if key in groups]
    for key in [*known, *sorted(groups.keys() - CURVES.keys())]:
        yield _curve(groups[key], key)


def _curve(series: Mapping[str, list[Report]], key: tuple[bool, str]) -> Plot:
    of_fm, term = key
    model = "FM" if of_fm else "VMs"
    title, caption = CURVES.get(key, (f"{term} of the {model}", "A term of the training loss."))
    figure, axes = new_axes(height=2.9)
    for method, points in series.items():
        every = max(1, len(points) // 6)
        steps, values = [p["step"] for p in points], _floats(p.get(term) for p in points)
        _line(axes, method, steps, values, markevery=(style(method) % every, every))
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(lambda value, _: short(value))
    axes.set_xlabel("step")
    axes.set_ylabel("LogLoss" if term == "logloss" else "loss")
    draw_legend(figure, list(series))
    return Plot(title, caption, render(figure, f"{model} {term}"))


def _calibration(report: Report) -> Plot | None:
    curves = report.get("calibration_curve") or {}
    values = _floats(v for c in curves.values() for part in c.values() for v in part)
    values = values[np.isfinite(values)]
    if not len(values):
        return None
    low, high = float(values.min()), float(values.max())
    figure, axes = new_axes(height=3.3)
    axes.plot([low, high], [low, high], color=INK, linewidth=1, linestyle="--")
    for method, curve in curves.items():
        _line(axes, method, _floats(curve["predicted"]), _floats(curve["observed"]))
    if low > 0 and high / low > 20:
        axes.set_xscale("log")
        axes.set_yscale("log")
    axes.set_xlabel("mean predicted click probability")
    axes.set_ylabel("observed click rate")
    draw_legend(figure, list(curves))
    caption = (
        "Rows sorted by prediction and cut into equally full parts. On the dashed line predictions "
        "are right on average; above it clicks are underestimated, below it overestimated."
    )
    return Plot("Calibration", caption, render(figure, "calibration"))


def _lengths(report: Report) -> Plot | None:
    table = report.get("history_lengths")
    if not table or not table["length"]:
        return None
    length, rows = np.array(table["length"]), np.array(table["rows"])
    figure, axes = new_axes(height=2.6)
    width = float(np.clip(210 / (np.ptp(length) + 1), 0.8, 24))
    axes.vlines(length, 0, rows, color=SERIES[style("loopfm")][0], linewidth=width)
    axes.set_ylim(0)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.yaxis.set_major_formatter(lambda value, _: short(value))
    axes.set_xlabel("entries in the history")
    axes.set_ylabel("judged rows")
    caption = "How many rows have a history of each length; longer ones are cut to the last bar."
    return Plot("History lengths", caption, render(figure, "lengths"))


def _line(axes: Axes, method: str, x: Any, y: np.ndarray, **options: Any) -> None:
    colour, _, marker = SERIES[style(method)]
    axes.plot(x, y, color=colour, marker=marker, label=method, **options)


def _floats(values: Iterable[float | None]) -> np.ndarray:
    return np.array([np.nan if v is None else v for v in values], np.float64)
