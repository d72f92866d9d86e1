"""Compressors: a tapped activation e -> code z in [-1, 1]^Z (PAPER section 1, stage 2).

None sends a gradient into the FM, and every prefix of z listed in `prefixes` has a decoder.

    autoencoder  `L_AE = sum over prefixes p of ||e - decode_p(z[:p])||^2` (Matryoshka), trained
                 beside the FM; tanh last.
    pca, random  the alternatives that the paper names: one linear map, fitted when the FM is done.

Open in the paper, chosen here: the autoencoder has one hidden ReLU layer on either side; e is
standardised per dimension by running statistics first (activations may be tiny, and tanh codes of
tiny numbers would all quantise to zero); the squared error is averaged over the D numbers of e and
over the prefixes. A linear code is `tanh(.8 x)` of projections x to unit variance: nearly a
Gaussian's distribution function stretched over [-1, 1], so that codes fill their range evenly, int4
wastes no level, and no two values become one as they would when cut off. Every PCA dimension gets
the same levels, whatever its variance; they are in falling order of it, so that prefixes are best.
"""

from abc import abstractmethod
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, struct

from loopfm_jax import sharding
from loopfm_jax.backbones.layers import dense
from loopfm_jax.errors import UserError, check_limits, check_tuples

MOMENTUM, EPSILON = 0.99, 1e-8
GAIN = 0.8
"""tanh(sqrt(2 / pi) x) has the slope of 2 Phi(x) - 1 at 0 and stays within .04 of it."""
FLOOR = 1e-6
"""Directions with less than this share of the largest variance are noise: their codes are 0."""


@dataclass(frozen=True)
class CompressorConfig:
    """Kind and shape of the compressor."""

    kind: Literal["autoencoder", "pca", "random"] = "autoencoder"
    """pca and random are linear, and fitted once on rows of the FM window after training."""
    width: int = 32
    """Z: numbers per code (the paper: 32)."""
    prefixes: tuple[int, ...] = (8, 16, 32)
    """Prefix lengths with a decoder of their own; the whole width is always among them."""
    hidden: tuple[int, ...] = (128,)
    """Hidden layers of the autoencoder's encoder, mirrored in its decoders; none: linear."""
    weight: float = 1.0
    """Of the autoencoder's loss beside the FM's; no gradient is shared."""

    def __post_init__(self) -> None:
        check_tuples("compressor", self)
        hidden = {f"hidden[{i}]": width for i, width in enumerate(self.hidden)}
        check_limits("compressor", {"width": self.width} | hidden, low=1)
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
        self.mean_D.set_value(kept * self.mean_D[...] + (1 - kept) * mean_D)
        self.variance_D.set_value(kept * self.variance_D[...] + (1 - kept) * variance_D)
        self.batches.set_value(seen + 1)
        return self._scale(e_BD, mean_D, variance_D)

    def _scale(self, e_BD: jax.Array, mean_D: jax.Array, variance_D: jax.Array) -> jax.Array:
        return (e_BD - mean_D[None]) * jax.lax.rsqrt(variance_D + EPSILON)[None]


@struct.dataclass
class Compressed:
    """A batch through a compressor."""

    activation_BD: jax.Array
    """Standardised."""
    code_BZ: jax.Array
    loss_B: jax.Array
    """Squared error of the standardised activation, mean over its numbers and over prefixes; of a
    linear kind, which learns nothing, for the curve alone: about 1 until it is fitted."""


class Compressor(nnx.Module):
    """What the kinds share; abstract.

    Args:
      inputs: D, numbers of an activation.
    """

    def __init__(self, inputs: int, config: CompressorConfig):
        self.inputs = inputs
        self.standardise = Standardise(inputs)
        self.prefixes = tuple(sorted({*config.prefixes, config.width}))

    def __call__(self, e_BD: jax.Array, *, train: bool) -> Compressed:
        e_BD = self.standardise(jax.lax.stop_gradient(e_BD), train=train)
        z_BZ = self.encode(e_BD)
        errors = [
            jnp.square(e_BD - self.decode(z_BZ, i)).mean(axis=1) for i in range(len(self.prefixes))
        ]
        return Compressed(e_BD, z_BZ, jnp.stack(errors).mean(axis=0))

    @abstractmethod
    def encode(self, e_BD: jax.Array) -> jax.Array:
        """Code [B,Z] of a standardised activation."""

    @abstractmethod
    def decode(self, z_BZ: jax.Array, which: int) -> jax.Array:
        """Reconstruction of the standardised activation from the prefix number `which`, [B,D]."""


