"""Ways of self-attention: all the same function, and which of them is taken."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from loopfm_jax.backbones import self_attention
from loopfm_jax.backbones.self_attention import (
    CHOICE,
    Shape,
    choose,
    in_blocks,
    measure,
    padded,
    self_attend,
    windowed,
)
from loopfm_jax.errors import UserError
from loopfm_jax.packing import lay_out

L, H, D, T = 5, 2, 8, 16
LENGTH = np.array([3, 5, 0, 1, 4], np.int32)
SHAPE = Shape(T, 3 * H * D, H, len(LENGTH), L, L, "float32", "cpu")
ON_CPU = {
    "cudnn": partial(padded, kernel="xla"),  # the same layout and mask
    "pallas": partial(windowed, interpret=True),
}


@pytest.fixture(autouse=True)
def no_choice_is_left(monkeypatch):
    monkeypatch.delenv(CHOICE, raising=False)
    choose.cache_clear()
    yield
    choose.cache_clear()


def learn(way, **how):
    tokens = lay_out(jnp.asarray(LENGTH), slots=T, longest=L)
    rng = np.random.default_rng(0)
    qkv_TX, weight_THD = rng.normal(size=(T, 3 * H * D)), rng.normal(size=(T, H, D))

    def loss(qkv_TX):
        seen_THD = jnp.where(tokens.real_T[:, None, None], way(tokens, qkv_TX, heads=H, **how), 0)
        return (seen_THD * weight_THD).sum(), seen_THD

    return jax.grad(loss, has_aux=True)(jnp.asarray(qkv_TX, jnp.float32))


@pytest.mark.parametrize("window", [0, 2])
@pytest.mark.parametrize("way", ON_CPU)
def test_kernels_are_the_same_function(way, window):
    """Values and gradients of the call that the kernel gets, run by what a CPU has for it."""
    found, want = (learn(f, window=window) for f in (ON_CPU[way], in_blocks))
    for one, other in zip(found, want, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-6)
        assert np.abs(other).max() > 0.1


@pytest.mark.parametrize("window", [1, 2, 3, 9])
def test_a_window_is_the_nearest_entries(window):
    """Each entry by hand: itself and the `window - 1` older ones that stand next to it; the widest
    makes all slots one block."""
    tokens = lay_out(jnp.asarray(LENGTH), slots=T, longest=max(L, window))
    qkv_TX = np.random.default_rng(1).normal(size=(T, 3 * H * D)).astype(np.float32)
    found = self_attend(jnp.asarray(qkv_TX), tokens, heads=H, window=window)
    q, k, v = np.split(qkv_TX.reshape(T, 3 * H, D), 3, axis=1)
    start = 0
    for length in LENGTH:
        for i in range(start, start + length):
            seen = slice(i, min(i + window, start + length))
            weight_SH = np.exp((k[seen] * q[i]).sum(-1) / np.sqrt(D))
            want_HD = (weight_SH[..., None] * v[seen]).sum(0) / weight_SH.sum(0)[:, None]
            np.testing.assert_allclose(found[i], want_HD, rtol=1e-4, atol=1e-5)
        start += length


def test_the_faster_one_is_taken_and_measured_once_per_shape(monkeypatch, capsys):
    seconds, asked = {"blocks": 2e-3, "cudnn": 1e-3}, []
    monkeypatch.setattr(self_attention, "ON", {"cpu": tuple(seconds)})
    monkeypatch.setattr(
        self_attention, "measure", lambda way, shape: asked.append(way) or seconds[way]
    )
    monkeypatch.setitem(self_attention.WAYS, "cudnn", ON_CPU["cudnn"])
    tokens = lay_out(jnp.asarray(LENGTH), slots=T, longest=L)
    run = jax.jit(lambda x: self_attend(x, tokens, heads=H))  # measured while a step is traced
    run(jnp.ones((T, 3 * H * D)))
    assert asked == ["blocks", "cudnn"] and choose(SHAPE) == "cudnn" and len(asked) == 2
    assert "cudnn (blocks 2.00 ms, cudnn 1.00 ms)" in capsys.readouterr().err
    seconds["cudnn"] = 3e-3
    choose.cache_clear()
    assert choose(SHAPE) == "blocks"


def test_what_is_compiled_for_a_device_elsewhere_is_not_measured_on_this_one(monkeypatch, capsys):
    monkeypatch.setattr(self_attention, "measure", lambda way, shape: pytest.fail("measured"))
    assert choose(SHAPE) == "blocks"
    assert choose(replace(SHAPE, platform="tpu")) == "blocks"
    assert "no tpu is here" in capsys.readouterr().err


def test_what_cannot_run_is_said_and_left_out(capsys):
    assert np.isfinite(measure("blocks", SHAPE, repeats=1))
    assert measure("cudnn", SHAPE) == np.inf
    assert "no cudnn here" in capsys.readouterr().err


def test_the_environment_decides_and_its_mistakes_are_told(monkeypatch):
    assert choose(SHAPE) == "blocks"  # nothing to choose from on a CPU
    choose.cache_clear()
    monkeypatch.setenv(CHOICE, "pallas")
    assert choose(SHAPE) == "pallas"
    choose.cache_clear()
    monkeypatch.setenv(CHOICE, "flash")
    with pytest.raises(UserError, match="LOOPFM_ATTENTION=flash: there are blocks, cudnn, pallas"):
        choose(SHAPE)
