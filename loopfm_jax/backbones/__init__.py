"""CTR models that teacher and students share: features -> `Output(logits, taps)`."""

from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from loopfm_jax.backbones.deepfm import DeepFM, DeepFMConfig
from loopfm_jax.backbones.dmin import DMIN, DMINConfig
from loopfm_jax.backbones.output import Backbone
from loopfm_jax.data.schema import Schema
from loopfm_jax.tables import TableConfig

BACKBONES = {"deepfm": (DeepFM, DeepFMConfig), "dmin": (DMIN, DMINConfig)}
"""Name on the command line -> (module, config)."""

BackboneName = Literal["deepfm", "dmin"]
BackboneConfig = DeepFMConfig | DMINConfig


def build(
    config: BackboneConfig,
    schema: Schema,
    table_config: TableConfig,
    *,
    rngs: nnx.Rngs,
    extra_fields: int = 0,
    dtype: DTypeLike = jnp.float32,
    frozen: dict[str, jax.Array] | None = None,
) -> Backbone:
    """The backbone that `config` configures; arguments as in its class."""
    model = next(model for model, kind in BACKBONES.values() if kind is type(config))
    return model(
        config,
        schema,
        table_config,
        rngs=rngs,
        extra_fields=extra_fields,
        dtype=dtype,
        frozen=frozen,
    )
