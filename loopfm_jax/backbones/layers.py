"""Dense layers that the backbones share: MLP, Dice, dropout, stacked fields.

Randomness comes as a key of the call; no key means inference: no dropout, running statistics.
`dtype` is the arithmetic of the large products. Parameters, normalisation statistics, softmax and
final outputs stay in float32.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike

from loopfm_jax.backbones.product import Dense
from loopfm_jax.errors import UserError, check_limits

Activation = Literal["relu", "dice"]
Norm = Literal["none", "input", "hidden"]
Key = jax.Array | None
KEPT = "kept"
"""Name of what is saved where all else is computed again (`blockwise`)."""


def check_dnn(
    owner: str, *, layers: Mapping[str, Sequence[int]], rates: Mapping[str, float]
) -> None:
    """Raises UserError for a layer without units or a dropout rate that leaves nothing."""
    widths = {f"{name}[{i}]": w for name, all_w in layers.items() for i, w in enumerate(all_w)}
    check_limits(owner, widths, low=1)
    check_limits(owner, rates, low=0, high=0.99)


def wide(x: jax.Array) -> jax.Array:
    """At least float32."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def dense(
    width_in: int,
    width_out: int,
    *,
    rngs: nnx.Rngs,
    bias: bool = True,
    dtype: DTypeLike | None = None,
) -> nnx.Linear:
    """A linear layer with an xavier-normal kernel and a zero bias (PAPER section 5).

    Without a `dtype` it computes in its parameters' float32.
    """
    kernel_init = nnx.initializers.xavier_normal()
    return Dense(
        width_in, width_out, use_bias=bias, dtype=dtype, kernel_init=kernel_init, rngs=rngs
    )


def weights(layer: nnx.Linear) -> tuple[jax.Array, jax.Array]:
    """Kernel [X,W] and bias [W] of a layer that has both, for who splits its product."""
    assert layer.bias is not None
    return layer.kernel[...], layer.bias[...]


def split(key: Key, count: int) -> list[Key]:
    """Independent keys, or as many times None."""
    return [None] * count if key is None else list(jax.random.split(key, count))


def kept_of(rate: float) -> int:
    """How many of 256 elements dropout keeps."""
    return round(256 * (1 - rate))


def dropout(x: jax.Array, rate: float, key: Key) -> jax.Array:
    """Zeroes elements with probability `rate` and scales the others; without a key, identity.

    The rate is rounded to 1/256: one drawn number decides about four elements, because drawing
    is what dropout costs where an MLP runs over tokens (benchmarks/LOG.md).
    """
    kept = kept_of(rate)
    if key is None or kept == 256:
        return x
    words = hashed(key, -(-x.size // 4))
    byte = jax.lax.bitcast_convert_type(words, jnp.uint8).reshape(-1)[: x.size].reshape(x.shape)
    return jnp.where(byte < kept, x * (256 / kept), 0)


@partial(jax.custom_jvp, nondiff_argnums=(1, 3))
def relu_dropout(x: jax.Array, rate: float, key: Key, name: str | None = None) -> jax.Array:
    """Dropout of relu(x). Its gradient asks the result what passed, which the next layer keeps
    anyway: nothing is drawn again, and x need not be kept.

    name: of `checkpoint_name`, which the result gets where it is differentiated.
    """
    return dropout(jax.nn.relu(x), rate, key)


@relu_dropout.defjvp
def _relu_dropout_jvp(
    rate: float, name: str | None, primals: tuple[jax.Array, Key], tangents: tuple[jax.Array, Any]
) -> tuple[jax.Array, jax.Array]:
    x, key = primals
    passed = relu_dropout(x, rate, key, name)
    if name is not None:
        passed = checkpoint_name(passed, name)
    scale = 1 if key is None else 256 / kept_of(rate)
    return passed, jnp.where(passed > 0, scale * tangents[0], 0)


def hashed(key: jax.Array, count: int) -> jax.Array:
    """Numbers [count] uint32 for masks: the key and a place, mixed by two multiplications (the
    constants are lowbias32's), where `jax.random.bits` takes twenty rounds."""
    start, salt = jax.random.bits(key, (2,), jnp.uint32)
    x = jax.lax.iota(jnp.uint32, count) + start
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D) ^ salt
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)


def batch_norm(width: int, *, rngs: nnx.Rngs) -> nnx.BatchNorm:
    """Batch norm as public runs have it: affine, a tenth of each batch into the statistics.

    One difference: running variances average the biased one, torch's the one over n - 1.
    """
    return nnx.BatchNorm(width, momentum=0.9, epsilon=1e-5, rngs=rngs)


