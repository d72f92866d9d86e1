"""Raw columns -> ids in one fused space and normalised floats.

Everything that is fitted (vocabularies, means, buckets) is fitted on the FM window only
(DESIGN: nothing later may leak into the teacher), then applied to all rows. What a row of the FM
window holds counts once for every row that holds it, also where rows share its storage.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import polars as pl

from loopfm_jax.data.fit import Fitted, Part, continuous, discrete, fit, scale, side_parts, split
from loopfm_jax.data.raw import Column, Pretrained, RawLog
from loopfm_jax.data.schema import Behaviour, Field, Numeric, Schema
from loopfm_jax.errors import UserError

PAST = "past_"  # prefix of the sequence fields that are made from the log itself


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


def encode(
    raw: RawLog,
    frame: pl.DataFrame,
    *,
    fm_rows: int,
    order: pl.Series | None = None,
    fitted: Fitted | None = None,
) -> Encoded:
    """Fits on the first `fm_rows` rows and encodes all of them.

    Args:
      frame: the columns of `raw.columns` and of its sequences.
      order: row numbers of `frame` in time order; by default as they stand.
      fitted: what was learned before, from other rows; nothing is learned from these.
    """
    order = pl.int_range(len(frame), eager=True) if order is None else order
    parts = [split(frame[c.name].gather(order), c, fm_rows) for c in discrete(raw)]
    for group in raw.sequences:
        parts.extend(side_parts(group, frame, order.head(fm_rows)))
    vocabularies = fitted.vocabularies if fitted else fit(parts, raw)
    known = fitted.numeric if fitted else None
    floats, normalisers = _normalise(frame, continuous(raw), order, fm_rows, known)
    schema = _schema(parts, raw, vocabularies, normalisers)
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


def _schema(
    parts: list[Part],
    raw: RawLog,
    vocabularies: Mapping[str, pl.DataFrame],
    numeric: tuple[Numeric, ...],
) -> Schema:
    hidden = {p.column.name for p in parts if p.column.fm_only}
    sizes = {name: len(v) + 2 for name, v in vocabularies.items()}
    return Schema(
        fields=_fields(parts, hidden, sizes, raw) + _past_fields(raw, hidden, sizes),
        numeric=numeric,
        behaviours=_behaviours(raw),
        item=raw.item,
        entity=raw.entity,
    )


def _local_ids(part: Part, vocabulary: pl.DataFrame) -> np.ndarray:
    """Code -> local id; what is not in the vocabulary gets the last one."""
    local = part.coded.texts.replace_strict(
        vocabulary["value"],
        vocabulary["id"],
        default=len(vocabulary) + 1,
        return_dtype=pl.Int64,
    )
    return local.cast(pl.Int64).to_numpy()


def _check_pretrained(part: Part, local: np.ndarray, table: Pretrained) -> None:
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
    frame: pl.DataFrame,
    columns: list[Column],
    order: pl.Series,
    fm_rows: int,
    known: tuple[Numeric, ...] | None,
) -> tuple[np.ndarray, tuple[Numeric, ...]]:
    floats = np.zeros((len(order), len(columns)), np.float32)
    fitted = []
    for i, column in enumerate(columns):
        values = frame[column.name].gather(order).cast(pl.Float64).to_numpy()
        values = np.log1p(values) if column.log else values
        of = scale(column, values[:fm_rows]) if known is None else known[i]
        floats[:, i] = (values - of.mean) / of.std
        if not np.isfinite(floats[:, i]).all():
            raise UserError(
                f"column {column.name!r} holds values up to {np.abs(values).max():g}, too large "
                "for float32 once standardised; clip them or drop the column"
            )
        fitted.append(of)
    return floats, tuple(fitted)


def _fields(
    parts: list[Part], hidden: set[str], sizes: Mapping[str, int], raw: RawLog
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
