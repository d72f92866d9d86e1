"""InterFormer (arXiv 2411.09852): fields and events interleaved, neither summed up for good.

The sequence arm of a layer (the other two are those of `arms`; PAPER section 6):

    X_sum = gate(W X)                          R tokens; gate(V) = sigmoid(V W) * V
    S = S + PFFN(X_sum, S)                     a matrix per example: P (X_sum W0), of rank R
    S = S + MHA(S)                             rotary positions; an event sees older ones
    S_sum = gate([CLS ; PMA(S) ; recent(S)])   what tells of the events

CLS are 4 tokens made of the fields. They stand before the newest event: they pass the same PFFN and
ask by the same attention, and events do not see them, so that they need no slots. PMA are 2 learned
seeds that attend to the events, recent the 2 newest.

Open in the paper, chosen here: how X_sum becomes a matrix D x D (of rank R, which is never built);
CLS made anew in every layer, as the fields are; and what `arms` says.

Letters: D token width, F fields, R `rank`, G tokens that tell of events.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from loopfm_jax.backbones.arms import SequenceArm, along, drawn, repeat
from loopfm_jax.backbones.config import Spec
from loopfm_jax.backbones.layers import Key, dense, split
from loopfm_jax.backbones.personal import ask, transform
from loopfm_jax.backbones.rotary import rank_angles, turn
from loopfm_jax.backbones.self_attention import self_attend
from loopfm_jax.data.schema import Behaviour
from loopfm_jax.packing import Tokens

CLS, SEEDS, RECENT = 4, 2, 2
"""Tokens that tell of events, the paper's."""


class Gate(nnx.Module):
    """sigmoid(V W) * V."""

    def __init__(self, width: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.weigh = dense(width, width, dtype=dtype, rngs=rngs)

    def __call__(self, x_BGD: jax.Array) -> jax.Array:
        return jax.nn.sigmoid(self.weigh(x_BGD)) * x_BGD


class InterFormer(SequenceArm):
    """See the module."""

    @staticmethod
    def told(spec: Spec, pair: Behaviour) -> int:
        return CLS + SEEDS + min(RECENT, spec.length(pair))

    def __init__(self, spec: Spec, pair: Behaviour, *, rngs: nnx.Rngs):
        config, dtype, width = spec.config, spec.dtype, spec.config.token_width
        self.heads, self.rate = config.heads, config.attention_dropout
        self.fields_FR = drawn(spec.fields, config.rank, rngs=rngs)
        self.cls_FG = drawn(spec.fields, CLS, rngs=rngs)
        self.gate_fields = Gate(width, dtype=dtype, rngs=rngs)
        self.norm_forward = nnx.LayerNorm(width, dtype=dtype, rngs=rngs)
        self.reduce = dense(width, config.rank, bias=False, dtype=dtype, rngs=rngs)
        self.matrix = dense(width, width, bias=False, dtype=dtype, rngs=rngs)
        self.norm_attend = nnx.LayerNorm(width, dtype=dtype, rngs=rngs)
        self.qkv = dense(width, 3 * width, bias=False, dtype=dtype, rngs=rngs)
        self.out = dense(width, width, dtype=dtype, rngs=rngs)
        self.seeds_GD = drawn(SEEDS, width, rngs=rngs)
        self.pool = dense(width, 2 * width, bias=False, dtype=dtype, rngs=rngs)
        self.gate_told = Gate(width, dtype=dtype, rngs=rngs)

    def __call__(
        self, events_TD: jax.Array, fields_BFD: jax.Array, tokens: Tokens, *, key: Key
    ) -> tuple[jax.Array, jax.Array]:
        see_key, cls_key, pool_key = split(key, 3)
        across_BRD = self.gate_fields(along(fields_BFD, self.fields_FR))
        cls_BGD = along(fields_BFD, self.cls_FG)
        matrix_BRD = self.matrix(across_BRD)
        reduced_TR, reduced_BGR = (self.reduce(self.norm_forward(x)) for x in (events_TD, cls_BGD))
        events_TD += transform(reduced_TR, matrix_BRD, tokens)
        cls_BGD += jnp.einsum("BGR,BRD->BGD", reduced_BGR, matrix_BRD)
        width = events_TD.shape[1]
        angle_TD = rank_angles(tokens, pairs=width // self.heads // 2)
        qkv_TX = turn(self.qkv(self.norm_attend(events_TD)), angle_TD, heads=self.heads)
        q_BGD = self.qkv(self.norm_attend(cls_BGD))[..., :width]  # at position 0: not turned
        how = {"heads": self.heads, "rate": self.rate}
        seen_THD = self_attend(qkv_TX, tokens, **how, key=see_key)
        cls_BGD += self.out(ask(q_BGD, qkv_TX[:, width:], tokens, **how, key=cls_key))
        events_TD += self.out(seen_THD.reshape(events_TD.shape))
        return events_TD, self._tell(events_TD, cls_BGD, tokens, key=pool_key)

    def _tell(
        self, events_TD: jax.Array, cls_BGD: jax.Array, tokens: Tokens, *, key: Key
    ) -> jax.Array:
        """[B,G,D]."""
        seeds_BGD = repeat(self.seeds_GD, like=cls_BGD)
        pooled_BGD = ask(
            seeds_BGD, self.pool(events_TD), tokens, heads=self.heads, rate=self.rate, key=key
        )
        recent_BGD = tokens.pad(events_TD)[:, :RECENT]
        return self.gate_told(jnp.concatenate([cls_BGD, pooled_BGD, recent_BGD], axis=1))
