"""Learning embedding tables by the rows that a step touches: no dense gradient, ever.

A step traces its loss twice: once to know which rows it looks up (the compiler drops everything
else of that), once with those rows as arguments of the gradient. Rows that were looked up more than
once get one gradient, their sum, without sorting: every lookup writes its number into its row's
place of a scratch column, and the one that is found there stands for all.

Rows that lie split over devices learn where they lie (`exchange`).

N lookups of a step, padding and repetitions included. Tables stand in dicts by the path of their
parameters.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

from loopfm_jax import exchange, sharding
from loopfm_jax.row_rules import Rule
from loopfm_jax.tables import LOOK_UP, Table

Arrays = dict[str, jax.Array]
SUMMED = 32
"""Numbers that XLA on CPU adds up in one loop with what makes them."""


def split(params: Any) -> tuple[Any, Arrays]:
    """Nested dicts of parameters -> (without the tables, the tables)."""
    flat: dict[tuple[Any, ...], Any] = dict(flatten_dict(params))
    tables = {path: leaf for path, leaf in flat.items() if path[-1] == "rows_VE"}
    dense = {path: leaf for path, leaf in flat.items() if path not in tables}
    return unflatten_dict(dense), {_name(path): leaf for path, leaf in tables.items()}


def join(params: Any, dense: Any, tables: Arrays) -> Any:
    """The inverse of `split`, in the order of `params`."""
    new = flatten_dict(dense)
    return unflatten_dict(
        {p: tables[_name(p)] if _name(p) in tables else new[p] for p in flatten_dict(params)}
    )


def _name(path: tuple[Any, ...]) -> str:
    return "/".join(map(str, path))


class Found(NamedTuple):
    """The gradient of one step."""

    dense: Any
    rows: dict[str, Any]
    """By `Asked.given`."""
    asked: dict[str, "Asked"]
    aux: Any


def gradient(
    loss: Callable[[Any], tuple[jax.Array, Any]], graphdef: Any, params: Any, rest: Any
) -> Found:
    """The gradient of loss(model) -> (value, aux), with respect to looked-up rows for tables."""
    dense, tables = split(params)

    def run(dense: Any, look_up: Callable[[str, Sequence[jax.Array]], list[jax.Array]]) -> Any:
        model = nnx.merge(graphdef, join(params, dense, tables), rest)
        names = {
            id(module): _name((*path, "rows_VE"))
            for path, module in nnx.iter_modules(model)
            if isinstance(module, Table)
        }
        token = LOOK_UP.set(lambda table, ids: look_up(names[id(table)], ids))
        try:
            return loss(model)
        finally:
            LOOK_UP.reset(token)

    wanted: dict[str, list[jax.Array]] = {name: [] for name in tables}

    def record(name: str, ids: Sequence[jax.Array]) -> list[jax.Array]:
        wanted[name].extend(ids)
        return [_rows(tables[name], i) for i in ids]

    run(dense, record)
    asked = {name: ask(tables[name], ids) for name, ids in wanted.items() if ids}

    def objective(dense: Any, given: dict[str, Any]) -> tuple[jax.Array, Any]:
        left = {name: iter(one.rows(given[name])) for name, one in asked.items()}

        def replay(name: str, ids: Sequence[jax.Array]) -> list[jax.Array]:
            return [next(left[name]) for _ in ids]

        return run(dense, replay)

    given = {name: one.given for name, one in asked.items()}
    (by_dense, by_rows), aux = jax.grad(objective, argnums=(0, 1), has_aux=True)(dense, given)
    return Found(by_dense, by_rows, asked, aux)


def _rows(table_VE: jax.Array, ids: jax.Array) -> jax.Array:
    return table_VE.at[ids].get(mode="promise_in_bounds")


class Asked(Protocol):
    """Rows of one table that a step looked up."""

    given: Any
    """What the loss is differentiated by."""

    def rows(self, given: Any) -> list[jax.Array]:
        """The rows of every lookup."""
        ...

    def merge(self, gradient: Any, scratch_V1: jax.Array, *, l2: float) -> "Change":
        """One gradient per row, the penalty l2/2 |row|^2 included.

        scratch_V1: int32 of any content.
        """
        ...


class Learned(NamedTuple):
    """Of a table."""

    table: jax.Array
    state: Any
    """Of its rule."""
    scratch: jax.Array


class Change(Protocol):
    """Merged gradients of a table's rows."""

    @property
    def square(self) -> jax.Array:
        """Their sum of squares."""
        ...

    def learn(self, rule: Rule, state: Any, scale: jax.Array, count: jax.Array) -> Learned:
        """After step `count`, by `scale` times the gradient."""
        ...


def ask(table_VE: jax.Array, ids: Sequence[jax.Array]) -> Asked:
    """Of the table, wherever its rows lie."""
    return Spread(table_VE, ids) if exchange.applies(table_VE, ids) else Here(table_VE, ids)


