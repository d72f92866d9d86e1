"""DIN (Deep Interest Network, arXiv 1706.06978): events weighted by their score for the candidate.

By default the weights are the bare scores, so that their sum measures the interest's strength; a
softmax over the real events is an option (public runs: on Amazon only).

No difference from the public code but that of `attention`.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from loopfm_jax.backbones.attention import Asked, Scores, pool
from loopfm_jax.backbones.behaviours import Seen, Weighed, Weighing
from loopfm_jax.backbones.config import Spec
from loopfm_jax.backbones.layers import Key
from loopfm_jax.data.schema import Behaviour


class DIN(Weighing):
    """The weighted sum of the events, [B,M]."""

    def __init__(self, spec: Spec, pair: Behaviour, *, rngs: nnx.Rngs):
        self.softmax = spec.config.attention_softmax
        self.width = spec.event_width(pair)
        self.scores = Scores(spec.config, self.width, dtype=spec.dtype, rngs=rngs)

    def weigh(self, seen: Seen, *, key: Key) -> Weighed:
        tokens = seen.tokens
        score_T = self.scores(Asked(seen.target_BM), seen.events_TM, tokens, key=key)
        weight_T = tokens.softmax(score_T) if self.softmax else jnp.where(tokens.real_T, score_T, 0)
        return [(weight_T, seen.events_TM)]

    def __call__(self, seen: Seen, *, key: Key) -> jax.Array:
        return pool(self.weigh(seen, key=key), seen.tokens)
