"""What every backbone returns, and what it may take besides the embedded features."""

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx, struct

from loopfm_jax.tables import Embedded, Embedder


@struct.dataclass
class Output:
    """Logits and every named activation; taps that nobody reads cost nothing under jit."""

    logits_B: jax.Array
    taps: dict[str, jax.Array]
    """`embedding` [B,X], `hidden_0, hidden_1, ..` [B,W] after each activation of the DNN, and
    `interaction` or `cross` where a backbone has such."""
    trunk_BW: jax.Array
    """Where auxiliary heads attach: the last hidden layer, or what the backbone says."""


def name_taps(embedding_BX: jax.Array, hidden: list[jax.Array]) -> dict[str, jax.Array]:
    """The taps of a DNN: its input vector and its hidden activations."""
    return {"embedding": embedding_BX} | {f"hidden_{i}": h_BW for i, h_BW in enumerate(hidden)}


class Backbone(nnx.Module):
    """Features -> logits; abstract. Made by `build`, or as `Model(spec, rngs=rngs)`.

    Embedding is apart so that a caller may use the candidate's embeddings.
    """

    embedder: Embedder
    trunk_width: int
    """Width of `Output.trunk_BW`."""

    def embed(self, batch: Mapping[str, Any]) -> Embedded:
        """batch: of `Embedder`."""
        return self.embedder(batch)

    @abstractmethod
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
