"""DIN (Deep Interest Network, arXiv 1706.06978): events weighted by their score for the candidate.

By default the weights are the bare scores, so that their sum measures the interest's strength; a
softmax over the real events is an option (public runs: on Amazon only).

No difference from the public code but that of `attention`.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from loopfm_jax.backbones.attention import Scores, pool
from loopfm_jax.backbones.behaviours import Interest, Seen
from loopfm_jax.backbones.config import Spec
from loopfm_jax.backbones.layers import Key, masked_softmax
from loopfm_jax.data.schema import Behaviour


class DIN(Interest):
    """The weighted sum of the events, [B,M]."""

    def __init__(self, spec: Spec, pair: Behaviour, *, rngs: nnx.Rngs):
        self.softmax = spec.config.attention_softmax
        self.width = spec.event_width(pair)
        self.scores = Scores(spec.config, self.width, dtype=spec.dtype, rngs=rngs)

    def __call__(self, seen: Seen, *, key: Key) -> jax.Array:
        scores_BL = self.scores([seen.target_BM[:, None]], seen.events_BLM, seen.mask_BL, key=key)
        if self.softmax:
            weights_BL = masked_softmax(scores_BL, seen.mask_BL)
        else:
            weights_BL = jnp.where(seen.mask_BL, scores_BL, 0)
        return pool(weights_BL, seen.events_BLM)
