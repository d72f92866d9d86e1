"""DeepFM (arXiv 1703.04247): first-order weights + pairwise inner products + an MLP on all fields.

Sequences enter as the masked mean of their events, as in the public runs (PAPER section 5). The
first-order part keeps a weight per field *and* id: a history field shares its target's embedding
rows but not its weights, and a field over a pretrained table gets trainable weights of its own.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from loopfm_jax.backbones.config import Spec
from loopfm_jax.backbones.layers import stack_fields
from loopfm_jax.backbones.output import Backbone, Output, name_taps
from loopfm_jax.data.schema import Schema
from loopfm_jax.tables import Embedded, Features, Table, TableConfig


class FirstOrder(nnx.Module):
    """Sum of one weight per (field, id), one per numeric column times its value, and a bias.

    A sequence adds the weights of all its events (a multi-hot feature), as the public code does.
    """

    def __init__(self, schema: Schema, config: TableConfig, *, rngs: nnx.Rngs):
        fields = (*schema.categorical, *schema.sequences)
        own = Schema(tuple(replace(f, shares=None, frozen_width=0) for f in fields))
        shifts = [own.offsets[f.name] - schema.offsets[f.name] for f in fields]
        self.shift_C = tuple(np.repeat(shifts, [f.length for f in fields]).tolist())
        self.table = Table(own, replace(config, width=1), rngs=rngs)
        weights = config.init_std * jax.random.normal(rngs.params(), (len(schema.numeric),))
        self.numeric_N = nnx.Param(weights) if schema.numeric else None
        self.bias = nnx.Param(jnp.zeros(()))

    def __call__(self, features: Features) -> jax.Array:
        """ids_BC, floats_BN -> [B]."""
        ids_BC = features.ids_BC
        own_BC = jnp.where(ids_BC > 0, ids_BC + jnp.asarray(self.shift_C, ids_BC.dtype)[None], 0)
        weights_B = self.table(own_BC).sum((1, 2)) + self.bias[...]
        if self.numeric_N is None:
            return weights_B
        return weights_B + features.floats_BN @ self.numeric_N[...]


def pairwise(fields_BFE: jax.Array) -> jax.Array:
    """Sum over pairs of fields of their inner product, [B], in float32 (it cancels)."""
    fields_BFE = fields_BFE.astype(jnp.float32)
    return 0.5 * (fields_BFE.sum(1) ** 2 - (fields_BFE**2).sum(1)).sum(1)


class DeepFM(Backbone):
    """See the module."""

    def __init__(self, spec: Spec, *, rngs: nnx.Rngs):
        self.extra_fields, self.pooled = spec.extra_fields, spec.pooled
        self.embedder = spec.embedder(rngs)
        self.first_order = FirstOrder(spec.schema, spec.config.tables, rngs=rngs)
        self.dnn = spec.dnn(spec.flat_width, rngs)
        self.trunk_width = spec.config.hidden[-1]

    def __call__(
        self,
        embedded: Embedded,
        *,
        extra_BKE: jax.Array | None = None,
        key: jax.Array | None = None,
    ) -> Output:
        fields_BFE = stack_fields(
            embedded, pooled=self.pooled, extra_BKE=extra_BKE, extra_fields=self.extra_fields
        )
        flat_BX = fields_BFE.reshape(fields_BFE.shape[0], -1)
        *hidden, deep_B1 = self.dnn(flat_BX, key=key)
        shallow_B = self.first_order(embedded.features) + pairwise(fields_BFE)
        return Output(shallow_B + deep_B1[:, 0], name_taps(flat_BX, hidden), hidden[-1])
