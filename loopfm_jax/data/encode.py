"""Raw columns -> ids in one fused space and normalised floats.

Everything that is fitted (vocabularies, means, buckets) is fitted on the FM window only
(DESIGN: nothing later may leak into the teacher), then applied to all rows. What a row of the FM
window holds counts once for every row that holds it, also where rows share its storage.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import polars as pl

from loopfm_jax.data.coding import Coded, as_text, code, hashed
from loopfm_jax.data.raw import Column, Pretrained, RawLog, Sequences
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
    """Feature columns of the log in time order, and what is needed to encode another row."""

    schema: Schema
    columns: tuple[np.ndarray, ...]
    """[rows] int32 fused ids per categorical field."""
    ragged: dict[str, Ragged]
    floats: np.ndarray
    """[rows, N] float32."""
    vocabulary: pl.DataFrame
    """field, value, id (local): what stands behind every known id."""
    sequences: dict[str, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)
    """Codes [S] and the local id of each code, in the smallest type that holds it, per field with
    `slices`: `ids[codes]` may be too large to hold as well."""

    @property
    def ids(self) -> np.ndarray:
        """[rows, F] int32."""
        return np.stack(self.columns, axis=1)


@dataclass(frozen=True)
class _Part:
    """One discrete column: its values as codes, and how often the FM window holds each."""

    column: Column
    coded: Coded
    counts: np.ndarray
    lengths: np.ndarray | None = None
    """Values per row of a multi-valued column."""


def encode(
    raw: RawLog, frame: pl.DataFrame, *, fm_rows: int, order: pl.Series | None = None
) -> Encoded:
    """Fits on the first `fm_rows` rows and encodes all of them.

    Args:
      frame: the columns of `raw.columns` and of its sequences.
      order: row numbers of `frame` in time order; by default as they stand.
    """
    order = pl.int_range(len(frame), eager=True) if order is None else order
    discrete = [c for c in raw.columns if c.kind != "numeric" or c.buckets]
    parts = [_split(frame[c.name].gather(order), c, fm_rows) for c in discrete]
    for group in raw.sequences:
        parts.extend(_side_parts(group, frame, order.head(fm_rows)))
    vocabularies = _fit(parts, raw)
    numeric = [c for c in raw.columns if c.kind == "numeric" and not c.buckets]
    floats, normalisers = _normalise(frame, numeric, order, fm_rows)
    hidden = {p.column.name for p in parts if p.column.fm_only}
    sizes = {name: len(v) + 2 for name, v in vocabularies.items()}
    schema = Schema(
        fields=_fields(parts, hidden, sizes, raw) + _past_fields(raw, hidden, sizes),
        numeric=normalisers,
        behaviours=_behaviours(raw),
        item=raw.item,
        entity=raw.entity,
    )
    columns, ragged, sequences = [], {}, {}
    for name in [p.column.name for p in parts]:
        part = parts.pop(0)  # codes are as large as ids: they go as they are used
        owner = part.column.shares or name
        local = _local_ids(part, vocabularies[owner])
        if owner in raw.pretrained:
            _check_pretrained(part, local, raw.pretrained[owner])
        if schema[name].slices:
            small = np.min_scalar_type(schema[name].rows)
            sequences[name] = part.coded.codes, local.astype(small)
            continue
        fused = (local + schema.offsets[name]).astype(np.int32)[part.coded.codes]
        if part.lengths is None:
            columns.append(fused)
        else:
            ragged[name] = Ragged(fused, part.lengths)
    return Encoded(
        schema=schema,
        columns=tuple(columns),
        ragged=ragged,
        floats=floats,
        vocabulary=pl.concat([_named(name, v) for name, v in vocabularies.items()]),
        sequences=sequences,
    )


def _split(values: pl.Series, column: Column, fm_rows: int) -> _Part:
    """A column in time order."""
    if column.kind == "sequence":
        return _split_lists(values, column, fm_rows)
    coded = _buckets(values, column, fm_rows) if column.buckets else code(values)
    coded = hashed(coded, column.hashed) if column.hashed else coded
    return _Part(column, coded, Coded(coded.codes[:fm_rows], coded.texts).counts())


def _split_lists(values: pl.Series, column: Column, fm_rows: int) -> _Part:
    """Lists without their missing values, of which the last `length` are kept."""
    lists = values.cast(pl.List(pl.String))
    kept = lists.list.eval(pl.element().filter(pl.element() != "")).list.tail(column.length)
    lengths = kept.list.len().fill_null(0).to_numpy().astype(np.int32)
    coded = code(kept.filter(kept.list.len() > 0).explode())
    seen = Coded(coded.codes[: int(lengths[:fm_rows].sum())], coded.texts)
    return _Part(column, coded, seen.counts(), lengths)


def _side_parts(group: Sequences, frame: pl.DataFrame, fm_order: pl.Series) -> list[_Part]:
    """Columns stored beside the log, counted by the FM rows whose slices cover each value."""
    end = frame[f"{group.name}/end"].gather(fm_order).to_numpy()
    length = frame[f"{group.name}/length"].gather(fm_order).to_numpy()
    size = len(next(iter(group.values.values())).codes)
    cover = np.zeros(size + 1, np.int32)
    np.add.at(cover, end - length, 1)
    np.add.at(cover, end, -1)
    np.cumsum(cover, out=cover)
    return [
        _Part(c, group.values[c.name], group.values[c.name].counts(cover[:size]))
        for c in group.columns
    ]


def _buckets(values: pl.Series, column: Column, fm_rows: int) -> Coded:
    """Quantile buckets of the FM window."""
    numbers = values.cast(pl.Float64).to_numpy()
    edges = np.unique(np.quantile(numbers[:fm_rows], np.linspace(0, 1, column.buckets + 1)))
    buckets = np.searchsorted(edges[1:-1], numbers, side="right").astype(np.int32)
    return Coded(buckets, as_text(pl.int_range(max(len(edges) - 1, 1), eager=True)))


def _fit(parts: list[_Part], raw: RawLog) -> dict[str, pl.DataFrame]:
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


def _most_frequent(parts: list[_Part], *, min_count: int) -> pl.DataFrame:
    """Ids from 1 on by falling count, ties by value."""
    seen = [pl.DataFrame({"value": p.coded.texts, "count": p.counts}) for p in parts]
    counts = pl.concat(seen).filter(pl.col("count") > 0).group_by("value").agg(pl.sum("count"))
    kept = counts.filter(pl.col("count") >= min_count)
    return _numbered(kept.sort(["count", "value"], descending=[True, False])["value"])


def _given(ids: pl.Series) -> pl.DataFrame:
    """The rows of a pretrained table, in its order."""
    return _numbered(as_text(ids))


def _numbered(values: pl.Series) -> pl.DataFrame:
    ids = pl.int_range(1, len(values) + 1, eager=True)
    return pl.DataFrame({"value": values, "id": ids})


def _local_ids(part: _Part, vocabulary: pl.DataFrame) -> np.ndarray:
    """Code -> local id; what is not in the vocabulary gets the last one."""
    return part.coded.texts.replace_strict(
        vocabulary["value"],
        vocabulary["id"],
        default=len(vocabulary) + 1,
        return_dtype=pl.Int64,
    ).to_numpy()


def _check_pretrained(part: _Part, local: np.ndarray, table: Pretrained) -> None:
    missing = (part.coded.counts() > 0) & (local > len(table.ids))
    if missing.any():
        first = part.coded.texts[int(missing.argmax())]
        raise UserError(
            f"column {part.column.name!r} holds {missing.sum():,} ids that have no row in its "
            f"pretrained table of {len(table.ids):,} (first: {first!r}): the files do not belong "
            "together"
        )


@np.errstate(over="ignore", invalid="ignore")  # what does not fit is refused below
def _normalise(
    frame: pl.DataFrame, columns: list[Column], order: pl.Series, fm_rows: int
) -> tuple[np.ndarray, tuple[Numeric, ...]]:
    floats = np.zeros((len(order), len(columns)), np.float32)
    fitted = []
    for i, column in enumerate(columns):
        values = frame[column.name].gather(order).cast(pl.Float64).to_numpy()
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
    parts: list[_Part], hidden: set[str], sizes: Mapping[str, int], raw: RawLog
) -> tuple[Field, ...]:
    sliced = {c.name: group.name for group in raw.sequences for c in group.columns}
    widths = {name: table.values.shape[1] for name, table in raw.pretrained.items()}
    return tuple(
        Field(
            name=c.name,
            rows=sizes[c.shares or c.name],
            kind="sequence" if c.kind == "sequence" else "categorical",
            length=c.length if c.kind == "sequence" else 1,
            shares=c.shares,
            fm_only=bool(hidden & {c.name, c.shares}),
            frozen_width=widths.get(c.shares or c.name, 0),
            slices=sliced.get(c.name, ""),
        )
        for c in (p.column for p in parts)
    )


def _past_fields(raw: RawLog, hidden: set[str], sizes: Mapping[str, int]) -> tuple[Field, ...]:
    return tuple(
        Field(
            name=PAST + name,
            rows=sizes[name],
            kind="sequence",
            length=raw.behaviour_length,
            shares=name,
            fm_only=name in hidden,
            from_log=True,
            slices=PAST.removesuffix("_"),
        )
        for name in raw.behaviour
    )


def _behaviours(raw: RawLog) -> tuple[Behaviour, ...]:
    if not raw.behaviour:
        return raw.given
    made = Behaviour(raw.behaviour, tuple(PAST + name for name in raw.behaviour))
    return (*raw.given, made)


def _named(field_name: str, vocabulary: pl.DataFrame) -> pl.DataFrame:
    return vocabulary.select(pl.lit(field_name).alias("field"), "value", "id")
