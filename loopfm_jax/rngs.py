"""Random keys that a fresh model draws its parameters with."""

import jax
from flax import nnx


class Rngs(nnx.Rngs):
    """`nnx.Rngs(seed)`, the same keys of `params`, counted in Python.

    Flax keeps the count in an array and asks for its sharding at every draw. A model is built under
    a trace (`loop.outline`), where JAX answers by searching all that was traced before: a DMIN of
    eight heads took seconds to build.
    """

    def __init__(self, seed: int | jax.Array):
        super().__init__(seed)
        self.drawn = 0

    def params(self) -> jax.Array:
        """The next key."""
        key = jax.random.fold_in(self.default.key[...], self.drawn)
        self.drawn += 1
        return key
