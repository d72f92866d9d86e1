"""DeepFM (arXiv 1703.04247): first-order weights + pairwise inner products + an MLP on all fields.

Sequences enter as the masked mean of their events, as in the public runs (PAPER section 5).
"""

import jax
from flax import nnx

from loopfm_jax.backbones.config import Spec
from loopfm_jax.backbones.interactions import FirstOrder, pairwise
from loopfm_jax.backbones.output import Backbone, Output, name_taps
from loopfm_jax.tables import Embedded


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
        fields_BFE = self.stack_fields(embedded, extra_BKE)
        flat_BX = fields_BFE.reshape(fields_BFE.shape[0], -1)
        *hidden, deep_B1 = self.dnn(flat_BX, key=key)
        shallow_B = self.first_order(embedded) + pairwise(fields_BFE).sum(1)
        return Output(shallow_B + deep_B1[:, 0], name_taps(flat_BX, hidden), hidden[-1])
