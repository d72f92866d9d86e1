"""History encoders: tokens -> one summary per example (PAPER sections 1 and 3, table 3).

Each is written once over `Tokens` and gives the same numbers padded and packed. An example without
history gets zeros. The attention encoders are the interests of the backbones, over projected
entries. Their query is open in the paper: here a projection of the candidate item's embeddings.
DIEN's recurrence and a small transformer stand beside the paper's four.
"""

from dataclasses import dataclass
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from loopfm_jax.backbones.behaviours import Seen, Weighed, Weighing
from loopfm_jax.backbones.config import BackboneConfig, Spec
from loopfm_jax.backbones.dien import DIEN
from loopfm_jax.backbones.din import DIN
from loopfm_jax.backbones.dmin import DMIN
from loopfm_jax.backbones.layers import dense
from loopfm_jax.data.schema import Behaviour, Field, Schema
from loopfm_jax.errors import UserError, check_limits
from loopfm_jax.history.codes import Code
from loopfm_jax.history.transformer import Transformer
from loopfm_jax.packing import Tokens
from loopfm_jax.tables import TableConfig

EncoderName = Literal["mean", "sum", "din", "dien", "dmin", "transformer"]
POOLING = ("mean", "sum")
"""Encoders without attention."""
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
        self.project = dense(inputs, config.width, rngs=rngs, bias=False)
        self.outputs = config.width

    def __call__(self, value_TX: jax.Array, query_BQ: jax.Array, tokens: Tokens) -> jax.Array:
        return tokens.mean(self.project(value_TX))


class Sum(nnx.Module):
    """Sum of the projected codes: also tells how many there are."""

    def __init__(self, inputs: int, query: int, config: EncoderConfig, *, rngs: nnx.Rngs):
        self.project = dense(inputs, config.width, rngs=rngs, bias=False)
        self.outputs = config.width

    def __call__(self, value_TX: jax.Array, query_BQ: jax.Array, tokens: Tokens) -> jax.Array:
        return tokens.sum(jnp.where(tokens.real_T[:, None], self.project(value_TX), 0))


class Attentive(nnx.Module):
    """What the candidate attends to, by one of the backbones' interests.

    Args:
      kind: how entries become a vector.
      deep: whether a transformer reads the entries first.
    """

    def __init__(
        self,
        kind: type[Weighing],
        inputs: int,
        query: int,
        config: EncoderConfig,
        *,
        deep: bool = False,
        rngs: nnx.Rngs,
    ):
        self.project = dense(inputs, config.width, rngs=rngs)
        self.query = dense(query, config.width, rngs=rngs)
        self.transformer = (
            Transformer(config.width, heads=config.heads, layers=config.layers, rngs=rngs)
            if deep
            else None
        )
        self.interest = kind(spec_of(config), ENTRIES, rngs=rngs)
        self.outputs = self.interest.width

    def _see(self, value_TX: jax.Array, query_BQ: jax.Array, tokens: Tokens) -> Seen:
        entries_TW = self.project(value_TX)
        if self.transformer is not None:
            entries_TW = self.transformer(entries_TW, tokens)
        return Seen(self.query(query_BQ), entries_TW, tokens, ids={})

    def weigh(self, value_TX: jax.Array, query_BQ: jax.Array, tokens: Tokens) -> Weighed:
        """The candidate's attention, which sums to 1 over an example's tokens, and what it is
        paid to, of every interest."""
        return self.interest.weigh(self._see(value_TX, query_BQ, tokens), key=None)

    def __call__(self, value_TX: jax.Array, query_BQ: jax.Array, tokens: Tokens) -> jax.Array:
        return self.interest(self._see(value_TX, query_BQ, tokens), key=None)


ENTRIES = Behaviour(("candidate",), ("entries",))


def spec_of(config: EncoderConfig) -> Spec:
    """An encoder as the backbones are told of a behaviour: entries of the encoder's width."""
    return Spec(
        BackboneConfig(
            attention_hidden=config.score_hidden,
            attention_dropout=0.0,
            attention_softmax=True,
            position_width=0,
            heads=config.heads,
            tables=TableConfig(width=config.width),
        ),
        Schema((Field("candidate", 1), Field("entries", 1, kind="sequence"))),
    )


ENCODERS = {
    "mean": Mean,
    "sum": Sum,
    "din": partial(Attentive, DIN),
    "dien": partial(Attentive, DIEN),
    "dmin": partial(Attentive, DMIN),
    "transformer": partial(Attentive, DIN, deep=True),
}
