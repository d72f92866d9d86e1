"""Matryoshka autoencoder: a tapped activation e -> code z in [-1, 1]^Z (PAPER section 1, stage 2).

`L_AE = sum over prefixes p of ||e - decode_p(z[:p])||^2`, one decoder per prefix, so that every
listed prefix of z is usable by itself. It trains beside the FM and sends no gradient into it.
Open in the paper, chosen here: one hidden ReLU layer on either side; e is standardised per
dimension by running statistics first (activations may be tiny, and tanh codes of tiny numbers would
all quantise to zero); the squared error is averaged over the D numbers of e and over the prefixes.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from loopfm_jax.errors import UserError, check_limits

MOMENTUM, EPSILON = 0.99, 1e-8


@dataclass(frozen=True)
class CompressorConfig:
    """Shape of the autoencoder."""

    width: int = 32
    """Z: numbers per code (the paper: 32)."""
    prefixes: tuple[int, ...] = (8, 16, 32)
    """Prefix lengths with a decoder of their own; the whole width is always among them."""
    hidden: int = 128
    weight: float = 1.0
    """Of the autoencoder's loss beside the FM's; no gradient is shared."""

    def __post_init__(self) -> None:
        check_limits("compressor", {"width": self.width, "hidden": self.hidden}, low=1)
        outside = [p for p in self.prefixes if not 1 <= p <= self.width]
        if outside:
            raise UserError(
                f"compressor.prefixes holds {outside[0]}; prefixes lie between 1 and "
                f"compressor.width, which is {self.width}"
            )


class Standardise(nnx.Module):
    """(e - mean) / std per dimension: of the batch in training, else of running statistics.

    These forget with momentum .99, but start as the plain mean over the batches so far: a start
    value of 1 would still be most of the variance of a tiny activation after hundreds of steps.
    """

    def __init__(self, width: int):
        self.mean_D = nnx.BatchStat(jnp.zeros(width))
        self.variance_D = nnx.BatchStat(jnp.ones(width))
        self.batches = nnx.BatchStat(jnp.zeros(()))

    def __call__(self, e_BD: jax.Array, *, train: bool) -> jax.Array:
        if not train:
            return self._scale(e_BD, self.mean_D[...], self.variance_D[...])
        mean_D, variance_D = e_BD.mean(axis=0), e_BD.var(axis=0)
        seen = self.batches[...]
        kept = jnp.minimum(MOMENTUM, seen / (seen + 1))
        self.mean_D[...] = kept * self.mean_D[...] + (1 - kept) * mean_D
        self.variance_D[...] = kept * self.variance_D[...] + (1 - kept) * variance_D
        self.batches[...] = seen + 1
        return self._scale(e_BD, mean_D, variance_D)

    def _scale(self, e_BD: jax.Array, mean_D: jax.Array, variance_D: jax.Array) -> jax.Array:
        return (e_BD - mean_D[None]) * jax.lax.rsqrt(variance_D + EPSILON)[None]


class Compressor(nnx.Module):
    """An autoencoder over activations of `inputs` numbers."""

    def __init__(self, inputs: int, config: CompressorConfig, *, rngs: nnx.Rngs):
        kernel = nnx.initializers.xavier_normal()

        def linear(a: int, b: int) -> nnx.Linear:
            return nnx.Linear(a, b, kernel_init=kernel, rngs=rngs)

        self.standardise = Standardise(inputs)
        self.prefixes = tuple(sorted({*config.prefixes, config.width}))
        self.encode_in = linear(inputs, config.hidden)
        self.encode_out = linear(config.hidden, config.width)
        self.decode_in = nnx.List([linear(p, config.hidden) for p in self.prefixes])
        self.decode_out = nnx.List([linear(config.hidden, inputs) for _ in self.prefixes])

    def __call__(self, e_BD: jax.Array, *, train: bool) -> tuple[jax.Array, jax.Array]:
        """Returns (z [B,Z], reconstruction loss [B])."""
        e_BD = self.standardise(jax.lax.stop_gradient(e_BD), train=train)
        z_BZ = jnp.tanh(self.encode_out(nnx.relu(self.encode_in(e_BD))))
        errors = [
            jnp.square(e_BD - self.decode(z_BZ, i)).mean(axis=1) for i in range(len(self.prefixes))
        ]
        return z_BZ, jnp.stack(errors).mean(axis=0)

    def decode(self, z_BZ: jax.Array, which: int) -> jax.Array:
        """Reconstruction of the standardised e from the prefix number `which`."""
        prefix = z_BZ[:, : self.prefixes[which]]
        return self.decode_out[which](nnx.relu(self.decode_in[which](prefix)))
