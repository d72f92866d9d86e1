"""Cells -> numbers of a table: means over seeds, paired differences, the paper's number beside."""

from collections.abc import Mapping
from itertools import permutations
from typing import Any

import numpy as np
from scipy.stats import ttest_rel

from loopfm_jax.evaluate import CLEAR
from loopfm_jax.metrics import Metrics
from loopfm_jax.study.cells import Cell, Table
from loopfm_jax.study.paper import Numbers, published
from loopfm_jax.study.run import Result, Results


def summarise(table: Table, results: Results, *, dataset: str = "") -> dict[str, Any]:
    """The table as JSON: `rows`, `columns`, and per cell the numbers of `_numbers`."""
    cells = {cell.place: results[table.name, cell.place] for cell in table.cells}
    paper, found = published(dataset, table.name), []
    for cell in table.cells:
        result = cells[cell.place]
        reference = cells.get(_reference(table, cell))
        found.append(
            {
                "row": cell.row,
                "column": cell.column,
                "method": cell.method,
                "changes": {name: str(value) for name, value in cell.changes.items()},
                **_numbers(result),
                **({} if reference is None or reference is result else _paired(result, reference)),
                "transfer_ratio": _transfer_ratio(result, cells.get(_base(table, cell))),
                "paper_auc": paper.get(cell.place),
            }
        )
    return {
        "name": table.name,
        "title": table.title,
        "curve": table.curve,
        "rows": table.rows,
        "columns": table.columns,
        "reference": _reference_name(table),
        "cells": found,
        "order": {column: _order(paper, cells, column) for column in table.columns},
    }


def _order(
    paper: Numbers, cells: Mapping[tuple[str, str], Result], column: str
) -> dict[str, list[list[str]]]:
    """Pairs of rows (worse, better in the paper): which are `as_published` here, which are the
    other way, which are within two standard errors of each other; none without repeated seeds."""
    known = [p for p in paper if p in cells and p[1] == column]
    found: dict[str, list[list[str]]] = {"as_published": [], "other_way": [], "within_error": []}
    for worse, better in permutations(known, 2):
        if paper[worse] < paper[better]:
            differences = _differences(cells[better], cells[worse])
            if len(differences) > 1:
                t = differences.mean() / max(_standard_error(differences), 1e-12)
                clear = "as_published" if t > 0 else "other_way"
                found[clear if abs(t) >= CLEAR else "within_error"].append([worse[0], better[0]])
    return found


def _reference_name(table: Table) -> str:
    return table.reference or "base"


def _reference(table: Table, cell: Cell) -> tuple[str, str]:
    name = _reference_name(table)
    return (cell.row, name) if table.curve else (name, cell.column)


def _base(table: Table, cell: Cell) -> tuple[str, str]:
    return (cell.row, "base") if table.curve else ("base", cell.column)


def _transfer_ratio(result: Result, base: Result | None) -> float | None:
    """TR on first launch; None where the FM is not clearly better than the base VM (two standard
    errors of the difference of row losses), as in `evaluate.transfer_ratios`."""
    if base is None or base is result:
        return None
    gain = base.loss - result.fm_loss
    if not gain.mean() > CLEAR * gain.std(ddof=1) / np.sqrt(len(gain)):
        return None
    return float((base.loss - result.loss).mean() / gain.mean())


def _numbers(result: Result) -> dict[str, Any]:
    """Mean over seeds of every metric, AUC's standard deviation, and the cell's facts."""
    means = {f: float(np.mean([getattr(s, f) for s in result.seeds])) for f in Metrics._fields}
    aucs = [seed.auc for seed in result.seeds]
    spread = {"auc_sd": float(np.std(aucs, ddof=1))} if len(aucs) > 1 else {}
    return {**means, **spread, "auc_by_seed": aucs, "fm_auc": result.fm.auc, **result.facts}


def _paired(result: Result, reference: Result) -> dict[str, float]:
    """AUC above the reference, seed by seed, with its standard error and a paired t test."""
    differences = _differences(result, reference)
    found = {"delta_auc": float(differences.mean())}
    if len(differences) > 1:
        found["delta_auc_se"] = _standard_error(differences)
        found["seeds_won"] = int((differences > 0).sum())
        found["p"] = float(ttest_rel(_aucs(result), _aucs(reference)).pvalue)
    return found


def _differences(result: Result, reference: Result) -> np.ndarray:
    """AUC of every seed above that of the reference."""
    return _aucs(result) - _aucs(reference)


def _aucs(result: Result) -> np.ndarray:
    return np.array([seed.auc for seed in result.seeds])


def _standard_error(values: np.ndarray) -> float:
    return float(values.std(ddof=1) / np.sqrt(len(values)))
