"""Embedding tables: one fused table per width for all trainable fields, one gather per batch.

Padding (fused id 0) embeds to zeros and receives no gradient. Frozen (pretrained) tables pass
through one trainable, bias-free projection per field. A numeric column is a learned vector times
its value, as in the public reference (PAPER section 5), but starts as small as the table's rows: at
the public scale (xavier-normal) a few count columns drown the rest of a log of 100k rows.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, struct

from loopfm_jax.data.schema import Field, Schema
from loopfm_jax.errors import check_limits


class Frozen(nnx.Variable):
    """A value that is never trained (pretrained tables)."""


def with_pretrained(rest: Any, tables: Mapping[str, np.ndarray], shardings: Any) -> Any:
    """The part of a model's state that is not trained, with `tables` in its `Frozen` values.

    A model is built with zeros there: constants of hundreds of megabytes do not belong into a
    compiled program.

    Args:
      rest: nested dicts of arrays, as a training state holds them.
      tables: [V, frozen_width] by the field that owns the table.
      shardings: of `rest`.
    """

    def fill(path: tuple[Any, ...], leaf: jax.Array, where: Any) -> jax.Array:
        *_, parent, name = ("", "", *(str(getattr(k, "key", k)) for k in path))
        if parent != "frozen" or name not in tables:
            return leaf
        return jax.device_put(np.asarray(tables[name], leaf.dtype), where)

    return jax.tree.map_with_path(fill, rest, shardings)


@dataclass(frozen=True)
class TableConfig:
    """Shape and start of the embedding tables."""

    width: int = 16
    """E: numbers per field."""
    init_std: float = 1e-4
    """Standard deviation of the initial rows (the public reference: 1e-4)."""
    row_multiple: int = 128
    """Rows are rounded up to a multiple of this, so that any mesh divides them."""

    def __post_init__(self) -> None:
        check_limits("tables", {"width": self.width, "row_multiple": self.row_multiple}, low=1)
        check_limits("tables", {"init_std": self.init_std}, low=0)


class Features(NamedTuple):
    """Model inputs of a batch: ids_BC int32 (`Schema.columns`), floats_BN float32."""

    ids_BC: jax.Array
    floats_BN: jax.Array


@struct.dataclass
class Embedded:
    """Looked-up features. `fields` [B,E] in schema order, numeric last; `sequences` [B,L,E]."""

    features: Features
    fields: dict[str, jax.Array]
    sequences: dict[str, jax.Array]
    masks: dict[str, jax.Array]
    """Per sequence, True where a real event stands, [B,L]."""


class Table(nnx.Module):
    """One fused trainable table [V,E] over the owners of `schema`."""

    def __init__(self, schema: Schema, config: TableConfig, *, rngs: nnx.Rngs):
        rows = -(-schema.table_rows // config.row_multiple) * config.row_multiple
        shape = (rows, config.width)
        self.rows_VE = nnx.Param(config.init_std * jax.random.normal(rngs.params(), shape))

    def __call__(self, ids: jax.Array) -> jax.Array:
        """Fused ids of any shape -> rows [..., E]; padding gives zeros."""
        rows = self.rows_VE[...].at[ids].get(mode="promise_in_bounds")
        return jnp.where(ids[..., None] > 0, rows, 0)


class PrivateTable(nnx.Module):
    """A second table for some fields, with rows per field *and* id, whatever is shared or frozen.

    Args:
      schema: what the fused ids mean.
      names: fields that have rows here.
      config: width and initial scale.
    """

    def __init__(
        self, schema: Schema, names: Sequence[str], config: TableConfig, *, rngs: nnx.Rngs
    ):
        fields = [schema[name] for name in names]
        own = Schema(tuple(replace(f, shares=None, frozen_width=0) for f in fields))
        self.columns = tuple(schema.columns[name] for name in names)
        self.shifts = tuple(own.offsets[name] - schema.offsets[name] for name in names)
        self.table = Table(own, config, rngs=rngs)

    def __call__(self, ids_BC: jax.Array) -> jax.Array:
        """All columns of a batch -> rows [B,C,E] of the columns of `names`."""
        own = [
            jnp.where(ids_BC[:, columns] > 0, ids_BC[:, columns] + shift, 0)
            for columns, shift in zip(self.columns, self.shifts, strict=True)
        ]
        return self.table(jnp.concatenate(own, axis=1))


class Embedder(nnx.Module):
    """All features of a batch -> `Embedded`.

    Args:
      schema: fields to look up.
      config: width and initial scale.
      frozen: pretrained tables by name of the owning field, [V, frozen_width] (zeros if absent).
    """

    def __init__(
        self,
        schema: Schema,
        config: TableConfig,
        *,
        rngs: nnx.Rngs,
        frozen: Mapping[str, jax.Array] | None = None,
    ):
        self.schema = schema
        self.table = Table(schema, config, rngs=rngs)
        shape = (len(schema.numeric), config.width)
        values_NE = config.init_std * jax.random.normal(rngs.params(), shape)
        self.numeric_NE = nnx.Param(values_NE) if schema.numeric else None  # Orbax: no empty arrays
        self.frozen = nnx.Dict()
        self.project = nnx.Dict()
        for f in (f for f in schema.fields if f.frozen_width):
            if not f.shares:
                values = (frozen or {}).get(f.name, jnp.zeros((f.rows, f.frozen_width)))
                self.frozen[f.name] = Frozen(values)
            kernel = nnx.initializers.xavier_normal()
            self.project[f.name] = nnx.Linear(
                f.frozen_width, config.width, use_bias=False, kernel_init=kernel, rngs=rngs
            )

    def _fields(self, *, frozen: bool) -> list[Field]:
        return [f for f in self.schema.fields if bool(f.frozen_width) == frozen]

    def _trained(self, ids: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """One gather for all trainable fields."""
        rows_BCE = self.table(jnp.concatenate(list(ids.values()), axis=1))
        stops = list(accumulate(i.shape[1] for i in ids.values()))
        return dict(zip(ids, jnp.split(rows_BCE, stops[:-1], axis=1), strict=True))

    def _frozen(self, f: Field, ids: jax.Array) -> jax.Array:
        rows = self.frozen[f.shares or f.name][...][ids]
        return self.project[f.name](jnp.where(ids[..., None] > 0, rows, 0))

    def __call__(self, features: Features) -> Embedded:
        columns = self.schema.columns
        ids = {f.name: features.ids_BC[:, columns[f.name]] for f in self.schema.fields}
        embedded = {f.name: self._frozen(f, ids[f.name]) for f in self._fields(frozen=True)}
        embedded |= self._trained({f.name: ids[f.name] for f in self._fields(frozen=False)})
        numeric = {}
        if self.numeric_NE is not None:
            numeric_BNE = features.floats_BN[:, :, None] * self.numeric_NE[...][None]
            numeric = {n.name: numeric_BNE[:, i] for i, n in enumerate(self.schema.numeric)}
        sequences = self.schema.sequences
        return Embedded(
            features=features,
            fields={f.name: embedded[f.name][:, 0] for f in self.schema.categorical} | numeric,
            sequences={f.name: embedded[f.name] for f in sequences},
            masks={f.name: features.ids_BC[:, columns[f.name]] > 0 for f in sequences},
        )
