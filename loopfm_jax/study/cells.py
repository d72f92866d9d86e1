"""A study is a list of tables, a table a list of cells, a cell one experiment.

Cells of different tables that ask for the same experiment are the same run: stages are named by
what they are made of (`flow.Flow.shared`), so whatever was done is found again.
"""

from collections.abc import Mapping
from dataclasses import dataclass, is_dataclass, replace
from typing import Any

from loopfm_jax.config import Config


@dataclass(frozen=True)
class Cell:
    """One number of a table: a method in an experiment."""

    row: str
    column: str
    method: str
    changes: Mapping[str, Any]
    """What differs from the study's configuration: dotted option -> value."""

    @property
    def place(self) -> tuple[str, str]:
        return self.row, self.column


@dataclass(frozen=True)
class Table:
    """Cells in the order in which rows and columns appear."""

    name: str
    title: str
    cells: tuple[Cell, ...]
    reference: str | None = None
    """Row against which every other is tested, in each column; None: the row `base`, if any."""
    curve: bool = False
    """Rows are numbers: drawn as curves, one per column."""

    @property
    def rows(self) -> list[str]:
        return list(dict.fromkeys(cell.row for cell in self.cells))

    @property
    def columns(self) -> list[str]:
        return list(dict.fromkeys(cell.column for cell in self.cells))


def changed(config: Config, changes: Mapping[str, Any]) -> Config:
    """The configuration with dotted options set: `{"history.length": 10}`.

    Options of one part are set together: some are valid only with each other.
    """
    nested: dict[str, Any] = {}
    for path, value in changes.items():
        *parents, name = path.split(".")
        inner = nested
        for parent in parents:
            inner = inner.setdefault(parent, {})
        inner[name] = value
    return _set(config, nested)


def _set(part: Any, nested: Mapping[str, Any]) -> Any:
    for name in nested:
        if not is_dataclass(part) or not hasattr(part, name):
            raise ValueError(f"no option {name!r} in {type(part).__name__}")
    values = {
        name: _set(getattr(part, name), value) if isinstance(value, dict) else value
        for name, value in nested.items()
    }
    return replace(part, **values)  # pyright: ignore[reportArgumentType]
