"""DMIN (Deep Multi-Interest Network, CIKM 2020): several interests per behaviour, each attended
to by the candidate; shapes and counts are those of the public runs (PAPER section 5).

Letters of this file: M = E * number of target fields (width of a behaviour), D = M / H,
P = width of a position.

Sequences stand oldest first, padded at either end: an event sees earlier real columns and itself.

Differences from the public code, none of which changes a shape:
  - the behaviour refiner masks by a boolean; the public float mask adds 1 to the masked scores;
  - no history gives zero interests, not the mean of whatever the padding turns into;
  - Dice in the score MLP takes its statistics from real events only.

The score MLP is ~95 % of the arithmetic. Its first layer on [t, H, t-H, t*H] is computed as
t(Wa+Wc) + [H, t*H][Wb-Wc, Wd], half of the products; t is a sum of a part per example and a part
per position, so its share is negligible.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from loopfm_jax.backbones.config import BackboneConfig, Spec
from loopfm_jax.backbones.layers import (
    FeedForward,
    Key,
    Mlp,
    causal_mask,
    dense,
    dropout,
    masked_softmax,
    self_attend,
    split,
    stack_fields,
    weights,
)
from loopfm_jax.backbones.output import Backbone, Output, name_taps
from loopfm_jax.errors import UserError
from loopfm_jax.tables import Embedded


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


class TargetAttention(nnx.Module):
    """The candidate's attention over one head's events: [B,M], [B,L,M] -> [B,M]."""

    def __init__(
        self, config: BackboneConfig, width: int, length: int, *, rngs: nnx.Rngs, dtype: DTypeLike
    ):
        self.dtype = dtype
        self.positional = config.position_width > 0
        if self.positional:
            self.position_LP = nnx.Param(jnp.zeros((length, config.position_width)))
            self.project = dense(width + config.position_width, width, rngs=rngs)
        self.score = Mlp(
            4 * width,
            config.attention_hidden,
            out=1,
            activation=config.attention_activation,
            dropout=config.attention_dropout,
            dtype=dtype,
            rngs=rngs,
        )

    def query(self, target_BM: jax.Array, length: int) -> list[jax.Array]:
        """Parts, [B,1,M] and [1,L,M], whose sum is the query t of every position."""
        if not self.positional:
            return [target_BM[:, None].astype(self.dtype)]
        kernel, bias_M = weights(self.project)
        target_BM = target_BM @ kernel[: target_BM.shape[1]]
        position_LM = self.position_LP[...][:length] @ kernel[target_BM.shape[1] :]
        position_LM = position_LM + bias_M[None]
        return [x.astype(self.dtype) for x in (target_BM[:, None], position_LM[None])]

    def first_layer(self, query: list[jax.Array], head_BLM: jax.Array) -> jax.Array:
        """The score MLP's first layer on [t, H, t-H, t*H] without building that, [B,L,W]."""
        kernel, bias_W = weights(self.score.layers[0])
        a_MW, b_MW, c_MW, d_MW = jnp.split(kernel, 4)
        target_MW = (a_MW + c_MW).astype(self.dtype)
        # One product for both event blocks: two would write and add [B,L,W] once more.
        event_XW = jnp.concatenate([b_MW - c_MW, d_MW]).astype(self.dtype)
        event_BLX = jnp.concatenate([head_BLM, sum(query) * head_BLM], axis=-1)
        shift = bias_W.astype(self.dtype)[None, None] + sum(part @ target_MW for part in query)
        return event_BLX @ event_XW + shift

    def __call__(
        self, target_BM: jax.Array, head_BLM: jax.Array, mask_BL: jax.Array, *, key: Key
    ) -> jax.Array:
        first_BLW = self.first_layer(self.query(target_BM, head_BLM.shape[1]), head_BLM)
        scores_BL = self.score.after_first(first_BLW, key=key, mask=mask_BL)[-1][..., 0]
        weights_BL = masked_softmax(scores_BL, mask_BL).astype(self.dtype)
        return jnp.einsum("BL,BLM->BM", weights_BL, head_BLM)


