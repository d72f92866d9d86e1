"""Modules filled with noise: no compilation, and no zero bias hides anything."""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

M = TypeVar("M", bound=nnx.Module)
MIDDLE = {"scale": 1.0, "var": 1.0, "variance_D": 1.0, "variance_W": 1.0}


def noisy(create: Callable[[nnx.Rngs], M], *, seed: int = 0) -> M:
    """The module that `create` builds, every array replaced by noise around 0 (scales: 1)."""
    graphdef, state = nnx.split(nnx.eval_shape(lambda: create(nnx.Rngs(0))))
    rng = np.random.default_rng(seed)

    def draw(path, x) -> jax.Array:
        name = path[-1].key
        spread = 0.0 if name == "batches" else 0.6
        values = MIDDLE.get(name, 0.0) + rng.uniform(-spread, spread, x.shape)
        return jnp.asarray(values, x.dtype)

    return nnx.merge(graphdef, jax.tree.map_with_path(draw, nnx.to_pure_dict(state)))


def parts(module: nnx.Module) -> tuple[Any, Any, Any]:
    """(graph, parameters, everything else) as plain arrays, for `nnx.merge` inside a program."""
    graphdef, params, rest = nnx.split(module, nnx.Param, ...)
    return graphdef, nnx.to_pure_dict(params), nnx.to_pure_dict(rest)


def named(module: nnx.Module) -> dict[str, np.ndarray]:
    """Every array of a module in float64, by its path: `mix/0/kernel`."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(nnx.to_pure_dict(nnx.state(module)))
    return {"/".join(str(k.key) for k in path): np.asarray(x, np.float64) for path, x in leaves}
