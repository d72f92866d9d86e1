"""The factorisation machine (Rendle, ICDM 2010): first-order weights + pairwise inner products.

Named fm2 for its order: FM alone means the foundation model here. Sequences enter as masked means.
It has no hidden layer, so where auxiliary heads attach is (open) in the paper: we take the sum of
the pairs' elementwise products (the bi-interaction vector), whose sum over E is the second-order
term. The tap `interaction` is the same vector.
"""

import jax
from flax import nnx

from loopfm_jax.backbones.config import Spec
from loopfm_jax.backbones.interactions import FirstOrder, pairwise
from loopfm_jax.backbones.output import Backbone, Output
from loopfm_jax.tables import Embedded


class FM2(Backbone):
    """See the module."""

    def __init__(self, spec: Spec, *, rngs: nnx.Rngs):
        self.extra_fields, self.pooled = spec.extra_fields, spec.pooled
        self.embedder = spec.embedder(rngs)
        self.first_order = FirstOrder(spec.schema, spec.config.tables, rngs=rngs)
        self.trunk_width = spec.config.tables.width

    def __call__(
        self,
        embedded: Embedded,
        *,
        extra_BKE: jax.Array | None = None,
        key: jax.Array | None = None,
    ) -> Output:
        fields_BFE = self.stack_fields(embedded, extra_BKE)
        pairs_BE = pairwise(fields_BFE)
        logits_B = self.first_order(embedded) + pairs_BE.sum(1)
        flat_BX = fields_BFE.reshape(fields_BFE.shape[0], -1)
        return Output(logits_B, {"embedding": flat_BX, "interaction": pairs_BE}, pairs_BE)
