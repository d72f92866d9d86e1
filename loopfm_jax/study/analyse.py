"""`loopfm analyse`: what is in the codes that an FM left behind, and what a VM attends to in them
(PAPER section 3, embedding facts).

Reads a finished `export` and a trained VM; writes analysis.json, .md, .html and the pictures. Codes
are taken as a VM reads them, after quantisation, of a sample of the judged window.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import matplotlib
import numpy as np
from markupsafe import Markup

from loopfm_jax import stages
from loopfm_jax.data.log import load
from loopfm_jax.flow import Flow
from loopfm_jax.fm.train import sample
from loopfm_jax.history.codes import dequantise
from loopfm_jax.history.store import open_export
from loopfm_jax.page import page
from loopfm_jax.plots import Plot
from loopfm_jax.report import finite, pipes, replace_file, text_of
from loopfm_jax.report_parts import Grid
from loopfm_jax.study.attention import analyse_attention
from loopfm_jax.study.codes import neighbours, principal, profiles, spectrum, spread
from loopfm_jax.study.notes import drift_text
from loopfm_jax.study.render import Section
from loopfm_jax.svg import INK, RC, SERIES, new_axes, render, style

SHOWN = 2_000
"""Points of a picture."""
INTRODUCTION = (
    "The paper's codes of TaobaoAd use 32 of 32 dimensions; their 4 largest singular values "
    "explain 28 %, the 8 largest 47 %; their mean norm is 1.71; the profiles of their correlation "
    "with the soft label and with the click agree (rank correlation .95). Entries under 10 minutes "
    "old get 3 times the attention of those 4 to 8 hours old, those of the candidate's category "
    "1.13 to 1.16 times that of others, of its brand 1.04 to 1.06, clicked ones .84 to .97."
)


def analyse(flow: Flow, *, command: str) -> dict[str, Any]:
    """The analysis of a flow's export, written into its working directory; returns the headline."""
    facts = stages.verify(flow.exported)["facts"]
    exported = open_export(flow.exported, facts)
    log, splits = load(flow.data)
    judged = splits[flow.config.holdout]
    rows = sample(np.arange(judged.start, judged.stop))
    example = rows - facts["first"]
    soft, outcome = exported.soft[example], log["label"][rows]
    found: dict[str, Any] = {"dataset": flow.config.data.name, "rows": len(rows), "taps": {}}
    sections = []
    for tap, stored in exported.codes.items():
        z = np.asarray(dequantise(jnp.asarray(stored[example]), exported.codecs[tap]), np.float64)
        found["taps"][tap] = {
            **spectrum(z),
            **spread(z),
            **profiles(z, soft, outcome),
            "losses": facts["losses"][tap],
        }
        sections.append(_section(tap, found["taps"][tap], z, soft))
    found["attention"] = analyse_attention(flow)
    sections.append(_attention_section(found["attention"]))
    found["drift"] = facts.get("drift", [])
    _write(finite(found), sections, flow.root, command=command)
    taps = {t: {k: v[k] for k in ("effective_rank", "norm")} for t, v in found["taps"].items()}
    attention = {k: v for k, v in found["attention"].items() if k != "classes"}
    return found | {"taps": taps, "attention": attention}


def _section(tap: str, found: Mapping[str, Any], z: np.ndarray, soft: np.ndarray) -> Section:
    rows = [
        ["dimensions in use", f"{found['used']} of {found['width']}"],
        ["effective rank", f"{found['effective_rank']:.1f}"],
        ["variance in 4, in 8 directions", f"{found['top_4']:.1%}, {found['top_8']:.1%}"],
        ["range", f"{found['low']:.2f} to {found['high']:.2f}"],
        ["norm", f"{found['norm']:.2f} ± {found['norm_sd']:.2f}"],
        ["profiles agree (rank correlation)", f"{found['profiles_agree'] or 0:.2f}"],
        *[[f"variance lost: {name}", f"{v:.2%}"] for name, v in found["losses"].items() if v],
    ]
    some = np.random.default_rng(0).permutation(len(z))[:SHOWN]
    with matplotlib.rc_context(RC):
        figures = [_spectrum_plot(tap, found), _profile_plot(tap, found)]
        figures.append(_points(f"{tap}: principal components", principal(z[some]), soft[some]))
        near = neighbours(z[some])
        if near is not None:
            figures.append(_points(f"{tap}: t-SNE", near, soft[some]))
    return Section(f"Tap {tap}", Grid(["fact", "value"], rows), [], figures)


