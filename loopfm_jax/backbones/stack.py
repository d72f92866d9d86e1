"""Equal layers one after the other, their parameters stacked: one program runs them all.

So the program, and the time to compile it, does not grow with the depth.
"""

from collections.abc import Callable

import jax
from flax import nnx


class Stack(nnx.Module):
    """x -> layer(layer(x)), `count` times.

    Args:
      make: one layer, a module x -> x of one shape.
      count: how many.
      remat: keep only what enters a layer, and compute the rest again for the gradient.
    """

    def __init__(
        self, make: Callable[[nnx.Rngs], nnx.Module], count: int, *, remat: bool, rngs: nnx.Rngs
    ):
        self.remat = remat
        self.layers = nnx.split_rngs(splits=count)(nnx.vmap(make))(rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        graphdef, params = nnx.split(self.layers)

        def run(x: jax.Array, params: dict) -> tuple[jax.Array, None]:
            return nnx.merge(graphdef, params)(x), None

        run = jax.checkpoint(run) if self.remat else run
        return jax.lax.scan(run, x, nnx.to_pure_dict(params))[0]
