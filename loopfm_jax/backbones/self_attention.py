"""Self-attention of packed entries: each sees itself and the older ones of its example, all of them
or the nearest.

One definition, several ways: products of neighbouring blocks, everywhere; cuDNN on GPU, padded and
masked; Pallas on TPU, over all tokens, with a window and segments. Which is the fastest depends on
sizes, so where there is a choice it is measured: forward and backward, once per shape of a process,
when a step is traced. The kernels draw no dropout and weigh by softmax; several devices, and
weights of another kind (HSTU's), go by blocks.
"""

import math
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.tree_util import Partial
from jax.typing import DTypeLike

from loopfm_jax import sharding
from loopfm_jax.backbones.blockwise import by_block
from loopfm_jax.backbones.layers import Key, dropout, wide
from loopfm_jax.backbones.product import batched_product
from loopfm_jax.errors import UserError
from loopfm_jax.packing import Tokens, lay_out
from loopfm_jax.progress import say

CHOICE = "LOOPFM_ATTENTION"
"""Environment: `blocks`, `cudnn` or `pallas` in the place of what would be measured."""
LANES, TILE = 128, 512
"""Pallas: sizes are multiples of the first; tokens of a tile."""


@struct.dataclass
class Pairs:
    """C blocks of L entries, each beside the S that it may see: 2L, or L where there is one."""

    seen_CLS: jax.Array
    """Who sees whom."""
    apart_LS: jax.Array
    """By how many ranks the seen one is older."""
    seconds_CLS: jax.Array | None
    """By how much, where ages are known."""


Weigh = Partial
"""(products of queries and keys [C,H,L,S] float32, `Pairs`) -> weights [C,H,L,S]."""


def self_attend(
    qkv_TX: jax.Array,
    tokens: Tokens,
    *,
    heads: int,
    window: int = 0,
    weigh: Weigh | None = None,
    rate: float = 0.0,
    key: Key = None,
) -> jax.Array:
    """Causal attention.

    Args:
      qkv_TX: queries, keys and values side by side, X = 3 * heads * D.
      tokens: whose they are.
      heads: H.
      window: how many entries one sees, itself included; 0: all.
      weigh: what becomes of products; default: their scaled softmax.
      rate: dropout of the attention weights.
      key: randomness of that dropout; None means inference.

    Returns:
      [T,H,D].
    """
    draws = rate > 0 and key is not None
    slots, width = qkv_TX.shape
    window = min(window or tokens.length, tokens.length)
    sizes = (slots, width, heads, tokens.examples, tokens.length, window)
    shape = Shape(*sizes, qkv_TX.dtype.name, sharding.platform())
    way = "blocks" if draws or weigh or sharding.devices() > 1 else choose(shape)
    if way != "blocks":
        return WAYS[way](tokens, qkv_TX, heads=heads, window=window)
    attend = partial(_in_blocks, heads=heads, window=window, rate=rate)
    return by_block(Partial(attend, weigh), ahead=window)(tokens, qkv_TX, key=key)


def _in_blocks(weigh: Weigh | None, tokens: Tokens, qkv_TX: jax.Array, **how: Any) -> jax.Array:
    return in_blocks(tokens, qkv_TX, weigh=weigh, **how)


