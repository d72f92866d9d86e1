"""A small transformer over entries: causal self-attention whose positions are time gaps.

Kunlun (arXiv 2602.10016, PAPER section 6) has rotary positions on log(1 + dt).
"""

import jax
import jax.numpy as jnp
from flax import nnx

from loopfm_jax.backbones.layers import dense
from loopfm_jax.backbones.self_attention import self_attend
from loopfm_jax.packing import Tokens

FASTEST, SLOWEST = 4.0, 1 / 16
"""Rotary frequencies, radians per e-fold of age: the fastest turns by 2.8 rad when an age doubles,
the slowest by 1 rad from a second to a year."""


class Block(nnx.Module):
    """Pre-norm transformer block: x + attention(norm x), then x + feed-forward(norm x)."""

    def __init__(self, width: int, heads: int, *, rngs: nnx.Rngs):
        self.heads = heads
        self.norm_attend = nnx.LayerNorm(width, rngs=rngs)
        self.attend = dense(width, 3 * width, rngs=rngs, bias=False)
        self.mix = dense(width, width, rngs=rngs, bias=False)
        self.norm_grow = nnx.LayerNorm(width, rngs=rngs)
        self.grow = dense(width, 2 * width, rngs=rngs)
        self.shrink = dense(2 * width, width, rngs=rngs)

    def __call__(self, x_TW: jax.Array, angle_TD: jax.Array, tokens: Tokens) -> jax.Array:
        qkv_THD = self.attend(self.norm_attend(x_TW)).reshape(len(x_TW), 3 * self.heads, -1)
        qk_THD, v_THD = jnp.split(qkv_THD, [2 * self.heads], axis=1)
        qkv_THD = jnp.concatenate([rotate(qk_THD, angle_TD), v_THD], axis=1)
        seen_THD = self_attend(qkv_THD.reshape(len(x_TW), -1), tokens, heads=self.heads)
        x_TW = x_TW + self.mix(seen_THD.reshape(x_TW.shape))
        return x_TW + self.shrink(nnx.relu(self.grow(self.norm_grow(x_TW))))


class Transformer(nnx.Module):
    """Entries and their ages -> the entries as they see what is older, [T,W]."""

    def __init__(self, width: int, *, heads: int, layers: int, rngs: nnx.Rngs):
        self.pairs = width // heads // 2
        self.blocks = nnx.List(Block(width, heads, rngs=rngs) for _ in range(layers))
        self.norm = nnx.LayerNorm(width, rngs=rngs)

    def __call__(self, x_TW: jax.Array, tokens: Tokens) -> jax.Array:
        assert tokens.age_T is not None
        angle_TD = time_angles(tokens.age_T, pairs=self.pairs)
        for block in self.blocks:
            x_TW = block(x_TW, angle_TD, tokens)
        return self.norm(x_TW)


def time_angles(age_T: jax.Array, *, pairs: int) -> jax.Array:
    """Rotary angles [T,D/2] on log(1 + age in seconds).

    A score then sees by which factor one entry is older than another: minutes apart today weigh as
    days apart last month. Which frequencies is open: falling by equal factors.
    """
    frequency_D = jnp.geomspace(FASTEST, SLOWEST, pairs)
    return jnp.log1p(age_T)[:, None] * frequency_D[None]


def rotate(x_THD: jax.Array, angle_TD: jax.Array) -> jax.Array:
    """Turns the pair of numbers i and i + D/2 of every head by angle i."""
    cos, sin = jnp.cos(angle_TD)[:, None], jnp.sin(angle_TD)[:, None]
    a, b = jnp.split(x_THD, 2, axis=2)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=2)
