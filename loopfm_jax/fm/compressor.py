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


class Compressor(nnx.Module):
    """An autoencoder over activations of `inputs` numbers."""

    def __init__(self, inputs: int, config: CompressorConfig, *, rngs: nnx.Rngs):
        kernel = nnx.initializers.xavier_normal()

        def linear(a: int, b: int) -> nnx.Linear:
            return nnx.Linear(a, b, kernel_init=kernel, rngs=rngs)

        self.standardise = nnx.BatchNorm(
            inputs, momentum=0.99, epsilon=1e-8, use_bias=False, use_scale=False, rngs=rngs
        )
        self.prefixes = tuple(sorted({*config.prefixes, config.width}))
        self.encode_in = linear(inputs, config.hidden)
        self.encode_out = linear(config.hidden, config.width)
        self.decode_in = nnx.List([linear(p, config.hidden) for p in self.prefixes])
        self.decode_out = nnx.List([linear(config.hidden, inputs) for _ in self.prefixes])

    def __call__(self, e_BD: jax.Array, *, train: bool) -> tuple[jax.Array, jax.Array]:
        """Returns (z [B,Z], reconstruction loss [B])."""
        e_BD = self.standardise(jax.lax.stop_gradient(e_BD), use_running_average=not train)
        z_BZ = jnp.tanh(self.encode_out(nnx.relu(self.encode_in(e_BD))))
        errors = [
            jnp.square(e_BD - self.decode(z_BZ, i)).mean(axis=1) for i in range(len(self.prefixes))
        ]
        return z_BZ, jnp.stack(errors).mean(axis=0)

    def decode(self, z_BZ: jax.Array, which: int) -> jax.Array:
        """Reconstruction of the standardised e from the prefix number `which`."""
        prefix = z_BZ[:, : self.prefixes[which]]
        return self.decode_out[which](nnx.relu(self.decode_in[which](prefix)))