def in_blocks(
    tokens: Tokens,
    qkv_TX: jax.Array,
    *,
    heads: int,
    window: int = 0,
    weigh: Weigh | None = None,
    rate: float = 0.0,
    key: Key = None,
) -> jax.Array:
    """An example's entries stand side by side, newest first, and one sees at most L: a block of L
    slots sees itself and the next one of its part. So the scores are T * 2L and need no padding,
    whose [B,H,L,L] is mostly empty. A part of at most 2L slots is one block, which sees itself."""
    dtype = qkv_TX.dtype
    if sharding.platform() == "cpu":
        qkv_TX = wide(qkv_TX)  # but for products: the rest is slow there in fewer bits
    (slots, width), window, parts = qkv_TX.shape, window or tokens.length, tokens.parts
    size, each = width // (3 * heads), slots // parts
    alone = each <= 2 * window
    length = each if alone else window
    weigh = weigh or Partial(partial(softmaxed, size=size))

    def blocks(x: jax.Array) -> jax.Array:
        x = x.reshape(parts, each, *x.shape[1:])
        x = jnp.pad(x, [(0, 0), (0, -each % length)] + [(0, 0)] * (x.ndim - 2))
        return x.reshape(-1, length, *x.shape[2:])

    def seen(x: jax.Array) -> jax.Array:
        if alone:
            return x
        own = x.reshape(parts, -1, *x.shape[1:])
        following = jnp.concatenate([own[:, 1:], jnp.zeros_like(own[:, :1])], axis=1)
        return jnp.concatenate([x, following.reshape(x.shape)], axis=-2)

    qkv_CHLD = jnp.moveaxis(blocks(qkv_TX.reshape(slots, 3 * heads, size)), 2, 1)
    q, k, v = jnp.split(qkv_CHLD, 3, axis=1)  # heads first: batched dots

    def apart(x_T: jax.Array) -> jax.Array:
        """Of the one that is seen, less that of the one that sees, [C,L,S]."""
        x_CL = blocks(x_T)
        return seen(x_CL[..., None])[..., 0][:, None] - x_CL[:, :, None]

    apart_LS = jnp.arange(length if alone else 2 * length)[None] - jnp.arange(length)[:, None]
    near_LS = (apart_LS >= 0) & (apart_LS < window)
    pairs = Pairs(
        seen_CLS=near_LS[None] & (apart(_owners(tokens)) == 0),
        apart_LS=apart_LS,
        seconds_CLS=None if tokens.age_T is None else apart(tokens.age_T),
    )
    product_CHLS = wide(batched_product(q, seen(k), dtype, over=-1))
    weight_CHLS = dropout(weigh(product_CHLS, pairs), rate, key).astype(v.dtype)
    mixed_CHLD = batched_product(weight_CHLS, seen(v), dtype)
    mixed_PSHD = jnp.moveaxis(mixed_CHLD, 1, 2).reshape(parts, -1, heads, size)
    return mixed_PSHD[:, :each].reshape(slots, heads, size).astype(dtype)


def softmaxed(product_CHLS: jax.Array, pairs: Pairs, *, size: int) -> jax.Array:
    """Scaled by the square root of the heads' width, and what is seen sums to 1."""
    score_CHLS = product_CHLS / math.sqrt(size)
    return jax.nn.softmax(jnp.where(pairs.seen_CLS[:, None], score_CHLS, -jnp.inf))


def _owners(tokens: Tokens) -> jax.Array:
    """From 1; unreal slots are nobody's and see each other."""
    return jnp.where(tokens.real_T, tokens.segment_T + 1, 0)


# ------------------------------------------------------------------------------- kernels


def padded(
    tokens: Tokens, qkv_TX: jax.Array, *, heads: int, window: int = 0, kernel: str = "cudnn"
) -> jax.Array:
    """By `jax.nn.dot_product_attention` of examples padded to L."""
    qkv_THD = qkv_TX.reshape(len(qkv_TX), 3 * heads, -1)
    q, k, v = jnp.split(tokens.pad(qkv_THD), 3, axis=2)
    real_BS = tokens.pad(tokens.real_T)
    rank = jnp.arange(tokens.length)
    apart_LS = rank[None] - rank[:, None]
    near_LS = (apart_LS >= 0) & (apart_LS < (window or tokens.length))
    mask_BLS = near_LS[None] & real_BS[:, None]
    seen = jax.nn.dot_product_attention(q, k, v, mask=mask_BLS[:, None], implementation=kernel)  # pyright: ignore
    return tokens.unpad(seen)


