"""Attention over tokens: a candidate's over events.

What DIN, DIEN, DMR, DMIN and the history encoders share. Everything runs over packed tokens
(`packing.Tokens`): padding costs nothing, and padded is only another layout of the same tokens.

An event is scored by an MLP of [t, H, t-H, t*H], t the query, H the event (DIN, arXiv 1706.06978).
That is ~95 % of these models' arithmetic. The first layer is computed as
[H, t*H, t][Wb-Wc, Wd, Wa+Wc], three quarters of the products.

Difference from the public code: Dice in the score MLP takes its statistics from real events only.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.tree_util import Partial
from jax.typing import DTypeLike

from loopfm_jax.backbones.blockwise import by_block
from loopfm_jax.backbones.config import BackboneConfig
from loopfm_jax.backbones.layers import Dice, Key, Mlp, dense, dropout, split, weights, wide
from loopfm_jax.packing import Tokens

FEW = 64
"""Tokens of which the first layer of scores is cheaper than adding up its kernels."""

Asked = Partial
"""Tokens, all or a block of them -> what their events are scored for, [T,M]."""


def candidate(target_BM: jax.Array) -> Asked:
    """Every event is scored for the candidate of its example."""
    return Partial(lambda target_BM, tokens: tokens.spread(target_BM), target_BM)


class Scores(nnx.Module):
    """Queries and events [T,M] -> scores [T], float32; those of unreal slots mean nothing."""

    def __init__(self, config: BackboneConfig, width: int, *, rngs: nnx.Rngs, dtype: DTypeLike):
        self.dtype = dtype
        self.mlp = Mlp(
            4 * width,
            config.attention_hidden,
            out=1,
            activation=config.attention_activation,
            dropout=config.attention_dropout,
            dtype=dtype,
            rngs=rngs,
        )

    def first_layer(self, query_TM: jax.Array, events_TM: jax.Array) -> jax.Array:
        """The MLP's first layer on [t, H, t-H, t*H] without building that, [T,W]."""
        query_TM, events_TM = query_TM.astype(self.dtype), events_TM.astype(self.dtype)
        if len(events_TM) <= FEW:
            seen = [query_TM, events_TM, query_TM - events_TM, query_TM * events_TM]
            return self.mlp.layers[0](jnp.concatenate(seen, axis=1))
        kernel, bias_W = weights(self.mlp.layers[0])
        a_MW, b_MW, c_MW, d_MW = jnp.split(kernel, 4)
        kernel_XW = jnp.concatenate([b_MW - c_MW, d_MW, a_MW + c_MW]).astype(self.dtype)
        seen_TX = jnp.concatenate([events_TM, query_TM * events_TM, query_TM], axis=1)
        return seen_TX @ kernel_XW + bias_W.astype(self.dtype)[None]

    def score(
        self, tokens: Tokens, query_TM: jax.Array, events_TM: jax.Array, *, key: Key
    ) -> jax.Array:
        """Of a part of the tokens; statistics of a batch need all of them at once."""
        first_TW = self.first_layer(query_TM, events_TM)
        return self.mlp.after_first(first_TW, key=key, mask=tokens.real_T)[-1][:, 0]

    def by_block(self, f: Partial, *, key: Key) -> Callable[..., Any]:
        """As the function of that name, if the scores of a part do not depend on the rest."""
        return f if self._together(key) else by_block(f)

    def _together(self, key: Key) -> bool:
        return bool(self.mlp.dice) and key is not None

    def __call__(
        self, query: Asked, events_TM: jax.Array, tokens: Tokens, *, key: Key
    ) -> jax.Array:
        if self._together(key):
            return self._by_layer(query, events_TM, tokens, key=key)
        return by_block(Partial(_score, self, query))(tokens, events_TM, key=key)

    def _by_layer(
        self, query: Asked, events_TM: jax.Array, tokens: Tokens, *, key: Key
    ) -> jax.Array:
        """As a call: block by block from the statistics of one Dice to those of the next."""
        assert self.mlp.out is not None
        x_TW = by_block(Partial(_first_layer, self, query))(tokens, events_TM, key=None)
        layers = [*self.mlp.layers[1:], self.mlp.out]
        keys = split(key, len(layers))
        for dice, layer, own in zip(self.mlp.dice, layers, keys, strict=True):
            fitted = dice.fit(x_TW, tokens.real_T)
            x_TW = by_block(Partial(_after_dice, self.mlp, dice, fitted, layer))(
                tokens, x_TW, key=own
            )
        return x_TW[:, 0]


def _score(
    scores: Scores, query: Asked, tokens: Tokens, events_TM: jax.Array, *, key: Key
) -> jax.Array:
    return scores.score(tokens, query(tokens), events_TM, key=key)


def _first_layer(
    scores: Scores, query: Asked, tokens: Tokens, events_TM: jax.Array, *, key: Key
) -> jax.Array:
    return scores.first_layer(query(tokens), events_TM)


def _after_dice(
    mlp: Mlp,
    dice: Dice,
    fitted: Any,
    layer: nnx.Linear,
    tokens: Tokens,
    x_TW: jax.Array,
    *,
    key: Key,
) -> jax.Array:
    return layer(dropout(dice.gate(x_TW, *fitted), mlp.rate, key))


class Query(nnx.Module):
    """W [target ; position] + b, for every token; no positions where their width is 0."""

    def __init__(self, width: int, length: int, position_width: int, *, rngs: nnx.Rngs):
        positions = jnp.zeros((length, position_width))
        self.position_LP = nnx.Param(positions) if position_width else None  # Orbax: no empty ones
        self.project = dense(width + position_width, width, rngs=rngs)

    def __call__(self, target_BM: jax.Array, tokens: Tokens) -> jax.Array:
        kernel, bias_M = weights(self.project)
        width = target_BM.shape[1]
        query_TM = tokens.spread(target_BM @ kernel[:width] + bias_M[None])
        if self.position_LP is None:
            return query_TM
        return query_TM + (self.position_LP[...] @ kernel[width:])[tokens.column_T]


def pool(weighed: Sequence[tuple[jax.Array, jax.Array]], tokens: Tokens) -> jax.Array:
    """The weighted sums of ([T], [T,M]), side by side in float32, [B,H*M]."""
    return jnp.concatenate([tokens.sum(w_T[:, None] * wide(x_TM)) for w_T, x_TM in weighed], axis=1)
