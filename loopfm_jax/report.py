"""The report of a run, from one dict of numbers: .json for machines, .md and .html for people.

Every table is built once, as cells of text, and rendered three ways. Whatever the dict lacks is
left out; a number that is not finite is `null` in the JSON and a dash elsewhere.
"""

import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from loopfm_jax import plots, svg
from loopfm_jax.page import page
from loopfm_jax.report_parts import (
    CONTROLS,
    DASH,
    WORDS,
    Grid,
    bayes_grid,
    controls_grid,
    facts,
    lengths_grid,
    main_grid,
    notes,
    subtitle,
    verdict,
)

INTRODUCTION = (
    "LoopFM feeds what a large foundation model (FM) computed about a user's past impressions to "
    "small vertical models (VMs) as features. Below, VMs that differ only in what they get from "
    "the FM are trained and judged on the same rows."
)


def write(report: dict[str, Any], directory: Path) -> None:
    """Writes report.json, report.md and report.html, each complete or not at all."""
    clean = finite(report)
    texts = {
        "report.json": json.dumps(clean, indent=1, allow_nan=False) + "\n",
        "report.md": markdown(clean),
        "report.html": html(clean),
    }
    for name, text in texts.items():
        replace_file(directory / name, text)


def replace_file(path: Path, text: str) -> None:
    """Writes a file, complete or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def finite(value: Any) -> Any:
    """The same in plain JSON types, with null for NaN and infinities."""
    if isinstance(value, Mapping):
        return {str(k): finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    if isinstance(value, (np.ndarray, np.generic)):
        return finite(value.tolist())
    return None if isinstance(value, float) and not math.isfinite(value) else value


def table(report: dict[str, Any]) -> str:
    """The comparison as aligned plain text, for a terminal."""
    report = finite(report)
    parts = [_aligned(main_grid(report).without("SD of AUC", "seeds won"))]
    parts.append("\n".join(notes(report)))
    controls, bayes = controls_grid(report), bayes_grid(report)
    if controls:
        parts.append(_aligned(controls.without("SD of AUC", "seeds won")))
    if bayes:
        parts.append(_aligned(bayes))
    return "\n\n".join(part for part in parts if part)


def _aligned(grid: Grid) -> str:
    """Columns of plain ASCII, which every terminal shows."""
    lines = [
        [cell.replace("±", "+-").replace(DASH, "-") for cell in line]
        for line in (grid.head, *grid.rows)
    ]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    sides = ["<" if i < grid.left else ">" for i in range(len(widths))]
    forms = [f"{{:{s}{w}}}" for s, w in zip(sides, widths, strict=True)]
    texts = ["  ".join(f.format(c) for f, c in zip(forms, x, strict=True)) for x in lines]
    texts.insert(1, "  ".join("-" * w for w in widths))
    return "\n".join(text.rstrip() for text in texts)


def markdown(report: dict[str, Any]) -> str:
    """The report in GitHub's Markdown, without figures."""
    parts = [f"# LoopFM on {text_of(report.get('dataset') or 'a log')}"]
    parts += [text_of(subtitle(report)), f"**{text_of(verdict(report))}**", INTRODUCTION]
    parts.append(pipes(main_grid(report)))
    parts += [f"> {text_of(note)}" for note in notes(report)]
    parts.append("\n".join(f"- **{word}**: {said}" for word, said in WORDS.items()))
    controls, bayes, lengths = controls_grid(report), bayes_grid(report), lengths_grid(report)
    if controls:
        said = [f"- {text_of(c)}: {CONTROLS[c]}" for c in report["controls"] if c in CONTROLS]
        parts += ["## Controls: these should gain nothing", "\n".join(said), pipes(controls)]
    if bayes:
        parts += ["## NE of the known click probabilities: no model can beat them", pipes(bayes)]
    if lengths:
        parts += ["## AUC by history length", pipes(lengths)]
    parts.append("## How the numbers came about")
    parts.append("\n".join(f"- {title}: {text_of(text)}" for title, text in facts(report)))
    if report.get("command"):
        parts.append("    " + " ".join(report["command"].split()))
    return "\n\n".join(part for part in parts if part) + "\n"


def pipes(grid: Grid) -> str:
    """A table in Markdown."""
    rule = [":--" if i < grid.left else "--:" for i in range(len(grid.head))]
    cells = [[text_of(cell) for cell in row] for row in (grid.head, *grid.rows)]
    lines = [cells[0], rule, *cells[1:]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def text_of(text: str) -> str:
    """Text that Markdown shows as it is."""
    return re.sub(r"([\\`*\[\]<>|&])", r"\\\1", " ".join(str(text).split()))


def html(report: dict[str, Any]) -> str:
    """The report as one page."""
    figures = [p._replace(svg=Markup(p.svg)) for p in plots.figures(report)]
    return page(
        "report",
        title=report.get("dataset") or "a log",
        subtitle=subtitle(report),
        command=report.get("command"),
        introduction=INTRODUCTION,
        verdict=verdict(report),
        notes=notes(report),
        main=main_grid(report),
        controls=controls_grid(report),
        controls_words={c: CONTROLS[c] for c in report.get("controls") or {} if c in CONTROLS},
        bayes=bayes_grid(report),
        lengths=lengths_grid(report),
        words=WORDS,
        facts=facts(report),
        figures=figures,
        series={name: svg.style(name) for name in ("FM", *report.get("methods", {}))},
    )
