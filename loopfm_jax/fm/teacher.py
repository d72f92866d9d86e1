"""The foundation model: a backbone, a tap, and the compressor that trains beside it."""

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import optax
from flax import nnx, struct

from loopfm_jax.backbones import BackboneConfig, build
from loopfm_jax.data.batches import OrderConfig
from loopfm_jax.data.schema import Schema
from loopfm_jax.errors import UserError
from loopfm_jax.fm.compressor import Compressor, CompressorConfig
from loopfm_jax.loop import TrainConfig
from loopfm_jax.tables import Features


@dataclass(frozen=True)
class FMConfig:
    """The teacher: backbone, tap, compressor and training; defaults for a log of some weeks."""

    backbone: BackboneConfig = field(default_factory=lambda: BackboneConfig(dropout=0.2))
    tap: str = "hidden_0"
    """Which activation is exported: embedding, hidden_0, hidden_1, .. or all (concatenated)."""
    compressor: CompressorConfig = field(default_factory=CompressorConfig)
    train: TrainConfig = field(
        default_factory=lambda: TrainConfig(OrderConfig(order="shuffled", epochs=2, batch=256))
    )


@struct.dataclass
class Taught:
    """Logits [B], codes [B,Z] and the compressor's loss [B]; what nobody reads costs nothing."""

    logits_B: jax.Array
    code_BZ: jax.Array
    compressor_loss_B: jax.Array


class Teacher(nnx.Module):
    """Features -> `Taught`."""

    def __init__(self, schema: Schema, config: FMConfig, *, rngs: nnx.Rngs):
        self.tap = config.tap
        dtype = jnp.dtype(config.train.dtype)
        self.backbone = build(config.backbone, schema, dtype=dtype, rngs=rngs)
        self.compressor = Compressor(self._tap_width(schema), config.compressor, rngs=rngs)

    def _tap_width(self, schema: Schema) -> int:
        """The backbone's own business: asked for by its shapes alone."""
        graphdef, state = nnx.split(self.backbone)

        def read(state: nnx.State, ids_BC: jax.Array, floats_BN: jax.Array) -> jax.Array:
            backbone = nnx.merge(graphdef, state)
            return self._read_tap(backbone(backbone.embed(Features(ids_BC, floats_BN))).taps)

        ids_BC = jax.ShapeDtypeStruct((1, sum(f.length for f in schema.fields)), jnp.int32)
        floats_BN = jax.ShapeDtypeStruct((1, len(schema.numeric)), jnp.float32)
        return jax.eval_shape(read, state, ids_BC, floats_BN).shape[1]

    def _read_tap(self, taps: dict[str, jax.Array]) -> jax.Array:
        if self.tap == "all":
            return jnp.concatenate(list(taps.values()), axis=1).astype(jnp.float32)
        if self.tap not in taps:
            raise UserError(f"no tap {self.tap!r}: fm.tap is one of {', '.join(taps)}, all")
        return taps[self.tap].astype(jnp.float32)

    def __call__(self, features: Features, *, key: jax.Array | None = None) -> Taught:
        output = self.backbone(self.backbone.embed(features), key=key)
        code_BZ, loss_B = self.compressor(self._read_tap(output.taps), train=key is not None)
        return Taught(output.logits_B, code_BZ, loss_B)


def loss(
    model: Teacher, batch: dict[str, jax.Array], _: object, key: jax.Array, *, config: FMConfig
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Cross-entropy plus the compressor's loss, means over the rows of weight 1."""
    features = Features(batch["ids_BC"], batch["floats_BN"])
    taught = model(features, key=key)
    weight_B = batch["weight_B"] / batch["weight_B"].sum()
    click = optax.sigmoid_binary_cross_entropy(taught.logits_B, batch["label_B"]) @ weight_B
    code = taught.compressor_loss_B @ weight_B
    return click + config.compressor.weight * code, {"logloss": click, "compressor": code}
