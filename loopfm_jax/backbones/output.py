"""What every backbone returns, and what it may take besides the embedded features."""

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
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
    extra_fields: int
    """K of `extra_BKE`."""
    pooled: tuple[str, ...]
    """Sequences that enter as masked means."""
    trunk_width: int
    """Width of `Output.trunk_BW`."""

    def embed(self, batch: Mapping[str, Any]) -> Embedded:
        """batch: of `Embedder`."""
        return self.embedder(batch)

    def stack_fields(self, embedded: Embedded, extra_BKE: jax.Array | None) -> jax.Array:
        """All fields, the masked means of the pooled sequences, the extra fields, [B,F,E]."""
        given = 0 if extra_BKE is None else extra_BKE.shape[1]
        if given != self.extra_fields:
            raise ValueError(
                f"extra_BKE has {given} fields; the backbone was built for "
                f"extra_fields={self.extra_fields}"
            )
        means = [embedded.tokens[name].mean(embedded.sequences[name]) for name in self.pooled]
        fields = [*embedded.fields.values(), *means]  # side by side, as they were looked up
        fields_BFE = jnp.concatenate(fields, axis=1).reshape(len(fields[0]), len(fields), -1)
        if extra_BKE is None:
            return fields_BFE
        return jnp.concatenate([fields_BFE, extra_BKE.astype(fields_BFE.dtype)], axis=1)

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
