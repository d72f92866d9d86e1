"""History encoders: tokens -> one summary per example (PAPER sections 1 and 3, table 3).

Each is written once over `Tokens` and gives the same numbers padded and packed. An example without
history gets zeros. The query of the attention encoders is open in the paper: here a projection of
the candidate item's embeddings. DIEN's recurrence and a small transformer stand beside the paper's
four.
"""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from loopfm_jax.errors import UserError, check_limits
from loopfm_jax.history.attention import Score, linear, rotate, self_attend, time_angles
from loopfm_jax.history.codes import Code
from loopfm_jax.history.packing import Tokens

EncoderName = Literal["mean", "sum", "din", "dien", "dmin", "transformer"]
TIMED = ("transformer",)
"""Encoders that look at the age of entries."""


@dataclass(frozen=True)
class EncoderConfig:
    """The VM's LoopFM module."""

    name: EncoderName = "dmin"
    width: int = 32
    """W: width of tokens inside the encoder (the paper: 32)."""
    heads: int = 2
    """Interests of the DMIN encoder (the paper: 4), attention heads of the transformer."""
    layers: int = 2
    """Blocks of the transformer."""
    score_hidden: tuple[int, ...] = (64, 32)
    """Hidden layers of the attention score."""
    fields: int = 2
    """K: how many fields of the embedding width a summary becomes."""
    trainable_codes: bool = False
    """Codes of --export.code rq name rows of a trained table, not the FM's vectors (QARM, arXiv
    2411.11739)."""

    def __post_init__(self) -> None:
        sizes = ("width", "heads", "layers", "fields")
        check_limits("encoder", {name: getattr(self, name) for name in sizes}, low=1)
        if self.name in ("dmin", "transformer") and self.width % self.heads:
            raise UserError(
                f"encoder.width {self.width} does not divide into encoder.heads {self.heads}: make "
                "the width a multiple of the heads"
            )
        if self.name == "transformer" and self.width // self.heads % 2:
            raise UserError(
                f"a head of the transformer has encoder.width / encoder.heads = "
                f"{self.width // self.heads} numbers, but rotary positions turn pairs: make the "
                "width a multiple of twice the heads"
            )
        if not self.score_hidden:
            raise UserError("encoder.score_hidden is empty; give at least one width, e.g. 64 32")

    def check_code(self, code: Code) -> None:
        """Raises UserError where codes name no vectors that could be trained."""
        if self.trainable_codes and code != "rq":
            raise UserError(
                f"encoder.trainable_codes trains the vectors that codes name, but {code} codes "
                "name none: add --export.code rq, or leave the option out"
            )


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


class Attentive(nnx.Module):
    """Pools what its `interests` return, each by its own weights, side by side."""

    def interests(
        self, value_TX: jax.Array, query_BQ: jax.Array, tokens: Tokens
    ) -> list[tuple[jax.Array, jax.Array]]:
        """The candidate's attention, which sums to 1 over an example's tokens, and what it is
        paid to: ([T], [T,W]) of every interest."""
        raise NotImplementedError

    def __call__(self, value_TX: jax.Array, query_BQ: jax.Array, tokens: Tokens) -> jax.Array:
        found = self.interests(value_TX, query_BQ, tokens)
        return jnp.concatenate([tokens.sum(w_T[:, None] * x_TW) for w_T, x_TW in found], axis=1)


class Din(Attentive):
    """DIN target attention with softmax."""

    def __init__(self, inputs: int, query: int, config: EncoderConfig, *, rngs: nnx.Rngs):
        self.project = linear(inputs, config.width, rngs=rngs, bias=False)
        self.query = linear(query, config.width, rngs=rngs)
        self.score = Score(config.width, config.score_hidden, rngs=rngs)
        self.outputs = config.width

    def interests(
        self, value_TX: jax.Array, query_BQ: jax.Array, tokens: Tokens
    ) -> list[tuple[jax.Array, jax.Array]]:
        token_TW = self.project(value_TX)
        return [(tokens.softmax(self.score(self.query(query_BQ), token_TW, tokens)), token_TW)]


class Gru(nnx.Module):
    """`h' = h + u * (n - h)` from zeros, oldest entry to newest; gates in the order u, r, n.

    A recurrence gains nothing from packing: it runs over the padded histories, its input products
    over the tokens.
    """

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        self.input = linear(width, 3 * width, rngs=rngs)
        self.state = linear(width, 3 * width, rngs=rngs)

    def __call__(
        self, token_TW: jax.Array, factor_T: jax.Array, tokens: Tokens
    ) -> tuple[jax.Array, jax.Array]:
        """The state after every entry [B,L,W], and after the newest [B,W]; zeros without entries.

        factor_T: of the update gate; 0 at unreal slots, so that these keep the state.
        """
        input_TX = jnp.concatenate([self.input(token_TW), factor_T[:, None]], axis=1)
        input_LBX = jnp.moveaxis(tokens.pad(input_TX), 1, 0)

        def step(h_BW: jax.Array, input_BX: jax.Array) -> tuple[jax.Array, jax.Array]:
            xu, xr, xn, factor_B1 = jnp.split(input_BX, [width, 2 * width, 3 * width], axis=1)
            hu, hr, hn = jnp.split(self.state(h_BW), 3, axis=1)
            new_BW = jnp.tanh(xn + jax.nn.sigmoid(xr + hr) * hn)
            h_BW = h_BW + jax.nn.sigmoid(xu + hu) * factor_B1 * (new_BW - h_BW)
            return h_BW, h_BW

        width = token_TW.shape[1]
        start_BW = jnp.zeros((tokens.examples, width), token_TW.dtype)
        last_BW, states_LBW = jax.lax.scan(step, start_BW, input_LBX, reverse=True)
        return jnp.moveaxis(states_LBW, 0, 1), last_BW