def _attention_section(found: Mapping[str, Any]) -> Section:
    title = "Attention over histories"
    if "missing" in found:
        return Section(title, Grid(["not looked at"], [[found["missing"]]]), [], [])
    rows = [
        [c["by"], c["entries"], f"{c['share']:.1%}", f"{c['attention']:.3f} ± {c['se']:.3f}"]
        for c in found["classes"]
    ]
    note = (
        f"Of the VM {found['method']} with the encoder {found['encoder']}, mean over its heads, in "
        f"{found['histories']:,} histories of two entries or more. 1 is an even share."
    )
    with matplotlib.rc_context(RC):
        figure = _attention_plot([c for c in found["classes"] if c["by"] == "age"])
    grid = Grid(["by", "entries", "share of entries", "attention"], rows, left=2)
    return Section(title, grid, [note], [figure])


def _attention_plot(ages: list[Mapping[str, Any]]) -> Plot:
    figure, axes = new_axes(height=2.9)
    colour, _, marker = SERIES[style("loopfm")]
    values, errors = [c["attention"] for c in ages], [c["se"] for c in ages]
    axes.axvline(1, color=INK, linewidth=1)
    axes.errorbar(values, range(len(ages)), xerr=errors, color=colour, marker=marker)
    axes.set_yticks(range(len(ages)), [c["entries"] for c in ages])
    axes.set_ylim(len(ages) - 0.5, -0.5)
    axes.set_xlabel("attention against an even share")
    title = "Attention by the age of the entry"
    caption = "Bars: one standard error over histories."
    return Plot(title, caption, render(figure, title))


def _spectrum_plot(tap: str, found: Mapping[str, Any]) -> Plot:
    figure, axes = new_axes(height=2.6)
    values = np.array(found["singular_values"])
    axes.plot(np.arange(1, len(values) + 1), values, color=SERIES[style("loopfm")][0], marker="^")
    axes.set_xlabel("direction")
    axes.set_ylabel("singular value")
    title = f"{tap}: singular values"
    return Plot(title, "A flat curve uses its numbers well.", render(figure, title))


def _profile_plot(tap: str, found: Mapping[str, Any]) -> Plot:
    figure, axes = new_axes(height=2.9)
    colour, _, marker = SERIES[style("kd")]
    axes.scatter(found["with_soft_label"], found["with_outcome"], color=colour, marker=marker)
    axes.set_xlabel("correlation with the soft label")
    axes.set_ylabel("with the outcome")
    title = f"{tap}: every dimension against what it should know"
    return Plot(title, "One point per dimension.", render(figure, title))


def _points(title: str, at: np.ndarray, soft: np.ndarray) -> Plot:
    """Codes in the plane, in three colours by soft label."""
    figure, axes = new_axes(height=3.6)
    thirds = np.array_split(np.argsort(soft, kind="stable"), 3)
    names = {"low": "base", "middle": "loopfm", "high": "kd"}
    for (name, method), rows in zip(names.items(), thirds, strict=True):
        colour, _, _ = SERIES[style(method)]
        axes.scatter(at[rows, 0], at[rows, 1], s=3, color=colour, label=name, linewidths=0)
    axes.set_xticks([])
    axes.set_yticks([])
    figure.legend(loc="outside upper left", ncols=3, markerscale=4)
    caption = "Each point is a row; colours: the lower, middle and upper third of soft labels."
    return Plot(title, caption, render(figure, title))


def _write(
    found: Mapping[str, Any], sections: list[Section], directory: Path, *, command: str
) -> None:
    days = found["drift"]
    parts = [f"# What is in the codes: {text_of(found['dataset'])}", INTRODUCTION]
    for section in sections:
        parts += [f"## {section.title}", pipes(section.grid), *section.notes]
    shown = [
        s._replace(figures=[p._replace(svg=Markup(p.svg)) for p in s.figures]) for s in sections
    ]
    texts = {
        "analysis.json": json.dumps(found, indent=1, allow_nan=False) + "\n",
        "analysis.md": "\n\n".join(parts) + "\n",
        "analysis.html": page(
            "study",
            title=f"{found['dataset']}: what is in the codes",
            subtitle=f"{found['rows']:,} rows of the judged window",
            introduction=INTRODUCTION,
            sections=shown,
            command=command,
            facts=[("Drift", drift_text(days) if days else "none: one frozen FM logged all rows")],
        ),
    }
    for name, text in texts.items():
        replace_file(directory / name, text)
