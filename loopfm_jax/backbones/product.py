"""Products of rows and kernels, whose bfloat16 on CPU needs care.

XLA has two kinds there: those with a float32 result are faster than float32's where the processor
multiplies bfloat16 (AVX512-BF16, AMX), those with a bfloat16 result slower. It has the former only
where what is summed over lies side by side in the left operand; else it converts both to float32.
Flax and JAX's own gradients ask for what is slow, these for what is fast (benchmarks/LOG.md).
Results and gradients of rows have the rows' dtype, gradients of kernels the kernels'.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from loopfm_jax import sharding

IN_FLOAT32 = 64
"""Up to so many rows are multiplied in float32: a kernel in fewer bits is not worth making."""


def product(x: jax.Array, kernel_XW: jax.Array) -> jax.Array:
    """`x @ kernel`, [..., X] -> [..., W]."""
    if not _narrow(x.dtype):
        return x @ kernel_XW.astype(x.dtype)
    rows = math.prod(x.shape[:-1])
    if rows <= IN_FLOAT32:
        return (x.astype(jnp.float32) @ kernel_XW).astype(x.dtype)
    return _product(x.reshape(rows, -1), kernel_XW).reshape(*x.shape[:-1], -1)


class Dense(nnx.Linear):
    """`nnx.Linear` by `product`."""

    def __call__(self, inputs: jax.Array, out_sharding: Any = None) -> jax.Array:
        if self.dtype is None or not _narrow(self.dtype):
            return super().__call__(inputs, out_sharding)
        result = product(inputs.astype(self.dtype), self.kernel[...])
        return result if self.bias is None else _add(result, self.bias[...])


def _narrow(dtype: DTypeLike) -> bool:
    return dtype == jnp.bfloat16 and sharding.platform() == "cpu"


def _apart(x: jax.Array) -> jax.Array:
    """What comes after is not merged into what came before."""
    return jax.lax.optimization_barrier(x)


def _dot(a: jax.Array, b: jax.Array, a_axis: int, b_axis: int) -> jax.Array:
    """The sum over one axis of each, float32."""
    axes = (((a_axis,), (b_axis,)), ((), ()))
    return jax.lax.dot_general(a, b, axes, preferred_element_type=jnp.float32)


@jax.custom_vjp
def _product(x_TX: jax.Array, kernel_XW: jax.Array) -> jax.Array:
    return _dot(x_TX, kernel_XW.astype(x_TX.dtype), 1, 0).astype(x_TX.dtype)


def _product_forward(x_TX: jax.Array, kernel_XW: jax.Array) -> tuple[jax.Array, Any]:
    return _product(x_TX, kernel_XW), (x_TX, kernel_XW)


def _product_backward(kept: Any, g_TW: jax.Array) -> tuple[jax.Array, jax.Array]:
    x_TX, kernel_XW = kept
    to_x_TX = _dot(g_TW, kernel_XW.astype(g_TW.dtype), 1, 1).astype(g_TW.dtype)
    narrower = x_TX.shape[1] <= g_TW.shape[1]
    to_kernel_XW = _over_rows(x_TX, g_TW) if narrower else _over_rows(g_TW, x_TX).T
    return to_x_TX, to_kernel_XW.astype(kernel_XW.dtype)


def _over_rows(a_TX: jax.Array, b_TW: jax.Array) -> jax.Array:
    """[X,W], by the first one turned in memory: a mere transpose XLA would read from where it is,
    by columns; a reshape it does not."""
    rows, width = a_TX.shape
    a_XT = _apart(a_TX.T.reshape(width, 1, rows)).reshape(width, rows)
    return _apart(_dot(a_XT, b_TW, 1, 0))


_product.defvjp(_product_forward, _product_backward)


@jax.custom_vjp
def _add(x: jax.Array, bias_W: jax.Array) -> jax.Array:
    return x + jnp.broadcast_to(bias_W.astype(x.dtype), x.shape)


def _add_forward(x: jax.Array, bias_W: jax.Array) -> tuple[jax.Array, jax.Array]:
    return _add(x, bias_W), bias_W


def _add_backward(bias_W: jax.Array, g: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The bias' gradient is a product with ones: a sum of bfloat16 is not vectorised."""
    g_TW = g.reshape(-1, g.shape[-1])
    ones_1T = jnp.ones((1, len(g_TW)), g.dtype)
    return g, _dot(ones_1T, g_TW, 1, 0)[0].astype(bias_W.dtype)


_add.defvjp(_add_forward, _add_backward)