class Dien(Attentive):
    """DIEN (PAPER section 5): a GRU over the entries gives interests; their softmax scores for the
    candidate scale the update gate of a second one (AUGRU), whose last state is the summary."""

    def __init__(self, inputs: int, query: int, config: EncoderConfig, *, rngs: nnx.Rngs):
        self.outputs = config.width
        self.project = linear(inputs, config.width, rngs=rngs)
        self.query = linear(query, config.width, rngs=rngs)
        self.extraction = Gru(config.width, rngs=rngs)
        self.score = Score(config.width, config.score_hidden, rngs=rngs)
        self.evolution = Gru(config.width, rngs=rngs)

    def interests(
        self, value_TX: jax.Array, query_BQ: jax.Array, tokens: Tokens
    ) -> list[tuple[jax.Array, jax.Array]]:
        real_T = tokens.real_T.astype(value_TX.dtype)
        interest_BLW, _ = self.extraction(self.project(value_TX), real_T, tokens)
        interest_TW = tokens.unpad(interest_BLW)
        weight_T = tokens.softmax(self.score(self.query(query_BQ), interest_TW, tokens))
        return [(weight_T, interest_TW)]

    def __call__(self, value_TX: jax.Array, query_BQ: jax.Array, tokens: Tokens) -> jax.Array:
        [(weight_T, interest_TW)] = self.interests(value_TX, query_BQ, tokens)
        return self.evolution(interest_TW, weight_T, tokens)[1]


class Dmin(Attentive):
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

    def interests(
        self, value_TX: jax.Array, query_BQ: jax.Array, tokens: Tokens
    ) -> list[tuple[jax.Array, jax.Array]]:
        token_TW = self.project(value_TX)
        target_BW = self.query(query_BQ)
        qkv_THD = self.attend(token_TW).reshape(len(token_TW), 3 * self.heads, -1)
        mixed_THD = self_attend(qkv_THD, tokens)
        found = []
        for i in range(self.heads):
            x_TW = self.norm[i](token_TW + self.mix[i](mixed_THD[:, i]))
            x_TW = x_TW + self.shrink[i](nnx.relu(self.grow[i](x_TW)))
            found.append((tokens.softmax(self.score[i](target_BW, x_TW, tokens)), x_TW))
        return found


class Block(nnx.Module):
    """Pre-norm transformer block: x + attention(norm x), then x + feed-forward(norm x)."""

    def __init__(self, width: int, heads: int, *, rngs: nnx.Rngs):
        self.heads = heads
        self.norm_attend = nnx.LayerNorm(width, rngs=rngs)
        self.attend = linear(width, 3 * width, rngs=rngs, bias=False)
        self.mix = linear(width, width, rngs=rngs, bias=False)
        self.norm_grow = nnx.LayerNorm(width, rngs=rngs)
        self.grow = linear(width, 2 * width, rngs=rngs)
        self.shrink = linear(2 * width, width, rngs=rngs)

    def __call__(self, x_TW: jax.Array, angle_TD: jax.Array, tokens: Tokens) -> jax.Array:
        qkv_TX = self.attend(self.norm_attend(x_TW))
        qk_THD, v_THD = jnp.split(
            qkv_TX.reshape(len(x_TW), 3 * self.heads, -1), [2 * self.heads], axis=1
        )
        qkv_THD = jnp.concatenate([rotate(qk_THD, angle_TD), v_THD], axis=1)
        x_TW = x_TW + self.mix(self_attend(qkv_THD, tokens).reshape(x_TW.shape))
        return x_TW + self.shrink(nnx.relu(self.grow(self.norm_grow(x_TW))))


class Transformer(Attentive):
    """Causal self-attention whose positions are time gaps, then DIN's target attention.

    Kunlun (arXiv 2602.10016, PAPER section 6) has rotary positions on log(1 + dt).
    """

    def __init__(self, inputs: int, query: int, config: EncoderConfig, *, rngs: nnx.Rngs):
        width = self.outputs = config.width
        self.pairs = width // config.heads // 2
        self.project = linear(inputs, width, rngs=rngs)
        self.query = linear(query, width, rngs=rngs)
        self.blocks = nnx.List(Block(width, config.heads, rngs=rngs) for _ in range(config.layers))
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.score = Score(width, config.score_hidden, rngs=rngs)

    def interests(
        self, value_TX: jax.Array, query_BQ: jax.Array, tokens: Tokens
    ) -> list[tuple[jax.Array, jax.Array]]:
        assert tokens.age_T is not None
        angle_TD = time_angles(tokens.age_T, pairs=self.pairs)
        x_TW = self.project(value_TX)
        for block in self.blocks:
            x_TW = block(x_TW, angle_TD, tokens)
        x_TW = self.norm(x_TW)
        return [(tokens.softmax(self.score(self.query(query_BQ), x_TW, tokens)), x_TW)]


ENCODERS = {
    "mean": Mean,
    "sum": Sum,
    "din": Din,
    "dien": Dien,
    "dmin": Dmin,
    "transformer": Transformer,
}
