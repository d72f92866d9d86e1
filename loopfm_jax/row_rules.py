"""How the rows that a step touched learn: transformations of optax's form.

`update` takes two more arguments. Gradients are [N,E], and `ids` says of which rows of the table
they are, each row at most once; ids out of bounds are no rows. `count` is the number of steps
before this one: a rule's state is nothing but arrays [V,X], which lie where the table's rows lie.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

Rule = optax.GradientTransformationExtraArgs


def rowwise_adagrad(learning_rate: optax.ScalarOrSchedule, *, epsilon: float = 1e-8) -> Rule:
    """Adagrad whose accumulator is one number per row, the mean of its squared gradients."""

    def init(params: Any) -> jax.Array:
        return jnp.zeros((len(params), 1), params.dtype)

    def update(updates: Any, state: Any, params: Any = None, **more: Any) -> Any:
        ids_N, rate = more["ids"], _rate(learning_rate, more["count"])
        total_N1 = _at(state, ids_N) + jnp.square(updates).mean(axis=1, keepdims=True)
        step_NE = -rate * updates / (jnp.sqrt(total_N1) + epsilon)
        return step_NE, _with(state, ids_N, total_N1)

    return Rule(init, update)


class RmsState(NamedTuple):
    """[V,1] each."""

    square: jax.Array
    last: jax.Array
    """The step of a row's last gradient, int32."""


def rowwise_rms(
    learning_rate: optax.ScalarOrSchedule, *, b2: float = 0.999, epsilon: float = 1e-8
) -> Rule:
    """What dense Adam does to a rare row, all at once: over the steps after a gradient its momentum
    moves the row by the whole gradient, over the root of a mean of squares that decays at every
    step, touched or not. That mean is one number per row."""

    def init(params: Any) -> RmsState:
        zeros = jnp.zeros((len(params), 1), params.dtype)
        return RmsState(zeros, jnp.zeros(zeros.shape, jnp.int32))

    def update(updates: Any, state: Any, params: Any = None, **more: Any) -> Any:
        ids_N, count = more["ids"], more["count"] + 1
        rate = _rate(learning_rate, more["count"])
        last_N1 = _at(state.last, ids_N)
        kept_N1 = b2 ** (count - last_N1).astype(updates.dtype)
        square_N1 = jnp.square(updates).mean(axis=1, keepdims=True)
        square_N1 = kept_N1 * _at(state.square, ids_N) + (1 - b2) * square_N1
        step_NE = -rate * updates / (jnp.sqrt(square_N1 / (1 - b2**count)) + epsilon)
        now_N1 = jnp.maximum(last_N1, count)
        return step_NE, RmsState(
            _with(state.square, ids_N, square_N1), _with(state.last, ids_N, now_N1)
        )

    return Rule(init, update)


class LazyAdamState(NamedTuple):
    """[V,E] each."""

    mean: jax.Array
    square: jax.Array


def lazy_adam(
    learning_rate: optax.ScalarOrSchedule,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    epsilon: float = 1e-8,
) -> Rule:
    """Adam whose moments decay only when their row is touched; the same where all rows are."""

    def init(params: Any) -> LazyAdamState:
        return LazyAdamState(jnp.zeros_like(params), jnp.zeros_like(params))

    def update(updates: Any, state: Any, params: Any = None, **more: Any) -> Any:
        ids_N, count = more["ids"], more["count"] + 1
        rate = _rate(learning_rate, more["count"])
        m_NE = b1 * _at(state.mean, ids_N) + (1 - b1) * updates
        v_NE = b2 * _at(state.square, ids_N) + (1 - b2) * jnp.square(updates)
        unbiased_m, unbiased_v = m_NE / (1 - b1**count), v_NE / (1 - b2**count)
        step_NE = -rate * unbiased_m / (jnp.sqrt(unbiased_v) + epsilon)
        return step_NE, LazyAdamState(
            _with(state.mean, ids_N, m_NE), _with(state.square, ids_N, v_NE)
        )

    return Rule(init, update)


RULES = {
    "rowwise_adagrad": rowwise_adagrad,
    "rowwise_rms": rowwise_rms,
    "lazy_adam": lazy_adam,
}
"""`OptimConfig.tables` -> the rule of that learning rate."""


def _rate(learning_rate: optax.ScalarOrSchedule, count: jax.Array) -> Any:
    return learning_rate(count) if callable(learning_rate) else learning_rate


def _at(x_VX: jax.Array, ids_N: jax.Array) -> jax.Array:
    return x_VX.at[ids_N].get(mode="fill", fill_value=0)


def _with(x_VX: jax.Array, ids_N: jax.Array, new_NX: jax.Array) -> jax.Array:
    """Set, not added, to what is made of the old ones: it must follow their reading, and needs no
    copy."""
    return x_VX.at[ids_N].set(new_NX, mode="drop")
