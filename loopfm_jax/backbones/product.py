"""Products whose bfloat16 on CPU needs care: of rows and kernels, and of many small matrices.

XLA has two kinds there: those with a float32 result are faster than float32's where the processor
multiplies bfloat16 (AVX512-BF16, AMX), those with a bfloat16 result slower. It has the former only
where what is summed over lies side by side in the left operand; else it converts both to float32.
Flax and JAX's own gradients ask for what is slow, these for what is fast (benchmarks/LOG.md).
Results and gradients of rows have the rows' dtype, gradients of kernels the kernels'.
"""

import math
from functools import partial
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


def batched_product(a: jax.Array, b: jax.Array, dtype: DTypeLike, *, over: int = -2) -> jax.Array:
    """Many small matrices, each of `a` times its one of `b`.

    Args:
      a: [..., L,K]; float32 on CPU, where what else is done in bfloat16 is slow.
      b: [..., K,M], or [..., M,K], in the dtype of `a`.
      dtype: arithmetic of the products.
      over: the axis of `b` that is summed over.

    Returns:
      [..., L,M], in the dtype of `a`, and so are gradients.
    """
    if not _narrow(dtype):
        lead = tuple(range(a.ndim - 2))
        return jax.lax.dot_general(a, b, (((a.ndim - 1,), (b.ndim + over,)), (lead, lead)))
    a_NLK, b_NXY = (x.reshape(-1, *x.shape[-2:]) for x in (a, b))
    return jnp.reshape(_batched_product(a_NLK, b_NXY, 3 + over), (*a.shape[:-1], -1))


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


def _dot(
    a: jax.Array, b: jax.Array, a_axis: int, b_axis: int, *, batch: tuple[int, ...] = ()
) -> jax.Array:
    """The sum over one axis of each, float32."""
    axes = (((a_axis,), (b_axis,)), (batch, batch))
    return jax.lax.dot_general(a, b, axes, preferred_element_type=jnp.float32)


@jax.custom_vjp
def _product(x_TX: jax.Array, kernel_XW: jax.Array) -> jax.Array:
    return _dot(x_TX, kernel_XW.astype(x_TX.dtype), 1, 0).astype(x_TX.dtype)


def _product_forward(x_TX: jax.Array, kernel_XW: jax.Array) -> tuple[jax.Array, Any]:
    return _product(x_TX, kernel_XW), (x_TX, kernel_XW)


def _product_backward(kept: Any, g_TW: jax.Array) -> tuple[jax.Array, jax.Array]:
    x_TX, kernel_XW = kept
    to_x_TX = _dot(g_TW, kernel_XW.astype(g_TW.dtype), 1, 1).astype(g_TW.dtype)
    x_is_narrower = x_TX.shape[1] <= g_TW.shape[1]  # and the narrower side is turned
    to_kernel_XW = _over_rows(x_TX, g_TW) if x_is_narrower else _over_rows(g_TW, x_TX).T
    return to_x_TX, to_kernel_XW.astype(kernel_XW.dtype)


def _over_rows(a_TX: jax.Array, b_TW: jax.Array) -> jax.Array:
    """The sum over rows of every number of one times every number of the other, [X,W]."""
    return _apart(_dot(_turned(a_TX), b_TW, 1, 0))


def _turned(x: jax.Array) -> jax.Array:
    """The last two axes swapped, in memory too: a mere transpose XLA would read from where it is,
    by columns; a reshape it does not."""
    *lead, rows, width = x.shape
    x = jnp.swapaxes(x, -1, -2).reshape(*lead, width, 1, rows)
    return _apart(x).reshape(*lead, width, rows)


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


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _batched_product(a_NLK: jax.Array, b_NXY: jax.Array, over: int) -> jax.Array:
    return _batched_product_forward(a_NLK, b_NXY, over)[0]


def _batched_product_forward(
    a_NLK: jax.Array, b_NXY: jax.Array, over: int
) -> tuple[jax.Array, Any]:
    a_NLK, b_NXY = a_NLK.astype(jnp.bfloat16), b_NXY.astype(jnp.bfloat16)
    return _dot(a_NLK, b_NXY, 2, over, batch=(0,)), (a_NLK, b_NXY)


def _batched_product_backward(
    over: int, kept: Any, g_NLM: jax.Array
) -> tuple[jax.Array, jax.Array]:
    a_NLK, b_NXY = kept
    g_NLM = g_NLM.astype(jnp.bfloat16)
    left, right = (a_NLK, g_NLM) if over == 1 else (g_NLM, a_NLK)
    to_a_NLK = _dot(g_NLM, b_NXY, 2, 3 - over, batch=(0,))
    to_b_NXY = _dot(_turned(left), right, 2, 1, batch=(0,))
    return _apart(to_a_NLK), _apart(to_b_NXY)


_batched_product.defvjp(_batched_product_forward, _batched_product_backward)