def windowed(
    tokens: Tokens, qkv_TX: jax.Array, *, heads: int, window: int = 0, interpret: bool = False
) -> jax.Array:
    """By Pallas' splash attention over all tokens: a window, segments, tiles that nothing is
    seen in left out. Heads are filled up to whole lanes, tokens to whole tiles."""
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    slots, size = len(qkv_TX), qkv_TX.shape[1] // (3 * heads)
    tile = min(TILE, -(-slots // LANES) * LANES)
    grown = -(-slots // tile) * tile
    x_THD = jnp.pad(
        qkv_TX.reshape(slots, 3 * heads, size),
        [(0, grown - slots), (0, 0), (0, -size % LANES)],
    )
    q, k, v = jnp.split(jnp.moveaxis(x_THD, 0, 1), 3)
    mask = splash.LocalMask((grown, grown), (0, (window or tokens.length) - 1), 0)
    sizes = splash.BlockSizes(
        block_q=tile, block_kv=tile, block_kv_compute=tile,
        block_q_dkv=tile, block_kv_dkv=tile, block_kv_dkv_compute=tile,
        block_q_dq=tile, block_kv_dq=tile,
    )  # fmt: skip
    run = splash.make_splash_mha_single_device(
        splash.MultiHeadMask([mask] * heads), block_sizes=sizes, interpret=interpret
    )
    owner = jnp.pad(_owners(tokens), (0, grown - slots))
    seen_HTD = run(q / math.sqrt(size), k, v, segment_ids=splash.SegmentIds(owner, owner))
    return jnp.moveaxis(jnp.asarray(seen_HTD), 0, 1)[:slots, :, :size]


WAYS: dict[str, Callable[..., jax.Array]] = {
    "blocks": in_blocks,
    "cudnn": padded,
    "pallas": windowed,
}
ON = {"gpu": ("blocks", "cudnn"), "tpu": ("blocks", "pallas")}
"""What there is to choose from, by platform; elsewhere blocks alone."""


# ------------------------------------------------------------------------------- the choice


@dataclass(frozen=True)
class Shape:
    """What the speed of a way depends on."""

    slots: int
    width: int
    """Of queries, keys and values together."""
    heads: int
    examples: int
    length: int
    window: int
    dtype: DTypeLike
    platform: str
    """What the step is compiled for."""


@cache
def choose(shape: Shape) -> str:
    """The fastest way, or the one that the environment names.

    Raises:
      UserError: it names none.
    """
    forced = os.environ.get(CHOICE, "")
    if forced:
        if forced not in WAYS:
            raise UserError(f"{CHOICE}={forced}: there are {', '.join(WAYS)}")
        return forced
    ways = ON.get(shape.platform, ("blocks",))
    if len(ways) == 1:
        return ways[0]
    if shape.platform != jax.default_backend():
        say(f"self-attention of {shape.slots} slots: {ways[0]}, as no {shape.platform} is here")
        return ways[0]
    with ThreadPoolExecutor(1) as apart:  # the step that is being traced goes on in this thread
        seconds = {way: apart.submit(measure, way, shape).result() for way in ways}
    best = min(seconds, key=lambda way: seconds[way])
    told = ", ".join(f"{way} {1e3 * s:.2f} ms" for way, s in seconds.items())
    say(f"self-attention of {shape.slots} slots: {best} ({told})")
    return best


def measure(way: str, shape: Shape, *, repeats: int = 5) -> float:
    """Seconds of a forward and backward pass; infinity where it cannot run."""
    mean = min(shape.slots // shape.examples, shape.length)
    tokens = lay_out(
        jnp.full(shape.examples, mean, jnp.int32), slots=shape.slots, longest=shape.length
    )
    qkv_TX = jax.random.normal(jax.random.key(0), (shape.slots, shape.width), shape.dtype)

    @jax.jit
    @jax.grad
    def learn(qkv_TX: jax.Array) -> jax.Array:
        seen_THD = WAYS[way](tokens, qkv_TX, heads=shape.heads, window=shape.window)
        return wide(seen_THD).sum()

    try:
        learn(qkv_TX).block_until_ready()
    except Exception as error:  # a kernel that refuses a size or a device says so in many ways
        say(f"self-attention: no {way} here ({str(error).splitlines()[0][:120]})")
        return math.inf
    took = []
    for _ in range(repeats):
        started = time.perf_counter()
        learn(qkv_TX).block_until_ready()
        took.append(time.perf_counter() - started)
    return min(took)
