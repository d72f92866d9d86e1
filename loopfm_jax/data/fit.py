"""What is learned from the FM window, for `encode` to apply: vocabularies, buckets, means.

Rows are counted as they are read; counts of parts of a log add up, so that parts may be counted
apart.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import polars as pl

from loopfm_jax.data.coding import Coded, as_text, code, hashed
from loopfm_jax.data.raw import Column, RawLog, Sequences
from loopfm_jax.data.schema import Numeric

ROUNDING = 1e-12


@dataclass(frozen=True)
class Fitted:
    """What was learned from the FM window."""

    vocabularies: Mapping[str, pl.DataFrame]
    """value, id (local) of every column that owns a vocabulary."""
    numeric: tuple[Numeric, ...]


@dataclass(frozen=True)
class Part:
    """One discrete column: its values as codes, and how often the FM window holds each."""

    column: Column
    coded: Coded
    counts: np.ndarray
    lengths: np.ndarray | None = None
    """Values per row of a multi-valued column."""


def discrete(raw: RawLog) -> list[Column]:
    return [c for c in raw.columns if c.kind != "numeric" or c.buckets]


def continuous(raw: RawLog) -> list[Column]:
    return [c for c in raw.columns if c.kind == "numeric" and not c.buckets]


def count_values(raw: RawLog, frame: pl.DataFrame) -> dict[str, pl.DataFrame]:
    """Column -> value, count in rows of the FM window; for columns that are fitted by counts."""
    parts = [split(frame[c.name], c, len(frame)) for c in discrete(raw)]
    return {p.column.name: _counted(p).filter(pl.col("count") > 0) for p in parts}


def fit_counts(raw: RawLog, counts: Mapping[str, pl.DataFrame]) -> dict[str, pl.DataFrame]:
    """The vocabularies of columns whose values `count_values` has counted."""
    columns = {c.name: c for c in raw.columns}
    return {n: _ranked([seen], min_count=columns[n].min_count) for n, seen in counts.items()}


def fit_numbers(raw: RawLog, column: str, values: np.ndarray) -> Numeric:
    """Mean and scale of a numeric column in the FM window."""
    return scale(next(c for c in continuous(raw) if c.name == column), values)


def split(values: pl.Series, column: Column, fm_rows: int) -> Part:
    """A column in time order."""
    if column.kind == "sequence":
        return _split_lists(values, column, fm_rows)
    coded = _buckets(values, column, fm_rows) if column.buckets else code(values)
    coded = hashed(coded, column.hashed) if column.hashed else coded
    return Part(column, coded, Coded(coded.codes[:fm_rows], coded.texts).counts())


def _split_lists(values: pl.Series, column: Column, fm_rows: int) -> Part:
    """Lists without their missing values, of which the last `length` are kept."""
    lists = values.cast(pl.List(pl.String))
    kept = lists.list.eval(pl.element().filter(pl.element() != "")).list.tail(column.length)
    lengths = kept.list.len().fill_null(0).to_numpy().astype(np.int32)
    coded = code(kept.filter(kept.list.len() > 0).explode())
    seen = Coded(coded.codes[: int(lengths[:fm_rows].sum())], coded.texts)
    return Part(column, coded, seen.counts(), lengths)


def side_parts(group: Sequences, frame: pl.DataFrame, fm_order: pl.Series) -> list[Part]:
    """Columns stored beside the log, counted by the FM rows whose slices cover each value."""
    end = frame[f"{group.name}/end"].gather(fm_order).to_numpy()
    length = frame[f"{group.name}/length"].gather(fm_order).to_numpy()
    size = len(next(iter(group.values.values())).codes)
    cover = np.zeros(size + 1, np.int32)
    np.add.at(cover, end - length, 1)
    np.add.at(cover, end, -1)
    np.cumsum(cover, out=cover)
    return [
        Part(c, group.values[c.name], group.values[c.name].counts(cover[:size]))
        for c in group.columns
    ]


def _buckets(values: pl.Series, column: Column, fm_rows: int) -> Coded:
    """Quantile buckets of the FM window."""
    numbers = values.cast(pl.Float64).to_numpy()
    edges = np.unique(np.quantile(numbers[:fm_rows], np.linspace(0, 1, column.buckets + 1)))
    buckets = np.searchsorted(edges[1:-1], numbers, side="right").astype(np.int32)
    return Coded(buckets, as_text(pl.int_range(max(len(edges) - 1, 1), eager=True)))


def fit(parts: list[Part], raw: RawLog) -> dict[str, pl.DataFrame]:
    """value, id of every column that owns a vocabulary."""
    owners = [p.column for p in parts if not p.column.shares]
    return {
        c.name: _given(raw.pretrained[c.name].ids)
        if c.name in raw.pretrained
        else _numbered(as_text(pl.int_range(c.hashed, eager=True)))
        if c.hashed
        else _most_frequent(
            [p for p in parts if c.name in (p.column.name, p.column.shares)],
            min_count=c.min_count,
        )
        for c in owners
    }


def _most_frequent(parts: list[Part], *, min_count: int) -> pl.DataFrame:
    return _ranked([_counted(p) for p in parts], min_count=min_count)


def _counted(part: Part) -> pl.DataFrame:
    return pl.DataFrame({"value": part.coded.texts, "count": part.counts})


def _ranked(seen: list[pl.DataFrame], *, min_count: int) -> pl.DataFrame:
    """Ids from 1 on by falling count, ties by value."""
    counts = pl.concat(seen).filter(pl.col("count") > 0).group_by("value").agg(pl.sum("count"))
    kept = counts.filter(pl.col("count") >= min_count)
    return _numbered(kept.sort(["count", "value"], descending=[True, False])["value"])


def _given(ids: pl.Series) -> pl.DataFrame:
    """The rows of a pretrained table, in its order."""
    return _numbered(as_text(ids))


def _numbered(values: pl.Series) -> pl.DataFrame:
    ids = pl.int_range(1, len(values) + 1, eager=True)
    return pl.DataFrame({"value": values, "id": ids})


@np.errstate(over="ignore", invalid="ignore")  # what does not fit is refused where it is used
def scale(column: Column, values: np.ndarray) -> Numeric:
    mean, std = float(values.mean()), float(values.std())
    if std <= ROUNDING * abs(mean):  # a constant; the rounding of its mean is no scale
        std = 1.0
    return Numeric(column.name, mean, std, column.log, column.fm_only)
