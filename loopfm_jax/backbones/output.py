"""What every backbone returns, and what it may take besides the embedded features."""

from typing import Protocol

import jax
from flax import struct

from loopfm_jax.tables import Embedded, Features


@struct.dataclass
class Output:
    """Logits and every named activation; taps that nobody reads cost nothing under jit."""

    logits_B: jax.Array
    taps: dict[str, jax.Array]
    """`embedding` [B,X], then `hidden_0, hidden_1, ..` [B,W] after each activation of the DNN."""

    @property
    def trunk_BW(self) -> jax.Array:
        """The last hidden layer: where auxiliary heads attach."""
        return self.taps[f"hidden_{len(self.taps) - 2}"]


def name_taps(embedding_BX: jax.Array, hidden: list[jax.Array]) -> dict[str, jax.Array]:
    """The taps of a DNN: its input vector and its hidden activations."""
    return {"embedding": embedding_BX} | {f"hidden_{i}": h_BW for i, h_BW in enumerate(hidden)}


class Backbone(Protocol):
    """Features -> logits. `embed` is apart so that a caller may use the candidate's embeddings."""

    def embed(self, features: Features) -> Embedded: ...

    def __call__(
        self,
        embedded: Embedded,
        *,
        extra_BKE: jax.Array | None = None,
        key: jax.Array | None = None,
    ) -> Output:
        """Args:
        embedded: from `embed`.
        extra_BKE: K more fields of width E, joined before the interaction layers.
        key: randomness of dropout; None means inference (no dropout, running statistics).
        """
        ...
