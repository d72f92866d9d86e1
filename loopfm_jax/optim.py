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
from loopfm_jax.row_rules import RULES, Rule

TableRule = Literal["adam", "rowwise_adagrad", "rowwise_rms", "lazy_adam"]
TINY = 1e-30


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
    """`adam` is exact; the others touch only the rows of the step (`row_rules`)."""
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

    count: jax.Array
    dense: Any
    tables: dict[str, Any]
    scratch: dict[str, jax.Array]


def _fast(config: OptimConfig, steps: int) -> Optimiser:
    dense_rule, table_rule = _adam(config, steps), _table_rule(config, steps)
    decay, clip = _decay(config), _clip(config)  # neither keeps anything from step to step

    def init(params: Any) -> FastState:
        dense, tables = rows.split(params)
        states = {name: table_rule.init(table) for name, table in tables.items()}
        scratch = {name: jnp.zeros((len(t), 1), jnp.int32) for name, t in tables.items()}
        return FastState(jnp.zeros((), jnp.int32), dense_rule.init(dense), states, scratch)

    def learn(loss: Any, graphdef: Any, params: Any, rest: Any, state: FastState) -> Any:
        found = rows.gradient(loss, graphdef, params, rest)
        dense, tables = rows.split(params)
        changes = {
            name: asked.merge(found.rows[name], state.scratch[name], l2=config.embedding_l2)
            for name, asked in found.asked.items()
        }
        by_dense, _ = decay.update(found.dense, decay.init(dense), dense)
        norm = jnp.sqrt(TINY + sum(change.square for change in changes.values()))
        clipped: Any = clip.update((by_dense, norm), clip.init((dense, norm)))[0]
        by_dense, scale = clipped[0], clipped[1] / norm
        updates, dense_state = dense_rule.update(by_dense, state.dense, dense)
        dense = jax.tree.map(jnp.add, dense, updates)
        states, scratch = dict(state.tables), dict(state.scratch)
        for name, change in changes.items():
            tables[name], states[name], scratch[name] = change.learn(
                table_rule, states[name], scale, state.count
            )
        state = FastState(state.count + 1, dense_state, states, scratch)
        return rows.join(params, dense, tables), state, found.aux

    return Optimiser(init, learn)


def _table_rule(config: OptimConfig, steps: int) -> Rule:
    rate = config.learning_rate
    if config.tables == "rowwise_adagrad":
        rate = config.table_rate or 10 * rate
    return RULES[config.tables](_schedule(rate, config, steps))


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
        norm = jnp.sqrt(sum(map(rows.square_sum, jax.tree.leaves(updates))))
        scale = config.clip_norm / jnp.maximum(norm, config.clip_norm)
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
