"""Learning embedding tables by the rows that a step touches: no dense gradient, ever.

A step traces its loss twice: once to know which rows it looks up (the compiler drops everything
else of that), once with those rows as arguments of the gradient. Rows that were looked up more than
once get one gradient, their sum, without sorting: every lookup writes its number into its row's
place of a scratch column, and the one that is found there stands for all.

N lookups of a step, padding and repetitions included. Tables stand in dicts by the path of their
parameters.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

from loopfm_jax.tables import LOOK_UP, Table

Arrays = dict[str, jax.Array]


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


class Gradient(NamedTuple):
    """Of one step."""

    dense: Any
    rows: Arrays
    """[N,E]."""
    ids: Arrays
    """[N] int32."""
    looked_up: Arrays
    """[N,E], the rows themselves."""
    aux: Any


def gradient(
    loss: Callable[[Any], tuple[jax.Array, Any]], graphdef: Any, params: Any, rest: Any
) -> Gradient:
    """The gradient of loss(model) -> (value, aux), with respect to looked-up rows for tables."""
    dense, tables = split(params)

    def run(dense: Any, look_up: Callable[[str, jax.Array], jax.Array]) -> Any:
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

    asked: dict[str, list[jax.Array]] = {name: [jnp.zeros(0, jnp.int32)] for name in tables}

    def record(name: str, ids: jax.Array) -> jax.Array:
        asked[name].append(ids.reshape(-1))
        return _rows(tables[name], ids)

    run(dense, record)
    ids = {name: jnp.concatenate(parts) for name, parts in asked.items()}
    rows = {name: _rows(table, ids[name]) for name, table in tables.items()}

    def objective(dense: Any, rows: Arrays) -> tuple[jax.Array, Any]:
        read = dict.fromkeys(tables, 0)

        def replay(name: str, ids: jax.Array) -> jax.Array:
            start, read[name] = read[name], read[name] + ids.size
            return rows[name][start : read[name]].reshape(*ids.shape, -1)

        return run(dense, replay)

    (by_dense, by_rows), aux = jax.grad(objective, argnums=(0, 1), has_aux=True)(dense, rows)
    return Gradient(by_dense, by_rows, ids, rows, aux)


def _rows(table_VE: jax.Array, ids: jax.Array) -> jax.Array:
    return table_VE.at[ids].get(mode="promise_in_bounds")


def merge(
    ids_N: jax.Array, rows_NE: jax.Array, scratch_V1: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """One gradient per row: where another lookup stands for it, zeros and an id out of bounds.

    Args:
      scratch_V1: int32 of any content.

    Returns:
      ids, rows, and the scratch column as it was left.
    """
    number_N = jnp.arange(len(ids_N), dtype=jnp.int32)
    scratch_V1 = scratch_V1.at[ids_N, 0].set(number_N, mode="promise_in_bounds")
    stands_N = scratch_V1.at[ids_N, 0].get(mode="promise_in_bounds")
    summed_NE = jnp.zeros_like(rows_NE).at[stands_N].add(rows_NE, mode="promise_in_bounds")
    return jnp.where(stands_N == number_N, ids_N, len(scratch_V1)), summed_NE, scratch_V1


def add(tables: Mapping[str, jax.Array], updates: Any, ids: Arrays) -> Arrays:
    """Tables after the updates [N,E] of the rows `ids`; ids out of bounds are dropped."""
    return {n: table.at[ids[n]].add(updates[n], mode="drop") for n, table in tables.items()}


# ------------------------------------------------------------------------------- transformations
# Of optax's form, with one more argument of `update`: gradients are [N,E] by table, and `ids` says
# which rows they belong to, each row at most once.


class RowwiseState(NamedTuple):
    """[V,1] per table, and how many steps were made."""

    count: jax.Array
    squares: Arrays


def rowwise_adagrad(
    learning_rate: optax.ScalarOrSchedule, *, epsilon: float = 1e-8
) -> optax.GradientTransformationExtraArgs:
    """Adagrad whose accumulator is one number per row, the mean of its squared gradients."""

    def init(params: Any) -> RowwiseState:
        squares = jax.tree.map(lambda p: jnp.zeros((len(p), 1), p.dtype), params)
        return RowwiseState(jnp.zeros((), jnp.int32), squares)

    def update(updates: Any, state: Any, params: Any = None, **more: Any) -> Any:
        rate = _rate(learning_rate, state.count)

        def change(g_NE: jax.Array, squares_V1: jax.Array, ids_N: jax.Array):
            square_N1 = jnp.square(g_NE).mean(axis=1, keepdims=True)
            total_N1 = squares_V1.at[ids_N].get(mode="fill", fill_value=0) + square_N1
            step_NE = -rate * g_NE / (jnp.sqrt(total_N1) + epsilon)
            # Set, not added: so it must follow what reads the old ones, and needs no copy.
            return step_NE, squares_V1.at[ids_N].set(total_N1, mode="drop")

        steps, squares = _each(change, updates, state.squares, more["ids"])
        return steps, RowwiseState(state.count + 1, squares)

    return optax.GradientTransformationExtraArgs(init, update)


class LazyAdamState(NamedTuple):
    """[V,E] per table, and how many steps were made."""

    count: jax.Array
    mean: Arrays
    square: Arrays


def lazy_adam(
    learning_rate: optax.ScalarOrSchedule,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    epsilon: float = 1e-8,
) -> optax.GradientTransformationExtraArgs:
    """Adam whose moments decay only when their row is touched; the same where all rows are."""

    def init(params: Any) -> LazyAdamState:
        zeros = jax.tree.map(jnp.zeros_like, params)
        return LazyAdamState(jnp.zeros((), jnp.int32), zeros, jax.tree.map(jnp.copy, zeros))

    def update(updates: Any, state: Any, params: Any = None, **more: Any) -> Any:
        count = state.count + 1
        rate = _rate(learning_rate, state.count)

        def change(g_NE: jax.Array, m_VE: jax.Array, v_VE: jax.Array, ids_N: jax.Array):
            old_m, old_v = (x.at[ids_N].get(mode="fill", fill_value=0) for x in (m_VE, v_VE))
            m_NE, v_NE = b1 * old_m + (1 - b1) * g_NE, b2 * old_v + (1 - b2) * jnp.square(g_NE)
            unbiased_m, unbiased_v = m_NE / (1 - b1**count), v_NE / (1 - b2**count)
            step_NE = -rate * unbiased_m / (jnp.sqrt(unbiased_v) + epsilon)
            return (
                step_NE,
                m_VE.at[ids_N].set(m_NE, mode="drop"),
                v_VE.at[ids_N].set(v_NE, mode="drop"),
            )

        steps, mean, square = _each(change, updates, state.mean, state.square, more["ids"])
        return steps, LazyAdamState(count, mean, square)

    return optax.GradientTransformationExtraArgs(init, update)


def _rate(learning_rate: optax.ScalarOrSchedule, count: jax.Array) -> Any:
    return learning_rate(count) if callable(learning_rate) else learning_rate


def _each(change: Callable[..., Any], *by_table: Arrays) -> list[Arrays]:
    """`change` of every table: a tuple of dicts from a dict of tuples."""
    found = {name: change(*(x[name] for x in by_table)) for name in by_table[0]}
    return [dict(zip(found, column, strict=True)) for column in zip(*found.values(), strict=True)]
