"""What factorisation machines are made of: a weight per feature, products of pairs of fields."""

from dataclasses import replace

import jax
import jax.numpy as jnp
from flax import nnx

from loopfm_jax.backbones.layers import wide
from loopfm_jax.data.schema import Schema
from loopfm_jax.tables import Embedded, PrivateTable, TableConfig


class FirstOrder(nnx.Module):
    """Sum of one weight per (field, id), one per numeric column times its value, and a bias.

    A weight belongs to a field *and* an id: a history field shares its target's embedding rows but
    not its weights, and a field over a pretrained table gets trainable weights of its own. A
    sequence adds the weights of all its events (a multi-hot feature), as the public code does.
    """

    def __init__(self, schema: Schema, config: TableConfig, *, rngs: nnx.Rngs):
        names = [f.name for f in (*schema.categorical, *schema.sequences)]
        self.table = PrivateTable(schema, names, replace(config, width=1), rngs=rngs)
        weights = config.init_std * jax.random.normal(rngs.params(), (len(schema.numeric),))
        self.numeric_N = nnx.Param(weights) if schema.numeric else None
        self.bias = nnx.Param(jnp.zeros(()))

    def __call__(self, embedded: Embedded) -> jax.Array:
        """[B]."""
        found = self.table(embedded.ids)
        for name, tokens in embedded.tokens.items():
            found[name] = tokens.sum(found[name])
        weights_B = jnp.concatenate(list(found.values()), axis=1).sum(1) + self.bias[...]
        if self.numeric_N is None:
            return weights_B
        return weights_B + embedded.floats_BN @ self.numeric_N[...]


def pairwise(fields_BFE: jax.Array) -> jax.Array:
    """Sum over pairs of fields of their elementwise products, [B,E], not in bfloat16 (it cancels).

    Its sum over E is the factorisation machine's second-order term.
    """
    fields_BFE = wide(fields_BFE)
    return 0.5 * (fields_BFE.sum(1) ** 2 - (fields_BFE**2).sum(1))
