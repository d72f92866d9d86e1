"""What a report is made of: tables as cells of text, and the sentences around them."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from scipy.special import stdtrit

DASH = "–"
CONFIDENCE = 0.975  # two-sided 95 %: what a difference must pass to be called one
WORDS = {
    "FM": "the foundation model: large, trained once, too slow to serve.",
    "VM": "a vertical model: small, serves traffic, never calls the FM.",
    "base": "a VM trained without any help from the FM.",
    "kd": "knowledge distillation: the VM also learns to predict the FM's click probability.",
    "loopfm": "the FM's compressed embeddings of past impressions are an input of the VM.",
    "AUC": "how often a clicked row is ranked above one that was not; 0.5 is chance, 1 perfect.",
    "gAUC": "AUC within each user, averaged by rows: the ranking a user would notice.",
    "LogLoss": "mean surprise of the model by what happened, in nats; lower is better.",
    "NE": "normalised entropy: LogLoss divided by that of always predicting the average click "
    "rate. Below 1 the model knows something; lower is better.",
    "calibration": "mean predicted click probability over the observed click rate; 1 is right.",
    "TR": "transfer ratio: the NE a VM gained over base, as a share of the NE by which the FM "
    "beats base. 0: nothing arrived, 1: everything.",
    "SE, SD": "standard error of the mean difference to base, paired by seed; standard deviation "
    "over seeds.",
}
CONTROLS = {
    "swapped-histories": "every row reads the history of another user",
    "shuffled-labels": "the FM was trained on permuted labels and knows nothing true",
}
BAYES = {
    "bayes_vm": "what the VM sees of the row",
    "bayes_vm_items": "and the user's past items",
    "bayes_vm_raw_history": "and their clicks",
    "bayes_vm_codes": "and what the FM saw of the user's past, without clicks",
    "bayes_vm_history": "and what the FM saw of the user's past",
    "bayes_fm_history": "and what the FM sees of the row",
}


class Grid(NamedTuple):
    """A table as text; the first `left` columns are words, the others numbers."""

    head: list[str]
    rows: list[list[str]]
    left: int = 1

    def without(self, *heads: str) -> "Grid":
        """The table without these columns."""
        keep = [i for i, h in enumerate(self.head) if h not in heads]
        return Grid(
            [self.head[i] for i in keep], [[r[i] for i in keep] for r in self.rows], self.left
        )


# Cells and tables


def _decimals(row: Mapping[str, Any], key: str) -> str:
    return DASH if row.get(key) is None else f"{row[key]:.4f}"


def _count(row: Mapping[str, Any], key: str) -> str:
    return DASH if row.get(key) is None else f"{row[key]:,.0f}"


def _delta(row: Mapping[str, Any], key: str) -> str:
    if row.get(key) is None:
        return DASH
    error = row.get(f"{key}_se")
    return f"{row[key]:+.4f}" + ("" if error is None else f" ± {_small(error)}")


def _small(error: float) -> str:
    return f"{error:.4f}" if error >= 5e-5 or error == 0 else f"{error:.0e}"


def _ratio(row: Mapping[str, Any], key: str) -> str:
    return DASH if row.get(key) is None else f"{row[key]:.2f}"


COLUMNS: dict[str, tuple[str, Callable[[Mapping[str, Any], str], str]]] = {
    "auc": ("AUC", _decimals),
    "delta_auc": ("delta AUC", _delta),
    "seeds_won": ("seeds won", _count),
    "auc_std": ("SD of AUC", _decimals),
    "gauc": ("gAUC", _decimals),
    "logloss": ("LogLoss", _decimals),
    "ne": ("NE", _decimals),
    "calibration": ("calibration", _decimals),
    "transfer_ratio": ("TR", _ratio),
    "params": ("params", _count),
    "train_examples_per_s": ("examples/s", _count),
}


def metrics_grid(rows: Iterable[tuple[list[str], Mapping[str, Any]]], names: list[str]) -> Grid:
    """Metrics of named rows; a column that no row has is left out."""
    rows = list(rows)
    keys = [k for k in COLUMNS if any(row.get(k) is not None for _, row in rows)]
    heads = [COLUMNS[k][0] for k in keys]
    if any(row.get("delta_auc_se") is not None for _, row in rows):
        heads = ["delta AUC ± SE" if h == "delta AUC" else h for h in heads]
    cells = [name + [COLUMNS[k][1](row, k) for k in keys] for name, row in rows]
    return Grid(names + heads, cells, left=len(names))


def main_grid(report: Mapping[str, Any]) -> Grid:
    ratios = report.get("transfer_ratio", {})
    rows = [(["FM"], report["fm"])] if report.get("fm") else []
    for name, row in report.get("methods", {}).items():
        rows.append(([name], {**row, "transfer_ratio": ratios.get(name, {}).get("value")}))
    return metrics_grid(rows, ["method"])


def controls_grid(report: Mapping[str, Any]) -> Grid | None:
    rows = [
        ([control, method], row)
        for control, methods in report.get("controls", {}).items()
        for method, row in methods.items()
    ]
    grid = metrics_grid(rows, ["control", "method"])
    return grid.without("params", "examples/s") if rows else None


def bayes_grid(report: Mapping[str, Any]) -> Grid | None:
    lines = [[k, BAYES.get(k, ""), _decimals({k: v}, k)] for k, v in items(report, "bayes")]
    return Grid(["limit", "what it knows", "NE"], lines, left=2) if lines else None


def lengths_grid(report: Mapping[str, Any]) -> Grid | None:
    table = report.get("by_history_length")
    if not table:
        return None
    columns = [[_decimals({"v": v}, "v") for v in values] for values in table["auc"].values()]
    rows = [f"{n:,}" for n in table["rows"]]
    cells = [list(line) for line in zip(table["bins"], rows, *columns, strict=True)]
    return Grid(["history entries", "rows", *table["auc"]], cells)


def items(report: Mapping[str, Any], key: str) -> list[tuple[str, Any]]:
    return list((report.get(key) or {}).items())


# Sentences


def verdict(report: Mapping[str, Any]) -> str:
    """What came out, in one sentence; a difference counts when it passes a paired t test."""
    methods = report.get("methods", {})
    rivals = {m: r for m, r in methods.items() if m != "base" and r.get("delta_auc") is not None}
    if not rivals:
        return "No method was compared with base."
    best, row = max(rivals.items(), key=lambda item: item[1]["delta_auc"])
    value, error = row["delta_auc"], row.get("delta_auc_se")
    if error is None:
        side = "above" if value > 0 else "not above"
        why = "one seed, so " if report.get("seeds") == 1 else ""
        return f"{best} is {side} base: {value:+.4f} AUC ({why}no standard error)."
    seeds = report.get("seeds") or 2
    size = f"{value:+.4f} AUC ± {_small(error)}"
    won = f"{row.get('seeds_won', 0)} of {seeds} seeds"
    clear = abs(value) > stdtrit(max(seeds - 1, 1), CONFIDENCE) * error
    if clear and value > 0:
        return f"{best} beats base by {size} ({won})."
    if clear:
        return f"Every method is below base; the nearest, {best}, by {size} (ahead in {won})."
    return f"No method is clearly above base; the best, {best}, is at {size} (ahead in {won})."


def subtitle(report: Mapping[str, Any]) -> str:
    """When, how often and on what."""
    seeds, rows = report.get("seeds"), (report.get("rows") or {}).get("test")
    said = [
        report.get("date"),
        f"{seeds} seed{'' if seeds == 1 else 's'}" if seeds else None,
        report.get("device"),
        f"judged on the {report.get('holdout') or 'test'} window",
        f"{rows:,} rows" if rows else None,
    ]
    return " · ".join(str(part) for part in said if part)


def notes(report: Mapping[str, Any]) -> list[str]:
    """What a reader must know before trusting the table."""
    lines = []
    if report.get("holdout") == "validation":
        lines.append("Judged on the validation window; the test window was not looked at.")
    if report.get("seeds") == 1:
        lines.append("One seed: no standard errors. Small differences may be chance.")
    costly = [m for m, row in items(report, "methods") if row.get("needs_fm")]
    if costly:
        lines.append(f"{', '.join(costly)}: the FM would have to run when the VM serves.")
    undefined: dict[str, list[str]] = {}
    for method, ratio in items(report, "transfer_ratio"):
        if ratio.get("value") is None:
            reason = ratio.get("reason") or "no reason given"
            undefined.setdefault(reason, []).append(method)
    lines += [f"TR undefined for {', '.join(m)}: {r}." for r, m in undefined.items()]
    return lines


def facts(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """How the numbers came about."""
    found = [("Windows", report.get("windows"))]
    for title, key in (("Rows", "rows"), ("Histories", "history"), ("Mesh", "mesh")):
        said = [f"{k.replace('_', ' ')} {_plain(v)}" for k, v in items(report, key)]
        found.append((title, ", ".join(said)))
    seconds = items(report, "seconds")
    if seconds:
        total = sum(v for _, v in seconds if v is not None)
        said = [f"{k} {_plain(v)}" for k, v in seconds]
        found.append(("Seconds", f"{', '.join(said)}; together {_plain(total)}"))
    found += [("Seeds", _plain(report.get("seeds"))), ("Device", report.get("device"))]
    found.append(("Versions", ", ".join(f"{k} {v}" for k, v in items(report, "versions"))))
    found.append(("Folder", report.get("workdir")))
    return [(title, str(text)) for title, text in found if text and text != DASH]


def _plain(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.1f}" if abs(value) >= 10 else f"{value:.3g}"
    return DASH if value is None else f"{value:,}" if isinstance(value, int) else str(value)
