"""Attention over tokens: a candidate's over events.

What DIN, DIEN, DMR, DMIN and the history encoders share. Everything runs over packed tokens
(`packing.Tokens`): padding costs nothing, and padded is only another layout of the same tokens.

An event is scored by an MLP of [t, H, t-H, t*H], t the query, H the event (DIN, arXiv 1706.06978).
That is ~95 % of these models' arithmetic. The first layer is computed as
[H, t*H][Wb-Wc, Wd] + t[Wa+Wc]: half of the products where t is multiplied by example, three
quarters where by token (`Scores.first`).

Difference from the public code: Dice in the score MLP takes its statistics from real events only.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx, struct
from jax.tree_util import Partial
from jax.typing import DTypeLike

from loopfm_jax import sharding
from loopfm_jax.backbones.blockwise import by_block
from loopfm_jax.backbones.config import BackboneConfig
from loopfm_jax.backbones.layers import Dice, Key, Mlp, dense, dropout, split, weights, wide
from loopfm_jax.backbones.product import product
from loopfm_jax.packing import Tokens

FEW = 64
"""Tokens of which the first layer of scores is cheaper than adding up its kernels."""

First = Partial
"""(tokens, events [T,M], all or a block of them) -> their first layer of scores, [T,W]."""


@struct.dataclass
class Asked:
    """What events are scored for: what their example asks and what their place does, added up."""

    by_example: jax.Array | None = None
    """[B,M], the candidate."""
    by_column: jax.Array | None = None
    """[L,M]."""
    rectified: bool = struct.field(pytree_node=False, default=False)
    """By a ReLU, through which no product passes."""

    def __call__(self, tokens: Tokens) -> jax.Array:
        """Token by token, [T,M]."""
        found = []
        if self.by_example is not None:
            found.append(tokens.spread(self.by_example))
        if self.by_column is not None:
            found.append(self.by_column[tokens.column_T])
        query_TM = sum(found[1:], found[0])
        return jax.nn.relu(query_TM) if self.rectified else query_TM

    def through(self, kernel_MW: jax.Array) -> "Asked":
        """The same through a linear layer."""
        assert not self.rectified
        return jax.tree.map(lambda x: x @ kernel_MW, self)


class Scores(nnx.Module):
    """Events [T,M] -> scores [T], float32; those of unreal slots mean nothing."""

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

    def first(self, asked: Asked, slots: int) -> First:
        """The MLP's first layer of events that stand in so many slots; what does not depend on
        them is computed here, once for all blocks.

        On CPU t is multiplied by example and looked up. An accelerator, where a product costs less
        than a wide lookup, multiplies it token by token.
        """
        if slots <= FEW:
            return Partial(_whole, self.mlp.layers[0], asked)
        kernel, bias_W = weights(self.mlp.layers[0])
        a_MW, b_MW, c_MW, d_MW = jnp.split(kernel, 4)
        if asked.rectified or sharding.platform() != "cpu":
            kernel_XW = jnp.concatenate([b_MW - c_MW, d_MW, a_MW + c_MW])
            return Partial(_by_token, kernel_XW, bias_W.astype(self.dtype), asked)
        kernel_XW = jnp.concatenate([b_MW - c_MW, d_MW])
        return Partial(_by_example, kernel_XW, bias_W, asked, asked.through(a_MW + c_MW))

    def score(self, tokens: Tokens, first: First, events_TM: jax.Array, *, key: Key) -> jax.Array:
        """Of a part of the tokens; statistics of a batch need all of them at once."""
        first_TW = first(tokens, events_TM.astype(self.dtype))
        return self.mlp.after_first(first_TW, key=key, mask=tokens.real_T)[-1][:, 0]

    def by_block(self, f: Partial, *, key: Key) -> Callable[..., Any]:
        """As the function of that name, if the scores of a part do not depend on the rest."""
        return f if self._together(key) else by_block(f)

    def _together(self, key: Key) -> bool:
        return bool(self.mlp.dice) and key is not None

    def __call__(
        self, asked: Asked, events_TM: jax.Array, tokens: Tokens, *, key: Key
    ) -> jax.Array:
        first = self.first(asked, len(events_TM))
        if self._together(key):
            return self._by_layer(first, events_TM, tokens, key=key)
        return by_block(Partial(_score, self, first))(tokens, events_TM, key=key)

    def _by_layer(
        self, first: First, events_TM: jax.Array, tokens: Tokens, *, key: Key
    ) -> jax.Array:
        """As a call: block by block from the statistics of one Dice to those of the next."""
        assert self.mlp.out is not None
        events_TM = events_TM.astype(self.dtype)
        x_TW = by_block(Partial(_first_layer, first))(tokens, events_TM, key=None)
        layers = [*self.mlp.layers[1:], self.mlp.out]
        keys = split(key, len(layers))
        for dice, layer, own in zip(self.mlp.dice, layers, keys, strict=True):
            fitted = dice.fit(x_TW, tokens.real_T)
            x_TW = by_block(Partial(_after_dice, self.mlp, dice, fitted, layer))(
                tokens, x_TW, key=own
            )
        return x_TW[:, 0]


def _score(
    scores: Scores, first: First, tokens: Tokens, events_TM: jax.Array, *, key: Key
) -> jax.Array:
    return scores.score(tokens, first, events_TM, key=key)


def _first_layer(first: First, tokens: Tokens, events_TM: jax.Array, *, key: Key) -> jax.Array:
    return first(tokens, events_TM)


def _whole(layer: nnx.Linear, asked: Asked, tokens: Tokens, events_TM: jax.Array) -> jax.Array:
    query_TM = asked(tokens).astype(events_TM.dtype)
    seen = [query_TM, events_TM, query_TM - events_TM, query_TM * events_TM]
    return layer(jnp.concatenate(seen, axis=1))


def _by_token(
    kernel_XW: jax.Array, bias_W: jax.Array, asked: Asked, tokens: Tokens, events_TM: jax.Array
) -> jax.Array:
    query_TM = asked(tokens).astype(events_TM.dtype)
    seen_TX = jnp.concatenate([events_TM, query_TM * events_TM, query_TM], axis=1)
    return product(seen_TX, kernel_XW) + bias_W[None]


def _by_example(
    kernel_XW: jax.Array,
    bias_W: jax.Array,
    asked: Asked,
    asked_W: Asked,
    tokens: Tokens,
    events_TM: jax.Array,
) -> jax.Array:
    query_TM = asked(tokens).astype(events_TM.dtype)
    seen_TX = jnp.concatenate([events_TM, query_TM * events_TM], axis=1)
    own_TW = (asked_W(tokens) + bias_W[None]).astype(events_TM.dtype)
    return product(seen_TX, kernel_XW) + own_TW


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
    """W [target ; position] + b; no positions where their width is 0."""

    def __init__(self, width: int, length: int, position_width: int, *, rngs: nnx.Rngs):
        positions = jnp.zeros((length, position_width))
        self.position_LP = nnx.Param(positions) if position_width else None  # Orbax: no empty ones
        self.project = dense(width + position_width, width, rngs=rngs)

    def __call__(self, target_BM: jax.Array) -> Asked:
        kernel, bias_M = weights(self.project)
        width = target_BM.shape[1]
        by_example = target_BM @ kernel[:width] + bias_M[None]
        if self.position_LP is None:
            return Asked(by_example)
        return Asked(by_example, self.position_LP[...] @ kernel[width:])


def pool(weighed: Sequence[tuple[jax.Array, jax.Array]], tokens: Tokens) -> jax.Array:
    """The weighted sums of ([T], [T,M]), side by side in float32, [B,H*M]."""
    return jnp.concatenate([tokens.sum(w_T[:, None] * wide(x_TM)) for w_T, x_TM in weighed], axis=1)
