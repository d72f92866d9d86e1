"""DMIN (Deep Multi-Interest Network, CIKM 2020): several interests per behaviour, each attended
to by the candidate; shapes and counts are those of the public runs (PAPER section 5).

Further letters: D = M / H, P = width of a position.

An event sees earlier real events and itself; a head's events are scored by the candidate and their
position.

Differences from the public code, none of which changes a count:
  - the behaviour refiner masks by a boolean; the public float mask adds 1 to the masked scores;
  - no history gives zero interests, not the mean of whatever the padding turns into;
  - and that of `attention`.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from loopfm_jax.backbones.attention import Query, Scores, pool
from loopfm_jax.backbones.behaviours import Interest, Seen
from loopfm_jax.backbones.config import BackboneConfig, Spec
from loopfm_jax.backbones.layers import (
    FeedForward,
    Key,
    causal_mask,
    dense,
    dropout,
    masked_softmax,
    self_attend,
    split,
)
from loopfm_jax.data.schema import Behaviour
from loopfm_jax.errors import UserError


class Refiner(nnx.Module):
    """Self-attention with a residual, then `FeedForward`: [B,L,M] -> [B,L,M]."""

    def __init__(self, config: BackboneConfig, width: int, *, rngs: nnx.Rngs, dtype: DTypeLike):
        self.config = config
        self.qkv = dense(width, 3 * width, dtype=dtype, rngs=rngs)
        self.out = dense(width, width, dtype=dtype, rngs=rngs)
        self.forward = FeedForward(width, dtype=dtype, rngs=rngs)

    def __call__(self, x_BLM: jax.Array, mask_BLL: jax.Array, *, key: Key) -> jax.Array:
        see_key, out_key = split(key, 2)
        heads, rate = self.config.heads, self.config.attention_dropout
        seen_BLHD = self_attend(self.qkv(x_BLM), mask_BLL, heads=heads, rate=rate, key=see_key)
        seen_BLM = dropout(self.out(seen_BLHD.reshape(x_BLM.shape)), self.config.dropout, out_key)
        return self.forward(x_BLM + seen_BLM)


class Head(nnx.Module):
    """One interest: the head's share of the attention back to width M, then the target's view."""

    def __init__(
        self, config: BackboneConfig, width: int, length: int, *, rngs: nnx.Rngs, dtype: DTypeLike
    ):
        self.rate = config.dropout
        self.out = dense(width // config.heads, width, bias=False, dtype=dtype, rngs=rngs)
        self.forward = FeedForward(width, dtype=dtype, rngs=rngs)
        positional = config.position_width > 0
        self.query = Query(width, length, config.position_width, rngs=rngs) if positional else None
        self.scores = Scores(config, width, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        target_BM: jax.Array,
        events_BLM: jax.Array,
        seen_BLD: jax.Array,
        mask_BL: jax.Array,
        *,
        key: Key,
    ) -> jax.Array:
        out_key, score_key = split(key, 2)
        seen_BLM = dropout(self.out(seen_BLD), self.rate, out_key)
        head_BLM = self.forward(events_BLM + seen_BLM)
        query = [target_BM[:, None]]
        if self.query is not None:
            query = self.query(target_BM, mask_BL.shape[1])
        scores_BL = self.scores(query, head_BLM, mask_BL, key=score_key)
        return pool(masked_softmax(scores_BL, mask_BL), head_BLM)


class DMIN(Interest):
    """The interests of all heads side by side, [B,H*M].

    Raises:
      UserError: heads does not divide the width of an event.
    """

    def __init__(self, spec: Spec, pair: Behaviour, *, rngs: nnx.Rngs):
        config, dtype, width = spec.config, spec.dtype, spec.event_width(pair)
        if width % config.heads:
            raise UserError(
                f"heads={config.heads} does not divide the behaviour width {width} (fields "
                f"{pair.target}, width {config.tables.width} each). Change the backbone's `heads` "
                "or the tables' `width`."
            )
        self.rate, self.dtype, self.width = config.attention_dropout, dtype, config.heads * width
        self.refiner = Refiner(config, width, dtype=dtype, rngs=rngs) if config.refiner else None
        self.qkv = dense(width, 3 * width, bias=False, dtype=dtype, rngs=rngs)
        self.heads = nnx.List(
            Head(config, width, spec.length(pair), dtype=dtype, rngs=rngs)
            for _ in range(config.heads)
        )

    def __call__(self, seen: Seen, *, key: Key) -> jax.Array:
        heads = len(self.heads)
        refiner_key, see_key, *keys = split(key, 2 + heads)
        mask_BLL = causal_mask(seen.mask_BL)
        x_BLM = seen.events_BLM.astype(self.dtype)
        if self.refiner is not None:
            x_BLM = self.refiner(x_BLM, mask_BLL, key=refiner_key)
        qkv_BLX = self.qkv(x_BLM)
        seen_BLHD = self_attend(qkv_BLX, mask_BLL, heads=heads, rate=self.rate, key=see_key)
        interests = [
            head(seen.target_BM, x_BLM, seen_BLHD[:, :, i], seen.mask_BL, key=k)
            for i, (head, k) in enumerate(zip(self.heads, keys, strict=True))
        ]
        return jnp.concatenate(interests, axis=-1)
