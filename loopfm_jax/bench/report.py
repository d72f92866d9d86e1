"""The numbers for people: a table, and the words under it."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from loopfm_jax.units import GIB

Result = Mapping[str, Any]
HEAD = ("row", "mode", "ours", "unit", "peer", "theirs", "ratio", "quartiles", "of peak", "GiB")
DASH = "-"


def card(results: Sequence[Result]) -> Table:
    """A line per side of ours and peer."""
    table = Table(*HEAD, box=None, pad_edge=False, header_style="bold")
    for column in table.columns[2:]:
        column.justify = "right"
        column.no_wrap = True
    before = None
    for result in results:
        name = (result["name"], how(result))
        table.add_row(*_line(result, first=name != before))
        before = name
    return table


def _line(result: Result, *, first: bool) -> list[str]:
    if result.get("error"):
        return [result["name"], result["mode"], "failed", *[""] * 7]
    low_high = result["ratio_quartiles"]
    ours = [
        result["name"] if first else "",
        how(result) if first else "",
        number(result["value"]) if first else "",
        result["unit"] if first else "",
    ]
    ratio = DASH if result["ratio"] is None else f"{result['ratio']:.2f}x"
    theirs = [
        result["peer"] or DASH,
        number(result["peer_value"]),
        ratio if result["valid"] else f"{ratio} INVALID",
        DASH if low_high is None else f"{low_high[0]:.2f}-{low_high[1]:.2f}",
    ]
    share = result["roofline_share"]
    return [*ours, *theirs, DASH if share is None else f"{share:.0%}", _memory(result)]


def how(result: Result) -> str:
    """Which of our sides: `exact`, `fast bf16`."""
    return result["mode"] + (" bf16" if result.get("dtype") == "bfloat16" else "")


def _memory(result: Result) -> str:
    """Ours / theirs."""
    peaks = (result.get("peak_rss_bytes"), result.get("peer_peak_rss_bytes"))
    return " / ".join(f"{peak / GIB:.1f}" for peak in peaks if peak) or DASH


def number(value: float | None) -> str:
    """Three digits, thousands with commas."""
    if value is None:
        return DASH
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def notes(results: Sequence[Result]) -> list[str]:
    """What a reader must know of them."""
    found = []
    for result in results:
        if result.get("error"):
            found.append(f"{result['name']} failed: {result['error']}")
        elif not result["valid"]:
            found.append(
                f"{result['name']} {how(result)} against {result['peer']}: the first losses "
                f"differ by {result['loss_difference'] or float('nan'):.1e}: not the same work, "
                "the ratio means nothing"
            )
    disturbed = sorted({r["name"] for r in results if (r.get("disturbed") or 0) > 0.1})
    if disturbed:
        found.append(
            f"other processes used more than a tenth of the cores during {', '.join(disturbed)}"
        )
    return found


def limits_line(limits: Mapping[str, Any]) -> str:
    return (
        f"limits: {limits['flops'] / 1e9:,.0f} GFLOP/s (float32 product), "
        f"{limits['stream_bytes_s'] / 1e9:,.0f} GB/s (triad), "
        f"{limits['gather_rows_s'] / 1e6:,.0f} M rows/s (gather of {limits['gather_width']} floats)"
    )
