"""Embedding tables: one fused table per width for all trainable fields, one gather per batch.

Padding (fused id 0) embeds to zeros and receives no gradient. Frozen (pretrained) tables pass
through one trainable, bias-free projection per field. A numeric column is a learned vector times
its value, as in the public reference (PAPER section 5), but starts as small as the table's rows: at
the public scale (xavier-normal) a few count columns drown the rest of a log of 100k rows.
"""

from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, struct

from loopfm_jax import exchange, sharding
from loopfm_jax.data.schema import Field, Schema
from loopfm_jax.errors import check_limits
from loopfm_jax.packing import Tokens, lay_out

MOST_ROWS = 2**31 - 1
"""Ids are int32."""
Instead = Callable[["Table", Sequence[jax.Array]], Sequence[jax.Array]]
LOOK_UP: ContextVar[Instead | None] = ContextVar("LOOK_UP", default=None)
"""What looks up in the place of the tables themselves while a step learns by rows (`rows.py`)."""


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
        name = _frozen_name(path)
        if name is None or name not in tables:
            return leaf
        return sharding.place(np.asarray(tables[name], leaf.dtype), where)

    return jax.tree.map_with_path(fill, rest, shardings)


def without_frozen(state: Any) -> Any:
    """A training state with None for its `Frozen` values."""
    return jax.tree.map_with_path(
        lambda path, leaf: leaf if _frozen_name(path) is None else None, state
    )


def _frozen_name(path: tuple[Any, ...]) -> str | None:
    """The field whose frozen table stands at a place of a training state; None: something else."""
    *_, parent, name = ("", "", *(str(getattr(k, "key", k)) for k in path))
    return name if parent == "frozen" else None


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


@struct.dataclass
class Embedded:
    """Looked-up features of a batch."""

    ids: dict[str, jax.Array]
    """Fused ids by field, [B], those of a sequence [T]."""
    floats_BN: jax.Array
    fields: dict[str, jax.Array]
    """[B,E] in schema order, numeric last."""
    sequences: dict[str, jax.Array]
    """[T,E]."""
    tokens: dict[str, Tokens]
    """Whose the slots of a sequence are; real where an event stands."""


