"""How a step learns: the public reference's way (PAPER section 5), or tables by touched rows.

`exact` is FuxiCTR's optimiser: whole-table L2, gradient-norm clip, dense Adam. `fast` forms learn
everything but the tables so, and of the tables the rows that a step looked up: cost and memory
traffic do not grow with a table. That is another rule where rows are rare (moments and decay of an
untouched row stand still).
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from loopfm_jax import rows
from loopfm_jax.errors import check_limits

TableRule = Literal["adam", "rowwise_adagrad", "lazy_adam"]


@dataclass(frozen=True)
class OptimConfig:
    """Adam as FuxiCTR runs it: dense, the L2 penalty inside the clipped gradient."""

    learning_rate: float = 1e-3
    clip_norm: float = 10.0
    """Global gradient norm."""
    embedding_l2: float = 0.0
    """Penalty l2/2 * |table|^2 on the whole tables at every step (TaobaoAd: 5e-6); of the fast
    forms on the touched rows."""
    cooldown: float = 0.0
    """Last share of the steps, over which the learning rate falls to 0 in a straight line."""
    tables: TableRule = "adam"
    """`adam` is exact; `rowwise_adagrad` and `lazy_adam` touch only the rows of the step."""
    table_rate: float = 0.0
    """Learning rate of `rowwise_adagrad`, which wants a larger one than Adam; 0 = 10 times
    `learning_rate`."""

    def __post_init__(self) -> None:
        positive = {"learning_rate": self.learning_rate, "clip_norm": self.clip_norm}
        check_limits("optim", positive, low=1e-12)
        above = {"embedding_l2": self.embedding_l2, "table_rate": self.table_rate}
        check_limits("optim", above, low=0)
        check_limits("optim", {"cooldown": self.cooldown}, low=0, high=1)


class Optimiser(NamedTuple):
    """`init(params)` -> state; `learn(loss, graphdef, params, rest, state)`, loss(model) -> (value,
    aux), -> new params, new state, aux."""

    init: Callable[[Any], Any]
    learn: Callable[..., tuple[Any, Any, Any]]


def make_optimiser(config: OptimConfig, *, steps: int) -> Optimiser:
    """The optimiser of a training run of so many steps."""
    return _exact(config, steps) if config.tables == "adam" else _fast(config, steps)


def _exact(config: OptimConfig, steps: int) -> Optimiser:
    transformation = optax.chain(_decay(config), _clip(config), _adam(config, steps))

    def learn(loss: Any, graphdef: Any, params: Any, rest: Any, state: Any) -> Any:
        def objective(params: Any) -> tuple[jax.Array, Any]:
            return loss(nnx.merge(graphdef, params, rest))

        gradients, aux = jax.grad(objective, has_aux=True)(params)
        updates, state = transformation.update(gradients, state, params)
        return jax.tree.map(jnp.add, params, updates), state, aux

    return Optimiser(transformation.init, learn)


class FastState(NamedTuple):
    """State of what is dense, of the tables, and the columns of `rows.merge`."""

    dense: Any
    tables: Any
    scratch: dict[str, jax.Array]


def _fast(config: OptimConfig, steps: int) -> Optimiser:
    dense_rule = _adam(config, steps)
    if config.tables == "lazy_adam":
        table_rule = rows.lazy_adam(_schedule(config.learning_rate, config, steps))
    else:
        rate = config.table_rate or 10 * config.learning_rate
        table_rule = rows.rowwise_adagrad(_schedule(rate, config, steps))
    decay, clip = _decay(config), _clip(config)  # neither keeps anything from step to step

    def init(params: Any) -> FastState:
        dense, tables = rows.split(params)
        scratch = {name: jnp.zeros((len(t), 1), jnp.int32) for name, t in tables.items()}
        return FastState(dense_rule.init(dense), table_rule.init(tables), scratch)

    def learn(loss: Any, graphdef: Any, params: Any, rest: Any, state: FastState) -> Any:
        found = rows.gradient(loss, graphdef, params, rest)
        dense, tables = rows.split(params)
        ids, by_rows, scratch = {}, {}, {}
        for name, table in tables.items():
            ids[name], by_rows[name], scratch[name] = rows.merge(
                found.ids[name], found.rows[name], state.scratch[name]
            )
            once_N1 = (ids[name] < len(table))[:, None]
            by_rows[name] += config.embedding_l2 * jnp.where(once_N1, found.looked_up[name], 0)
        before: Any = dense, tables
        by_dense, _ = decay.update(found.dense, decay.init(dense), dense)
        clipped: Any = clip.update((by_dense, by_rows), clip.init(before), before)[0]
        by_dense, by_rows = clipped
        updates, dense_state = dense_rule.update(by_dense, state.dense, dense)
        row_updates, table_state = table_rule.update(by_rows, state.tables, tables, ids=ids)
        dense = jax.tree.map(jnp.add, dense, updates)
        params = rows.join(params, dense, rows.add(tables, row_updates, ids))
        return params, FastState(dense_state, table_state, scratch), found.aux

    return Optimiser(init, learn)


def _schedule(rate: float, config: OptimConfig, steps: int) -> optax.ScalarOrSchedule:
    cooling = round(config.cooldown * steps)
    if not cooling:
        return rate
    return optax.linear_schedule(rate, 0.0, cooling, transition_begin=steps - cooling)


def _adam(config: OptimConfig, steps: int) -> optax.GradientTransformation:
    return optax.adam(_schedule(config.learning_rate, config, steps), eps=1e-8)


def _decay(config: OptimConfig) -> optax.GradientTransformation:
    return optax.add_decayed_weights(config.embedding_l2, mask=_tables)


def _clip(config: OptimConfig) -> optax.GradientTransformation:
    """By the norm of the model's gradient and, apart, of the compressor's, which trains beside the
    FM and must not weaken its updates."""

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        # One number for all: optax divides every gradient, an array as large as the tables more.
        scale = config.clip_norm / jnp.maximum(optax.tree.norm(updates), config.clip_norm)
        return jax.tree.map(lambda g: g * scale, updates), state

    clip = optax.GradientTransformation(lambda params: optax.EmptyState(), update)
    return optax.partition({"model": clip, "compressor": clip}, _part)


def _tables(params: Any) -> Any:
    return jax.tree.map_with_path(
        lambda path, _: bool(re.search(r"rows_VE|numeric_NE", jax.tree_util.keystr(path))), params
    )


def _part(params: Any) -> Any:
    return jax.tree.map_with_path(
        lambda path, _: "compressor" if "compressors" in jax.tree_util.keystr(path) else "model",
        params,
    )
