"""Fields and events that learn from one another in every layer: what InterFormer and Kunlun share.

Every layer holds three arms (InterFormer's words, arXiv 2411.09852). Between them go tokens of one
width, X of the fields and S of the events:

  - the cross arm: `rank` tokens tell the events of the fields, X_sum = W X over the fields' axis,
    and some tokens tell the fields of the events;
  - the sequence arm: S' = f(S, X_sum). It differs, and brings what tells of its events;
  - the interaction arm: X' = Wukong's layer on [X ; what tells of the events] (the papers leave it
    open: inner products, DHEN, DCNv2; Kunlun has experts of Wukong's).

The fields include the candidate's, which is how events meet it. Events of several fields become one
token as InterFormer's MaskNet merges sequences: W (e * mask(e)). Several behaviours are sequences
with arms of their own, which tell the fields of them side by side (open in the papers).

Open, and chosen here: sequence first, then interaction, so that the last layer's events are read;
pre-norm residuals; the DNN reads the last X, brought back to the width of the fields (of F * D
numbers of unit size Adam's first steps would leave no ReLU alive).

Letters: D token width, F fields, R `rank`, G tokens that tell of events.
"""

from abc import abstractmethod
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from loopfm_jax.backbones.behaviours import check, see
from loopfm_jax.backbones.config import Spec
from loopfm_jax.backbones.layers import Key, dense, split, wide
from loopfm_jax.backbones.output import Backbone, Output, name_taps
from loopfm_jax.backbones.stack import Stack
from loopfm_jax.backbones.wukong import Layer as Interaction
from loopfm_jax.data.schema import Behaviour
from loopfm_jax.packing import Tokens
from loopfm_jax.tables import Embedded

State = tuple[jax.Array, tuple[jax.Array, ...], tuple[jax.Array, ...]]
"""Fields [B,F,D]; of every behaviour its events [T,D] and what told of them last [B,G,D]."""


class SequenceArm(nnx.Module):
    """One behaviour in one layer; abstract."""

    @staticmethod
    @abstractmethod
    def told(spec: Spec, pair: Behaviour) -> int:
        """G."""

    @abstractmethod
    def __init__(self, spec: Spec, pair: Behaviour, *, rngs: nnx.Rngs): ...

    @abstractmethod
    def __call__(
        self, events_TD: jax.Array, fields_BFD: jax.Array, tokens: Tokens, *, key: Key
    ) -> tuple[jax.Array, jax.Array]:
        """The events as they see one another and the fields, and what tells of them [B,G,D]."""


class Layer(nnx.Module):
    """`State` -> `State`.

    Args:
      kind: of the sequence arms.
    """

    def __init__(self, kind: type[SequenceArm], spec: Spec, *, rngs: nnx.Rngs):
        pairs = spec.schema.behaviours
        self.arms = nnx.List(kind(spec, pair, rngs=rngs) for pair in pairs)
        self.interact = Interaction(
            spec.config,
            fields=spec.fields,
            beside=sum(kind.told(spec, pair) for pair in pairs),
            width=spec.config.token_width,
            dtype=spec.dtype,
            rngs=rngs,
        )

    def __call__(self, state: State, tokens: Sequence[Tokens], *, key: Key = None) -> State:
        fields_BFD, events, _ = state
        keys = split(key, len(self.arms))
        given = zip(self.arms, events, tokens, keys, strict=True)
        found = [arm(x_TD, fields_BFD, own, key=k) for arm, x_TD, own, k in given]
        events, told = tuple(e for e, _ in found), tuple(t for _, t in found)
        return self.interact(fields_BFD, *told), events, told


class Unit(nnx.Module):
    """Layers of several kinds, one after the other: what a stack repeats."""

    def __init__(self, kinds: Sequence[type[SequenceArm]], spec: Spec, *, rngs: nnx.Rngs):
        self.layers = nnx.List(Layer(kind, spec, rngs=rngs) for kind in kinds)

    def __call__(self, state: State, tokens: Sequence[Tokens], *, key: Key = None) -> State:
        for layer, k in zip(self.layers, split(key, len(self.layers)), strict=True):
            state = layer(state, tokens, key=k)
        return state


