"""Codes: how a compressed embedding z in [-1, 1]^Z is stored (PAPER section 1, stage 2b).

Uniform codes have no per-row scale. Four-bit codes stand two in a byte, dimensions 2j and 2j+1 in
byte j: a prefix of bytes is a prefix of dimensions, as Matryoshka codes want. `kmeans4` replaces
the 16 uniform levels by 16 learned centres per dimension (the paper does not say whether they are
shared: open). `rq` is residual quantisation: K bytes, each naming one of 256 vectors whose sum
approximates z. Everything here runs inside a jitted step; fm/codebook.py fits the books.
"""

from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

Code = Literal["fp32", "fp16", "int8", "int4", "kmeans4", "rq"]
CODES: tuple[Code, ...] = get_args(Code)
FITTED = ("kmeans4", "rq")
"""Codes that need a book."""
NUMPY_TYPE = {"fp32": "float32", "fp16": "float16", "int8": "int8"}
LEVELS = {"int8": 127.0, "int4": 8.0}


@struct.dataclass
class Codec:
    """One way to store codes of `width` numbers."""

    code: Code = struct.field(pytree_node=False)
    width: int = struct.field(pytree_node=False)
    """Z."""
    book: jax.Array | np.ndarray | None = None
    """kmeans4: rising centres [Z,16]; rq: vectors [K,256,Z]; else None."""

    @property
    def columns(self) -> int:
        """Stored columns per code, each of `dtype`."""
        if self.book is not None and self.code == "rq":
            return len(self.book)
        return (self.width + 1) // 2 if self.code in ("int4", "kmeans4") else self.width

    @property
    def dtype(self) -> str:
        return NUMPY_TYPE.get(self.code, "uint8")


def quantise(z_BZ: jax.Array, codec: Codec) -> jax.Array:
    """Codes of z in [-1, 1]; a uniform code is off by half a level at most (one for z = 1)."""
    match codec.code:
        case "int4":
            return pack_int4(jnp.clip(jnp.round(8 * z_BZ), -8, 7).astype(jnp.int8))
        case "int8":
            return jnp.clip(jnp.round(127 * z_BZ), -127, 127).astype(jnp.int8)
        case "kmeans4":
            assert codec.book is not None
            apart_BZC = jnp.abs(z_BZ[..., None] - codec.book[None])
            return pack_int4(jnp.argmin(apart_BZC, axis=-1).astype(jnp.int8))
        case "rq":
            return _residual_codes(z_BZ, codec)
    return z_BZ.astype(codec.dtype)


def dequantise(stored: jax.Array, codec: Codec) -> jax.Array:
    """Stored codes [..., columns] -> float32 [..., Z]."""
    match codec.code:
        case "int4":
            return unpack_int4(stored)[..., : codec.width].astype(jnp.float32) / LEVELS["int4"]
        case "int8":
            return stored.astype(jnp.float32) / LEVELS["int8"]
        case "kmeans4":
            assert codec.book is not None
            centre = unpack_int4(stored)[..., : codec.width].astype(jnp.int32) & 0xF
            return jnp.asarray(codec.book)[jnp.arange(codec.width), centre]
        case "rq":
            return look_up(stored, codec.book).sum(-2)
    return stored.astype(jnp.float32)


def look_up(stored: jax.Array, book: jax.Array | np.ndarray | None) -> jax.Array:
    """rq codes [..., K] -> the vectors they name, [..., K, Z]."""
    assert book is not None
    return jnp.asarray(book)[jnp.arange(len(book)), stored.astype(jnp.int32)]


def _residual_codes(z_BZ: jax.Array, codec: Codec) -> jax.Array:
    """Greedy: each book names the vector next to what the ones before it left over."""
    assert codec.book is not None
    named = []
    for book_CZ in jnp.asarray(codec.book):
        near_BC = z_BZ @ book_CZ.T - 0.5 * jnp.square(book_CZ).sum(axis=1)[None]
        named.append(jnp.argmax(near_BC, axis=1))
        z_BZ = z_BZ - book_CZ[named[-1]]
    return jnp.stack(named, axis=1).astype(jnp.uint8)


def pack_int4(values: jax.Array) -> jax.Array:
    """int8, its low four bits, [..., Z] -> uint8 [..., ceil(Z / 2)]; an odd Z is filled up by 0."""
    if values.shape[-1] % 2:
        values = jnp.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, 1)])
    nibbles = values.astype(jnp.uint8) & 0xF
    pairs = jax.lax.bitcast_convert_type(nibbles.reshape(*nibbles.shape[:-1], -1, 2), jnp.uint16)
    return (pairs | pairs >> 4).astype(jnp.uint8)


def unpack_int4(packed: jax.Array) -> jax.Array:
    """uint8 [..., n] -> int8 in [-8, 7], [..., 2n].

    Both halves of a byte are spread over two bytes at once: no interleaving, which compilers do
    number by number.
    """
    pairs = packed.astype(jnp.uint16)
    pairs = (pairs | pairs << 4) & 0x0F0F
    nibbles = jax.lax.bitcast_convert_type(pairs, jnp.uint8).reshape(*packed.shape[:-1], -1)
    return (nibbles ^ 8).astype(jnp.int8) - 8
