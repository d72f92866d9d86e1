"""The compressor: apart from the FM, usable at every prefix, standardised whatever the scale."""

from dataclasses import replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from noise import named, noisy, parts

from loopfm_jax.backbones import BackboneConfig
from loopfm_jax.data.schema import Field, Schema
from loopfm_jax.errors import UserError
from loopfm_jax.fm import teacher
from loopfm_jax.fm.compressor import Autoencoder, CompressorConfig, Standardise
from loopfm_jax.fm.exporter import ExportConfig, code_width
from loopfm_jax.fm.teacher import FMConfig, Teacher
from loopfm_jax.history.codes import Codec, quantise
from loopfm_jax.tables import TableConfig

B, D, Z = 32, 12, 6
CONFIG = CompressorConfig(width=Z, prefixes=(2, 4), hidden=(16,))


def low_rank(rank: int = 3, *, rows: int = B, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng((seed, rank))
    basis = np.random.default_rng(rank).normal(size=(rank, D))
    return (rng.normal(size=(rows, rank)) @ basis).astype(np.float32)


@cache
def split(hidden: tuple[int, ...] = CONFIG.hidden):
    return parts(
        noisy(lambda rngs: Autoencoder(D, replace(CONFIG, hidden=hidden), rngs=rngs), seed=1)
    )


@partial(jax.jit, static_argnames=("train", "hidden"))
def compress(e_BD, rest=None, *, train: bool, hidden: tuple[int, ...] = CONFIG.hidden):
    """(z, loss, statistics after the call)."""
    graphdef, params, rest_before = split(hidden)
    model = nnx.merge(graphdef, params, rest_before if rest is None else rest)
    found = model(e_BD, train=train)
    return found.code_BZ, found.loss_B, parts(model)[2]


# -------------------------------------------------------------------------------- the loss


@pytest.mark.parametrize("hidden", [(16,), (), (9, 7)])
def test_loss_is_the_mean_squared_error_over_numbers_and_prefixes(hidden):
    e = low_rank().astype(np.float64)
    model = nnx.merge(*split(hidden))
    p = named(model)

    def layers(name, x):
        for i in range(len(hidden) + 1):
            x = np.maximum(x, 0) if i else x
            x = x @ p[f"{name}/layers/{i}/kernel"] + p[f"{name}/layers/{i}/bias"]
        return x

    e = (e - e.mean(0)) / np.sqrt(e.var(0) + 1e-8)
    z = np.tanh(layers("encoder", e))
    assert model.prefixes == (2, 4, 6)
    assert [p[f"decoders/0/layers/{i}/kernel"].shape[1] for i in range(len(hidden))] == [
        *reversed(hidden)
    ]
    decoded = [layers(f"decoders/{i}", z[:, :prefix]) for i, prefix in enumerate(model.prefixes)]
    z_found, loss, _ = compress(low_rank(), train=True, hidden=hidden)
    np.testing.assert_allclose(z_found, z, rtol=1e-4, atol=1e-5)
    errors = [((e - back) ** 2).mean(axis=1) for back in decoded]
    np.testing.assert_allclose(loss, np.mean(errors, axis=0), rtol=1e-4)


def test_each_decoder_reads_its_prefix_and_nothing_else():
    model = nnx.merge(*split())

    def decoded(z_BZ):
        return jnp.stack([model.decode(z_BZ, i).sum() for i in range(len(model.prefixes))])

    slopes_PBZ = jax.jit(jax.jacrev(decoded))(low_rank()[:, :Z])
    reads_PZ = (np.asarray(slopes_PBZ) != 0).any(axis=1)
    expected = np.arange(Z)[None] < np.array(model.prefixes)[:, None]
    np.testing.assert_array_equal(reads_PZ, expected)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_codes_lie_between_minus_one_and_one(scale):
    for train in (True, False):
        z, loss, _ = compress(scale * low_rank(), train=train)
        assert np.abs(z).max() <= 1 and np.isfinite(z).all() and np.isfinite(loss).all()
    assert z.shape == (B, Z) and loss.shape == (B,)


def fit(e_BD: np.ndarray, steps: int = 300):
    """Loss by prefix before and after, and the trained compressor."""
    graphdef, params, rest = split()
    optimiser = optax.adam(1e-2)

    def step(carry, _):
        params, rest, moments = carry

        def objective(params):
            model = nnx.merge(graphdef, params, rest)
            loss_B = model(e_BD, train=True).loss_B
            return loss_B.mean(), parts(model)[2]

        (loss, rest), gradients = jax.value_and_grad(objective, has_aux=True)(params)
        updates, moments = optimiser.update(gradients, moments)
        return (optax.apply_updates(params, updates), rest, moments), loss

    carry = params, rest, optimiser.init(params)
    train = jax.jit(lambda carry: jax.lax.scan(step, carry, length=steps))
    (params, rest, _), losses = train(carry)
    return losses, nnx.merge(graphdef, params, rest)


def test_learns_low_rank_activations_and_longer_prefixes_are_better():
    e_BD = low_rank(5, rows=128)
    losses, model = fit(e_BD)
    assert losses[-1] < 0.3 * losses[0]
    standard = model.standardise(e_BD, train=False)
    z_BZ = model(e_BD, train=False).code_BZ
    errors = [float(((model.decode(z_BZ, i) - standard) ** 2).mean()) for i in range(3)]
    assert errors[0] > 1.5 * errors[1] > 1.5 * errors[2] and errors[2] < 0.15


# ------------------------------------------------------------------------------ statistics


def test_running_statistics_start_as_a_mean_and_forget_slowly():
    graphdef, _, state = parts(Standardise(2))

    @jax.jit
    def train(state, e_BD):
        model = nnx.merge(graphdef, {}, state)
        return model(e_BD, train=True), parts(model)[2]

    rng = np.random.default_rng(0)
    batches = [rng.normal(3, 5, (4, 2)).astype(np.float32) for _ in range(105)]
    mean, variance = np.zeros(2), np.ones(2)
    for n, e in enumerate(batches):
        standard, state = train(state, e)
        kept = min(0.99, n / (n + 1))
        mean = kept * mean + (1 - kept) * e.mean(0)
        variance = kept * variance + (1 - kept) * e.var(0)
        if n in (0, 9, 104):
            np.testing.assert_allclose(state["mean_D"], mean, rtol=1e-4)
            np.testing.assert_allclose(state["variance_D"], variance, rtol=1e-4)
            # The batch itself is standardised by its own statistics.
            np.testing.assert_allclose(standard.mean(0), 0, atol=1e-5)
            np.testing.assert_allclose(standard.var(0), 1, atol=1e-5)
        if n == 9:  # so far a plain mean
            np.testing.assert_allclose(mean, np.mean(batches[:10], axis=(0, 1)), rtol=1e-4)


@pytest.mark.parametrize(("scale", "offset"), [(1e-3, 0.0), (1e-2, 10.0), (1e3, 0.0)])
def test_codes_do_not_depend_on_the_scale_of_the_activations(scale, offset):
    """After a few batches, too: tiny activations must not all quantise to zero."""
    rest, plain_rest = None, None
    for seed in range(3):
        e_BD = low_rank(seed=seed)
        rest = compress(offset + scale * e_BD, rest, train=True)[2]
        plain_rest = compress(e_BD, plain_rest, train=True)[2]
    z_BZ = compress(offset + scale * e_BD, rest, train=False)[0]
    plain_BZ = compress(e_BD, plain_rest, train=False)[0]
    np.testing.assert_allclose(z_BZ, plain_BZ, atol=0.05)
    assert len(np.unique(quantise(plain_BZ, Codec("int8", plain_BZ.shape[1])))) > 50


def test_inference_changes_no_statistics_and_looks_at_one_row_at_a_time():
    z, loss, after = compress(low_rank(), train=False)
    jax.tree.map(np.testing.assert_array_equal, after, split()[2])
    other = low_rank().copy()
    other[1:] *= 50
    z_too, loss_too, _ = compress(other, train=False)
    np.testing.assert_allclose(z_too[0], z[0], rtol=1e-6)
    np.testing.assert_allclose(loss_too[0], loss[0], rtol=1e-6)
    assert (compress(other, train=True)[0][0] != compress(low_rank(), train=True)[0][0]).any()


# --------------------------------------------------------------------- beside the backbone


FM = FMConfig(
    backbone=BackboneConfig(hidden=(D, 5), tables=TableConfig(width=3, row_multiple=1)),
    compressor=CompressorConfig(width=Z, prefixes=(2, 4), hidden=(16,), weight=3.0),
)


def test_no_gradient_passes_between_fm_and_compressor():
    schema = Schema(fields=(Field("user", 7), Field("item", 9)))
    graphdef, params, rest = parts(noisy(lambda rngs: Teacher(schema, FM, rngs=rngs)))
    rng = np.random.default_rng(0)
    batch = {
        "ids_BF": rng.integers([1, 8], [7, 16], (B, 2)).astype(np.int32),
        "floats_BN": np.zeros((B, 0), np.float32),
        "events": {},
        "label_B": rng.integers(0, 2, B).astype(np.float32),
        "weight_B": np.ones(B, np.float32),
    }

    @jax.jit
    def slopes(params):
        def terms(params):
            model = nnx.merge(graphdef, params, rest)
            total, numbers = teacher.loss(model, batch, None, jax.random.key(0), config=FM)
            return jnp.stack([total, numbers["logloss"], numbers["compressor"]])

        return terms(params), jax.jacrev(terms)(params)

    (total, click, code), gradients = slopes(params)
    np.testing.assert_allclose(total, click + 3 * code, rtol=1e-6)
    for path, g in jax.tree.leaves_with_path(gradients):
        whole, of_click, of_code = np.asarray(g)
        own, other, weight = (
            (of_code, of_click, 3) if "compressor" in str(path) else (of_click, of_code, 1)
        )
        assert not other.any() and own.any(), path
        np.testing.assert_allclose(whole, weight * own, rtol=1e-4, atol=1e-6)


def test_codes_of_the_teacher_come_from_its_tap():
    model = noisy(
        lambda rngs: Teacher(Schema(fields=(Field("user", 7), Field("item", 9))), FM, rngs=rngs)
    )
    assert [c.inputs for c in model.compressors] == [D]
    wrong = replace(FM, taps=("hidden_0", "hidden_9"))
    with pytest.raises(UserError, match=r"no tap 'hidden_9': fm.taps are some of embedding"):
        noisy(lambda rngs: Teacher(Schema(fields=(Field("user", 7),)), wrong, rngs=rngs))


# --------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"width": 0, "prefixes": ()}, "compressor.width is 0"),
        ({"hidden": (8, 0)}, r"compressor.hidden\[1\] is 0"),
        ({"width": 16}, "compressor.prefixes holds 32; prefixes lie between 1 and"),
        ({"prefixes": (0,)}, "compressor.prefixes holds 0"),
    ],
)
def test_shapes_that_cannot_be_built_are_refused(knobs, message):
    with pytest.raises(UserError, match=message):
        CompressorConfig(**knobs)


def test_an_exported_prefix_fits_its_code():
    for knobs in ({"prefix": -1}, {"batch": 0}):
        with pytest.raises(UserError, match="export."):
            ExportConfig(**knobs)
    with pytest.raises(UserError, match="export.prefix is 7, but a code has only .* = 6 numbers"):
        code_width(ExportConfig(prefix=7), FM)
