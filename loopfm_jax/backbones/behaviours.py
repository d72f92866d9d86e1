"""Sequence backbones: what DIN, DIEN, DMR, DMIN and HSTU share.

They differ in how one behaviour, a sequence of earlier events and the candidate's fields that it
answers to, becomes a vector: an `Interest`. The vectors of all behaviours and every other field
enter a DNN. Sequences outside every behaviour enter as masked means.

Letters: M = E * number of target fields, the width of an event.
"""

from abc import abstractmethod

import jax
import jax.numpy as jnp
from flax import nnx, struct

from loopfm_jax.backbones.config import Spec
from loopfm_jax.backbones.layers import Key, split, wide
from loopfm_jax.backbones.output import Backbone, Output, name_taps
from loopfm_jax.data.schema import Behaviour
from loopfm_jax.errors import UserError
from loopfm_jax.packing import Tokens
from loopfm_jax.tables import Embedded


@struct.dataclass
class Seen:
    """What an `Interest` sees of a batch."""

    target_BM: jax.Array
    """The candidate."""
    events_TM: jax.Array
    """Newest first; zeros at unreal slots: whatever stands there must not reach a product, as
    0 * inf is not 0."""
    tokens: Tokens
    """Whose the events are."""
    ids: dict[str, jax.Array]
    """Fused ids by field."""


def see(embedded: Embedded, pair: Behaviour) -> Seen:
    tokens = embedded.tokens[pair.history[0]]
    events_TM = jnp.concatenate([embedded.sequences[n] for n in pair.history], axis=1)
    return Seen(
        target_BM=jnp.concatenate([embedded.fields[n] for n in pair.target], axis=1),
        events_TM=jnp.where(tokens.real_T[:, None], events_TM, 0),
        tokens=tokens,
        ids=embedded.ids,
    )


Weighed = list[tuple[jax.Array, jax.Array]]
"""Of every interest the weights [T] and what they weigh [T,M]."""


class Interest(nnx.Module):
    """One behaviour as a vector; abstract."""

    width: int
    """X, numbers in the vector."""
    tap: str = ""
    """Under which name the vectors of all behaviours can be tapped; none: they cannot."""

    @abstractmethod
    def __init__(self, spec: Spec, pair: Behaviour, *, rngs: nnx.Rngs): ...

    @abstractmethod
    def __call__(self, seen: Seen, *, key: Key) -> jax.Array:
        """The vector, [B,X]; key: randomness of dropout, None means inference."""


class Weighing(Interest):
    """An interest that sums what it weighs; abstract."""

    @abstractmethod
    def weigh(self, seen: Seen, *, key: Key) -> Weighed:
        """What the candidate attends to."""


def check(spec: Spec) -> None:
    """Raises UserError where a sequence backbone cannot be built."""
    schema, name = spec.schema, spec.config.name
    if not schema.behaviours:
        raise UserError(
            f"{name} reads behaviour sequences, and the schema has none (behaviours=()). Name the "
            "history fields in the data config's `behaviours`, or use the backbone deepfm."
        )
    for pair in schema.behaviours:
        lengths = {schema[history].length for history in pair.history}
        if len(pair.target) != len(pair.history) or len(lengths) != 1:
            raise UserError(
                f"Behaviour {pair.target} <- {pair.history}: {name} needs as many target as "
                f"history fields, all of one length (found {sorted(lengths)}). Change the data "
                "config."
            )


class SequenceBackbone(Backbone):
    """See the module. Needs `schema.behaviours`.

    Args:
      kind: how a behaviour becomes a vector.
      spec: everything else.

    Raises:
      UserError: the schema has no behaviours, or their shapes do not fit the configuration.
    """

    def __init__(self, kind: type[Interest], spec: Spec, *, rngs: nnx.Rngs):
        check(spec)
        self.extra_fields, self.pooled = spec.extra_fields, spec.pooled
        self.behaviours = spec.schema.behaviours
        self.embedder = spec.embedder(rngs)
        self.tap = kind.tap
        self.interests = nnx.List(kind(spec, pair, rngs=rngs) for pair in self.behaviours)
        width = sum(interest.width for interest in self.interests)
        self.dnn = spec.dnn(width + spec.flat_width, rngs)
        self.trunk_width = spec.config.hidden[-1]

    def __call__(
        self,
        embedded: Embedded,
        *,
        extra_BKE: jax.Array | None = None,
        key: jax.Array | None = None,
    ) -> Output:
        dnn_key, *keys = split(key, 1 + len(self.behaviours))
        parts = [
            wide(interest(see(embedded, pair), key=k))
            for pair, interest, k in zip(self.behaviours, self.interests, keys, strict=True)
        ]
        fields_BFE = self.stack_fields(embedded, extra_BKE)
        own = {self.tap: jnp.concatenate(parts, axis=-1)} if self.tap else {}
        parts.append(fields_BFE.reshape(fields_BFE.shape[0], -1))
        flat_BX = jnp.concatenate(parts, axis=-1)
        *hidden, logits_B1 = self.dnn(flat_BX, key=dnn_key)
        return Output(logits_B1[:, 0], name_taps(flat_BX, hidden) | own, hidden[-1])
