"""FmFM (field-matrixed factorisation machines, arXiv 2102.12994): sum_{i<j} <v_i W_ij, v_j>.

W_ij belongs to the pair of fields, a vector (v_i * w_ij) or a matrix; first-order weights besides.
Sequences enter as masked means. Public runs: vectors on TaobaoAd, matrices on KuaiVideo and Amazon.
As in `fm2`, where auxiliary heads attach is (open): the sum over pairs of (v_i W_ij) * v_j, which
is also the tap `interaction`.

The weights of all pairs are laid out as one matrix from fields to fields with zeros for i >= j: one
product, half of it with zeros, instead of a gather of both sides of every pair.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from loopfm_jax.backbones.config import Spec
from loopfm_jax.backbones.interactions import FirstOrder
from loopfm_jax.backbones.layers import wide
from loopfm_jax.backbones.output import Backbone, Output
from loopfm_jax.tables import Embedded


class FmFM(Backbone):
    """See the module. Pairs stand in the order (0,1), (0,2), .. (1,2), ..; extra fields last."""

    def __init__(self, spec: Spec, *, rngs: nnx.Rngs):
        config, width = spec.config, spec.config.tables.width
        self.extra_fields, self.pooled, self.dtype = spec.extra_fields, spec.pooled, spec.dtype
        self.embedder = spec.embedder(rngs)
        self.first_order = FirstOrder(spec.schema, config.tables, rngs=rngs)
        fields = spec.flat_width // width
        shape = (fields * (fields - 1) // 2, *[width] * (1 if config.pair == "vector" else 2))
        # The public start: xavier-normal as torch counts fans, over the pairs too.
        spread = (2 / ((shape[0] + width) * np.prod(shape[2:]))) ** 0.5
        self.pairs_PE = nnx.Param(spread * jax.random.normal(rngs.params(), shape))
        self.trunk_width = width

    def interaction(self, fields_BFE: jax.Array) -> jax.Array:
        """Sum over pairs of (v_i W_ij) * v_j, [B,E]; P pairs, W [P,E] or [P,E,D], D = E."""
        count, pairs = fields_BFE.shape[1], self.pairs_PE[...].astype(self.dtype)
        weight = jnp.zeros((count, count, *pairs.shape[1:]), self.dtype)
        weight = weight.at[np.triu_indices(count, 1)].set(pairs)
        letters = "BFE,FGE->BGE" if pairs.ndim == 2 else "BFE,FGED->BGD"
        mixed_BGE = jnp.einsum(letters, fields_BFE.astype(self.dtype), weight)
        return (wide(mixed_BGE) * fields_BFE).sum(1)

    def __call__(
        self,
        embedded: Embedded,
        *,
        extra_BKE: jax.Array | None = None,
        key: jax.Array | None = None,
    ) -> Output:
        fields_BFE = self.stack_fields(embedded, extra_BKE)
        pairs_BE = self.interaction(fields_BFE)
        logits_B = self.first_order(embedded) + pairs_BE.sum(1)
        flat_BX = fields_BFE.reshape(fields_BFE.shape[0], -1)
        return Output(logits_B, {"embedding": flat_BX, "interaction": pairs_BE}, pairs_BE)
