"""Codes: how a compressed embedding z in [-1, 1]^Z is stored (PAPER section 1, stage 2b).

`int4` is uniform with no per-row scale, two codes a byte, dimensions 2j and 2j+1 in byte j: a
prefix of bytes is a prefix of dimensions, as Matryoshka codes want. Everything here runs inside a
jitted step.
"""

from typing import Literal

import jax
import jax.numpy as jnp

Code = Literal["fp32", "fp16", "int8", "int4"]
NUMPY_TYPE = {"fp32": "float32", "fp16": "float16", "int8": "int8", "int4": "uint8"}
LEVELS = {"int8": 127.0, "int4": 8.0}


def columns(width: int, code: Code) -> int:
    """Stored columns of a code of `width` numbers, each of `NUMPY_TYPE[code]`."""
    return (width + 1) // 2 if code == "int4" else width


def quantise(z_BZ: jax.Array, code: Code) -> jax.Array:
    """Codes of z in [-1, 1]; the reconstruction error is at most half a level (one for z = 1)."""
    if code == "int4":
        return pack_int4(jnp.clip(jnp.round(8 * z_BZ), -8, 7).astype(jnp.int8))
    if code == "int8":
        return jnp.clip(jnp.round(127 * z_BZ), -127, 127).astype(jnp.int8)
    return z_BZ.astype(NUMPY_TYPE[code])


def dequantise(stored: jax.Array, code: Code, *, width: int) -> jax.Array:
    """Stored codes [..., columns] -> float32 [..., width]."""
    if code == "int4":
        return unpack_int4(stored)[..., :width].astype(jnp.float32) / LEVELS["int4"]
    if code == "int8":
        return stored.astype(jnp.float32) / LEVELS["int8"]
    return stored.astype(jnp.float32)


def pack_int4(values: jax.Array) -> jax.Array:
    """int8 in [-8, 7], [..., Z] -> uint8 [..., ceil(Z / 2)]; an odd Z is filled up with 0."""
    if values.shape[-1] % 2:
        values = jnp.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, 1)])
    nibbles = values.astype(jnp.uint8) & 0xF
    return nibbles[..., 0::2] | (nibbles[..., 1::2] << 4)


def unpack_int4(packed: jax.Array) -> jax.Array:
    """uint8 [..., n] -> int8 in [-8, 7], [..., 2n]."""
    nibbles = jnp.stack([packed & 0xF, packed >> 4], axis=-1)
    signed = (nibbles ^ 8).astype(jnp.int8) - 8
    return signed.reshape(*packed.shape[:-1], -1)
