"""Dense layers that the backbones share, against plain numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from noise import noisy

from loopfm_jax.backbones.layers import KEPT, Dice, Mlp, dense, dropout, relu_dropout


def test_dropout_keeps_the_mean_and_needs_a_key():
    x = jnp.ones((200, 50))
    assert dropout(x, 0.3, None) is x and dropout(x, 0.0, jax.random.key(0)) is x
    y = np.asarray(dropout(x, 0.3, jax.random.key(0)))
    assert abs((y == 0).mean() - 0.3) < 0.02 and abs(y.mean() - 1) < 0.03
    drawn = np.asarray(dropout(jnp.ones((3, 7)), 0.5, jax.random.key(0)))  # 21: not a multiple of 4
    assert set(np.unique(drawn)) == {0, 2}
    many = np.asarray(dropout(jnp.ones((20_000, 4)), 0.3, jax.random.key(0)))
    together = np.corrcoef((many == 0).T) - np.eye(4)  # one number decides about four
    assert np.abs(together).max() < 0.03


@pytest.mark.parametrize("key", [None, 3])
def test_relu_and_its_dropout_have_the_gradient_of_one_after_the_other(key):
    key = None if key is None else jax.random.key(key)
    x, seen = (jax.random.normal(jax.random.key(i), (7, 33)) for i in (1, 2))

    def fused(x):
        return seen * relu_dropout(x, 0.2, key, KEPT)

    def plain(x):
        return seen * dropout(jax.nn.relu(x), 0.2, key)

    np.testing.assert_array_equal(fused(x), plain(x))
    found, expected = (jax.grad(lambda x, f=f: f(x).sum())(x) for f in (fused, plain))
    np.testing.assert_array_equal(found, expected)
    assert 0 < (found == 0).mean() < 1


def test_dropped_places_have_nothing_to_do_with_each_other():
    """Neighbours, columns of an MLP, two keys: correlations within what chance gives (5 sigma)."""
    keys = jax.random.split(jax.random.key(3), 8)
    kept_KN = np.stack([np.asarray(dropout(jnp.ones(2**16), 0.2, key)) > 0 for key in keys])
    limit = 5 / 2**8
    for apart in (1, 2, 3, 4, 8, 64, 512, 1024):
        for kept_N in kept_KN:
            assert abs(np.corrcoef(kept_N[:-apart], kept_N[apart:])[0, 1]) < limit
    assert np.abs(np.corrcoef(kept_KN) - np.eye(len(keys))).max() < limit
    by_column = kept_KN.reshape(-1, 512).mean(axis=0)
    assert np.abs(by_column - 0.8).max() < 5 * np.sqrt(0.8 * 0.2 / 1024)


def test_dice_follows_its_formula_and_statistics_skip_padding():
    x = np.random.default_rng(0).normal(2.0, 3.0, (2, 3, 2)).astype(np.float32)
    mask = np.array([[True, True, False], [True, False, False]])
    dice = Dice(2)
    dice.alpha_W[...] = jnp.array([0.3, -0.5])

    def formula(mean, var):
        p = 1 / (1 + np.exp(-(x - mean) / np.sqrt(var + 1e-9)))
        return p * x + np.array([0.3, -0.5]) * (1 - p) * x

    got = dice(jnp.asarray(x), mask=jnp.asarray(mask))
    np.testing.assert_allclose(got, formula(0, 1), rtol=1e-5)
    mean, var = x[mask].mean(0), x[mask].var(0)
    got = dice(jnp.asarray(x), train=True, mask=jnp.asarray(mask))
    np.testing.assert_allclose(got, formula(mean, var), rtol=1e-4)
    np.testing.assert_allclose(dice.mean_W[...], 0.01 * mean, rtol=1e-5)
    np.testing.assert_allclose(dice.variance_W[...], 0.99 + 0.01 * var, rtol=1e-5)


def test_mlp_returns_each_hidden_activation_then_its_output():
    mlp = noisy(lambda rngs: Mlp(3, (5, 4), out=2, rngs=rngs))
    x = np.random.default_rng(0).normal(size=(6, 3)).astype(np.float32)
    want = []
    for layer in (*mlp.layers, mlp.out):
        x = x @ np.asarray(layer.kernel[...]) + np.asarray(layer.bias[...])
        x = np.maximum(x, 0) if layer is not mlp.out else x
        want.append(x)
    got = mlp(jnp.asarray(np.random.default_rng(0).normal(size=(6, 3)), jnp.float32))
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_kernels_start_xavier_normal_and_biases_at_zero():
    layer = dense(300, 200, rngs=nnx.Rngs(0))
    assert abs(float(layer.kernel[...].std()) / np.sqrt(2 / 500) - 1) < 0.02
    assert layer.bias is not None and (layer.bias[...] == 0).all()
