"""The vertical model: a backbone, what comes from the FM as more of its fields, auxiliary heads.

Summaries of histories and codes of the row itself become fields of the backbone's embedding width
and join the others before the interaction layers (PAPER section 1, stage 4). What is distilled is
always learned by heads beside the serving head, never mixed into it (ExFM, arXiv 2502.17494):
label h(y_S, y) + gamma h(y_D, min(alpha y_F, 1)), with the gradient that these heads send into the
trunk scaled by beta.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx, struct

from loopfm_jax.backbones import BackboneConfig, build
from loopfm_jax.backbones.layers import dense
from loopfm_jax.data.batches import OrderConfig
from loopfm_jax.data.schema import Schema
from loopfm_jax.errors import check_limits
from loopfm_jax.history.codes import dequantise
from loopfm_jax.history.encoders import EncoderConfig
from loopfm_jax.history.reader import Past, Readers, Reading
from loopfm_jax.loop import TrainConfig
from loopfm_jax.vm.methods import Method

ADAPTER_HIDDEN = 16


@dataclass(frozen=True)
class DistilConfig:
    """ExFM's auxiliary head. The paper's TaobaoAd values are alpha 5, beta 5, gamma 10."""

    alpha: float = 1.0
    """Scale of the soft label; must keep alpha * y_F well below 1 for most rows."""
    beta: float = 1.0
    """Scale of the gradient from the auxiliary heads into the trunk."""
    gamma: float = 1.0
    """Weight of the distillation loss, of the soft label or its adapted form."""
    fitnets: float = 1.0
    """Weight of the squared error to the FM's code."""

    def __post_init__(self) -> None:
        values = {name: getattr(self, name) for name in ("alpha", "beta", "gamma", "fitnets")}
        check_limits("distil", values, low=0)


@dataclass(frozen=True)
class VMConfig:
    """The student: backbone, history encoder, distillation and training."""

    backbone: BackboneConfig = field(default_factory=lambda: BackboneConfig(hidden=(128, 64)))
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    distil: DistilConfig = field(default_factory=DistilConfig)
    train: TrainConfig = field(default_factory=lambda: TrainConfig(OrderConfig(batch=256)))


@struct.dataclass
class Answer:
    """Logits of the serving head, and what auxiliary heads say; None for closed channels."""

    logits_B: jax.Array
    kd_B: jax.Array | None
    """Logits against the soft label."""
    adapted_B: jax.Array | None
    """Logits against the adapted soft label."""
    adapter_B: jax.Array | None
    """Logits of the adapter itself: the soft label, corrected."""
    code_BZ: jax.Array | None
    """The FM's code as the trunk guesses it."""