def drawn(*shape: int, rngs: nnx.Rngs) -> nnx.Param:
    """A parameter that starts as dense kernels do."""
    return nnx.Param(nnx.initializers.xavier_normal()(rngs.params(), shape))


def along(fields_BFD: jax.Array, weight_FR: nnx.Param) -> jax.Array:
    """Tokens that are sums of fields, [B,R,D]."""
    return jnp.einsum("BFD,FR->BRD", fields_BFD, weight_FR[...].astype(fields_BFD.dtype))


def repeat(seeds_GD: nnx.Param, *, like: jax.Array) -> jax.Array:
    """The same tokens for every example of `like`, [B,G,D]."""
    values_GD = seeds_GD[...].astype(like.dtype)
    return jnp.broadcast_to(values_GD[None], (len(like), *values_GD.shape))


class Merge(nnx.Module):
    """Fields of an event [T,M] -> its token [T,D], each number weighed by what all of them are."""

    def __init__(self, spec: Spec, pair: Behaviour, *, rngs: nnx.Rngs):
        width, dtype = spec.event_width(pair), spec.dtype
        self.mask = dense(width, width, dtype=dtype, rngs=rngs)
        self.out = dense(width, spec.config.token_width, dtype=dtype, rngs=rngs)

    def __call__(self, events_TM: jax.Array) -> jax.Array:
        return self.out(events_TM * jax.nn.sigmoid(self.mask(events_TM)))


class ArmsBackbone(Backbone):
    """See the module. Needs `schema.behaviours`. Besides the DNN's taps there are `interaction`,
    the last X [B,F*E], and `summary`, what told of the events last [B,G*D].

    Args:
      kinds: of the sequence arms, by layer; `layers` times all of them.
      spec: everything else.

    Raises:
      UserError: the schema has no behaviours, or their shapes do not fit the configuration.
    """

    def __init__(self, kinds: Sequence[type[SequenceArm]], spec: Spec, *, rngs: nnx.Rngs):
        check(spec)
        config, dtype = spec.config, spec.dtype
        self.extra_fields, self.pooled = spec.extra_fields, spec.pooled
        self.behaviours, self.dtype = spec.schema.behaviours, dtype
        self.told = tuple(kinds[-1].told(spec, pair) for pair in self.behaviours)
        self.embedder = spec.embedder(rngs)
        self.project = dense(config.tables.width, config.token_width, dtype=dtype, rngs=rngs)
        self.merge = nnx.List(Merge(spec, pair, rngs=rngs) for pair in self.behaviours)
        self.stack = Stack(
            lambda rngs: Unit(kinds, spec, rngs=rngs),
            config.layers,
            remat=config.remat,
            rngs=rngs,
        )
        self.back = dense(config.token_width, config.tables.width, dtype=dtype, rngs=rngs)
        self.dnn = spec.dnn(spec.flat_width, rngs)
        self.trunk_width = config.hidden[-1]

    def __call__(
        self,
        embedded: Embedded,
        *,
        extra_BKE: jax.Array | None = None,
        key: jax.Array | None = None,
    ) -> Output:
        stack_key, dnn_key = split(key, 2)
        fields_BFE = self.stack_fields(embedded, extra_BKE)
        examples = len(fields_BFE)
        fields_BFD, _, told = self._layers(embedded, fields_BFE, key=stack_key)
        mixed_BX = wide(self.back(fields_BFD)).reshape(examples, -1)
        *hidden, logits_B1 = self.dnn(mixed_BX, key=dnn_key)
        summary_BX = jnp.concatenate([wide(t).reshape(examples, -1) for t in told], axis=1)
        own = {"interaction": mixed_BX, "summary": summary_BX}
        taps = name_taps(fields_BFE.reshape(examples, -1), hidden) | own
        return Output(logits_B1[:, 0], taps, hidden[-1])

    def _layers(self, embedded: Embedded, fields_BFE: jax.Array, *, key: Key) -> State:
        seen = [see(embedded, pair) for pair in self.behaviours]
        fields_BFD = self.project(fields_BFE)
        width = fields_BFD.shape[-1]
        events = tuple(m(s.events_TM) for m, s in zip(self.merge, seen, strict=True))
        told = tuple(jnp.zeros((len(fields_BFE), n, width), self.dtype) for n in self.told)
        return self.stack((fields_BFD, events, told), [s.tokens for s in seen], key=key)
