"""Codes: identities over every byte, error bounds, bit layout against plain numpy (R14)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from loopfm_jax.history import codes

ALL = tuple(codes.NUMPY_TYPE)
ERROR = {"fp32": 0.0, "fp16": 2.0**-12, "int8": 0.5 / 127, "int4": 0.5 / 8}
"""Largest error of a code over [-1, 1]; int4 has it only up to 15/16, where it saturates."""

quantise = jax.jit(codes.quantise, static_argnames="code")
dequantise = jax.jit(codes.dequantise, static_argnames=("code", "width"))
pack, unpack = jax.jit(codes.pack_int4), jax.jit(codes.unpack_int4)
every_code = pytest.mark.parametrize("code", ALL)


def restore(z, code):
    z = np.atleast_2d(np.asarray(z, np.float32))
    return np.asarray(dequantise(quantise(z, code=code), code=code, width=z.shape[1]))


def oracle_quantise_int4(z_BZ: np.ndarray) -> np.ndarray:
    """Number by number: dimension 2j in the low nibble of byte j, 2j + 1 in the high one."""
    rows, width = z_BZ.shape
    stored = np.zeros((rows, -(-width // 2)), np.uint8)
    for row in range(rows):
        for j in range(width):
            level = int(np.clip(np.rint(8 * z_BZ[row, j]), -8, 7))
            stored[row, j // 2] |= (level % 16) << (4 * (j % 2))
    return stored


def draw(rows: int, width: int) -> np.ndarray:
    """Codes over the whole range, ends and halves of a level included."""
    rng = np.random.default_rng(rows + width)
    z_BZ = rng.uniform(-1, 1, (rows, width)).astype(np.float32)
    z_BZ[0] = rng.choice(np.arange(-16, 17) / 16, width)
    return z_BZ


def test_pack_and_unpack_are_inverse_on_every_byte():
    every_byte = jnp.arange(256, dtype=jnp.uint8)[:, None]
    levels = unpack(every_byte)
    assert levels.dtype == jnp.int8 and levels.min() == -8 and levels.max() == 7
    assert len({tuple(row) for row in levels.tolist()}) == 256
    np.testing.assert_array_equal(pack(levels), every_byte)


def test_unpack_and_pack_are_inverse_on_every_pair_of_levels():
    low, high = np.meshgrid(np.arange(-8, 8), np.arange(-8, 8))
    pairs = np.stack([low.ravel(), high.ravel()], axis=1).astype(np.int8)
    packed = pack(pairs)
    np.testing.assert_array_equal(unpack(packed), pairs)
    np.testing.assert_array_equal(packed[:, 0], low.ravel() % 16 + 16 * (high.ravel() % 16))


@pytest.mark.parametrize("width", [1, 2, 5, 8, 31, 32])
def test_int4_layout_is_that_of_a_plain_loop(width):
    z_BZ = draw(7, width)
    stored = quantise(z_BZ, code="int4")
    np.testing.assert_array_equal(stored, oracle_quantise_int4(z_BZ))


@every_code
@pytest.mark.parametrize("width", [1, 2, 5, 32])
def test_stored_shape_and_type_are_as_promised(code, width):
    stored = quantise(draw(3, width), code=code)
    assert stored.shape == (3, codes.columns(width, code))
    assert stored.dtype == codes.NUMPY_TYPE[code]
    restored = dequantise(stored, code=code, width=width)
    assert restored.shape == (3, width) and restored.dtype == jnp.float32


@every_code
def test_error_bound(code):
    z = np.linspace(-1, 15 / 16, 100_001, dtype=np.float32)
    error = np.abs(restore(z, code)[0] - z)
    assert error.max() <= ERROR[code] + 1e-7
    assert error.max() >= 0.99 * ERROR[code]  # the bound is the code's own, not a loose one


@every_code
def test_values_saturate_and_do_not_wrap(code):
    ends = np.array([-1, -1 + 1e-7, 1 - 1e-7, 1], np.float32)
    top = 7 / 8 if code == "int4" else 1
    np.testing.assert_allclose(restore(ends, code)[0], [-1, -1, top, top], atol=3e-4)


@pytest.mark.parametrize("code", ["int8", "int4"])
def test_what_no_tanh_gives_saturates_too(code):
    np.testing.assert_array_equal(restore([[-9, 9]], code), restore([[-1, 1]], code))


@every_code
def test_restored_values_are_fixed_points(code):
    z_BZ = draw(5, 9)
    once = restore(z_BZ, code)
    np.testing.assert_array_equal(restore(once, code), once)


@every_code
def test_order_is_kept(code):
    z = np.linspace(-1, 1, 4001, dtype=np.float32)
    assert (np.diff(restore(z, code)[0]) >= 0).all()


@every_code
@pytest.mark.parametrize("prefix", [1, 2, 3, 8, 9])
def test_prefix_of_columns_is_prefix_of_dimensions(code, prefix):
    z_BZ = draw(6, 9)
    whole = quantise(z_BZ, code=code)
    front = whole[:, : codes.columns(prefix, code)]
    # A byte of int4 holds two dimensions: those of the prefix are read from the cut bytes alone.
    np.testing.assert_array_equal(
        dequantise(front, code=code, width=prefix), restore(z_BZ, code)[:, :prefix]
    )
    if code != "int4" or prefix % 2 == 0:
        np.testing.assert_array_equal(front, quantise(z_BZ[:, :prefix], code=code))


@every_code
def test_any_leading_axes_and_none(code):
    z = draw(6, 5)
    stacked = quantise(z.reshape(2, 3, 5), code=code)
    np.testing.assert_array_equal(stacked.reshape(6, -1), quantise(z, code=code))
    np.testing.assert_array_equal(quantise(z[1], code=code), quantise(z, code=code)[1])


@every_code
def test_jit_changes_no_bit(code):
    z_BZ = draw(4, 7)
    stored = codes.quantise(jnp.asarray(z_BZ), code)
    np.testing.assert_array_equal(quantise(z_BZ, code=code), stored)
    np.testing.assert_array_equal(
        dequantise(stored, code=code, width=7), codes.dequantise(stored, code, width=7)
    )
