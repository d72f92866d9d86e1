"""DIEN (Deep Interest Evolution Network, arXiv 1809.03672): a GRU over the events gives interests,
DIN's score of each for the candidate, softmax, drives a second GRU (AUGRU); its last state is read.

    u = sigmoid(..) * a_t,   h' = h + u * (n - h)

Both are one cell, the first with a_t = 1. No history gives zeros. The auxiliary loss is left out,
as in the public runs.

Differences from the public code, none of which changes a count:
  - padding may stand at either end (a padded step keeps the state); there, only at the end;
  - both cells start xavier-normal with zero biases; there the first keeps torch's uniform start;
  - the first cell's update gate says how much is taken, there how much is kept: weights of the
    other sign;
  - and that of `attention`.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from loopfm_jax.backbones.attention import Scores
from loopfm_jax.backbones.behaviours import Interest, Seen
from loopfm_jax.backbones.config import Spec
from loopfm_jax.backbones.layers import Key, dense, masked_softmax, weights, wide
from loopfm_jax.data.schema import Behaviour


class Gru(nnx.Module):
    """Steps x [B,L,M] -> states [B,L,M], starting from zeros. Gates in the order u, r, n."""

    def __init__(self, width: int, *, rngs: nnx.Rngs, dtype: DTypeLike):
        self.dtype = dtype
        self.input = dense(width, 3 * width, dtype=dtype, rngs=rngs)
        self.state = dense(width, 3 * width, dtype=dtype, rngs=rngs)

    def __call__(
        self, x_BLM: jax.Array, mask_BL: jax.Array, attention_BL: jax.Array | None = None
    ) -> jax.Array:
        """mask: steps that count; attention: factor of the update gate (none: 1)."""
        kernel, bias_X = weights(self.state)
        kernel = kernel.astype(self.dtype)
        update_BL = jnp.where(mask_BL, 1.0 if attention_BL is None else attention_BL, 0)

        def step(h_BM: jax.Array, at: tuple[jax.Array, jax.Array]):
            from_x, update_B = at
            from_h = wide(h_BM.astype(self.dtype) @ kernel) + bias_X[None]
            (xu, xr, xn), (hu, hr, hn) = jnp.split(from_x, 3, axis=1), jnp.split(from_h, 3, axis=1)
            new_BM = jnp.tanh(xn + jax.nn.sigmoid(xr + hr) * hn)
            u_BM = jax.nn.sigmoid(xu + hu) * update_B[:, None]
            h_BM = h_BM + u_BM * (new_BM - h_BM)
            return h_BM, h_BM

        gates_LBX = jnp.moveaxis(wide(self.input(x_BLM)), 1, 0)
        start_BM = jnp.zeros_like(gates_LBX[0, :, : x_BLM.shape[2]])
        _, states_LBM = jax.lax.scan(step, start_BM, (gates_LBX, update_BL.T))
        return jnp.moveaxis(states_LBM, 0, 1)


class DIEN(Interest):
    """The last state of the interest that evolves towards the candidate, [B,M]."""

    def __init__(self, spec: Spec, pair: Behaviour, *, rngs: nnx.Rngs):
        self.width = spec.event_width(pair)
        self.extraction = Gru(self.width, dtype=spec.dtype, rngs=rngs)
        self.scores = Scores(spec.config, self.width, dtype=spec.dtype, rngs=rngs)
        self.evolution = Gru(self.width, dtype=spec.dtype, rngs=rngs)

    def __call__(self, seen: Seen, *, key: Key) -> jax.Array:
        mask_BL = seen.mask_BL
        interests_BLM = self.extraction(seen.events_BLM, mask_BL)
        scores_BL = self.scores([seen.target_BM[:, None]], interests_BLM, mask_BL, key=key)
        attention_BL = masked_softmax(scores_BL, mask_BL)
        return self.evolution(interests_BLM, mask_BL, attention_BL)[:, -1]
