"""Codes: identities over every byte, error bounds, bit layout against plain numpy (R14)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from loopfm_jax.errors import UserError
from loopfm_jax.fm import codebook
from loopfm_jax.history import codes
from loopfm_jax.history.codes import CODES, FITTED, Codec

ALL = tuple(code for code in CODES if code not in FITTED)
ERROR = {"fp32": 0.0, "fp16": 2.0**-12, "int8": 0.5 / 127, "int4": 0.5 / 8}
"""Largest error of a code over [-1, 1]; int4 has it only up to 15/16, where it saturates."""

_quantise, _dequantise = jax.jit(codes.quantise), jax.jit(codes.dequantise)
pack, unpack = jax.jit(codes.pack_int4), jax.jit(codes.unpack_int4)
every_code = pytest.mark.parametrize("code", ALL)


def quantise(z, *, code):
    return _quantise(z, Codec(code, z.shape[-1]))


def dequantise(stored, *, code, width):
    return _dequantise(stored, Codec(code, width))


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
    assert stored.shape == (3, Codec(code, width).columns)
    assert stored.dtype == Codec(code, width).dtype
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
    front = whole[:, : Codec(code, prefix).columns]
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
    codec = Codec(code, 7)
    stored = codes.quantise(jnp.asarray(z_BZ), codec)
    np.testing.assert_array_equal(quantise(z_BZ, code=code), stored)
    np.testing.assert_array_equal(
        dequantise(stored, code=code, width=7), codes.dequantise(stored, codec)
    )


# ------------------------------------------------------------------------- learned codes


def fitted(code, z, *, books=3) -> Codec:
    return Codec(code, z.shape[1], codebook.fit(z, code, books=books, seed=0))


def lumpy(rows: int = 2000, width: int = 5) -> np.ndarray:
    """Codes that crowd around a few values, as tanh codes do."""
    rng = np.random.default_rng(3)
    z_BZ = rng.choice([-0.9, -0.33, 0.02, 0.71], (rows, width)) + 0.05 * rng.normal(
        size=(rows, width)
    )
    return np.clip(z_BZ, -1, 1).astype(np.float32)


def test_plain_codes_need_no_book():
    assert all(codebook.fit(lumpy(), code, books=3, seed=0) is None for code in ALL)


@pytest.mark.parametrize("width", [4, 5])
def test_kmeans_names_the_nearest_of_sixteen_centres(width):
    z_BZ = lumpy(width=width)
    codec = fitted("kmeans4", z_BZ)
    assert codec.book.shape == (width, 16) and (np.diff(codec.book, axis=1) >= 0).all()
    stored = np.asarray(_quantise(z_BZ, codec))
    assert stored.shape == (len(z_BZ), codec.columns) == (len(z_BZ), -(-width // 2))
    nearest = np.abs(z_BZ[:, :, None] - codec.book[None]).argmin(axis=2)
    expected = np.take_along_axis(codec.book[None], nearest[:, :, None], axis=2)[:, :, 0]
    np.testing.assert_allclose(_dequantise(stored, codec), expected, atol=1e-7)
    off = [np.square(z_BZ - r).mean() for r in (expected, restore(z_BZ, "int4"))]
    assert off[0] < 0.3 * off[1]  # at equal bytes


def test_residual_codes_are_greedy_sums_of_named_vectors():
    z_BZ = lumpy()
    codec = fitted("rq", z_BZ)
    stored = np.asarray(_quantise(z_BZ, codec))
    assert stored.shape == (len(z_BZ), 3) and stored.dtype == codec.dtype == "uint8"
    rest, errors = z_BZ.astype(np.float64), []
    for k, book in enumerate(codec.book):
        apart = np.square(rest[:, None] - book[None]).sum(axis=2)
        chosen = np.take_along_axis(apart, stored[:, k : k + 1].astype(int), axis=1)[:, 0]
        np.testing.assert_allclose(chosen, apart.min(axis=1), atol=1e-6)
        rest = rest - book[stored[:, k]]
        errors.append(np.square(rest).mean())
    assert errors == sorted(errors, reverse=True)  # every book helps
    np.testing.assert_allclose(_dequantise(stored, codec), z_BZ - rest, atol=1e-6)


def test_fitting_is_repeatable_and_wants_enough_rows():
    z_BZ = lumpy()
    for code in FITTED:
        np.testing.assert_array_equal(fitted(code, z_BZ).book, fitted(code, z_BZ).book)
    with pytest.raises(UserError, match="needs 256 rows .* there are 40"):
        fitted("rq", z_BZ[:40])