class Autoencoder(Compressor):
    """Matryoshka autoencoder."""

    def __init__(self, inputs: int, config: CompressorConfig, *, rngs: nnx.Rngs):
        super().__init__(inputs, config)
        back = config.hidden[::-1]
        self.encoder = Layers((inputs, *config.hidden, config.width), rngs=rngs)
        self.decoders = nnx.List(Layers((p, *back, inputs), rngs=rngs) for p in self.prefixes)

    def encode(self, e_BD: jax.Array) -> jax.Array:
        return jnp.tanh(self.encoder(e_BD))

    def decode(self, z_BZ: jax.Array, which: int) -> jax.Array:
        return self.decoders[which](z_BZ[:, : self.prefixes[which]])


class Layers(nnx.Module):
    """Linear layers with ReLU between."""

    def __init__(self, widths: tuple[int, ...], *, rngs: nnx.Rngs):
        self.layers = nnx.List(dense(a, b, rngs=rngs) for a, b in pairwise(widths))

    def __call__(self, x: jax.Array) -> jax.Array:
        for i, layer in enumerate(self.layers):
            x = layer(nnx.relu(x) if i else x)
        return x


class Projection(Compressor):
    """`tanh(.8 (e - centre) P)`, P random directions or principal ones, scaled to unit variance.

    Nothing here is a parameter: `fit` sets it once, and every later checkpoint keeps it.
    """

    def __init__(self, inputs: int, config: CompressorConfig, *, rngs: nnx.Rngs):
        super().__init__(inputs, config)
        shape, self.principal = (inputs, config.width), config.kind == "pca"
        start_DZ = jnp.zeros(shape) if self.principal else jax.random.normal(rngs.params(), shape)
        self.centre_D = nnx.BatchStat(jnp.zeros(inputs))
        self.directions_DZ = nnx.BatchStat(start_DZ / np.sqrt(inputs))
        self.decoders = nnx.List(nnx.BatchStat(jnp.zeros((p, inputs))) for p in self.prefixes)

    def encode(self, e_BD: jax.Array) -> jax.Array:
        x_BZ = (e_BD - self.centre_D[...][None]) @ self.directions_DZ[...]
        return jnp.tanh(GAIN * x_BZ)

    def decode(self, z_BZ: jax.Array, which: int) -> jax.Array:
        z_BZ = jnp.clip(z_BZ[:, : self.prefixes[which]], -1 + 1e-6, 1 - 1e-6)
        return self.centre_D[...][None] + jnp.arctanh(z_BZ) / GAIN @ self.decoders[which][...]

    def fit(self, e_RD: np.ndarray) -> None:
        """Sets directions and least-squares decoders by standardised activations of R rows."""
        centre_D = e_RD.mean(axis=0, dtype=np.float64)
        apart_RD = e_RD - centre_D[None]
        covariance_DD = apart_RD.T @ apart_RD / len(e_RD)
        directions_DZ = np.asarray(self.directions_DZ[...], np.float64)
        if self.principal:
            directions_DZ = principal(covariance_DD, directions_DZ.shape[1])
        variance_Z = ((covariance_DD @ directions_DZ) * directions_DZ).sum(axis=0)
        real_Z = variance_Z > FLOOR * variance_Z.max()
        directions_DZ = directions_DZ * (real_Z / np.sqrt(np.where(real_Z, variance_Z, 1)))[None]
        _set(self.centre_D, centre_D)
        _set(self.directions_DZ, directions_DZ)
        for prefix, decoder in zip(self.prefixes, self.decoders, strict=True):
            towards_PD = directions_DZ[:, :prefix].T @ covariance_DD
            _set(decoder, np.linalg.pinv(towards_PD @ directions_DZ[:, :prefix]) @ towards_PD)


def principal(covariance_DD: np.ndarray, width: int) -> np.ndarray:
    """The directions of largest variance, falling, [D,width]; zeros beyond D."""
    vectors_DD = np.linalg.eigh(covariance_DD)[1][:, ::-1]
    largest = np.abs(vectors_DD).argmax(axis=0)
    vectors_DD = vectors_DD * np.sign(vectors_DD[largest, np.arange(len(largest))])[None]
    return np.pad(vectors_DD, [(0, 0), (0, width)])[:, :width]


def _set(variable: nnx.Variable, value: np.ndarray) -> None:
    old = variable[...]
    variable[...] = sharding.place(value.astype(old.dtype), old.sharding)


COMPRESSORS = {"autoencoder": Autoencoder, "pca": Projection, "random": Projection}
