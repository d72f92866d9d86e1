"""Linear compressors, and what codes lose of a tap: fitted on the FM window, kept for ever."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from command_line import CommandLine
from flax import nnx
from noise import parts

from loopfm_jax import infer, stages
from loopfm_jax.fm import train
from loopfm_jax.fm.compressor import CompressorConfig, Projection, principal

R, D, Z = 4000, 12, 6
INFER = infer.run
every_kind = pytest.mark.parametrize("kind", ["pca", "random"])


def draw(*, seed: int = 0, rank: int = D) -> np.ndarray:
    """Correlated Gaussian rows of falling variance, off centre, [R,D]."""
    rng = np.random.default_rng(seed)
    basis = np.random.default_rng(9).normal(size=(D, D)) * (0.7 ** np.arange(D))[:, None]
    return (rng.normal(size=(R, rank)) @ basis[:rank] + 0.3).astype(np.float32)


@cache
def fitted(kind, width: int = Z, rank: int = D) -> Projection:
    config = CompressorConfig(kind=kind, width=width, prefixes=(2, 4))
    model = Projection(D, config, rngs=nnx.Rngs(0))
    model.fit(draw(rank=rank))
    return model


def lost(model: Projection, e_RD: np.ndarray) -> list[float]:
    """By prefix: the share of the variance that the code loses."""
    z = model.encode(jnp.asarray(e_RD))
    whole = np.square(e_RD - e_RD.mean(axis=0)).sum()
    back = [np.asarray(model.decode(z, i)) for i in range(len(model.prefixes))]
    return [float(np.square(e_RD - b).sum() / whole) for b in back]


@every_kind
def test_codes_are_bounded_projections_of_unit_variance(kind):
    model, e = fitted(kind), draw(seed=1)
    z = np.asarray(model.encode(jnp.asarray(e)))
    x = (e - draw().mean(axis=0)) @ np.asarray(model.directions_DZ[...], np.float64)
    np.testing.assert_allclose(z, np.tanh(0.8 * x), atol=1e-5)
    np.testing.assert_allclose(x.std(axis=0), 1, atol=0.1)
    assert np.abs(z).max() < 1 and (np.abs(z) < 0.25).mean() > 0.15  # fills the range evenly
    assert (np.abs(z) > 0.75).mean() > 0.15


@every_kind
def test_decoders_are_least_squares_of_the_prefix(kind):
    e = draw()
    model = fitted(kind)
    x = (e - e.mean(axis=0)) @ np.asarray(model.directions_DZ[...], np.float64)
    for prefix, found in zip(model.prefixes, lost(model, e), strict=True):
        design = x[:, :prefix]
        best = design @ np.linalg.lstsq(design, e - e.mean(axis=0), rcond=None)[0]
        whole = np.square(e - e.mean(axis=0)).sum()
        share = np.square(e - e.mean(axis=0) - best).sum() / whole
        np.testing.assert_allclose(found, share, rtol=1e-3)
    assert sorted(lost(model, e), reverse=True) == lost(model, e)


def test_pca_loses_what_the_smallest_eigenvalues_hold_and_random_loses_more():
    e = draw()
    values = np.linalg.eigvalsh(np.cov(e.T))[::-1]
    expected = [values[p:].sum() / values.sum() for p in (2, 4, Z)]
    np.testing.assert_allclose(lost(fitted("pca"), e), expected, rtol=1e-3)
    assert all(a > 1.2 * b for a, b in zip(lost(fitted("random"), e), expected, strict=True))


def test_principal_directions_fall_in_variance_and_do_not_flip():
    directions = principal(np.diag([1.0, 4.0, 9.0]), 4)
    np.testing.assert_array_equal(directions, np.eye(3, 4)[[2, 1, 0]])


@every_kind
def test_directions_without_variance_stay_silent(kind):
    """More numbers than the tap has dimensions of its own, as with units that never fire."""
    model = fitted(kind, 8, 3)
    z = np.asarray(model.encode(jnp.asarray(draw(seed=1, rank=3))))
    assert np.isfinite(z).all()
    if kind == "pca":
        assert z[:, :3].std(axis=0).min() > 0.4 and np.abs(z[:, 3:]).max() < 1e-3
    assert lost(model, draw(rank=3))[-1] < 1e-4
    still = Projection(D, CompressorConfig(kind=kind, width=2, prefixes=()), rngs=nnx.Rngs(0))
    still.fit(np.ones((50, D), np.float32))
    assert not np.asarray(still.encode(jnp.ones((1, D)))).any()


@every_kind
def test_nothing_is_trained(kind):
    model = fitted(kind)
    graphdef, params, rest = parts(model)
    assert not jax.tree.leaves(params)

    def total(e_BD):
        found = nnx.merge(graphdef, params, rest)(e_BD, train=True)
        return found.code_BZ.sum() + found.loss_B.sum()

    assert not np.asarray(jax.grad(total)(jnp.asarray(draw()[:8]))).any()


# ------------------------------------------------------------------------------ in the flow


def run(command: CommandLine, monkeypatch, *options: str):
    """(facts of the export, title -> (rows, numbers, directions) of every pass over the log)."""
    passes = {}

    def spy(model, program, rows, assemble, writers, *, title, **named):
        rate = INFER(model, program, rows, assemble, writers, title=title, **named)
        numbers = {name: np.array(values) for name, values in writers.items()}
        passes[title] = rows, numbers, np.asarray(model.compressors[0].directions_DZ[...])
        return rate

    monkeypatch.setattr(infer, "run", spy)
    for stage in ("prepare", "train-fm", "export"):
        command.succeed(stage, *options)
    return stages.verify(command.workdir / "fm" / "export")["facts"], passes


def test_pca_is_fitted_on_the_fm_window_and_stays_while_the_fm_learns(
    tmp_path, capsys, monkeypatch
):
    options = ("--fm.compressor.kind", "pca", "--fm.compressor.prefixes", "2")
    refresh = ("--export.refresh", "fresh", "--export.refresh-hours", "48", "--export.code", "fp32")
    facts, passes = run(
        CommandLine(tmp_path, capsys), monkeypatch, *options, *refresh, "--export.prefix", "2"
    )
    rows, found, _ = passes["activations of the FM window"]
    assert rows.max() < facts["first"] and facts["width"] == 2
    # What an export says of its codes is what the smaller eigenvalues of that covariance hold.
    e = found["hidden_0"].astype(np.float64)
    values = np.linalg.eigvalsh(np.cov(e.T, bias=True))
    share = values[:-2].sum() * len(e) / np.square(e).sum()
    np.testing.assert_allclose(facts["losses"]["hidden_0"]["code"], share, rtol=1e-3)
    assert facts["losses"]["hidden_0"]["quantised"] == 0
    # The model that was loaded from disk is the fitted one, and days later still is.
    _, known, directions = passes["codes of the FM window"]
    known = known["codes_hidden_0"]
    np.testing.assert_allclose(np.cov(np.arctanh(known).T / 0.8), np.eye(2), atol=0.02)
    np.testing.assert_array_equal(passes["export, day 4"][2], directions)


def test_a_sample_has_all_places_of_a_slate():
    rows = np.arange(1000, 1000 + 3 * train.SAMPLE)
    found = train.sample(rows)
    assert len(found) == train.SAMPLE and (np.diff(found) > 0).all() and found[0] >= 1000
    places = np.bincount(found % 3) / train.SAMPLE
    np.testing.assert_allclose(places, 1 / 3, atol=0.02)
    np.testing.assert_array_equal(train.sample(rows[: train.SAMPLE]), rows[: train.SAMPLE])


def test_a_prefix_without_a_decoder_has_no_loss_to_report(tmp_path, capsys, monkeypatch):
    facts, passes = run(
        CommandLine(tmp_path, capsys),
        monkeypatch,
        *("--fm.compressor.kind", "random", "--export.prefix", "3"),
    )
    losses = facts["losses"]["hidden_0"]
    assert losses["code"] is None and 0 < losses["quantised"] < 0.1
    assert passes["export"][1]["codes_hidden_0"].any()
