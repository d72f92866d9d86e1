"""CTR models that teacher and students share: features -> `Output(logits, taps)`."""

from collections.abc import Mapping
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from loopfm_jax.backbones.arms import ArmsBackbone
from loopfm_jax.backbones.behaviours import SequenceBackbone
from loopfm_jax.backbones.config import BackboneConfig, Spec
from loopfm_jax.backbones.dcnv2 import DCNv2
from loopfm_jax.backbones.deepfm import DeepFM
from loopfm_jax.backbones.dien import DIEN
from loopfm_jax.backbones.din import DIN
from loopfm_jax.backbones.dmin import DMIN
from loopfm_jax.backbones.dmr import DMR
from loopfm_jax.backbones.fm2 import FM2
from loopfm_jax.backbones.fmfm import FmFM
from loopfm_jax.backbones.hstu import HSTU
from loopfm_jax.backbones.interformer import InterFormer
from loopfm_jax.backbones.kunlun import KUNLUN
from loopfm_jax.backbones.output import Backbone
from loopfm_jax.backbones.wukong import Wukong
from loopfm_jax.data.schema import Schema

__all__ = ["BACKBONES", "Backbone", "BackboneConfig", "build"]

BACKBONES = {
    "fm2": FM2,
    "fmfm": FmFM,
    "deepfm": DeepFM,
    "dcnv2": DCNv2,
    "wukong": Wukong,
    "din": partial(SequenceBackbone, DIN),
    "dien": partial(SequenceBackbone, DIEN),
    "dmr": partial(SequenceBackbone, DMR),
    "dmin": partial(SequenceBackbone, DMIN),
    "hstu": partial(SequenceBackbone, HSTU),
    "interformer": partial(ArmsBackbone, (InterFormer,)),
    "kunlun": partial(ArmsBackbone, KUNLUN),
}
"""`BackboneConfig.name` -> what makes the module of a `Spec`."""


def build(
    config: BackboneConfig,
    schema: Schema,
    *,
    rngs: nnx.Rngs,
    extra_fields: int = 0,
    dtype: DTypeLike = jnp.float32,
    frozen: Mapping[str, jax.Array] | None = None,
) -> Backbone:
    """The backbone that `config` names; the arguments are those of `config.Spec`."""
    spec = Spec(config, schema, extra_fields=extra_fields, dtype=dtype, frozen=frozen)
    return BACKBONES[config.name](spec, rngs=rngs)
