"""DMR (Deep Match to Rank, AAAI 2020): attention whose query knows the position, and optionally how
well the candidate matches the user.

    query = ReLU(W [target ; position]),  DIN's scores, masked softmax, weighted sum

The match (`u2i`, public runs: on Amazon only): the events are pooled with queries ReLU(W position)
alone, the result passes a ReLU layer, and its inner product with the candidate, embedded in a table
of its own, is one more input of the DNN. Item-to-item relevance and the auxiliary loss are left
out, as in the public runs.

Differences from the public code:
  - without `u2i` it still holds the candidate's second tables, which nothing reads; here they exist
    with `u2i` only, so the published counts are ours plus those (PAPER section 5; 248 of 291
    million parameters on KuaiVideo);
  - with several behaviours each has second tables of its own; there behaviours share them;
  - and that of `attention`.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
from flax import nnx

from loopfm_jax.backbones.attention import Asked, Query, Scores, pool
from loopfm_jax.backbones.behaviours import Seen, Weighed, Weighing
from loopfm_jax.backbones.config import Spec
from loopfm_jax.backbones.layers import Key, dense, split
from loopfm_jax.data.schema import Behaviour
from loopfm_jax.tables import PrivateTable


class Match(nnx.Module):
    """How well the candidate matches the user, [B,1]."""

    def __init__(self, spec: Spec, pair: Behaviour, *, rngs: nnx.Rngs):
        config, width = spec.config, spec.event_width(pair)
        self.target = pair.target
        self.table = PrivateTable(spec.schema, pair.target, config.tables, rngs=rngs)
        self.position_LP = nnx.Param(jnp.zeros((spec.length(pair), config.position_width)))
        self.query = dense(config.position_width, width, rngs=rngs)
        self.scores = Scores(config, width, dtype=spec.dtype, rngs=rngs)
        self.user = dense(width, width, rngs=rngs)

    def __call__(self, seen: Seen, *, key: Key) -> jax.Array:
        tokens = seen.tokens
        query_LM = jax.nn.relu(self.query(self.position_LP[...]))
        events_TM = seen.events_TM
        score_T = self.scores(Asked(by_column=query_LM), events_TM, tokens, key=key)
        past_BM = pool([(tokens.softmax(score_T), events_TM)], tokens)
        user_BM = jax.nn.relu(self.user(past_BM))
        rows = self.table(seen.ids)
        item_BM = jnp.concatenate([rows[name] for name in self.target], axis=1)
        return (user_BM * item_BM).sum(1, keepdims=True)


class DMR(Weighing):
    """The weighted sum of the events, [B,M], and with `u2i` the match, [B,M+1]."""

    def __init__(self, spec: Spec, pair: Behaviour, *, rngs: nnx.Rngs):
        config, width = spec.config, spec.event_width(pair)
        self.width = width + config.u2i
        self.query = Query(width, spec.length(pair), config.position_width, rngs=rngs)
        self.scores = Scores(config, width, dtype=spec.dtype, rngs=rngs)
        self.match = Match(spec, pair, rngs=rngs) if config.u2i else None

    def weigh(self, seen: Seen, *, key: Key) -> Weighed:
        asked = replace(self.query(seen.target_BM), rectified=True)
        score_T = self.scores(asked, seen.events_TM, seen.tokens, key=key)
        return [(seen.tokens.softmax(score_T), seen.events_TM)]

    def __call__(self, seen: Seen, *, key: Key) -> jax.Array:
        key, match_key = split(key, 2)
        past_BM = pool(self.weigh(seen, key=key), seen.tokens)
        if self.match is None:
            return past_BM
        return jnp.concatenate([past_BM, self.match(seen, key=match_key)], axis=1)
