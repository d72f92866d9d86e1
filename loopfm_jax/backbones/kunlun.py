"""Kunlun (arXiv 2602.10016): InterFormer's arms, built for the accelerator.

`layers` counts pairs of layers. What their sequence arms do (the other arms are those of `arms`;
PAPER section 6):

    X_sum = W X                                    R tokens
    S = S + act(Q K^T / L) V                       GDPA: Q of the events, K and V of X_sum, per head
    S = S + window(S)                              an event sees the next older ones only
    S_sum = sum_k Z_k^T ask(seeds, S) W_k          HSP: learned seeds attend to the events, and a
                                                   SumKronLinear makes fewer tokens of theirs

Computation skip: the second layer of a pair leaves the events as they are, and only asks them anew.
Self-attention has rotary positions on log(1 + age); where times are not known, on ranks.

Open in the paper, chosen here: act is SiLU; which of the two layers skips what; SEEDS, TOLD and
TERMS; one expert in the interaction arm. Left out: sizes that differ by event type.

Letters: D token width, F fields, R `rank`, P seeds, G tokens that tell of events, K terms.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from loopfm_jax.backbones.arms import SequenceArm, along, drawn, repeat
from loopfm_jax.backbones.config import Spec
from loopfm_jax.backbones.layers import Key, dense, split
from loopfm_jax.backbones.personal import answer, ask
from loopfm_jax.backbones.rotary import angles, turn
from loopfm_jax.backbones.self_attention import self_attend
from loopfm_jax.data.schema import Behaviour
from loopfm_jax.packing import Tokens

SEEDS, TOLD, TERMS = 16, 8, 2
"""P, G and K."""


class Pool(nnx.Module):
    """Hierarchical seed pooling: events [T,D] -> [B,G,D]."""

    def __init__(self, spec: Spec, *, rngs: nnx.Rngs):
        config, width = spec.config, spec.config.token_width
        self.heads, self.rate = config.heads, config.attention_dropout
        self.norm = nnx.LayerNorm(width, dtype=spec.dtype, rngs=rngs)
        self.kv = dense(width, 2 * width, bias=False, dtype=spec.dtype, rngs=rngs)
        self.seeds_PD = drawn(SEEDS, width, rngs=rngs)
        self.mix_PX = drawn(SEEDS, TERMS * TOLD, rngs=rngs)
        self.turn_DX = drawn(width, TERMS * width, rngs=rngs)

    def __call__(
        self, events_TD: jax.Array, tokens: Tokens, like: jax.Array, *, key: Key
    ) -> jax.Array:
        seeds_BPD = repeat(self.seeds_PD, like=like)
        kv_TX = self.kv(self.norm(events_TD))
        found_BPD = ask(seeds_BPD, kv_TX, tokens, heads=self.heads, rate=self.rate, key=key)
        mix_PKG, turn_DKW = (
            p[...].astype(found_BPD.dtype).reshape(len(p[...]), TERMS, -1)
            for p in (self.mix_PX, self.turn_DX)
        )
        fewer_BKGD = jnp.einsum("BPD,PKG->BKGD", found_BPD, mix_PKG)
        return jnp.einsum("BKGD,DKW->BGW", fewer_BKGD, turn_DKW)


class Resting(SequenceArm):
    """The second layer of a pair: the events stay, and are asked anew."""

    @staticmethod
    def told(spec: Spec, pair: Behaviour) -> int:
        return TOLD

    def __init__(self, spec: Spec, pair: Behaviour, *, rngs: nnx.Rngs):
        self.pool = Pool(spec, rngs=rngs)

    def __call__(
        self, events_TD: jax.Array, fields_BFD: jax.Array, tokens: Tokens, *, key: Key
    ) -> tuple[jax.Array, jax.Array]:
        return events_TD, self.pool(events_TD, tokens, fields_BFD, key=key)


class Moving(SequenceArm):
    """The first layer of a pair: events learn of the fields and of one another."""

    @staticmethod
    def told(spec: Spec, pair: Behaviour) -> int:
        return TOLD

    def __init__(self, spec: Spec, pair: Behaviour, *, rngs: nnx.Rngs):
        config, dtype, width = spec.config, spec.dtype, spec.config.token_width
        self.heads, self.window = config.heads, config.window
        self.rate = config.attention_dropout
        self.fields_FR = drawn(spec.fields, config.rank, rngs=rngs)
        self.norm_answer = nnx.LayerNorm(width, dtype=dtype, rngs=rngs)
        self.query = dense(width, width, bias=False, dtype=dtype, rngs=rngs)
        self.kv = dense(width, 2 * width, bias=False, dtype=dtype, rngs=rngs)
        self.out_answer = dense(width, width, dtype=dtype, rngs=rngs)
        self.norm_attend = nnx.LayerNorm(width, dtype=dtype, rngs=rngs)
        self.qkv = dense(width, 3 * width, bias=False, dtype=dtype, rngs=rngs)
        self.out_attend = dense(width, width, dtype=dtype, rngs=rngs)
        self.pool = Pool(spec, rngs=rngs)

    def __call__(
        self, events_TD: jax.Array, fields_BFD: jax.Array, tokens: Tokens, *, key: Key
    ) -> tuple[jax.Array, jax.Array]:
        see_key, pool_key = split(key, 2)
        kv_BRX = self.kv(along(fields_BFD, self.fields_FR))
        query_TD = self.query(self.norm_answer(events_TD))
        events_TD += self.out_answer(answer(query_TD, kv_BRX, tokens, heads=self.heads))
        angle_TD = angles(tokens, pairs=events_TD.shape[1] // self.heads // 2)
        qkv_TX = turn(self.qkv(self.norm_attend(events_TD)), angle_TD, heads=self.heads)
        seen_THD = self_attend(
            qkv_TX, tokens, heads=self.heads, window=self.window, rate=self.rate, key=see_key
        )
        events_TD += self.out_attend(seen_THD.reshape(events_TD.shape))
        return events_TD, self.pool(events_TD, tokens, fields_BFD, key=pool_key)


KUNLUN = (Moving, Resting)
"""A pair of layers."""
