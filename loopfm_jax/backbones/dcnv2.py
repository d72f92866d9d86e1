"""DCNv2 (arXiv 2008.13535), parallel form: cross layers beside a DNN, both into the logit.

x_0 = all fields, x_{l+1} = x_0 * (W_l x_l + b_l) + x_l with full matrices, as in the public runs
(4 layers on TaobaoAd, 2 on KuaiVideo and Amazon); sequences enter as masked means. The last linear
layer on [cross ; hidden] is held as two, which changes its start (xavier over each part) and
nothing else. Where auxiliary heads attach is (open) in the paper: what that layer reads.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from loopfm_jax.backbones.config import Spec
from loopfm_jax.backbones.layers import dense
from loopfm_jax.backbones.output import Backbone, Output, name_taps
from loopfm_jax.tables import Embedded


class DCNv2(Backbone):
    """See the module. Besides the DNN's taps there is `cross`, the last cross layer [B,X]."""

    def __init__(self, spec: Spec, *, rngs: nnx.Rngs):
        width = spec.flat_width
        self.extra_fields, self.pooled = spec.extra_fields, spec.pooled
        self.embedder = spec.embedder(rngs)
        self.cross = nnx.List(
            dense(width, width, dtype=spec.dtype, rngs=rngs)
            for _ in range(spec.config.cross_layers)
        )
        self.cross_out = dense(width, 1, bias=False, rngs=rngs)
        self.dnn = spec.dnn(width, rngs)
        self.trunk_width = width + spec.config.hidden[-1]

    def __call__(
        self,
        embedded: Embedded,
        *,
        extra_BKE: jax.Array | None = None,
        key: jax.Array | None = None,
    ) -> Output:
        fields_BFE = self.stack_fields(embedded, extra_BKE)
        flat_BX = fields_BFE.reshape(fields_BFE.shape[0], -1)
        cross_BX = flat_BX
        for layer in self.cross:
            cross_BX = flat_BX * layer(cross_BX) + cross_BX
        *hidden, deep_B1 = self.dnn(flat_BX, key=key)
        logits_B1 = self.cross_out(cross_BX) + deep_B1
        taps = name_taps(flat_BX, hidden) | {"cross": cross_BX}
        return Output(logits_B1[:, 0], taps, jnp.concatenate([cross_BX, hidden[-1]], axis=-1))
