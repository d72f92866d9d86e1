"""The foundation model: a backbone, its taps, and a compressor for each of them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx, struct

from loopfm_jax.backbones import BackboneConfig, build
from loopfm_jax.data.batches import OrderConfig
from loopfm_jax.data.schema import Schema
from loopfm_jax.errors import UserError, check_tuples
from loopfm_jax.fm.compressor import COMPRESSORS, CompressorConfig
from loopfm_jax.history.encoders import EncoderConfig
from loopfm_jax.history.reader import Past, Readers, Reading
from loopfm_jax.loop import TrainConfig
from loopfm_jax.tables import Embedded, blank


@dataclass(frozen=True)
class FMConfig:
    """The teacher: backbone, taps, compressor and training; defaults for a log of some weeks."""

    backbone: BackboneConfig = field(default_factory=lambda: BackboneConfig(dropout=0.2))
    taps: tuple[str, ...] = ("hidden_0",)
    """What is exported: embedding, hidden_0, hidden_1, .., all (of these concatenated), item (the
    candidate's embeddings) or entity (the key's). LoopFM reads the first; see history.tap."""
    compressor: CompressorConfig = field(default_factory=CompressorConfig)
    encoder: EncoderConfig = field(default_factory=lambda: EncoderConfig(name="mean"))
    """How an FM of a second round reads the histories of the first (the method `self`)."""
    train: TrainConfig = field(
        default_factory=lambda: TrainConfig(OrderConfig(order="shuffled", epochs=2, batch=256))
    )

    def __post_init__(self) -> None:
        check_tuples("fm", self)
        if not self.taps or len(set(self.taps)) < len(self.taps):
            raise UserError(f"fm.taps is {list(self.taps)}: name each tap once, at least one")


@struct.dataclass
class Taught:
    """What nobody reads of it costs nothing."""

    logits_B: jax.Array
    activations: dict[str, jax.Array]
    """By tap, as its compressor standardises it, [B,D]."""
    codes: dict[str, jax.Array]
    """By tap, [B,Z]."""
    compressor_loss_B: jax.Array
    """Mean over the taps."""


class Teacher(nnx.Module):
    """Features -> `Taught`.

    Args:
      reading: the histories that it reads itself, in a second round; else None.
    """

    def __init__(
        self,
        schema: Schema,
        config: FMConfig,
        reading: Reading | None = None,
        *,
        rngs: nnx.Rngs,
    ):
        self.taps = config.taps
        self.item, self.entity = schema.item, schema.entity
        tables, self.dtype = config.backbone.tables, config.train.dtype
        dtype = jnp.dtype(self.dtype)
        self.readers = (
            Readers(reading, schema, config.encoder, tables, rngs=rngs) if reading else None
        )
        self.extra_fields = self.readers.fields if self.readers else 0
        self.backbone = build(
            config.backbone, schema, extra_fields=self.extra_fields, dtype=dtype, rngs=rngs
        )
        widths = self._tap_widths(schema, tables.width)
        create = COMPRESSORS[config.compressor.kind]
        self.compressors = nnx.List(
            create(widths[tap], config.compressor, rngs=rngs) for tap in self.taps
        )

    def _tap_widths(self, schema: Schema, width: int) -> dict[str, int]:
        """The backbone's own business: asked for by its shapes alone."""
        graphdef, state = nnx.split(self.backbone)

        def read(state: nnx.State, batch: Mapping[str, Any]) -> dict[str, Any]:
            backbone = nnx.merge(graphdef, state)
            embedded = backbone.embed(batch)
            extra_BKE = jnp.zeros((1, self.extra_fields, width)) if self.extra_fields else None
            return self._read_taps(embedded, backbone(embedded, extra_BKE=extra_BKE).taps)

        found = jax.eval_shape(read, state, blank(schema))
        return {tap: activation.shape[1] for tap, activation in found.items()}

    def _read_taps(self, embedded: Embedded, taps: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """Tap -> activation [B,D] float32, of the configured taps."""
        known = taps | {"all": jnp.concatenate(list(taps.values()), axis=1)}
        for name, fields in (("item", self.item), ("entity", self.entity)):
            if fields:
                known[name] = jnp.concatenate([embedded.fields[f] for f in fields], axis=1)
        for tap in self.taps:
            if tap not in known:
                raise UserError(f"no tap {tap!r}: fm.taps are some of {', '.join(known)}")
        return {tap: known[tap].astype(jnp.float32) for tap in self.taps}

    def __call__(
        self, batch: Mapping[str, Any], past: Past | None = None, *, key: jax.Array | None = None
    ) -> Taught:
        """Args:
        batch: of `Inputs` and, for an FM that reads histories, those.
        past: these histories.
        key: randomness of dropout; None means inference.
        """
        embedded = self.backbone.embed(batch)
        extra_BKE = None
        if self.readers is not None:
            assert past is not None
            extra_BKE = self.readers(batch, embedded, past, self.backbone.embedder.table)
        output = self.backbone(embedded, extra_BKE=extra_BKE, key=key)
        taps = self._read_taps(embedded, output.taps)
        found = {
            tap: compressor(taps[tap], train=key is not None)
            for tap, compressor in zip(self.taps, self.compressors, strict=True)
        }
        return Taught(
            output.logits_B,
            activations={tap: one.activation_BD for tap, one in found.items()},
            codes={tap: one.code_BZ for tap, one in found.items()},
            compressor_loss_B=jnp.stack([one.loss_B for one in found.values()]).mean(axis=0),
        )


def loss(
    model: Teacher, batch: dict[str, Any], past: Past | None, key: jax.Array, *, config: FMConfig
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Cross-entropy plus the compressors' loss, means over the rows of weight 1."""
    taught = model(batch, past, key=key)
    weight_B = batch["weight_B"] / batch["weight_B"].sum()
    click = optax.sigmoid_binary_cross_entropy(taught.logits_B, batch["label_B"]) @ weight_B
    code = taught.compressor_loss_B @ weight_B
    return click + config.compressor.weight * code, {"logloss": click, "compressor": code}