class Here:
    """All rows on every device."""

    def __init__(self, table_VE: jax.Array, ids: Sequence[jax.Array]):
        self.table_VE, self.ids, self.ids_N = table_VE, ids, exchange.in_one(ids)
        self.given = _rows(table_VE, self.ids_N)

    def rows(self, given: jax.Array) -> list[jax.Array]:
        return exchange.apart(given, self.ids)

    def merge(self, gradient: jax.Array, scratch_V1: jax.Array, *, l2: float) -> "MergedHere":
        ids_N, rows_NE, scratch_V1 = merge(self.ids_N, gradient, scratch_V1)
        rows_NE += l2 * jnp.where((ids_N < len(self.table_VE))[:, None], self.given, 0)
        return MergedHere(self.table_VE, ids_N, rows_NE, scratch_V1)


class MergedHere(NamedTuple):
    table_VE: jax.Array
    ids_N: jax.Array
    rows_NE: jax.Array
    scratch_V1: jax.Array

    @property
    def square(self) -> jax.Array:
        return square_sum(self.rows_NE)

    def learn(self, rule: Rule, state: Any, scale: jax.Array, count: jax.Array) -> Learned:
        told = {"ids": self.ids_N, "count": count}
        updates, state = rule.update(scale * self.rows_NE, state, self.table_VE, **told)
        table_VE = self.table_VE.at[self.ids_N].add(updates, mode="drop")
        return Learned(table_VE, state, self.scratch_V1)


class Spread:
    """Rows split over the devices: owners learn what all devices have for them."""

    def __init__(self, table_VE: jax.Array, ids: Sequence[jax.Array]):
        self.table_VE = table_VE
        self.given, self.wanted = exchange.fetch(table_VE, list(ids))

    def rows(self, given: list[jax.Array]) -> list[jax.Array]:
        return given

    def merge(self, gradient: Any, scratch_V1: jax.Array, *, l2: float) -> "MergedSpread":
        return MergedSpread(self.table_VE, self.wanted, gradient, scratch_V1, l2)


class MergedSpread(NamedTuple):
    """Merged when needed, twice: what is kept for all rows of a step has no size that is known."""

    table_VE: jax.Array
    wanted: exchange.Wanted
    gradients: list[jax.Array]
    scratch_V1: jax.Array
    l2: float

    def _with_penalty(
        self, row_M: jax.Array, gradient_ME: jax.Array, table_RE: jax.Array
    ) -> jax.Array:
        return gradient_ME + self.l2 * table_RE.at[row_M].get(mode="fill", fill_value=0)

    @property
    def square(self) -> jax.Array:
        def visit(row_M: jax.Array, gradient_ME: jax.Array, own: Any, *, shared: Any) -> Any:
            table_RE, square = own
            gradient_ME = self._with_penalty(row_M, gradient_ME, table_RE)
            return table_RE, square + jnp.square(gradient_ME).sum()

        own = self.table_VE, jnp.zeros((), self.table_VE.dtype)
        return exchange.learn(visit, self.wanted, self.gradients, own, ())[1]

    def learn(self, rule: Rule, state: Any, scale: jax.Array, count: jax.Array) -> Learned:
        def visit(row_M: jax.Array, gradient_ME: jax.Array, own: Any, *, shared: Any) -> Any:
            table_RE, state = own
            scale, count = shared
            gradient_ME = scale * self._with_penalty(row_M, gradient_ME, table_RE)
            updates, state = rule.update(gradient_ME, state, table_RE, ids=row_M, count=count)
            return table_RE.at[row_M].add(updates, **exchange.SORTED), state

        own = self.table_VE, state
        shared = scale, count
        table_VE, state = exchange.learn(visit, self.wanted, self.gradients, own, shared)
        return Learned(table_VE, state, self.scratch_V1)


def square_sum(x: jax.Array) -> jax.Array:
    """Of an array of any shape.

    On one CPU device, XLA adds up to 32 numbers while it squares them; before a longer sum it
    writes the squares down, and takes twelve times as long.
    """
    if sharding.platform() != "cpu" or sharding.devices() > 1:
        return jnp.square(x).sum()
    flat, whole = x.reshape(-1), x.size - x.size % SUMMED
    parts = jnp.square(flat[:whole].reshape(SUMMED, -1)).sum(axis=0)
    return jax.lax.optimization_barrier(parts).sum() + jnp.square(flat[whole:]).sum()


def merge(
    ids_N: jax.Array, rows_NE: jax.Array, scratch_V1: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """One gradient per row: where another lookup stands for it, zeros and an id out of bounds.

    Args:
      ids_N: row numbers; those out of bounds are no rows.
      scratch_V1: int32 of any content.

    Returns:
      ids, rows, and the scratch column as it was left.
    """
    number_N, none = jnp.arange(len(ids_N), dtype=jnp.int32), len(ids_N)
    scratch_V1 = scratch_V1.at[ids_N, 0].set(number_N, mode="drop")
    stands_N = scratch_V1.at[ids_N, 0].get(mode="fill", fill_value=none)
    summed_NE = jnp.zeros_like(rows_NE).at[stands_N].add(rows_NE, mode="drop")
    return jnp.where(stands_N == number_N, ids_N, len(scratch_V1)), summed_NE, scratch_V1
