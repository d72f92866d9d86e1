"""One configuration for all backbones, and what a backbone is built from."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from loopfm_jax.backbones.layers import Activation, Mlp, Norm, check_dnn
from loopfm_jax.data.schema import Behaviour, Schema
from loopfm_jax.errors import UserError, check_limits, check_tuples
from loopfm_jax.tables import Embedder, TableConfig

BackboneName = Literal[
    "fm2",
    "fmfm",
    "deepfm",
    "dcnv2",
    "wukong",
    "din",
    "dien",
    "dmr",
    "dmin",
    "hstu",
    "interformer",
    "kunlun",
]

TOKEN_BACKBONES = ("hstu", "interformer", "kunlun")
"""Backbones whose layers work on tokens of one width."""
MIXING = ("wukong", "interformer", "kunlun")
"""Backbones with Wukong's layers."""
STACKED = ("wukong", *TOKEN_BACKBONES)
"""Backbones of `layers` equal layers."""
SEQUENCE_BACKBONES = ("din", "dien", "dmr", "dmin", *TOKEN_BACKBONES)
"""Backbones that cannot do without behaviour sequences."""
TIMED_BACKBONES = ("hstu", "kunlun")
"""Backbones that look at the age of events where it is known."""


@dataclass(frozen=True)
class BackboneConfig:
    """Which backbone, and its shape; the default is the public one for TaobaoAd.

    The DNN (`hidden`, `activation`, `dropout`, `norm`) is that of all but fm2 and fmfm.
    """

    name: BackboneName = "deepfm"
    hidden: tuple[int, ...] = (512, 256, 128)
    """Widths of the DNN's hidden layers."""
    activation: Activation = "relu"
    """Activation of the DNN."""
    dropout: float = 0.0
    """Dropout rate of the DNN and, in dmin, of the attention outputs."""
    norm: Norm = "none"
    """Where the DNN has batch norm: nowhere, at its input, or in every hidden layer."""
    attention_hidden: tuple[int, ...] = (512, 256)
    """din, dien, dmr, dmin: widths of the MLP that scores events for the candidate."""
    attention_activation: Activation = "relu"
    """din, dien, dmr, dmin: activation of that MLP."""
    attention_dropout: float = 0.2
    """din, dien, dmr, dmin: dropout rate of that MLP; dmin, hstu, interformer, kunlun: of the
    weights of self-attention."""
    attention_softmax: bool = False
    """din: weights of the events sum to 1; dien, dmr and dmin always have it so."""
    position_width: int = 4
    """dmr, dmin: width of the positional embedding in the attention query; 0 = none."""
    u2i: bool = False
    """dmr: the match of user and candidate is an input of the DNN."""
    heads: int = 1
    """H: dmin: interests per behaviour; hstu, interformer, kunlun: heads of every attention."""
    refiner: bool = False
    """dmin: whether a self-attention block refines the behaviour sequence first."""
    pair: Literal["vector", "matrix"] = "vector"
    """fmfm: the weight of a pair of fields."""
    cross_layers: int = 4
    """dcnv2: number of cross layers."""
    layers: int = 3
    """wukong, hstu, interformer: layers, one after the other; kunlun: pairs of layers."""
    rank: int = 16
    """wukong, interformer, kunlun: K, columns to which the products of all pairs of fields are
    projected; interformer, kunlun: also how many tokens tell the events of the fields."""
    mix_hidden: tuple[int, ...] = (256,)
    """wukong, interformer, kunlun: widths of the MLP behind those products, in every layer."""
    token_width: int = 64
    """hstu, interformer, kunlun: D, width of fields and events between the layers."""
    window: int = 32
    """kunlun: how many events one sees, itself and the next older ones; 0: all."""
    remat: bool = False
    """wukong, hstu, interformer, kunlun: activations inside a layer are computed again for the
    gradient, not kept."""
    tables: TableConfig = field(default_factory=TableConfig)
    behaviours: bool = False
    """Read behaviour sequences, as pooled fields, in a backbone that could do without them."""

    def __post_init__(self) -> None:
        check_tuples("backbone", self)
        rates = {"dropout": self.dropout, "attention_dropout": self.attention_dropout}
        layers = {
            "hidden": self.hidden,
            "attention_hidden": self.attention_hidden,
            "mix_hidden": self.mix_hidden,
        }
        check_dnn("backbone", layers=layers, rates=rates)
        counts = {
            "heads": self.heads,
            "cross_layers": self.cross_layers,
            "layers": self.layers,
            "rank": self.rank,
            "token_width": self.token_width,
        }
        check_limits("backbone", counts, low=1)
        check_limits("backbone", {"position_width": self.position_width}, low=int(self.u2i))
        check_limits("backbone", {"window": self.window}, low=0)
        if self.name in TOKEN_BACKBONES and self.token_width % self.token_unit:
            raise UserError(
                f"backbone.token_width is {self.token_width}; {self.name} with "
                f"backbone.heads = {self.heads} needs a multiple of {self.token_unit}"
            )

    @property
    def token_unit(self) -> int:
        """What divides `token_width`: heads, and rotary positions turn pairs of their numbers."""
        return self.heads if self.name == "hstu" else 2 * self.heads

    @property
    def reads_times(self) -> bool:
        """Whether the model looks at how long ago events were."""
        return self.name in TIMED_BACKBONES

    @property
    def reads_behaviours(self) -> bool:
        """Whether the model's schema keeps the sequences of earlier events."""
        return self.behaviours or self.name in SEQUENCE_BACKBONES


@dataclass(frozen=True)
class Spec:
    """What every backbone is built from."""

    config: BackboneConfig
    schema: Schema
    """Fields to read."""
    extra_fields: int = 0
    """K, how many fields `extra_BKE` will bring."""
    dtype: DTypeLike = jnp.float32
    """Arithmetic of the large products."""
    frozen: Mapping[str, jax.Array] | None = None
    """Pretrained tables by field name."""

    def embedder(self, rngs: nnx.Rngs) -> Embedder:
        """The model's tables."""
        return Embedder(self.schema, self.config.tables, rngs=rngs, frozen=self.frozen)

    @property
    def pooled(self) -> tuple[str, ...]:
        """Sequences that enter as masked means: all but those that the backbone attends to."""
        attends = self.config.name in SEQUENCE_BACKBONES
        past = {n for b in self.schema.behaviours for n in b.history} if attends else set()
        return tuple(f.name for f in self.schema.sequences if f.name not in past)

    @property
    def fields(self) -> int:
        """F of `Backbone.stack_fields`."""
        own = len(self.schema.categorical) + len(self.schema.numeric) + len(self.pooled)
        return own + self.extra_fields

    @property
    def flat_width(self) -> int:
        """Width of these fields, laid flat."""
        return self.fields * self.config.tables.width

    def event_width(self, pair: Behaviour) -> int:
        """M, width of an event of that behaviour."""
        return self.config.tables.width * len(pair.target)

    def timed(self, pair: Behaviour) -> bool:
        """Whether the times of that behaviour's events are known: those of the log's own rows."""
        return all(self.schema[name].from_log for name in pair.history)

    def length(self, pair: Behaviour) -> int:
        """L, longest history of that behaviour."""
        return self.schema[pair.history[0]].length

    def dnn(self, width_in: int, rngs: nnx.Rngs) -> Mlp:
        """The DNN on an input of that width, down to one logit."""
        config = self.config
        return Mlp(
            width_in,
            config.hidden,
            out=1,
            activation=config.activation,
            dropout=config.dropout,
            norm=config.norm,
            dtype=self.dtype,
            rngs=rngs,
        )