class Adapter(nnx.Module):
    """ExFM's student adapter: y_F -> corrected logit; which MLP is open, here of logit(y_F)."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.up = dense(1, ADAPTER_HIDDEN, rngs=rngs)
        self.down = dense(ADAPTER_HIDDEN, 1, rngs=rngs)

    def __call__(self, soft_B: jax.Array) -> jax.Array:
        p_B = jnp.clip(soft_B, 1e-6, 1 - 1e-6)
        return self.down(nnx.relu(self.up((jnp.log(p_B) - jnp.log1p(-p_B))[:, None])))[:, 0]


class Student(nnx.Module):
    """Features, histories and codes -> `Answer`."""

    def __init__(
        self,
        schema: Schema,
        config: VMConfig,
        method: Method,
        reading: Reading,
        *,
        rngs: nnx.Rngs,
    ):
        tables, encoder = config.backbone.tables, config.encoder
        self.beta = config.distil.beta
        self.taps = now_taps(method, reading)
        self.features = method.features
        self.readers = (
            Readers(reading, schema, encoder, tables, rngs=rngs) if reading.contents else None
        )
        extra = (self.readers.fields if self.readers else 0) + encoder.fields * len(self.features)
        self.width = tables.width
        self.dtype, dtype = config.train.dtype, jnp.dtype(config.train.dtype)
        self.backbone = build(config.backbone, schema, extra_fields=extra, dtype=dtype, rngs=rngs)
        codecs = reading.codecs
        self.summaries = nnx.List(
            nnx.Linear(
                codecs[self.taps[feature]].width,
                encoder.fields * tables.width,
                kernel_init=nnx.initializers.normal(tables.init_std),
                rngs=rngs,
            )
            for feature in self.features
        )
        trunk, heads = self.backbone.trunk_width, method.heads
        self.kd = dense(trunk, 1, rngs=rngs) if "kd" in heads else None
        self.adapted = dense(trunk, 1, rngs=rngs) if "adapter" in heads else None
        self.adapter = Adapter(rngs=rngs) if "adapter" in heads else None
        self.mimic = (
            dense(trunk, codecs[self.taps["fitnets"]].width, rngs=rngs)
            if "fitnets" in heads
            else None
        )

    def __call__(
        self,
        batch: Mapping[str, Any],
        past: Past,
        *,
        key: jax.Array | None = None,
    ) -> Answer:
        """Args:
        batch: of `vm.train.Examples`.
        past: what the FM left behind.
        key: randomness of dropout; None means inference.
        """
        embedded = self.backbone.embed(batch)
        extra = []
        if self.readers is not None:
            extra.append(self.readers(batch, embedded, past, self.backbone.embedder.table))
        for feature, summary in zip(self.features, self.summaries, strict=True):
            code_BZ = self._code_now(batch, past, feature)
            extra.append(summary(code_BZ).reshape(len(code_BZ), -1, self.width))
        extra_BKE = jnp.concatenate(extra, axis=1) if extra else None
        output = self.backbone(embedded, extra_BKE=extra_BKE, key=key)
        trunk_BW = output.trunk_BW
        trunk_BW = self.beta * trunk_BW + (1 - self.beta) * jax.lax.stop_gradient(trunk_BW)
        return Answer(
            logits_B=output.logits_B,
            kd_B=self.kd(trunk_BW)[:, 0] if self.kd else None,
            adapted_B=self.adapted(trunk_BW)[:, 0] if self.adapted else None,
            adapter_B=self.adapter(batch["teacher_B"]) if self.adapter else None,
            code_BZ=self.mimic(trunk_BW) if self.mimic else None,
        )

    def attention(self, batch: Mapping[str, Any], past: Past) -> list[jax.Array | None]:
        """What the candidates attend to: of every part of the reading, `Readers.attention`."""
        assert self.readers is not None
        embedded = self.backbone.embed(batch)
        return self.readers.attention(batch, embedded, past, self.backbone.embedder.table)

    def _code_now(self, batch: Mapping[str, Any], past: Past, channel: str) -> jax.Array:
        """The FM's code of the row itself, [B,Z]."""
        tap = self.taps[channel]
        return dequantise(batch["codes"][tap], past.codecs[tap])

    def loss(
        self,
        batch: Mapping[str, Any],
        past: Past,
        key: jax.Array,
        *,
        config: DistilConfig,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Label loss of the serving head plus the weighted losses of the auxiliary heads."""
        answer = self(batch, past, key=key)
        weight_B = batch["weight_B"] / batch["weight_B"].sum()

        def entropy(logits_B: jax.Array, target_B: jax.Array) -> jax.Array:
            return optax.sigmoid_binary_cross_entropy(logits_B, target_B) @ weight_B

        total = label = entropy(answer.logits_B, batch["label_B"])
        numbers = {"logloss": label}
        if answer.kd_B is not None:
            soft_B = jnp.minimum(config.alpha * batch["teacher_B"], 1)
            numbers["distillation"] = entropy(answer.kd_B, soft_B)
            total += config.gamma * numbers["distillation"]
        if answer.adapter_B is not None and answer.adapted_B is not None:
            adapted_B = jax.lax.stop_gradient(nnx.sigmoid(answer.adapter_B))
            numbers["adapter"] = entropy(answer.adapter_B, batch["label_B"])
            numbers["adapted"] = entropy(answer.adapted_B, adapted_B)
            total += numbers["adapter"] + config.gamma * numbers["adapted"]
        if answer.code_BZ is not None:
            error_BZ = answer.code_BZ - self._code_now(batch, past, "fitnets")
            numbers["fitnets"] = jnp.square(error_BZ).mean(axis=1) @ weight_B
            total += config.fitnets * numbers["fitnets"]
        return total, numbers


def now_taps(method: Method, reading: Reading) -> dict[str, str]:
    """Channel -> tap, for the channels that need the FM's code of the row itself."""
    channels = [*method.features, *(head for head in method.heads if head == "fitnets")]
    return {channel: "entity" if channel == "entity" else reading.tap for channel in channels}
