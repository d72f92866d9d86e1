"""DIEN (Deep Interest Evolution Network, arXiv 1809.03672): a GRU over the events gives interests,
DIN's score of each for the candidate, softmax, drives a second GRU (AUGRU); its last state is read.

    u = sigmoid(..) * a_t,   h' = h + u * (n - h)

Both are one cell, the first with a_t = 1. No history gives zeros. The auxiliary loss is left out,
as in the public runs.

Differences from the public code, none of which changes a count:
  - both cells start xavier-normal with zero biases; there the first keeps torch's uniform start;
  - the first cell's update gate says how much is taken, there how much is kept: weights of the
    other sign;
  - and that of `attention`.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from loopfm_jax.backbones.attention import Asked, Scores
from loopfm_jax.backbones.behaviours import Seen, Weighed, Weighing
from loopfm_jax.backbones.config import Spec
from loopfm_jax.backbones.layers import Key, dense, weights, wide
from loopfm_jax.backbones.product import product
from loopfm_jax.data.schema import Behaviour
from loopfm_jax.packing import Tokens


class Gru(nnx.Module):
    """Events [T,M] -> states after each of them [T,M] and after the newest [B,M], from zeros.

    Gates in the order u, r, n. A recurrence gains nothing from packing: it runs over the padded
    histories, its input products over the tokens.
    """

    def __init__(self, width: int, *, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32):
        self.dtype = dtype
        self.input = dense(width, 3 * width, dtype=dtype, rngs=rngs)
        self.state = dense(width, 3 * width, dtype=dtype, rngs=rngs)

    def __call__(
        self, x_TM: jax.Array, tokens: Tokens, attention_T: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """attention: factor of the update gate (none: 1)."""
        kernel, bias_X = weights(self.state)
        update_T = jnp.where(tokens.real_T, 1.0 if attention_T is None else attention_T, 0)

        def step(h_BM: jax.Array, at: tuple[jax.Array, jax.Array]):
            from_x, update_B = at
            # A kernel made narrow before would have its gradient summed over events as narrow.
            from_h = wide(product(h_BM.astype(self.dtype), kernel)) + bias_X[None]
            (xu, xr, xn), (hu, hr, hn) = jnp.split(from_x, 3, axis=1), jnp.split(from_h, 3, axis=1)
            new_BM = jnp.tanh(xn + jax.nn.sigmoid(xr + hr) * hn)
            u_BM = jax.nn.sigmoid(xu + hu) * update_B[:, None]
            h_BM = h_BM + u_BM * (new_BM - h_BM)
            return h_BM, h_BM

        gates_LBX = jnp.moveaxis(tokens.pad(wide(self.input(x_TM))), 1, 0)
        start_BM = jnp.zeros_like(gates_LBX[0, :, : x_TM.shape[1]])
        over = gates_LBX, tokens.pad(update_T).T
        # The newest stands first.
        last_BM, states_LBM = jax.lax.scan(step, start_BM, over, reverse=True)
        return tokens.unpad(jnp.moveaxis(states_LBM, 0, 1)), last_BM


class DIEN(Weighing):
    """The last state of the interest that evolves towards the candidate, [B,M]."""

    def __init__(self, spec: Spec, pair: Behaviour, *, rngs: nnx.Rngs):
        self.width = spec.event_width(pair)
        self.extraction = Gru(self.width, dtype=spec.dtype, rngs=rngs)
        self.scores = Scores(spec.config, self.width, dtype=spec.dtype, rngs=rngs)
        self.evolution = Gru(self.width, dtype=spec.dtype, rngs=rngs)

    def weigh(self, seen: Seen, *, key: Key) -> Weighed:
        tokens = seen.tokens
        states_TM, _ = self.extraction(seen.events_TM, tokens)
        score_T = self.scores(Asked(seen.target_BM), states_TM, tokens, key=key)
        return [(tokens.softmax(score_T), states_TM)]

    def __call__(self, seen: Seen, *, key: Key) -> jax.Array:
        [(weight_T, states_TM)] = self.weigh(seen, key=key)
        return self.evolution(states_TM, seen.tokens, weight_T)[1]
