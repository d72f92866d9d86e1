"""HSTU (arXiv 2402.17152): self-attention whose weights are SiLU of the scores, not a softmax, so
that their sum tells how strong an interest is.

A layer, of tokens normalised to x: `u, v, q, k = split(SiLU(x W))`, then
`y = x + out(u * norm(SiLU(q k^T + bias) v / L))`; the bias knows by how many ranks and, where times
are known, by how many seconds the seen event is older. It is shared by the heads.

The candidate is the newest token (the paper leaves its place open): it sees every event and itself,
and events, which see what is older, never see it. So it needs no slot among them, and they are
computed without it. What the layers make of it enters the DNN beside all other fields.
Several behaviours have layers of their own.

Differences from the public code: the bias of time is piecewise linear in log(1 + seconds), where
that one has a table of buckets: its gradient is a sum, not a scatter into few rows.

Letters: D token width, N ranks, K knots.
"""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx, struct
from jax.tree_util import Partial

from loopfm_jax.backbones.behaviours import Interest, Seen
from loopfm_jax.backbones.config import Spec
from loopfm_jax.backbones.layers import Key, dense, dropout, split, wide
from loopfm_jax.backbones.self_attention import Pairs, self_attend
from loopfm_jax.backbones.stack import Stack
from loopfm_jax.data.schema import Behaviour
from loopfm_jax.packing import Tokens

KNOTS, STEP = 13, 1.5
"""Of the bias of time, over log(1 + seconds): the last is at two years."""


class Layer(nnx.Module):
    """(events [T,D], candidate [B,D]) -> the same."""

    def __init__(self, spec: Spec, pair: Behaviour, *, rngs: nnx.Rngs):
        config, dtype, width = spec.config, spec.dtype, spec.config.token_width
        self.heads, self.rate = config.heads, config.attention_dropout
        self.norm = nnx.LayerNorm(width, dtype=dtype, rngs=rngs)
        self.into = dense(width, 4 * width, bias=False, dtype=dtype, rngs=rngs)
        self.rank_N = nnx.Param(jnp.zeros(spec.length(pair) + 1))
        self.time_K = nnx.Param(jnp.zeros(KNOTS)) if spec.timed(pair) else None
        self.norm_seen = nnx.LayerNorm(width, dtype=dtype, rngs=rngs)
        self.out = dense(width, width, dtype=dtype, rngs=rngs)

    def __call__(
        self, x: tuple[jax.Array, jax.Array], tokens: Tokens, *, key: Key = None
    ) -> tuple[jax.Array, jax.Array]:
        events_key, candidate_key = split(key, 2)
        gate_TD, qkv_TX = self._split(x[0])
        gate_BD, qkv_BX = self._split(x[1])
        seen_THD = self_attend(
            qkv_TX,
            tokens,
            heads=self.heads,
            weigh=Partial(partial(_weigh, length=tokens.length), self._bias),
            rate=self.rate,
            key=events_key,
        )
        seen_BD = self._ask(qkv_BX, qkv_TX, tokens, key=candidate_key)
        seen_TD = seen_THD.reshape(gate_TD.shape)
        return self._add(x[0], gate_TD, seen_TD), self._add(x[1], gate_BD, seen_BD)

    def _split(self, x_XD: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The gate, and queries, keys and values side by side."""
        made = jax.nn.silu(self.into(self.norm(x_XD)))
        return made[:, : x_XD.shape[1]], made[:, x_XD.shape[1] :]

    def _add(self, x_XD: jax.Array, gate_XD: jax.Array, seen_XD: jax.Array) -> jax.Array:
        return x_XD + self.out(gate_XD * self.norm_seen(seen_XD))

    @property
    def _bias(self) -> "Bias":
        return Bias(self.rank_N[...], None if self.time_K is None else self.time_K[...])

    def _ask(self, qkv_BX: jax.Array, qkv_TX: jax.Array, tokens: Tokens, *, key: Key) -> jax.Array:
        """What the candidate gathers from all events and itself, [B,D]."""
        q_BHD, own_BHD, value_BHD = self._heads(qkv_BX)
        _, k_THD, v_THD = self._heads(qkv_TX)
        product_TH = wide((tokens.spread(q_BHD) * k_THD).sum(-1))
        bias_T = self._bias.by_rank(1 + tokens.rank_T) + self._bias.by_time(tokens.age_T)
        weight_TH = jax.nn.silu(product_TH + bias_T[:, None]) / tokens.length
        weight_TH = dropout(jnp.where(tokens.real_T[:, None], weight_TH, 0), self.rate, key)
        seen_BHD = tokens.sum(weight_TH[..., None] * wide(v_THD))
        itself = self._bias.by_rank(jnp.zeros((1, 1), jnp.int32))
        itself += self._bias.by_time(jnp.zeros((1, 1)))
        weight_BH = jax.nn.silu(wide((q_BHD * own_BHD).sum(-1)) + itself) / tokens.length
        seen_BHD += weight_BH[..., None] * wide(value_BHD)
        return seen_BHD.reshape(len(seen_BHD), -1).astype(qkv_BX.dtype)

    def _heads(self, qkv_XY: jax.Array) -> list[jax.Array]:
        return jnp.split(qkv_XY.reshape(len(qkv_XY), 3 * self.heads, -1), 3, axis=1)


@struct.dataclass
class Bias:
    """What a score gains by how much older the seen event is."""

    rank_N: jax.Array
    time_K: jax.Array | None

    def by_rank(self, apart: jax.Array) -> jax.Array:
        """Of events so many ranks older, of any shape."""
        return self.rank_N[jnp.clip(apart, 0, len(self.rank_N) - 1)]

    def by_time(self, seconds: jax.Array | None) -> jax.Array | float:
        """Of events so many seconds older, of any shape; nothing where times are not known."""
        if self.time_K is None or seconds is None:
            return 0.0
        at = jnp.minimum(jnp.log1p(jnp.maximum(seconds, 0)) / STEP, KNOTS - 1.0)
        hats = (jnp.maximum(1 - jnp.abs(at - i), 0) for i in range(KNOTS))
        return sum(value * hat for value, hat in zip(self.time_K, hats, strict=True))


def _weigh(bias: Bias, product_CHLS: jax.Array, pairs: Pairs, *, length: int) -> jax.Array:
    bias_CLS = bias.by_rank(pairs.apart_LS)[None] + bias.by_time(pairs.seconds_CLS)
    weight_CHLS = jax.nn.silu(product_CHLS + bias_CLS[:, None]) / length
    return jnp.where(pairs.seen_CLS[:, None], weight_CHLS, 0)


class HSTU(Interest):
    """The candidate as the last layer leaves it, [B,D]."""

    tap = "summary"

    def __init__(self, spec: Spec, pair: Behaviour, *, rngs: nnx.Rngs):
        config = spec.config
        self.width, self.dtype = config.token_width, spec.dtype
        self.project = dense(spec.event_width(pair), self.width, dtype=spec.dtype, rngs=rngs)
        self.stack = Stack(
            lambda rngs: Layer(spec, pair, rngs=rngs), config.layers, remat=config.remat, rngs=rngs
        )

    def __call__(self, seen: Seen, *, key: Key) -> jax.Array:
        x = self.project(seen.events_TM), self.project(seen.target_BM)
        return self.stack(x, seen.tokens, key=key)[1]
