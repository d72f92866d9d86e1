"""Attention over tokens: a candidate's over its history, an entry's over the older ones."""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from loopfm_jax.history.packing import Tokens

FASTEST, SLOWEST = 4.0, 1 / 16
"""Rotary frequencies, radians per e-fold of age: the fastest turns by 2.8 rad when an age doubles,
the slowest by 1 rad from a second to a year."""


def linear(inputs: int, outputs: int, *, rngs: nnx.Rngs, bias: bool = True) -> nnx.Linear:
    kernel = nnx.initializers.xavier_normal()
    return nnx.Linear(inputs, outputs, use_bias=bias, kernel_init=kernel, rngs=rngs)


class Score(nnx.Module):
    """DIN's score MLP([t, h, t-h, t*h]) per token, its first layer split by blocks.

    `[t, h, t-h, t*h] W = t (Wa + Wc) + h (Wb - Wc) + (t*h) Wd`: the target's part is computed once
    per example instead of once per token.
    """

    def __init__(self, width: int, hidden: tuple[int, ...], *, rngs: nnx.Rngs):
        self.target = linear(width, hidden[0], rngs=rngs)
        self.token = linear(width, hidden[0], rngs=rngs, bias=False)
        self.product = linear(width, hidden[0], rngs=rngs, bias=False)
        sizes = (*hidden, 1)
        self.rest = nnx.List(
            [linear(a, b, rngs=rngs) for a, b in zip(sizes, sizes[1:], strict=False)]
        )

    def __call__(self, target_BW: jax.Array, token_TW: jax.Array, tokens: Tokens) -> jax.Array:
        product_TW = tokens.spread(target_BW) * token_TW
        x = tokens.spread(self.target(target_BW)) + self.token(token_TW) + self.product(product_TW)
        for layer in self.rest:
            x = layer(nnx.relu(x))
        return x[:, 0]


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


def self_attend(qkv_THD: jax.Array, tokens: Tokens) -> jax.Array:
    """Causal self-attention: an entry sees itself and older ones of its example.

    Queries, keys and values one after the other, [T,3H,D] -> [T,H,D]. An example's entries stand
    side by side, newest first, at most L of them: a block of L slots sees itself and the next one.
    So the scores are T * 2L and need no padding, whose [B,H,L,L] is mostly empty.
    """
    length, (slots, thrice, size) = tokens.length, qkv_THD.shape
    owner_T = jnp.where(tokens.real_T, tokens.segment_T + 1, 0)

    def blocks(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, [(0, -slots % length)] + [(0, 0)] * (x.ndim - 1))
        return x.reshape(-1, length, *x.shape[1:])

    def seen(x: jax.Array) -> jax.Array:
        return jnp.concatenate([x, jnp.concatenate([x[1:], jnp.zeros_like(x[:1])])], axis=-2)

    q, k, v = jnp.split(jnp.moveaxis(blocks(qkv_THD), 2, 1), 3, axis=1)  # heads first: batched dots
    owner_CL = blocks(owner_T)
    owner_CS = seen(owner_CL[..., None])[..., 0]
    older_LS = jnp.arange(2 * length)[None] >= jnp.arange(length)[:, None]
    mask_CLS = older_LS[None] & (owner_CL[:, :, None] == owner_CS[:, None])
    score_CHLS = jnp.einsum("CHLD,CHSD->CHLS", q, seen(k)) / math.sqrt(size)
    score_CHLS = jnp.where(mask_CLS[:, None], score_CHLS, -jnp.inf)
    mixed_CHLD = jnp.einsum("CHLS,CHSD->CHLD", jax.nn.softmax(score_CHLS), seen(v))
    return jnp.moveaxis(mixed_CHLD, 1, 2).reshape(-1, thrice // 3, size)[:slots]
