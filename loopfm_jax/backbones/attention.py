"""Attention of a candidate over events: what DIN, DIEN, DMR and DMIN share.

An event is scored by an MLP of [t, H, t-H, t*H], t the query, H the event (DIN, arXiv 1706.06978).
That is ~95 % of these models' arithmetic. The first layer is computed as
t(Wa+Wc) + [H, t*H][Wb-Wc, Wd], half of the products, and what does not depend on the event, or not
on the example, is multiplied once: a query comes as parts, [B,1,M], [1,L,M] or [B,L,M], whose sum
it is.

Difference from the public code: Dice in the score MLP takes its statistics from real events only.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from loopfm_jax.backbones.config import BackboneConfig
from loopfm_jax.backbones.layers import Key, Mlp, dense, weights


class Scores(nnx.Module):
    """Query parts and events [B,L,M] -> scores [B,L], float32; those of padding mean nothing."""

    def __init__(self, config: BackboneConfig, width: int, *, rngs: nnx.Rngs, dtype: DTypeLike):
        self.dtype = dtype
        self.mlp = Mlp(
            4 * width,
            config.attention_hidden,
            out=1,
            activation=config.attention_activation,
            dropout=config.attention_dropout,
            dtype=dtype,
            rngs=rngs,
        )

    def first_layer(self, query: Sequence[jax.Array], events_BLM: jax.Array) -> jax.Array:
        """The MLP's first layer on [t, H, t-H, t*H] without building that, [B,L,W]."""
        query = [part.astype(self.dtype) for part in query]
        events_BLM = events_BLM.astype(self.dtype)
        kernel, bias_W = weights(self.mlp.layers[0])
        a_MW, b_MW, c_MW, d_MW = jnp.split(kernel, 4)
        target_MW = (a_MW + c_MW).astype(self.dtype)
        # One product for both event blocks: two would write and add [B,L,W] once more.
        event_XW = jnp.concatenate([b_MW - c_MW, d_MW]).astype(self.dtype)
        event_BLX = jnp.concatenate([events_BLM, sum(query) * events_BLM], axis=-1)
        shift = bias_W.astype(self.dtype)[None, None] + sum(part @ target_MW for part in query)
        return event_BLX @ event_XW + shift

    def __call__(
        self, query: Sequence[jax.Array], events_BLM: jax.Array, mask_BL: jax.Array, *, key: Key
    ) -> jax.Array:
        first_BLW = self.first_layer(query, events_BLM)
        return self.mlp.after_first(first_BLW, key=key, mask=mask_BL)[-1][..., 0]


class Query(nnx.Module):
    """W [target ; position] + b as parts: [B,1,M] and, if positions have a width, [1,L,M]."""

    def __init__(self, width: int, length: int, position_width: int, *, rngs: nnx.Rngs):
        positions = jnp.zeros((length, position_width))
        self.position_LP = nnx.Param(positions) if position_width else None
        self.project = dense(width + position_width, width, rngs=rngs)

    def __call__(self, target_BM: jax.Array, length: int) -> list[jax.Array]:
        kernel, bias_M = weights(self.project)
        width = target_BM.shape[1]
        parts = [(target_BM @ kernel[:width] + bias_M[None])[:, None]]
        if self.position_LP is not None:
            parts.append((self.position_LP[...][:length] @ kernel[width:])[None])
        return parts


def pool(weights_BL: jax.Array, events_BLM: jax.Array) -> jax.Array:
    """The weighted sum of the events, [B,M]."""
    return jnp.einsum("BL,BLM->BM", weights_BL.astype(events_BLM.dtype), events_BLM)
