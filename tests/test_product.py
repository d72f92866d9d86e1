"""Products in bfloat16 on CPU against numpy, in float64 of the same rounded numbers."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from loopfm_jax import compiler
from loopfm_jax.backbones.product import IN_FLOAT32, Dense, batched_product, product

ROUNDED = 2**-8
"""Relative, of a number that becomes bfloat16."""
SHAPES = [(80, 6, 5), (80, 5, 6), (80, 6, 1), (IN_FLOAT32, 6, 5)]
"""Rows, X, W: what is turned before a kernel's gradient, and few rows."""


def drawn(*shape, dtype=jnp.bfloat16, seed=0):
    return jax.random.normal(jax.random.key(seed), shape).astype(dtype)


def exact(x):
    return np.asarray(x.astype(jnp.float32), np.float64)


def affine(x, kernel, bias, seen):
    layer = Dense(*kernel.shape, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    layer.kernel[...], layer.bias[...] = kernel, bias
    return (layer(x) * seen).astype(jnp.float32).sum()


@pytest.mark.parametrize(("rows", "x_width", "width"), SHAPES)
def test_rows_keep_their_dtype_and_kernels_theirs(rows, x_width, width):
    x, seen = drawn(rows, x_width), drawn(rows, width, seed=1)
    kernel, bias = (drawn(*s, dtype=jnp.float32, seed=2) for s in ((x_width, width), (width,)))
    found = product(x, kernel)
    narrow = exact(kernel if rows <= IN_FLOAT32 else kernel.astype(jnp.bfloat16))
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(exact(found), exact(x) @ narrow, rtol=ROUNDED, atol=1e-5)
    to_x, to_kernel, to_bias = jax.grad(affine, argnums=(0, 1, 2))(x, kernel, bias, seen)
    assert (to_x.dtype, to_kernel.dtype, to_bias.dtype) == (jnp.bfloat16, *2 * [jnp.float32])
    np.testing.assert_allclose(exact(to_x), exact(seen) @ narrow.T, rtol=ROUNDED, atol=1e-5)
    for got, want in ((to_kernel, exact(x).T @ exact(seen)), (to_bias, exact(seen).sum(axis=0))):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)  # sums in float32: not rounded


@pytest.mark.parametrize("over", [-1, -2])
def test_matrices_are_wide_before_and_after(over):
    a, b = drawn(3, 2, 5, 4, dtype=jnp.float32), drawn(3, 2, 4, 6, dtype=jnp.float32, seed=1)
    seen = drawn(3, 2, 5, 6, seed=2)

    def found(a, b):
        b = b if over == -2 else jnp.swapaxes(b, 2, 3)
        return batched_product(a, b, jnp.bfloat16, over=over)

    to_a, to_b = jax.grad(lambda a, b: (found(a, b) * seen).sum(), (0, 1))(a, b)
    assert {x.dtype for x in (found(a, b), to_a, to_b)} == {np.dtype("float32")}
    exact_a, exact_b = (exact(x.astype(jnp.bfloat16)) for x in (a, b))
    for got, want in (
        (found(a, b), exact_a @ exact_b),
        (to_a, exact(seen) @ np.swapaxes(exact_b, 2, 3)),
        (to_b, np.swapaxes(exact_a, 2, 3) @ exact(seen)),
    ):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("over", [-1, -2])
def test_matrices_in_float32_are_what_they_always_are(over):
    a, b = drawn(3, 5, 4, dtype=jnp.float32), drawn(3, 4, 6, dtype=jnp.float32)
    found = batched_product(a, b if over == -2 else jnp.swapaxes(b, 1, 2), jnp.float32, over=over)
    np.testing.assert_allclose(found, a @ b, rtol=1e-6)


def test_every_product_of_bfloat16_has_a_float32_result():
    """Those that have not are slow, and JAX's own gradients ask for them."""
    given = drawn(80, 6), drawn(6, 5, dtype=jnp.float32), jnp.ones(5), drawn(80, 5)

    def kinds(f):
        text = jax.jit(f).lower(*given).as_text()
        return re.findall(r"dot_general.*\(tensor<\S+xbf16>.*-> tensor<\S+x(\w+)>", text)

    assert kinds(jax.grad(affine, argnums=(0, 1, 2))) == 3 * ["f32"]
    plain = jax.grad(lambda x, k, *_: (x @ k.astype(x.dtype)).astype(jnp.float32).sum(), (0, 1))
    assert set(kinds(plain)) == {"bf16"}


def multiplied(f, *given) -> set[str]:
    """What XLA multiplies on CPU when it is asked as for bfloat16."""
    asked = compiler.options(dtype="bfloat16")
    text = jax.jit(f, compiler_options=asked).lower(*given).compile().as_text() or ""
    kinds = dict(re.findall(r"%(\S+) = (\w+)\[", text))
    operands = [name for two in re.findall(r" dot\(%(\S+), %(\S+?)\)", text) for name in two]
    return {kinds[name] for name in operands}


@pytest.mark.parametrize(("x_width", "width"), [(64, 96), (96, 64)])
def test_gradients_too_are_multiplied_in_bfloat16(x_width, width):
    """XLA converts operands to float32 where it has no product for how they lie."""
    x, kernel = drawn(256, x_width), drawn(x_width, width, dtype=jnp.float32)
    seen = drawn(256, width, seed=1)

    def loss(x, kernel):
        return (product(x, kernel) * seen).astype(jnp.float32).sum()

    def attended(x):
        x_NLK = x.astype(jnp.float32).reshape(16, 16, x_width)
        return batched_product(x_NLK, x_NLK, jnp.bfloat16, over=-1).sum()

    def by_columns(x, seen):
        return jnp.einsum("tx,tw->xw", x, seen, preferred_element_type=jnp.float32)

    if multiplied(loss, x, kernel) == {"f32"}:
        pytest.skip("XLA has no products of bfloat16 for this processor")
    assert multiplied(jax.grad(loss, (0, 1)), x, kernel) == {"bf16"}
    assert multiplied(jax.grad(attended), x) == {"bf16"}
    assert multiplied(by_columns, x, seen) == {"f32"}


def test_leading_axes_and_a_layer_without_a_bias():
    x, kernel = drawn(3, 40, 6), drawn(6, 5, dtype=jnp.float32)
    layer = Dense(6, 5, use_bias=False, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    layer.kernel[...] = kernel
    np.testing.assert_array_equal(
        product(x, kernel).reshape(120, 5), product(x.reshape(120, 6), kernel)
    )
    np.testing.assert_array_equal(layer(x), product(x, kernel))


def test_in_float32_a_product_is_what_it_always_is():
    x, kernel = drawn(40, 6, dtype=jnp.float32), drawn(6, 5, dtype=jnp.float32)
    layer, usual = (kind(6, 5, rngs=nnx.Rngs(0)) for kind in (Dense, nnx.Linear))
    np.testing.assert_array_equal(product(x, kernel), x @ kernel)
    np.testing.assert_array_equal(layer(x), usual(x))
