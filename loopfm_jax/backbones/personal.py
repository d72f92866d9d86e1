"""Attention between an example's packed events and tokens of the example.

Examples have different events and different tokens, so neither product is one matrix for all: these
run over events padded to L, as batched products. All else runs over packed events.
"""

import math

import jax
import jax.numpy as jnp

from loopfm_jax.backbones.layers import Key, dropout, wide
from loopfm_jax.packing import Tokens


def ask(
    query_BGX: jax.Array,
    kv_TY: jax.Array,
    tokens: Tokens,
    *,
    heads: int,
    rate: float = 0.0,
    key: Key = None,
) -> jax.Array:
    """What G tokens gather from all events of their example, by softmax; zeros where it has none.

    Args:
      query_BGX: queries, X = heads * D.
      kv_TY: keys and values of the events side by side, Y = 2 X.
      tokens: whose they are.
      heads: H.
      rate: dropout of the weights.
      key: randomness of that dropout; None means inference.

    Returns:
      [B,G,X].
    """
    examples, count, width = query_BGX.shape
    size = width // heads
    q_BGHD = query_BGX.reshape(examples, count, heads, size)
    kv_BLHD = tokens.pad(kv_TY.reshape(len(kv_TY), 2 * heads, size))
    k_BLHD, v_BLHD = jnp.split(kv_BLHD, 2, axis=2)
    score_BHGL = wide(jnp.einsum("BGHD,BLHD->BHGL", q_BGHD, k_BLHD)) / math.sqrt(size)
    # Finite: without any event the weights are even, over values that are zeros.
    lowest = jnp.finfo(score_BHGL.dtype).min
    score_BHGL = jnp.where(tokens.pad(tokens.real_T)[:, None, None], score_BHGL, lowest)
    weight_BHGL = dropout(jax.nn.softmax(score_BHGL), rate, key).astype(v_BLHD.dtype)
    seen_BGHD = jnp.einsum("BHGL,BLHD->BGHD", weight_BHGL, v_BLHD)
    return seen_BGHD.reshape(examples, count, width)


def answer(query_TX: jax.Array, kv_BRY: jax.Array, tokens: Tokens, *, heads: int) -> jax.Array:
    """Generalised dot-product attention (Kunlun): what every event gathers from the R tokens of its
    example, weighed by SiLU of the products over L.

    Args:
      query_TX: queries, X = heads * D.
      kv_BRY: keys and values side by side, Y = 2 X.
      tokens: whose the events are.
      heads: H.

    Returns:
      [T,X].
    """
    (examples, count, width), slots = kv_BRY.shape, len(query_TX)
    size = width // (2 * heads)
    k_BRHD, v_BRHD = jnp.split(kv_BRY.reshape(examples, count, 2 * heads, size), 2, axis=2)
    q_BLHD = tokens.pad(query_TX.reshape(slots, heads, size))
    product_BHLR = jnp.einsum("BLHD,BRHD->BHLR", q_BLHD, k_BRHD)
    weight_BHLR = jax.nn.silu(product_BHLR / tokens.length)
    return tokens.unpad(jnp.einsum("BHLR,BRHD->BLHD", weight_BHLR, v_BRHD)).reshape(slots, -1)


def transform(x_TR: jax.Array, matrix_BRX: jax.Array, tokens: Tokens) -> jax.Array:
    """Every event by the matrix of its example, [T,X]."""
    return tokens.unpad(jnp.einsum("BLR,BRX->BLX", tokens.pad(x_TR), matrix_BRX))
