"""Raw columns -> ids in one fused space and normalised floats.

Everything that is fitted (vocabularies, means, buckets) is fitted on the FM window only
(DESIGN: nothing later may leak into the teacher), then applied to all rows.
"""

from dataclasses import dataclass

import numpy as np
import polars as pl

from loopfm_jax.data.raw import Column, RawLog
from loopfm_jax.data.schema import Behaviour, Field, Numeric, Schema
from loopfm_jax.errors import UserError

PAST = "past_"  # prefix of the sequence fields that are made from the log itself
ROUNDING = 1e-12


@dataclass(frozen=True)
class Ragged:
    """A multi-valued column: `values` of all rows in order, `lengths` per row."""

    values: np.ndarray
    lengths: np.ndarray


@dataclass(frozen=True)
class Encoded:
    """Feature columns of the log in its row order, and what is needed to encode another row."""

    schema: Schema
    ids: np.ndarray
    """[rows, F] int32 fused ids of the categorical fields."""
    ragged: dict[str, Ragged]
    floats: np.ndarray
    """[rows, N] float32."""
    vocabulary: pl.DataFrame
    """field, value, id (local): what stands behind every known id."""


def encode(raw: RawLog, frame: pl.DataFrame, *, fm_rows: int) -> Encoded:
    """Fits on the first `fm_rows` rows of `frame` (in time order) and encodes all of them."""
    discrete = [c for c in raw.columns if c.kind != "numeric" or c.buckets]
    hidden = {c.name for c in raw.columns if c.fm_only}
    text = {c.name: _as_text(frame[c.name], c, fm_rows) for c in discrete}
    vocabularies = {
        c.name: _fit_vocabulary(
            [_flat(text[o.name].head(fm_rows)) for o in discrete if c.name in (o.name, o.shares)],
            min_count=c.min_count,
        )
        for c in discrete
        if not c.shares
    }
    numeric = [c for c in raw.columns if c.kind == "numeric" and not c.buckets]
    floats, normalisers = _normalise(frame, numeric, fm_rows)
    schema = Schema(
        fields=_fields(discrete, hidden, vocabularies) + _past_fields(raw, hidden, vocabularies),
        numeric=normalisers,
        behaviours=_behaviours(raw),
        item=raw.item,
        entity=raw.entity,
    )
    offsets, ids, ragged = schema.offsets, {}, {}
    for c in discrete:
        flat = _to_ids(_flat(text[c.name]), vocabularies[c.shares or c.name], offsets[c.name])
        if c.kind == "sequence":
            lengths = text[c.name].list.len().fill_null(0).to_numpy().astype(np.int32)
            ragged[c.name] = Ragged(flat.to_numpy(), lengths)
        else:
            ids[c.name] = flat.to_numpy()
    return Encoded(
        schema=schema,
        ids=np.stack(list(ids.values()), axis=1) if ids else np.zeros((len(frame), 0), np.int32),
        ragged=ragged,
        floats=floats,
        vocabulary=pl.concat([_named(name, v) for name, v in vocabularies.items()]),
    )


def _as_text(series: pl.Series, column: Column, fm_rows: int) -> pl.Series:
    """Values as strings, or lists of strings of which the last `length` are kept."""
    if column.kind == "sequence":
        kept = series.cast(pl.List(pl.String)).list.eval(pl.element().filter(pl.element() != ""))
        return kept.list.tail(column.length)
    if column.kind == "numeric":
        values = series.cast(pl.Float64).to_numpy()
        edges = np.unique(np.quantile(values[:fm_rows], np.linspace(0, 1, column.buckets + 1)))
        buckets = np.searchsorted(edges[1:-1], values, side="right")
        return pl.Series(column.name, buckets).cast(pl.String)
    return series.cast(pl.String).fill_null("")


def _flat(series: pl.Series) -> pl.Series:
    """One value an entry, whether the column is single- or multi-valued."""
    if series.dtype == pl.String:
        return series
    return series.filter(series.list.len() > 0).explode()


def _fit_vocabulary(parts: list[pl.Series], *, min_count: int) -> pl.DataFrame:
    """value, id: from 1 on by falling count, ties by value."""
    counts = pl.concat([p.rename("value") for p in parts]).value_counts()
    kept = counts.filter(pl.col("count") >= min_count).sort(
        ["count", "value"], descending=[True, False]
    )
    return kept.select("value").with_row_index("id", offset=1).with_columns(pl.col("id").cast(int))


def _to_ids(text: pl.Series, vocabulary: pl.DataFrame, offset: int) -> pl.Series:
    unknown = len(vocabulary) + 1
    local = text.replace_strict(
        vocabulary["value"], vocabulary["id"], default=unknown, return_dtype=pl.Int64
    )
    return (local + offset).cast(pl.Int32)


@np.errstate(over="ignore", invalid="ignore")  # what does not fit is refused below
def _normalise(
    frame: pl.DataFrame, columns: list[Column], fm_rows: int
) -> tuple[np.ndarray, tuple[Numeric, ...]]:
    floats = np.zeros((len(frame), len(columns)), np.float32)
    fitted = []
    for i, column in enumerate(columns):
        values = frame[column.name].cast(pl.Float64).to_numpy()
        values = np.log1p(values) if column.log else values
        mean, std = float(values[:fm_rows].mean()), float(values[:fm_rows].std())
        if std <= ROUNDING * abs(mean):  # a constant; the rounding of its mean is no scale
            std = 1.0
        floats[:, i] = (values - mean) / std
        if not np.isfinite(floats[:, i]).all():
            raise UserError(
                f"column {column.name!r} holds values up to {np.abs(values).max():g}, too large "
                "for float32 once standardised; clip them or drop the column"
            )
        fitted.append(Numeric(column.name, mean, std, column.log, column.fm_only))
    return floats, tuple(fitted)


def _fields(
    columns: list[Column], hidden: set[str], vocabularies: dict[str, pl.DataFrame]
) -> tuple[Field, ...]:
    return tuple(
        Field(
            name=c.name,
            rows=len(vocabularies[c.shares or c.name]) + 2,
            kind="sequence" if c.kind == "sequence" else "categorical",
            length=c.length if c.kind == "sequence" else 1,
            shares=c.shares,
            fm_only=bool(hidden & {c.name, c.shares}),
        )
        for c in columns
    )


def _past_fields(
    raw: RawLog, hidden: set[str], vocabularies: dict[str, pl.DataFrame]
) -> tuple[Field, ...]:
    return tuple(
        Field(
            name=PAST + name,
            rows=len(vocabularies[name]) + 2,
            kind="sequence",
            length=raw.behaviour_length,
            shares=name,
            fm_only=name in hidden,
            from_log=True,
        )
        for name in raw.behaviour
    )


def _behaviours(raw: RawLog) -> tuple[Behaviour, ...]:
    if not raw.behaviour:
        return ()
    return (Behaviour(raw.behaviour, tuple(PAST + name for name in raw.behaviour)),)


def _named(field: str, vocabulary: pl.DataFrame) -> pl.DataFrame:
    return vocabulary.select(pl.lit(field).alias("field"), "value", "id")