class Dice(nnx.Module):
    """`p x + alpha (1 - p) x`, p = sigmoid(batch norm of x) (DIN, arXiv 1706.06978, section 5.3).

    Statistics are taken over real positions only; the public code (PAPER section 5) lets padding
    in. Its constants are kept: no affine part, 1 % of each batch, epsilon 1e-9. Running variances
    differ as in `batch_norm`.
    """

    MOMENTUM, EPSILON = 0.99, 1e-9

    def __init__(self, width: int):
        self.mean_W = nnx.BatchStat(jnp.zeros(width))
        self.variance_W = nnx.BatchStat(jnp.ones(width))
        self.alpha_W = nnx.Param(jnp.zeros(width))

    def __call__(
        self, x: jax.Array, *, train: bool = False, mask: jax.Array | None = None
    ) -> jax.Array:
        """x [..., W], mask [...] True = real -> [..., W]."""
        if not train:
            return self.gate(x, self.mean_W[...], self.variance_W[...])
        width = x.shape[-1]
        real_N = jnp.ones(x.size // width, bool) if mask is None else mask.reshape(-1)
        return self.gate(x, *self.fit(x.reshape(-1, width), real_N))

    def fit(self, x_NW: jax.Array, real_N: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Mean and variance [W] of the real rows, which the running ones learn of."""
        mean_W, variance_W = moments(wide(x_NW), real_N)
        for running, now in ((self.mean_W, mean_W), (self.variance_W, variance_W)):
            running.set_value(self.MOMENTUM * running[...] + (1 - self.MOMENTUM) * now)
        return mean_W, variance_W

    def gate(self, x: jax.Array, mean_W: jax.Array, variance_W: jax.Array) -> jax.Array:
        """[..., W], by these statistics."""
        mean, scale, alpha = (
            v.reshape((1,) * (x.ndim - 1) + (-1,))
            for v in (mean_W, jax.lax.rsqrt(variance_W + self.EPSILON), self.alpha_W[...])
        )
        p = jax.nn.sigmoid((wide(x) - mean) * scale)
        return ((p + alpha * (1 - p)) * x).astype(x.dtype)


@jax.checkpoint  # what is between would be as large as x, several times
def moments(x_NW: jax.Array, real_N: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean and variance of the real rows, [W]; of all where there is none.

    By the distance from the mean: the difference of squared means loses to rounding far above the
    epsilon of `Dice`.
    """
    weight_N = (real_N | ~real_N.any()).astype(x_NW.dtype)
    weight_N /= weight_N.sum()
    mean_W = weight_N @ x_NW
    return mean_W, weight_N @ jnp.square(x_NW - mean_W[None])


class Mlp(nnx.Module):
    """Linear -> batch norm (if `norm` is "hidden") -> activation -> dropout, per hidden width.

    Args:
      width_in: width of the input.
      hidden: widths of the hidden layers, at least one.
      out: width of a last linear layer, computed in float32; 0 = none.
      activation: after every hidden layer.
      dropout: rate after every activation.
      norm: where batch norm stands: nowhere, at the input, or in every hidden layer.
    """

    def __init__(
        self,
        width_in: int,
        hidden: Sequence[int],
        *,
        rngs: nnx.Rngs,
        out: int = 0,
        activation: Activation = "relu",
        dropout: float = 0.0,
        norm: Norm = "none",
        dtype: DTypeLike = jnp.float32,
    ):
        if not hidden:
            raise UserError("hidden is empty; give at least one width, e.g. --hidden 64 32")
        self.rate = dropout
        widths = (width_in, *hidden)
        self.input_norm = batch_norm(width_in, rngs=rngs) if norm == "input" else None
        self.layers = nnx.List(
            dense(i, o, dtype=dtype, rngs=rngs)
            for i, o in zip(widths[:-1], widths[1:], strict=True)
        )
        self.norms = nnx.List(batch_norm(w, rngs=rngs) for w in hidden if norm == "hidden")
        self.dice = nnx.List(Dice(w) for w in hidden if activation == "dice")
        self.out = dense(hidden[-1], out, rngs=rngs) if out else None

    def __call__(
        self, x: jax.Array, *, key: Key = None, mask: jax.Array | None = None
    ) -> list[jax.Array]:
        """x [..., X] -> every hidden activation before its dropout, then the output if there is.

        Args:
          x: input.
          key: randomness of dropout; None means inference.
          mask: [...], True where the batch statistics should look.
        """
        if self.input_norm is not None:
            x = self.input_norm(x, use_running_average=key is None)
        return self.after_first(self.layers[0](x), key=key, mask=mask)

    def after_first(self, x: jax.Array, *, key: Key, mask: jax.Array | None) -> list[jax.Array]:
        """As a call, from the first layer's linear result on, for who computes that otherwise."""
        results, inputs = [], x
        for i, k in enumerate(split(key, len(self.layers))):
            x = self.layers[i](inputs) if i else x
            if self.norms:
                x = self.norms[i](x, use_running_average=key is None).astype(x.dtype)
            if self.dice:
                x = checkpoint_name(x, KEPT) if i else x
                x = self.dice[i](x, train=key is not None, mask=mask)
                inputs = dropout(x, self.rate, k)
            else:
                inputs = relu_dropout(x, self.rate, k, KEPT if i else None)
                x = jax.nn.relu(x)
            results.append(x)
        return results if self.out is None else [*results, self.out(inputs)]


class FeedForward(nnx.Module):
    """LayerNorm, then X -> 2X -> X with ReLU and a residual from the normalised input."""

    def __init__(self, width: int, *, rngs: nnx.Rngs, dtype: DTypeLike):
        self.norm = nnx.LayerNorm(width, epsilon=1e-5, dtype=dtype, rngs=rngs)
        self.up = dense(width, 2 * width, dtype=dtype, rngs=rngs)
        self.down = dense(2 * width, width, dtype=dtype, rngs=rngs)

    def __call__(self, x_BLX: jax.Array) -> jax.Array:
        x_BLX = self.norm(x_BLX)
        return x_BLX + self.down(jax.nn.relu(self.up(x_BLX)))
