"""A study for people: study.md, study.html and one SVG per picture, from its JSON."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.ticker import MaxNLocator

from loopfm_jax.page import page
from loopfm_jax.plots import Plot
from loopfm_jax.report import pipes, replace_file, text_of
from loopfm_jax.report_parts import DASH, Grid
from loopfm_jax.study.notes import notes
from loopfm_jax.study.paper import PAPER
from loopfm_jax.svg import INK, RC, SERIES, draw_legend, new_axes, render, standalone, style

INTRODUCTION = (
    "Every number is the AUC of a vertical model on the judged window, mean over seeds, with "
    "what it lies above the table's reference, with the standard error of that difference, paired "
    "by seed. TR is the share of the FM's gain over base, in LogLoss, that arrived (a dash where "
    "the FM is not clearly better than base). Where the paper's numbers stand beside ours, they "
    "are of {paper}."
)
Table = Mapping[str, Any]


class Section(NamedTuple):
    """One table of the page."""

    title: str
    grid: Grid
    notes: list[str]
    figures: list[Plot]


def write(study: dict[str, Any], directory: Path) -> None:
    """Writes study.json, study.md, study.html and the pictures, each complete or not at all."""
    sections = [_section(table) for table in study["tables"]]
    texts = {
        "study.json": json.dumps(study, indent=1, allow_nan=False) + "\n",
        "study.md": markdown(study, sections),
        "study.html": _html(study, sections),
    }
    for table, section in zip(study["tables"], sections, strict=True):
        for plot in section.figures:
            texts[f"{table['name']}.svg"] = standalone(plot.svg)
    for name, text in texts.items():
        replace_file(directory / name, text)


def markdown(study: Mapping[str, Any], sections: list[Section]) -> str:
    parts = [f"# Study: LoopFM on {text_of(study['dataset'])}", _introduction(study)]
    for section in sections:
        parts += [f"## {section.title}", pipes(section.grid)]
        parts += [f"> {text_of(note)}" for note in section.notes]
    parts += ["## How the numbers came about", "    " + study["command"]]
    parts.append("\n".join(f"- {title}: {text_of(said)}" for title, said in _facts(study)))
    return "\n\n".join(parts) + "\n"


def _html(study: Mapping[str, Any], sections: list[Section]) -> str:
    return page(
        "study",
        title=f"{study['dataset']}: study",
        subtitle=f"{study['date']}, judged on the {study['holdout']} window",
        introduction=_introduction(study),
        sections=[
            s._replace(figures=[p._replace(svg=Markup(p.svg)) for p in s.figures]) for s in sections
        ],
        command=study["command"],
        facts=_facts(study),
    )


def _introduction(study: Mapping[str, Any]) -> str:
    other = "TaobaoAd, another log: compare orders, not values"
    return INTRODUCTION.format(paper="this data set" if study["dataset"] in PAPER else other)


def _facts(study: Mapping[str, Any]) -> list[tuple[str, str]]:
    versions = ", ".join(f"{name} {v}" for name, v in study["versions"].items())
    return [
        ("Seeds", str(study["seeds"])),
        ("Minutes", f"{study['minutes']:.1f} (cells that were there already took none)"),
        ("Device", study["device"]),
        ("Versions", versions),
    ]


def _section(table: Table) -> Section:
    grid = _decomposition_grid(table) if table["name"] == "decomposition" else _grid(table)
    with matplotlib.rc_context(RC):
        figures = [_curves(table) if table["curve"] else _bars(table)]
    return Section(table["title"], grid, notes(table), [plot for plot in figures if plot])


# Tables


def _grid(table: Table) -> Grid:
    """Rows by columns: AUC, what it is above the reference, and the paper's AUC; a table of one
    column also says what its cells cost."""
    columns, cells = table["columns"], _cells(table)
    paper, ratio = (
        {c for c in columns if any(cells[k][fact] for k in cells if k[1] == c)}
        for fact in ("paper_auc", "transfer_ratio")
    )
    head, rows = ["" if len(columns) > 1 else "row"], []
    for column in columns:
        prefix = f"{column} " if column else ""
        head += [f"{prefix}AUC", f"{prefix}± SE"]
        head += ["TR"] if column in ratio else []
        head += ["paper"] if column in paper else []
    extra = _extras(table) if len(columns) == 1 else {}
    for row in table["rows"]:
        line = [row]
        for column in columns:
            cell = cells.get((row, column))
            line += [_decimals(cell["auc"] if cell else None), _delta(cell)]
            line += [_ratio(cell)] if column in ratio else []
            line += [_decimals(cell["paper_auc"] if cell else None)] if column in paper else []
        rows.append(line + [extra[name][row] for name in extra])
    return Grid(head + list(extra), rows)


def _extras(table: Table) -> dict[str, dict[str, str]]:
    """More columns of a table of one column: name -> row -> text."""
    cells = {cell["row"]: cell for cell in table["cells"]}
    found = {
        "p": {row: _p(cell) for row, cell in cells.items()},
        "seeds won": {row: str(cell.get("seeds_won", DASH)) for row, cell in cells.items()},
        "gAUC": {row: _decimals(cell["gauc"]) for row, cell in cells.items()},
        "NE": {row: _decimals(cell["ne"]) for row, cell in cells.items()},
    }
    if table["name"] == "code":
        lost = {r: next(iter(c["losses"].values()), {}) for r, c in cells.items()}
        found["bytes"] = {row: str(cell["bytes_per_row"]) for row, cell in cells.items()}
        found["variance lost"] = {r: _decimals(v.get("quantised")) for r, v in lost.items()}
    return found


def _decomposition_grid(table: Table) -> Grid:
    terms = table["terms"]
    rows = []
    for column, found in terms.items():
        for name, term in found.items():
            truth = term.get("truth")
            away = abs(term["estimate"] - truth) / term["se"] if truth is not None else None
            rows.append(
                [
                    column,
                    name,
                    f"{term['estimate']:+.5f}",
                    f"{term['se']:.5f}",
                    DASH if truth is None else f"{truth:+.5f}",
                    DASH if away is None else f"{away:.1f}",
                ]
            )
    return Grid(["histories", "term", "nats", "SE", "truth", "SEs apart"], rows, left=2)


def _cells(table: Table) -> dict[tuple[str, str], Mapping[str, Any]]:
    return {(cell["row"], cell["column"]): cell for cell in table["cells"]}


def _decimals(value: float | None) -> str:
    return DASH if value is None else f"{value:.4f}"


def _ratio(cell: Mapping[str, Any] | None) -> str:
    value = cell["transfer_ratio"] if cell else None
    return DASH if value is None else f"{value:.2f}"


def _delta(cell: Mapping[str, Any] | None) -> str:
    if not cell or "delta_auc" not in cell:
        return DASH
    error = cell.get("delta_auc_se")
    return f"{cell['delta_auc']:+.4f}" + ("" if error is None else f" ± {error:.4f}")


def _p(cell: Mapping[str, Any]) -> str:
    p = cell.get("p")
    return DASH if p is None or not np.isfinite(p) else f"{p:.1g}"


# Pictures


def _curves(table: Table) -> Plot | None:
    cells, place = _cells(table), np.arange(len(table["rows"]))
    figure, axes = new_axes(height=3.2)
    for column in table["columns"]:
        found = [cells.get((row, column)) for row in table["rows"]]
        values = [np.nan if c is None else c["auc"] for c in found]
        errors = [0.0 if c is None else c.get("auc_sd", 0.0) for c in found]
        colour, _, marker = SERIES[style(column)]
        axes.errorbar(
            place, values, yerr=errors, color=colour, marker=marker, label=column, capsize=3
        )
    axes.set_xticks(place, table["rows"], rotation=0 if len(table["rows"][0]) < 6 else 20)
    axes.set_ylabel("AUC")
    draw_legend(figure, table["columns"])
    caption = "Bars: one standard deviation over seeds."
    return Plot(table["title"], caption, render(figure, f"study {table['name']}"))


def _bars(table: Table) -> Plot | None:
    """What every row lies above the reference, one marker per column."""
    cells = _cells(table)
    tested = {row for (row, _), cell in cells.items() if "delta_auc" in cell}
    rows = [row for row in table["rows"] if row in tested]
    if not rows:
        return None
    figure, axes = new_axes(height=0.9 + 0.3 * len(rows))
    axes.axvline(0, color=INK, linewidth=1)
    for i, column in enumerate(table["columns"]):
        colour, _, marker = SERIES[(i + 3) % len(SERIES)]
        found = [(y, cells.get((row, column), {})) for y, row in enumerate(rows)]
        found = [(y, cell) for y, cell in found if "delta_auc" in cell]
        axes.errorbar(
            [cell["delta_auc"] for _, cell in found],
            [y + 0.16 * (i - (len(table["columns"]) - 1) / 2) for y, _ in found],
            xerr=[cell.get("delta_auc_se", 0.0) for _, cell in found],
            color=colour,
            marker=marker,
            linestyle="none",
            capsize=3,
            label=column,
        )
    axes.set_yticks(range(len(rows)), rows)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.grid(False, axis="y")
    axes.set_xlabel(f"AUC above {table['reference']}")
    draw_legend(figure, table["columns"])
    caption = "Bars: one standard error of the mean difference, paired by seed."
    return Plot(table["title"], caption, render(figure, f"study {table['name']}"))