class Table(nnx.Module):
    """One fused trainable table [V,E] over the owners of `schema`."""

    def __init__(self, schema: Schema, config: TableConfig, *, rngs: nnx.Rngs):
        rows = -(-schema.table_rows // config.row_multiple) * config.row_multiple
        check_limits("tables", {"rows": rows}, low=1, high=MOST_ROWS)
        shape = (rows, config.width)
        self.rows_VE = nnx.Param(_start(config, shape, rngs))

    def __call__(self, ids: jax.Array) -> jax.Array:
        """Fused ids of any shape -> rows [..., E]; padding gives zeros."""
        return self.gather([ids])[0]

    def gather(self, ids: Sequence[jax.Array]) -> list[jax.Array]:
        """As a call of each, in one gather for all."""
        find = LOOK_UP.get() or Table.find
        rows = find(self, ids)
        return [jnp.where(i[..., None] > 0, r, 0) for i, r in zip(ids, rows, strict=True)]

    def find(self, ids: Sequence[jax.Array]) -> list[jax.Array]:
        """The rows themselves, differentiable by the table."""
        if exchange.applies(self.rows_VE[...], ids):
            return exchange.look_up(self.rows_VE[...], list(ids))
        rows = self.rows_VE[...].at[exchange.in_one(ids)].get(mode="promise_in_bounds")
        return exchange.apart(rows, ids)


def _start(config: TableConfig, shape: tuple[int, int], rngs: nnx.Rngs) -> jax.Array:
    """Drawing takes several times the memory of what is drawn; zeros need none of it."""
    if not config.init_std:
        return jnp.zeros(shape)
    return config.init_std * jax.random.normal(rngs.params(), shape)


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
        self.names = tuple(names)
        self.shifts = tuple(own.offsets[name] - schema.offsets[name] for name in names)
        self.table = Table(own, config, rngs=rngs)

    def __call__(self, ids: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """Fused ids by field -> rows [..., E] of `names`, padding as zeros."""
        own = [
            jnp.where(ids[name] > 0, ids[name] + shift, 0)
            for name, shift in zip(self.names, self.shifts, strict=True)
        ]
        return dict(zip(self.names, self.table.gather(own), strict=True))


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
        values_NE = _start(config, shape, rngs)
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

    def _trained(self, ids: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """Rows of every field that is not frozen. Those of fields that are read side by side stand
        side by side, so that whoever wants them together ([T,M]) finds them so."""
        columns = [[f.name for f in self.schema.categorical], *self.schema.groups.values()]
        trained = [[n for n in names if not self.schema[n].frozen_width] for names in columns]
        trained = [names for names in trained if names]
        rows = self.table.gather([jnp.stack([ids[n] for n in names], axis=1) for names in trained])
        return {
            name: row_XE
            for names, rows_XGE in zip(trained, rows, strict=True)
            for name, row_XE in zip(names, _side_by_side(rows_XGE), strict=True)
        }

    def _frozen(self, f: Field, ids: jax.Array) -> jax.Array:
        rows = self.frozen[f.shares or f.name][...][ids]
        return self.project[f.name](jnp.where(ids[..., None] > 0, rows, 0))

    def __call__(self, batch: Mapping[str, Any]) -> Embedded:
        """batch: `ids_BF`, `floats_BN`, and by group of sequences (`Schema.groups`) `events`:
        `ids_PSG` int32, newest first, `length_B`, how many of the slots are whose, and where it is
        known `age_PS`, seconds since the event."""
        schema = self.schema
        ids = {f.name: batch["ids_BF"][:, i] for i, f in enumerate(schema.categorical)}
        tokens = {}
        for group, names in schema.groups.items():
            found = batch["events"][group]
            parts, each, width = found["ids_PSG"].shape
            slots = lay_out(
                found["length_B"], slots=parts * each, longest=schema[group].length, parts=parts
            )
            ids_TG = found["ids_PSG"].reshape(-1, width)
            age_T = found["age_PS"].reshape(-1) if "age_PS" in found else None
            for i, name in enumerate(names):
                ids[name] = ids_TG[:, i]
                real_T = slots.real_T & (ids[name] > 0)
                tokens[name] = replace(slots, real_T=real_T, age_T=age_T)
        frozen = [f for f in schema.fields if f.frozen_width]
        embedded = {f.name: self._frozen(f, ids[f.name]) for f in frozen}
        embedded |= self._trained(ids)
        numeric = {}
        if self.numeric_NE is not None:
            numeric_BNE = batch["floats_BN"][:, :, None] * self.numeric_NE[...][None]
            numeric = {n.name: numeric_BNE[:, i] for i, n in enumerate(schema.numeric)}
        return Embedded(
            ids=ids,
            floats_BN=batch["floats_BN"],
            fields={f.name: embedded[f.name] for f in schema.categorical} | numeric,
            sequences={f.name: embedded[f.name] for f in schema.sequences},
            tokens=tokens,
        )


def _side_by_side(rows_XGE: jax.Array) -> list[jax.Array]:
    """G times [X,E], as parts of one matrix: the compiler sees that concatenated they are it."""
    slots, count, _ = rows_XGE.shape
    return jnp.split(rows_XGE.reshape(slots, -1), count, axis=1)


def blank(schema: Schema) -> dict[str, Any]:
    """A batch of one example of nothing but padding, for who asks for shapes."""
    events = {
        group: {
            "ids_PSG": np.zeros((1, 1, len(names)), np.int32),
            "length_B": np.zeros(1, np.int32),
        }
        for group, names in schema.groups.items()
    }
    return {
        "ids_BF": np.zeros((1, len(schema.categorical)), np.int32),
        "floats_BN": np.zeros((1, len(schema.numeric)), np.float32),
        "events": events,
    }
