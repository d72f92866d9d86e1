"""Wukong (arXiv 2403.02545): stacked factorisation machines whose depth and width scale.

A layer turns F fields into F fields: half of them from a factorisation machine block (products of
all pairs of fields, projected to K columns, through an MLP), half linear in the fields, then a
residual and a layer norm; `hidden` reads the last layer. Sequences enter as masked means.
Open in the paper, chosen here: the halves, and that the blocks' MLP has no norm of its own.

Letters: F fields with the extra ones, K `rank`.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from loopfm_jax.backbones.config import BackboneConfig, Spec
from loopfm_jax.backbones.layers import Key, Mlp, dense, wide
from loopfm_jax.backbones.output import Backbone, Output, name_taps
from loopfm_jax.backbones.stack import Stack
from loopfm_jax.tables import Embedded


class Layer(nnx.Module):
    """[B,F,E] -> [B,F,E].

    Args:
      config: `rank` and `mix_hidden`.
      fields: F, which the layer makes anew.
      width: E.
      beside: further tokens, which it only reads.
      dtype: of its products.
    """

    def __init__(
        self,
        config: BackboneConfig,
        *,
        fields: int,
        width: int,
        beside: int = 0,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        made, read = fields // 2, fields + beside
        start = nnx.initializers.xavier_normal()
        self.project_FK = nnx.Param(start(rngs.params(), (read, config.rank)))
        self.norm_products = nnx.LayerNorm(read * config.rank, dtype=dtype, rngs=rngs)
        self.mix = Mlp(read * config.rank, config.mix_hidden, dtype=dtype, rngs=rngs)
        self.make = dense(config.mix_hidden[-1], made * width, dtype=dtype, rngs=rngs)
        self.keep_FG = nnx.Param(start(rngs.params(), (read, fields - made)))
        self.norm = nnx.LayerNorm(width, dtype=dtype, rngs=rngs)

    def __call__(self, own_BFE: jax.Array, *beside: jax.Array, key: Key = None) -> jax.Array:
        """beside: tokens [B,G,E] to read."""
        x_BFE = jnp.concatenate([own_BFE, *beside], axis=1)
        project_FK, keep_FG = (p[...].astype(x_BFE.dtype) for p in (self.project_FK, self.keep_FG))
        kept_BGE = jnp.einsum("BFE,FG->BGE", x_BFE, keep_FG)
        new_BFE = jnp.concatenate([self.factorise(x_BFE, project_FK), kept_BGE], axis=1)
        return self.norm(new_BFE + own_BFE)

    def factorise(self, x_BFE: jax.Array, project_FK: jax.Array) -> jax.Array:
        """Half as many fields, made of X (X^T Y): F * F products are never held."""
        seen_BEK = jnp.einsum("BFE,FK->BEK", x_BFE, project_FK)
        product_BFK = jnp.einsum("BFE,BEK->BFK", x_BFE, seen_BEK)
        flat_BX = self.norm_products(product_BFK.reshape(len(x_BFE), -1))
        *_, mixed_BX = self.mix(flat_BX)
        return self.make(mixed_BX).reshape(len(x_BFE), -1, x_BFE.shape[2])


class Wukong(Backbone):
    """See the module. Besides the DNN's taps there is `interaction`, the last layer [B,F*E]."""

    def __init__(self, spec: Spec, *, rngs: nnx.Rngs):
        config = spec.config
        self.extra_fields, self.pooled, self.dtype = spec.extra_fields, spec.pooled, spec.dtype
        self.embedder = spec.embedder(rngs)
        self.stack = Stack(
            lambda rngs: Layer(
                config,
                fields=spec.fields,
                width=config.tables.width,
                dtype=spec.dtype,
                rngs=rngs,
            ),
            config.layers,
            remat=config.remat,
            rngs=rngs,
        )
        self.dnn = spec.dnn(spec.flat_width, rngs)
        self.trunk_width = config.hidden[-1]

    def __call__(
        self,
        embedded: Embedded,
        *,
        extra_BKE: jax.Array | None = None,
        key: jax.Array | None = None,
    ) -> Output:
        fields_BFE = self.stack_fields(embedded, extra_BKE)
        examples = len(fields_BFE)
        mixed_BX = wide(self.stack(fields_BFE.astype(self.dtype))).reshape(examples, -1)
        *hidden, logits_B1 = self.dnn(mixed_BX, key=key)
        taps = name_taps(fields_BFE.reshape(examples, -1), hidden) | {"interaction": mixed_BX}
        return Output(logits_B1[:, 0], taps, hidden[-1])
