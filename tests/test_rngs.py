"""Keys of a fresh model: those of flax, without the count among what is traced."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from loopfm_jax.loop import step_key
from loopfm_jax.rngs import Rngs


def draw(rngs: nnx.Rngs) -> list[jax.Array]:
    layers = [nnx.Linear(3, 2, rngs=rngs) for _ in range(2)]
    return [layer.kernel[...] for layer in layers] + [jax.random.key_data(rngs.params())]


def start(seed: jax.Array) -> list[jax.Array]:
    return draw(Rngs(jax.random.key(seed)))


def test_they_are_those_of_flax():
    for found in (draw(Rngs(7)), jax.jit(start)(jnp.uint32(7))):
        for made, like in zip(found, draw(nnx.Rngs(7)), strict=True):
            np.testing.assert_array_equal(made, like)


def test_a_trace_holds_no_count():
    names = [eqn.primitive.name for eqn in jax.make_jaxpr(start)(jnp.uint32(7)).eqns]
    assert names.count("random_fold_in") == 5 and "add" not in names, names


def test_a_step_draws_with_no_key_that_drew_a_parameter():
    seed, rngs = jnp.uint32(7), Rngs(jax.random.key(7))
    parameters = {tuple(np.asarray(jax.random.key_data(rngs.params()))) for _ in range(200)}
    steps = {tuple(np.asarray(jax.random.key_data(step_key(seed, n)))) for n in range(200)}
    assert len(parameters | steps) == 400
