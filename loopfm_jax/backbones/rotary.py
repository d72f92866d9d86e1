"""Rotary positions: a score sees how far apart two entries are.

Positions are ranks (RoFormer, arXiv 2104.09864) or, where times are known, log(1 + age) (Kunlun,
arXiv 2602.10016, PAPER section 6).
"""

import jax
import jax.numpy as jnp

from loopfm_jax.packing import Tokens

FASTEST, SLOWEST = 4.0, 1 / 16
"""Rotary frequencies, radians per e-fold of age: the fastest turns by 2.8 rad when an age doubles,
the slowest by 1 rad from a second to a year."""
LONGEST = 10_000.0
"""Entries per radian of the slowest frequency over ranks; the fastest turns by 1 rad each."""


def angles(tokens: Tokens, *, pairs: int) -> jax.Array:
    """Rotary angles [T,D/2]: by time where it is known, else by rank."""
    if tokens.age_T is None:
        return rank_angles(tokens, pairs=pairs)
    return time_angles(tokens.age_T, pairs=pairs)


def time_angles(age_T: jax.Array, *, pairs: int) -> jax.Array:
    """Rotary angles [T,D/2] on log(1 + age in seconds).

    A score then sees by which factor one entry is older than another: minutes apart today weigh as
    days apart last month. Which frequencies is open: falling by equal factors.
    """
    frequency_D = jnp.geomspace(FASTEST, SLOWEST, pairs)
    return jnp.log1p(age_T)[:, None] * frequency_D[None]


def rank_angles(tokens: Tokens, *, pairs: int) -> jax.Array:
    """Rotary angles [T,D/2] on how many entries stand between one and the candidate."""
    frequency_D = LONGEST ** -(jnp.arange(pairs) / pairs)
    return (1.0 + tokens.rank_T)[:, None] * frequency_D[None]


def turn(qkv_TX: jax.Array, angle_TD: jax.Array, *, heads: int) -> jax.Array:
    """Queries, keys and values side by side: the first two turned, head by head."""
    qkv_THD = qkv_TX.reshape(len(qkv_TX), 3 * heads, -1)
    qk_THD, v_THD = jnp.split(qkv_THD, [2 * heads], axis=1)
    return jnp.concatenate([rotate(qk_THD, angle_TD), v_THD], axis=1).reshape(qkv_TX.shape)


def rotate(x_THD: jax.Array, angle_TD: jax.Array) -> jax.Array:
    """Turns the pair of numbers i and i + D/2 of every head by angle i."""
    cos, sin = (f(angle_TD).astype(x_THD.dtype)[:, None] for f in (jnp.cos, jnp.sin))
    a, b = jnp.split(x_THD, 2, axis=2)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=2)
