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
from flax import nnx
from jax.tree_util import Partial
from jax.typing import DTypeLike

from loopfm_jax.backbones.attention import Asked, First, Query, Scores, pool
from loopfm_jax.backbones.behaviours import Seen, Weighed, Weighing
from loopfm_jax.backbones.config import BackboneConfig, Spec
from loopfm_jax.backbones.layers import FeedForward, Key, dense, dropout, split
from loopfm_jax.backbones.self_attention import self_attend
from loopfm_jax.data.schema import Behaviour
from loopfm_jax.errors import UserError
from loopfm_jax.packing import Tokens


class Refiner(nnx.Module):
    """Self-attention with a residual, then `FeedForward`: [T,M] -> [T,M]."""

    def __init__(self, config: BackboneConfig, width: int, *, rngs: nnx.Rngs, dtype: DTypeLike):
        self.config = config
        self.qkv = dense(width, 3 * width, dtype=dtype, rngs=rngs)
        self.out = dense(width, width, dtype=dtype, rngs=rngs)
        self.forward = FeedForward(width, dtype=dtype, rngs=rngs)

    def __call__(self, x_TM: jax.Array, tokens: Tokens, *, key: Key) -> jax.Array:
        see_key, out_key = split(key, 2)
        heads, rate = self.config.heads, self.config.attention_dropout
        seen_THD = self_attend(self.qkv(x_TM), tokens, heads=heads, rate=rate, key=see_key)
        seen_TM = dropout(self.out(seen_THD.reshape(x_TM.shape)), self.config.dropout, out_key)
        return self.forward(x_TM + seen_TM)


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
        events_TM: jax.Array,
        seen_TD: jax.Array,
        tokens: Tokens,
        *,
        key: Key,
    ) -> tuple[jax.Array, jax.Array]:
        """The weight of every event [T], and the events as this head sees them [T,M]."""
        asked = self.query(target_BM) if self.query else Asked(target_BM)
        first = self.scores.first(asked, len(events_TM))
        see = self.scores.by_block(Partial(Head.see, self, first), key=key)
        score_T, head_TM = see(tokens, events_TM, seen_TD, key=key)
        return tokens.softmax(score_T), head_TM

    def see(
        self,
        first: First,
        tokens: Tokens,
        events_TM: jax.Array,
        seen_TD: jax.Array,
        *,
        key: Key,
    ) -> tuple[jax.Array, jax.Array]:
        """Of a part of the tokens: scores, events."""
        out_key, score_key = split(key, 2)
        head_TM = self.forward(events_TM + dropout(self.out(seen_TD), self.rate, out_key))
        return self.scores.score(tokens, first, head_TM, key=score_key), head_TM


class DMIN(Weighing):
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

    def weigh(self, seen: Seen, *, key: Key) -> Weighed:
        heads, tokens = len(self.heads), seen.tokens
        refiner_key, see_key, *keys = split(key, 2 + heads)
        x_TM = seen.events_TM.astype(self.dtype)
        if self.refiner is not None:
            x_TM = self.refiner(x_TM, tokens, key=refiner_key)
        seen_THD = self_attend(self.qkv(x_TM), tokens, heads=heads, rate=self.rate, key=see_key)
        return [
            head(seen.target_BM, x_TM, seen_THD[:, i], tokens, key=k)
            for i, (head, k) in enumerate(zip(self.heads, keys, strict=True))
        ]

    def __call__(self, seen: Seen, *, key: Key) -> jax.Array:
        return pool(self.weigh(seen, key=key), seen.tokens)
