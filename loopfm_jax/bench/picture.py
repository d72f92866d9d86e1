"""The picture of a run: how many times the peer, and how much of the machine's peak."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from loopfm_jax.bench.report import how
from loopfm_jax.svg import INK, RC, SERIES, WIDTH, render, standalone

Result = Mapping[str, Any]
COLOURS = {"exact": SERIES[3][0], "fast": SERIES[4][0]}
THEIRS = SERIES[1][0]


def draw(results: Sequence[Result]) -> str | None:
    """A whole SVG file; None where nothing has a ratio or a share."""
    shown = [r for r in _first_peers(results) if r["ratio"] or r["roofline_share"]]
    if not shown:
        return None
    with matplotlib.rc_context(RC):
        figure = Figure(figsize=(1.7 * WIDTH, 1.2 + 0.34 * len(shown)), layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
        _ratios(left, shown)
        _shares(right, shown)
        left.set_yticks(range(len(shown)), [_label(r) for r in shown])
        left.set_ylim(len(shown) - 0.4, -0.6)
        svg = render(figure, "bench")
    return standalone(svg)


def _first_peers(results: Sequence[Result]) -> list[Result]:
    """The valid ones, each side of ours beside its reference alone: the first of its own dtype."""
    found: dict[tuple[str, str], Result] = {}
    alike = lambda r: r.get("peer_dtype") == r.get("dtype")  # noqa: E731
    for result in sorted(results, key=lambda r: not alike(r)):
        if not result.get("error") and result["valid"]:
            found.setdefault((result["name"], how(result)), result)
    return [r for r in results if any(r is one for one in found.values())]


def _label(result: Result) -> str:
    words = how(result).removeprefix("exact").strip()
    return result["name"] + (f" ({words})" if words else "")


def _ratios(axes: Axes, shown: Sequence[Result]) -> None:
    for y, result in enumerate(shown):
        if not result["ratio"]:
            continue
        low, high = result["ratio_quartiles"]
        axes.barh(y, result["ratio"] - 1, left=1, height=0.6, color=COLOURS[result["mode"]])
        axes.hlines(y, low, high, color=INK, linewidth=1.4)
        axes.annotate(
            f"{result['ratio']:.2f}" if high < 100 else f"{result['ratio']:.0f}",
            (max(result["ratio"], high, 1), y),
            (5, 0),
            textcoords="offset points",
            va="center",
        )
    axes.axvline(1, color=INK, linewidth=1, linestyle="--")
    axes.set_xscale("log")
    known = [r["ratio"] for r in shown if r["ratio"]] or [1.0]
    axes.set_xlim(min(0.5, 0.8 * min(known)), 2.5 * max(2.0, *known))
    axes.xaxis.set_major_locator(LogLocator(subs=(1,) if max(known) > 50 else (1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(False, axis="y")
    axes.tick_params(length=0, which="both")
    axes.set_xlabel("times the peer (dashed: alike)")


def _shares(axes: Axes, shown: Sequence[Result]) -> None:
    """Ours, and below it the peer's by the same count, which holds what we compute again for the
    gradient: kinder to the peer than its own."""
    for y, result in enumerate(shown):
        share = result["roofline_share"]
        if not share:
            continue
        axes.barh(y - 0.15, 100 * share, height=0.3, color=COLOURS[result["mode"]])
        if result["peer_value"]:
            theirs = 100 * share * result["peer_value"] / result["value"]
            axes.barh(y + 0.15, theirs, height=0.3, color=THEIRS)
    axes.set_xlim(0, 100)
    axes.grid(False, axis="y")
    axes.tick_params(length=0)
    axes.set_xlabel("% of peak by our count (grey: peer)")
