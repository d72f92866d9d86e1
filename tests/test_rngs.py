"""Keys of a fresh model: those of flax, without the count among what is traced."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

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
