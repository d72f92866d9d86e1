"""The fitted law beside plain oracles; its words and its picture; counts of operations."""

from dataclasses import replace
from xml.etree import ElementTree

import jax
import numpy as np
import pytest
from flax import nnx
from scipy.stats import linregress, t
from test_scale import config, spec_of

from loopfm_jax import loop
from loopfm_jax.history.encoders import EncoderConfig
from loopfm_jax.optim import make_optimiser
from loopfm_jax.scale import job, picture, report
from loopfm_jax.scale.law import fit
from loopfm_jax.scale.make import told
from loopfm_jax.scale.plan import plan

SIZES = np.array([1e6, 3e6, 1e7, 3e7, 1e8, 3e8])


def test_a_true_power_law_is_found():
    law = fit(SIZES, 5e9 * SIZES**-0.8)
    assert law is not None and law.n == 6 and not law.poor
    assert (law.b, law.low, law.high, law.r2) == pytest.approx((0.8, 0.8, 0.8, 1.0))
    rate, low, high = law.at(np.array([2e7]))
    assert rate == pytest.approx(5e9 * 2e7**-0.8) and low == pytest.approx(high)


def test_interval_and_band_are_those_of_linear_regression():
    rate = 5e9 * SIZES**-0.8 * np.exp(np.random.default_rng(0).normal(size=6) / 4)
    law = fit(SIZES, rate)
    assert law is not None
    x, y = np.log(SIZES), np.log(rate)
    found = linregress(x, y)
    half = t.ppf(0.975, 4) * found.stderr
    assert (-law.b, law.r2) == pytest.approx((found.slope, found.rvalue**2))
    assert (law.low, law.high) == pytest.approx((-found.slope - half, -found.slope + half))
    design = np.stack([np.ones(6), x], axis=1)
    coefficients, [squares], *_ = np.linalg.lstsq(design, y)
    at = np.array([[1, np.log(1e6)], [1, np.log(7e7)]])
    error = np.sqrt(np.diag(at @ np.linalg.inv(design.T @ design) @ at.T) * squares / 4)
    rates, low, high = law.at(np.array([1e6, 7e7]))
    assert np.log(rates) == pytest.approx(at @ coefficients)
    assert np.log(high) - np.log(low) == pytest.approx(2 * t.ppf(0.975, 4) * error)


def test_the_interval_holds_the_exponent_as_often_as_it_says():
    rng, held = np.random.default_rng(1), 0
    for _ in range(400):
        law = fit(SIZES, SIZES**-0.5 * np.exp(rng.normal(size=6)))
        assert law is not None
        held += law.low <= 0.5 <= law.high
    assert 0.92 < held / 400 < 0.98


def test_two_sizes_are_no_law_and_a_bent_curve_is_a_poor_one():
    assert fit([1e6, 1e7], [2.0, 1.0]) is None and fit([], []) is None
    flat = fit(SIZES, [100, 100, 100, 100, 60, 20])
    assert flat is not None and flat.poor
    level = fit(SIZES, [100, 103, 99, 101, 98, 102])
    assert level is not None and level.r2 < 0.5 and not level.poor  # nothing to explain
    assert "poor fit" in report.law(told(flat)) and "three sizes" in report.law(None)


# --------------------------------------------------------------------------------- files


def point(sweep: str, size: float, **more) -> dict:
    return {
        "sweep": sweep, "target": size, "dense": size, "table_rows": 1000, "table_params": 8000,
        "params": size + 8000, "backbone": "deepfm", "hidden": [64, 32], "updates": "fast",
        "dtype": "float32", "batch": 512, "examples_s": 1e9 / size, "tokens_s": 2e10 / size,
        "step_s": 512 * size / 1e9, "mfu": 0.5, "flops_per_example": 6 * size, "flops_s": 6e9,
        "peak_flops_s": 1.2e10, "tokens_per_example": 20.0, "memory_bytes": 16 * size + 5e8,
        "estimated_bytes": 16 * size, "steps": 3, "disturbed": 0.0, **more,
    }  # fmt: skip


def found(**sweeps: list[dict]) -> dict:
    laws = {}
    for name, points in sweeps.items():
        key = "table_rows" if name == "tables" else "dense"
        law = fit([p[key] for p in points], [p["examples_s"] for p in points])
        laws[name] = {"points": points, "law": None if law is None else told(law)}
    left = [{"sweep": "fm", "size": "1B", "reason": "a step needs 21 GiB"}]
    return {
        "device": "CPU", "dtype": "float32", "date": "2026-01-01", "command": "loopfm scale x.py",
        "sweeps": laws, "left_out": left,
    }  # fmt: skip


def test_picture_and_page_show_every_sweep_and_what_is_missing():
    fm = [point("fm", s) for s in SIZES]
    vm = [point("vm", s, mfu=None, memory_bytes=None, disturbed=0.5) for s in SIZES[:2]]
    tables = [point("tables", r, table_rows=r) for r in (1e5, 1e6, 1e7)]
    whole = found(fm=fm, vm=vm, tables=tables)
    svg = picture.draw(whole)
    assert svg is not None and svg == picture.draw(whole)
    ElementTree.fromstring(svg)
    for words in ("dense parameters", "table rows", "examples/s", "MFU, %", "GiB", "b 1.00 to"):
        assert words in svg
    page = report.markdown(whole)
    assert "| 1M | 64-32 |" in page and "b = 1.00" in page and "fm 1B left out" in page
    assert "cores during vm 1M, vm 3M" in page and "No law" in page
    assert len(report.table(whole).splitlines()) == 1 + len(fm) + len(vm) + len(tables)


@pytest.mark.parametrize("sweeps", [{"tables": [point("tables", 1e6)]}, {"fm": [point("fm", 1e6)]}])
def test_a_single_point_is_a_picture(sweeps):
    assert (picture.draw(found(**sweeps)) or "").startswith("<svg")
    assert picture.draw(found()) is None


# --------------------------------------------------------------------------------- operations


@pytest.mark.parametrize("encoder", ["none", "sum", "din"])
def test_count_is_what_xla_counts_where_products_dominate(encoder, tmp_path):
    """A step of an FM with its compressor, and of VMs whose histories are all full."""
    wide = config(sizes=(2e6,), sweeps=("fm" if encoder == "none" else "vm",))
    if encoder != "none":
        reads = EncoderConfig(encoder, width=64, score_hidden=(128, 64))
        wide = replace(wide, vm=replace(wide.vm, encoder=reads))
    [one] = plan(wide, dtype="float32")
    spec = spec_of(one, tmp_path)
    if encoder != "none":
        spec["histories"] = {**spec["histories"], "mean": spec["histories"]["length"]}
    subject = job.make_subject(spec)
    batch = job.source_of(subject)[0]
    optimiser = make_optimiser(subject.config.train.optim, steps=1)
    graphdef, init = loop.outline(subject.build, optimiser)
    state = jax.eval_shape(init, np.uint32(0))

    def loss(params, rest, batch):
        model = nnx.merge(graphdef, params, rest)
        return subject.task.loss(model, batch, subject.past, jax.random.key(0))[0]

    gradient = jax.jit(jax.grad(loss)).lower(state.params, state.rest, batch)
    counted = gradient.cost_analysis()["flops"] / 32
    assert job.count(subject, spec)[0] == pytest.approx(counted, rel=0.15)
