"""The vertical model: a backbone, histories as more features, a distillation head.

The history's summary becomes K more fields of the backbone's embedding width and joins the others
before the interaction layers (PAPER section 1, stage 4). Distillation is always ExFM's auxiliary
head: label h(y_S, y) + gamma h(y_D, min(alpha y_F, 1)), with the gradient that the distillation
head sends into the trunk scaled by beta (arXiv 2502.17494).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import optax
from flax import nnx, struct

from loopfm_jax.backbones import BackboneConfig, build
from loopfm_jax.data.batches import OrderConfig
from loopfm_jax.data.schema import Schema
from loopfm_jax.errors import check_limits
from loopfm_jax.history import codes
from loopfm_jax.history.codes import Code
from loopfm_jax.history.packing import Tokens, pack
from loopfm_jax.history.store import Side
from loopfm_jax.loop import TrainConfig
from loopfm_jax.tables import Embedded, Features
from loopfm_jax.vm.encoders import ENCODERS, EncoderConfig, linear
from loopfm_jax.vm.methods import Method

MINUTE, WEEK = 60.0, 7 * 86_400.0


@dataclass(frozen=True)
class DistilConfig:
    """ExFM's auxiliary head. The paper's TaobaoAd values are alpha 5, beta 5, gamma 10."""

    alpha: float = 1.0
    """Scale of the soft label; must keep alpha * y_F well below 1 for most rows."""
    beta: float = 1.0
    """Scale of the gradient from the distillation head into the trunk."""
    gamma: float = 1.0
    """Weight of the distillation loss."""

    def __post_init__(self) -> None:
        check_limits("distil", {"alpha": self.alpha, "beta": self.beta, "gamma": self.gamma}, low=0)


@dataclass(frozen=True)
class VMConfig:
    """The student: backbone, history encoder, distillation and training."""

    backbone: BackboneConfig = field(default_factory=lambda: BackboneConfig(hidden=(128, 64)))
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    summary_fields: int = 2
    """K: how many fields of the embedding width the history's summary becomes."""
    distil: DistilConfig = field(default_factory=DistilConfig)
    train: TrainConfig = field(default_factory=lambda: TrainConfig(OrderConfig(batch=256)))

    def __post_init__(self) -> None:
        check_limits("vm", {"summary_fields": self.summary_fields}, low=1)


@struct.dataclass
class History:
    """A device-resident store and the static facts of its codes."""

    codes: jax.Array
    seconds: jax.Array
    outcome: jax.Array
    code: Code = struct.field(pytree_node=False)
    width: int = struct.field(pytree_node=False)
    longest: int = struct.field(pytree_node=False)


class Student(nnx.Module):
    """Features and histories -> logits of the serving head and of the distillation head."""

    def __init__(
        self, schema: Schema, config: VMConfig, method: Method, *, code_width: int, rngs: nnx.Rngs
    ):
        self.item = schema.item
        self.side = method.side
        extra = config.summary_fields if method.history else 0
        dtype, tables = jnp.dtype(config.train.dtype), config.backbone.tables
        self.backbone = build(config.backbone, schema, extra_fields=extra, dtype=dtype, rngs=rngs)
        tokens, query = code_width + len(self.side), len(schema.item) * tables.width
        encoder = ENCODERS[config.encoder.name]
        self.encoder = encoder(tokens, query, config.encoder, rngs=rngs) if method.history else None
        self.summary = (
            nnx.Linear(
                self.encoder.outputs,
                extra * tables.width,
                kernel_init=nnx.initializers.normal(tables.init_std),
                rngs=rngs,
            )  # as small as the rows it joins: training starts from the base model
            if self.encoder
            else None
        )
        self.distil = linear(self.backbone.trunk_width, 1, rngs=rngs) if method.kd else None

    def __call__(
        self,
        batch: Mapping[str, jax.Array],
        history: History | None,
        *,
        beta: float = 1.0,
        key: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array | None]:
        """Returns (serving logits [B], distillation logits [B] or None)."""
        embedded = self.backbone.embed(Features(batch["ids_BC"], batch["floats_BN"]))
        extra_BKE = self._summarise(batch, embedded, history) if self.encoder else None
        output = self.backbone(embedded, extra_BKE=extra_BKE, key=key)
        if self.distil is None:
            return output.logits_B, None
        trunk_BW = output.trunk_BW
        trunk_BW = beta * trunk_BW + (1 - beta) * jax.lax.stop_gradient(trunk_BW)
        return output.logits_B, self.distil(trunk_BW)[:, 0]

    def _summarise(
        self, batch: Mapping[str, jax.Array], embedded: Embedded, history: History | None
    ) -> jax.Array:
        assert history is not None and self.encoder is not None and self.summary is not None
        query_BQ = jnp.concatenate([embedded.fields[name] for name in self.item], axis=1)
        tokens = pack(
            batch["end_B"],
            batch["length_B"],
            slots=len(batch["slot_T"]),
            longest=history.longest,
        )
        value_TX = read_entries(history, tokens, batch["seconds_B"], self.side)
        summary_BX = self.summary(self.encoder(value_TX, query_BQ, tokens))
        return summary_BX.reshape(len(query_BQ), -1, embedded.fields[self.item[0]].shape[1])


def read_entries(
    history: History, tokens: Tokens, seconds_B: jax.Array, side: tuple[Side, ...]
) -> jax.Array:
    """Store rows of the tokens, dequantised, with their side information: [T, Z + sides].

    `outcome` is -1 or 1, `age` the logarithm of seconds since the entry, scaled to about [0, 1].
    """
    row_T = tokens.row_T
    parts = [codes.dequantise(history.codes[row_T], history.code, width=history.width)]
    if "outcome" in side:
        parts.append(2 * history.outcome[row_T].astype(jnp.float32)[:, None] - 1)
    if "age" in side:
        age_T = (tokens.spread(seconds_B) - history.seconds[row_T]).astype(jnp.float32)
        scaled_T = jnp.log1p(jnp.maximum(age_T, 0) / MINUTE) / jnp.log1p(WEEK / MINUTE)
        parts.append(scaled_T[:, None])
    return jnp.where(tokens.real_T[:, None], jnp.concatenate(parts, axis=1), 0)


def loss(
    model: Student,
    batch: dict[str, jax.Array],
    history: History | None,
    key: jax.Array,
    *,
    config: DistilConfig,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Label loss of the serving head plus gamma times that of the distillation head."""
    serving_B, distil_B = model(batch, history, beta=config.beta, key=key)
    weight_B = batch["weight_B"] / batch["weight_B"].sum()
    label = optax.sigmoid_binary_cross_entropy(serving_B, batch["label_B"]) @ weight_B
    if distil_B is None:
        return label, {"logloss": label}
    soft_B = jnp.minimum(config.alpha * batch["teacher_B"], 1)
    taught = optax.sigmoid_binary_cross_entropy(distil_B, soft_B) @ weight_B
    return label + config.gamma * taught, {"logloss": label, "distillation": taught}
