"""The whole of `loopfm study`: tables by name -> runs -> numbers -> JSON, page and pictures."""

import time
from dataclasses import replace
from datetime import date
from importlib.metadata import version
from typing import Any

import jax

from loopfm_jax.config import Config
from loopfm_jax.data.log import read_schema
from loopfm_jax.flow import Flow
from loopfm_jax.report import finite
from loopfm_jax.stages import PACKAGES
from loopfm_jax.study import render
from loopfm_jax.study.cells import Table
from loopfm_jax.study.decomposition import LIMITS, decompose
from loopfm_jax.study.plan import possible, with_taps
from loopfm_jax.study.run import Results, limits, run
from loopfm_jax.study.summary import summarise
from loopfm_jax.study.tables import find_tables


def make(config: Config, *, command: str) -> dict[str, Any]:
    """Runs what is not there yet, writes the study, returns its JSON."""
    started = time.monotonic()
    find_tables(config.study.tables, config)  # a name that is none is found before anything runs
    flow = Flow(config, shared=True)
    flow.prepare()
    schema = read_schema(flow.data)
    config = with_taps(config, schema)
    tables = possible(find_tables(config.study.tables, config), config, schema)
    flow = replace(flow, config=config)
    results = run(flow, tables)
    summaries = [summarise(table, results, dataset=config.data.name) for table in tables]
    for table, summary in zip(tables, summaries, strict=True):
        if table.name == "decomposition":
            summary["terms"] = _terms(flow, table, results)
    study = {
        "dataset": config.data.name,
        "date": date.today().isoformat(),
        "command": command,
        "holdout": config.holdout,
        "seeds": config.seeds,
        "minutes": (time.monotonic() - started) / 60,
        "device": jax.devices()[0].device_kind,
        "versions": {name: version(name) for name in PACKAGES},
        "tables": summaries,
    }
    study = finite(study)
    render.write(study, config.workdir)
    return study


def _terms(flow: Flow, table: Table, results: Results) -> dict[str, Any]:
    """Column -> term -> estimate."""
    known, found = limits(flow), {}
    for column in table.columns:
        losses = {
            cell.row: results[table.name, cell.place].loss
            for cell in table.cells
            if cell.column == column
        }
        names = LIMITS[column]
        found[column] = decompose(
            losses, {row: known[name] for row, name in names.items()} if known else None
        )
    return found


def headline(study: dict[str, Any]) -> dict[str, Any]:
    """The last line of stdout: AUC and what it lies above the reference, by table, row, column."""
    kept = ("row", "column", "auc", "delta_auc", "delta_auc_se", "p")
    return {
        "dataset": study["dataset"],
        "minutes": round(study["minutes"], 1),
        "tables": {
            table["name"]: [{k: cell[k] for k in kept if k in cell} for cell in table["cells"]]
            for table in study["tables"]
        },
        "decomposition": next((t["terms"] for t in study["tables"] if "terms" in t), None),
    }