class Head(nnx.Module):
    """One interest: the head's share of the attention back to width M, then the target's view."""

    def __init__(
        self, config: BackboneConfig, width: int, length: int, *, rngs: nnx.Rngs, dtype: DTypeLike
    ):
        self.rate = config.dropout
        self.out = dense(width // config.heads, width, bias=False, dtype=dtype, rngs=rngs)
        self.forward = FeedForward(width, dtype=dtype, rngs=rngs)
        self.attention = TargetAttention(config, width, length, dtype=dtype, rngs=rngs)

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
        return self.attention(target_BM, head_BLM, mask_BL, key=score_key)


class Interests(nnx.Module):
    """A behaviour's interests: target [B,M], events [B,L,M], mask [B,L] -> [B, H*M] float32."""

    def __init__(
        self, config: BackboneConfig, width: int, length: int, *, rngs: nnx.Rngs, dtype: DTypeLike
    ):
        self.config, self.dtype = config, dtype
        self.refiner = Refiner(config, width, dtype=dtype, rngs=rngs) if config.refiner else None
        self.qkv = dense(width, 3 * width, bias=False, dtype=dtype, rngs=rngs)
        self.heads = nnx.List(
            Head(config, width, length, dtype=dtype, rngs=rngs) for _ in range(config.heads)
        )

    def __call__(
        self, target_BM: jax.Array, events_BLM: jax.Array, mask_BL: jax.Array, *, key: Key
    ) -> jax.Array:
        heads, rate = len(self.heads), self.config.attention_dropout
        refiner_key, see_key, *keys = split(key, 2 + heads)
        mask_BLL = causal_mask(mask_BL)
        # Whatever stands at padding must not reach a product: 0 * inf is not 0.
        events_BLM = jnp.where(mask_BL[..., None], events_BLM, 0).astype(self.dtype)
        if self.refiner is not None:
            events_BLM = self.refiner(events_BLM, mask_BLL, key=refiner_key)
        seen_BLHD = self_attend(self.qkv(events_BLM), mask_BLL, heads=heads, rate=rate, key=see_key)
        interests = [
            head(target_BM, events_BLM, seen_BLHD[:, :, i], mask_BL, key=k)
            for i, (head, k) in enumerate(zip(self.heads, keys, strict=True))
        ]
        return jnp.concatenate(interests, axis=-1).astype(jnp.float32)


def check(spec: Spec) -> None:
    """Raises UserError where DMIN cannot be built."""
    schema, heads, width = spec.schema, spec.config.heads, spec.config.tables.width
    if not schema.behaviours:
        raise UserError(
            "DMIN reads behaviour sequences, and the schema has none (behaviours=()). Name the "
            "history fields in the data config's `behaviours`, or use the backbone deepfm."
        )
    for pair in schema.behaviours:
        lengths = {schema[name].length for name in pair.history}
        if len(pair.target) != len(pair.history) or len(lengths) != 1:
            raise UserError(
                f"Behaviour {pair.target} <- {pair.history}: DMIN needs as many target as history "
                f"fields, all of one length (found {sorted(lengths)}). Change the data config."
            )
        if len(pair.target) * width % heads:
            raise UserError(
                f"heads={heads} does not divide the behaviour width "
                f"{len(pair.target) * width} (fields {pair.target}, width {width} each). "
                "Change the backbone's `heads` or the tables' `width`."
            )


class DMIN(Backbone):
    """See the module. Needs `schema.behaviours`; other sequences enter the DNN as masked means.

    Raises:
      UserError: the schema has no behaviours, or their shapes do not fit the configuration.
    """

    def __init__(self, spec: Spec, *, rngs: nnx.Rngs):
        check(spec)
        config, schema, dtype = spec.config, spec.schema, spec.dtype
        self.extra_fields, self.pooled = spec.extra_fields, spec.pooled
        self.behaviours = schema.behaviours
        self.embedder = spec.embedder(rngs)
        widths = [config.tables.width * len(b.target) for b in schema.behaviours]
        lengths = [schema[b.history[0]].length for b in schema.behaviours]
        self.interests = nnx.List(
            Interests(config, w, length, dtype=dtype, rngs=rngs)
            for w, length in zip(widths, lengths, strict=True)
        )
        self.dnn = spec.dnn(config.heads * sum(widths) + spec.flat_width, rngs)
        self.trunk_width = config.hidden[-1]

    def __call__(
        self,
        embedded: Embedded,
        *,
        extra_BKE: jax.Array | None = None,
        key: jax.Array | None = None,
    ) -> Output:
        dnn_key, *keys = split(key, 1 + len(self.behaviours))
        parts = []
        for pair, interests, k in zip(self.behaviours, self.interests, keys, strict=True):
            target_BM = jnp.concatenate([embedded.fields[n] for n in pair.target], axis=-1)
            events_BLM = jnp.concatenate([embedded.sequences[n] for n in pair.history], axis=-1)
            parts.append(interests(target_BM, events_BLM, embedded.masks[pair.history[0]], key=k))
        fields_BFE = stack_fields(
            embedded, pooled=self.pooled, extra_BKE=extra_BKE, extra_fields=self.extra_fields
        )
        parts.append(fields_BFE.reshape(fields_BFE.shape[0], -1))
        flat_BX = jnp.concatenate(parts, axis=-1)
        *hidden, logits_B1 = self.dnn(flat_BX, key=dnn_key)
        return Output(logits_B1[:, 0], name_taps(flat_BX, hidden), hidden[-1])
