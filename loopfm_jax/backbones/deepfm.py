"""DeepFM (arXiv 1703.04247): first-order weights + pairwise inner products + an MLP on all fields.

Sequences enter as the masked mean of their events, as in the public runs (PAPER section 5). The
first-order part keeps a weight per field *and* id: a history field shares its target's embedding
rows but not its weights, and a field over a pretrained table gets trainable weights of its own.
"""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from loopfm_jax.backbones.layers import Activation, Mlp, Norm, check_dnn, stack_fields
from loopfm_jax.backbones.output import Output, name_taps
from loopfm_jax.data.schema import Schema
from loopfm_jax.tables import Embedded, Embedder, Features, Table, TableConfig


@dataclass(frozen=True)
class DeepFMConfig:
    """Dense part of DeepFM; the default is the public one for TaobaoAd."""

    hidden: tuple[int, ...] = (512, 256, 128)
    """Widths of the DNN's hidden layers."""
    activation: Activation = "relu"
    """Activation of the DNN."""
    dropout: float = 0.0
    """Dropout rate of the DNN."""
    norm: Norm = "none"
    """Where the DNN has batch norm: nowhere, at its input, or in every hidden layer."""

    def __post_init__(self) -> None:
        check_dnn("deepfm", hidden=self.hidden, rates={"dropout": self.dropout})


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


class DeepFM(nnx.Module):
    """See the module; follows `output.Backbone`.

    Args:
      config: dense part.
      schema: fields to read.
      table_config: embedding tables.
      extra_fields: K, how many fields `extra_BKE` will bring.
      dtype: arithmetic of the DNN.
      frozen: pretrained tables by field name.
    """

    def __init__(
        self,
        config: DeepFMConfig,
        schema: Schema,
        table_config: TableConfig,
        *,
        rngs: nnx.Rngs,
        extra_fields: int = 0,
        dtype: DTypeLike = jnp.float32,
        frozen: dict[str, jax.Array] | None = None,
    ):
        self.extra_fields = extra_fields
        self.sequences = tuple(f.name for f in schema.sequences)
        self.embedder = Embedder(schema, table_config, rngs=rngs, frozen=frozen)
        self.first_order = FirstOrder(schema, table_config, rngs=rngs)
        self.dnn = Mlp(
            (len(schema.fields) + len(schema.numeric) + extra_fields) * table_config.width,
            config.hidden,
            out=1,
            activation=config.activation,
            dropout=config.dropout,
            norm=config.norm,
            dtype=dtype,
            rngs=rngs,
        )

    def embed(self, features: Features) -> Embedded:
        return self.embedder(features)

    def __call__(
        self,
        embedded: Embedded,
        *,
        extra_BKE: jax.Array | None = None,
        key: jax.Array | None = None,
    ) -> Output:
        fields_BFE = stack_fields(
            embedded, pooled=self.sequences, extra_BKE=extra_BKE, extra_fields=self.extra_fields
        )
        flat_BX = fields_BFE.reshape(fields_BFE.shape[0], -1)
        *hidden, deep_B1 = self.dnn(flat_BX, key=key)
        shallow_B = self.first_order(embedded.features) + pairwise(fields_BFE)
        return Output(logits_B=shallow_B + deep_B1[:, 0], taps=name_taps(flat_BX, hidden))
