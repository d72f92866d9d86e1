"""Equal layers one after the other, their parameters stacked: one program runs them all.

So the program, and the time to compile it, does not grow with the depth.
"""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from loopfm_jax.backbones.layers import Key


class Stack(nnx.Module):
    """x -> layer(layer(x)), `count` times.

    Args:
      make: one layer, a module `(x, *beside, key=..)` -> x, x arrays of the same shapes.
      count: how many.
      remat: keep only what enters a layer, and compute the rest again for the gradient.
    """

    def __init__(
        self, make: Callable[[nnx.Rngs], nnx.Module], count: int, *, remat: bool, rngs: nnx.Rngs
    ):
        self.remat, self.count = remat, count
        self.layers = nnx.split_rngs(splits=count)(nnx.vmap(make))(rngs)

    def __call__(self, x: Any, *beside: Any, key: Key = None) -> Any:
        """Args:
        x: what the layers hand on.
        beside: what all of them read.
        key: randomness of dropout, of which every layer gets its own; None means inference.
        """
        graphdef, params = nnx.split(self.layers)
        keys = None if key is None else jax.random.split(key, self.count)

        def run(x: Any, layer: tuple[dict, Key]) -> tuple[Any, None]:
            params, key = layer
            return nnx.merge(graphdef, params)(x, *beside, key=key), None

        run = jax.checkpoint(run) if self.remat else run
        return jax.lax.scan(run, x, (nnx.to_pure_dict(params), keys))[0]
