"""The sentences under a study's tables."""

from collections.abc import Mapping
from typing import Any

Table = Mapping[str, Any]


def notes(table: Table) -> list[str]:
    """What is to be said of a table (JSON of `summary.summarise`)."""
    if table["name"] == "decomposition":
        return _pipeline(table)
    return [*_order(table), *_chosen(table), *_drifts(table), *_needs_fm(table)]


def _order(table: Table) -> list[str]:
    """How often two rows stand to each other as they do in the paper."""
    notes = []
    for column, order in table["order"].items():
        same, other, close = (order[k] for k in ("as_published", "other_way", "within_error"))
        pairs = len(same) + len(other) + len(close)
        if pairs < 2:
            continue
        said = "; ".join(f"{worse} over {better}" for worse, better in other)
        notes.append(
            f"{column + ': ' if column else ''}of {pairs} pairs of rows, {len(same)} stand as in "
            f"the paper, {len(close)} are within two standard errors of each other, {len(other)} "
            f"stand the other way{': ' + said if said else ''}."
        )
    return notes


def _pipeline(table: Table) -> list[str]:
    """What histories lose before a VM reads them."""
    losses = next(
        c["losses"] for c in table["cells"] if (c["row"], c["column"]) == ("loopfm", "plain")
    )
    return [
        f"Tap {tap}: the code leaves out {found['code']:.1%} of the activation's variance, storing "
        f"it {found['quantised']:.2%} of the code's."
        for tap, found in losses.items()
        if found.get("code") is not None
    ] + ["L_quantised is what storing costs the VM, against codes of full precision."]


def _chosen(table: Table) -> list[str]:
    found = {c["row"]: c["chosen"] for c in table["cells"] if c["chosen"] != c["method"]}
    return [f"{row} chose {method} on the validation window." for row, method in found.items()]


def _drifts(table: Table) -> list[str]:
    found = {cell["changes"].get("export.refresh"): cell["drift"] for cell in table["cells"]}
    return [f"{kind}: {drift_text(days)}." for kind, days in found.items() if days]


def drift_text(days: list[Mapping[str, Any]]) -> str:
    """How far codes went by the last checkpoint of an FM that goes on learning."""
    last = days[-1]
    return (
        f"after {last['day']} checkpoints the mean code is {last['centroid']:.3f} from the first "
        f"one's, and the mean cosine of both codes of a row is {last['cosine']:.2f}"
    )


def _needs_fm(table: Table) -> list[str]:
    rows = dict.fromkeys(c["row"] for c in table["cells"] if c["needs_fm"])
    return [f"{', '.join(rows)}: the FM would have to run when the VM serves."] if rows else []
