"""Modules filled with noise: no compilation, and no zero bias hides anything."""

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

M = TypeVar("M", bound=nnx.Module)


def noisy(create: Callable[[nnx.Rngs], M], *, seed: int = 0) -> M:
    """The module that `create` builds, every array replaced by noise around 0 (scales: 1)."""
    graphdef, state = nnx.split(nnx.eval_shape(lambda: create(nnx.Rngs(0))))
    rng = np.random.default_rng(seed)

    def draw(path, x) -> jax.Array:
        around = 1.0 if path[-1].key in ("scale", "var", "variance_D") else 0.0
        return jnp.asarray(around + rng.uniform(-0.6, 0.6, x.shape), x.dtype)

    return nnx.merge(graphdef, jax.tree.map_with_path(draw, nnx.to_pure_dict(state)))


def named(module: nnx.Module) -> dict[str, np.ndarray]:
    """Every array of a module in float64, by its path: `mix/0/kernel`."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(nnx.to_pure_dict(nnx.state(module)))
    return {"/".join(str(k.key) for k in path): np.asarray(x, np.float64) for path, x in leaves}
