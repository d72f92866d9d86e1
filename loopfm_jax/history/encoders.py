"""History encoders: tokens -> one summary per example (PAPER sections 1 and 3, table 3).

Each is written once over `Tokens` and gives the same numbers padded and packed. An example without
history gets zeros. The query of the attention encoders is open in the paper: here a projection of
the candidate item's embeddings.
"""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from loopfm_jax.errors import UserError, check_limits
from loopfm_jax.history.packing import Tokens

EncoderName = Literal["mean", "sum", "din", "dmin"]
TIMED = ("transformer",)
"""Encoders that look at the age of entries."""


@dataclass(frozen=True)
class EncoderConfig:
    """The VM's LoopFM module."""

    name: EncoderName = "dmin"
    width: int = 32
    """W: width of tokens inside the encoder (the paper: 32)."""
    heads: int = 2
    """Interests of the DMIN encoder (the paper: 4)."""
    score_hidden: tuple[int, ...] = (64, 32)
    """Hidden layers of the attention score."""
    fields: int = 2
    """K: how many fields of the embedding width a summary becomes."""

    def __post_init__(self) -> None:
        check_limits(
            "encoder", {"width": self.width, "heads": self.heads, "fields": self.fields}, low=1
        )
        if self.name == "dmin" and self.width % self.heads:
            raise UserError(
                f"encoder.width {self.width} does not divide into encoder.heads {self.heads}: make "
                "the width a multiple of the heads"
            )
        if not self.score_hidden:
            raise UserError("encoder.score_hidden is empty; give at least one width, e.g. 64 32")


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


class Mean(nnx.Module):
    """Mean of the projected codes."""

    def __init__(self, inputs: int, query: int, config: EncoderConfig, *, rngs: nnx.Rngs):
        self.project = linear(inputs, config.width, rngs=rngs, bias=False)
        self.outputs = config.width

    def __call__(self, value_TX: jax.Array, query_BQ: jax.Array, tokens: Tokens) -> jax.Array:
        total = tokens.sum(jnp.where(tokens.real_T[:, None], self.project(value_TX), 0))
        return total / jnp.maximum(tokens.count(), 1)[:, None]


class Sum(nnx.Module):
    """Sum of the projected codes: also tells how many there are."""

    def __init__(self, inputs: int, query: int, config: EncoderConfig, *, rngs: nnx.Rngs):
        self.project = linear(inputs, config.width, rngs=rngs, bias=False)
        self.outputs = config.width

    def __call__(self, value_TX: jax.Array, query_BQ: jax.Array, tokens: Tokens) -> jax.Array:
        return tokens.sum(jnp.where(tokens.real_T[:, None], self.project(value_TX), 0))


class Din(nnx.Module):
    """DIN target attention with softmax."""

    def __init__(self, inputs: int, query: int, config: EncoderConfig, *, rngs: nnx.Rngs):
        self.project = linear(inputs, config.width, rngs=rngs, bias=False)
        self.query = linear(query, config.width, rngs=rngs)
        self.score = Score(config.width, config.score_hidden, rngs=rngs)
        self.outputs = config.width

    def __call__(self, value_TX: jax.Array, query_BQ: jax.Array, tokens: Tokens) -> jax.Array:
        token_TW = self.project(value_TX)
        weight_T = tokens.softmax(self.score(self.query(query_BQ), token_TW, tokens))
        return tokens.sum(weight_T[:, None] * token_TW)


class Dmin(nnx.Module):
    """DMIN's multi-interest extractor and per-interest target attention (PAPER section 5).

    Causal self-attention (an entry sees itself and older ones) gives one sequence per head; each
    is normalised, passes a feed-forward layer and is pooled by its own target attention. All layers
    run over the packed tokens; only the attention itself, small here, is computed padded.
    """

    def __init__(self, inputs: int, query: int, config: EncoderConfig, *, rngs: nnx.Rngs):
        width, heads = config.width, config.heads
        self.heads, self.outputs = heads, width * heads
        self.project = linear(inputs, width, rngs=rngs)
        self.query = linear(query, width, rngs=rngs)
        self.attend = linear(width, 3 * width, rngs=rngs, bias=False)
        self.mix = nnx.List(
            [linear(width // heads, width, rngs=rngs, bias=False) for _ in range(heads)]
        )
        self.norm = nnx.List([nnx.LayerNorm(width, rngs=rngs) for _ in range(heads)])
        self.grow = nnx.List([linear(width, 2 * width, rngs=rngs) for _ in range(heads)])
        self.shrink = nnx.List([linear(2 * width, width, rngs=rngs) for _ in range(heads)])
        self.score = nnx.List([Score(width, config.score_hidden, rngs=rngs) for _ in range(heads)])

    def __call__(self, value_TX: jax.Array, query_BQ: jax.Array, tokens: Tokens) -> jax.Array:
        token_TW = self.project(value_TX)
        target_BW = self.query(query_BQ)
        mixed_THD = self._self_attention(token_TW, tokens)
        interests = []
        for i in range(self.heads):
            x_TW = self.norm[i](token_TW + self.mix[i](mixed_THD[:, i]))
            x_TW = x_TW + self.shrink[i](nnx.relu(self.grow[i](x_TW)))
            weight_T = tokens.softmax(self.score[i](target_BW, x_TW, tokens))
            interests.append(tokens.sum(weight_T[:, None] * x_TW))
        return jnp.concatenate(interests, axis=1)

    def _self_attention(self, token_TW: jax.Array, tokens: Tokens) -> jax.Array:
        """[T,W] -> [T,H,W/H]; rank 0 is the newest, so "older" is a higher rank."""
        qkv_BLHD = tokens.pad(self.attend(token_TW).reshape(len(token_TW), 3 * self.heads, -1))
        q, k, v = jnp.split(qkv_BLHD, 3, axis=2)
        rank_L = jnp.arange(tokens.length)
        real_BL = rank_L[None] < tokens.count()[:, None]
        older_LL = rank_L[None, :] >= rank_L[:, None]
        itself_LL = rank_L[None, :] == rank_L[:, None]
        mask_BLL = (older_LL[None] & real_BL[:, None, :]) | itself_LL[None]
        mixed = jax.nn.dot_product_attention(q, k, v, mask=mask_BLL[:, None])
        return tokens.unpad(mixed)


ENCODERS = {"mean": Mean, "sum": Sum, "din": Din, "dmin": Dmin}
