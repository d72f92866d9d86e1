"""The arithmetic of benchmarks: rounds, quartiles, agreement, counts of operations."""

from dataclasses import replace

import bench_cases
import jax
import numpy as np
import pytest
from flax import nnx

from loopfm_jax.backbones.stack import Stack
from loopfm_jax.bench import flops, measure
from loopfm_jax.bench.case import Timed, difference
from loopfm_jax.bench.data import draw_lengths, read_log
from loopfm_jax.bench.measure import Round, ratios, spread
from loopfm_jax.bench.model import make_subject
from loopfm_jax.bench.protocol import Measured, timed, timed_each
from loopfm_jax.bench.public import PUBLIC
from loopfm_jax.bench.rows import BF16, CASES, DIN, EXACT, FAST, FUXICTR, LogSpec, describe
from loopfm_jax.data.batches import GlobalBatches


def slice_of(value: float) -> Measured:
    return Measured(value, steps=1, examples=1, seconds=1.0, cpu_seconds=1.0)


def test_ratio_is_above_one_where_we_are_better():
    rounds = [
        Round({"a": slice_of(a), "b": slice_of(b)}, 0.0) for a, b in ((10, 5), (30, 10), (8, 8))
    ]
    assert ratios(rounds, "a", "b", more_is_better=True) == [2.0, 3.0, 1.0]
    assert ratios(rounds, "a", "b", more_is_better=False) == pytest.approx([0.5, 1 / 3, 1.0])
    found = spread([2.0, 3.0, 1.0])
    assert (found.low, found.median, found.high) == (1.5, 2.0, 2.5)


def test_disturbed_rounds_are_repeated_and_a_third_of_them_at_most(monkeypatch):
    shares = iter([0.0, 0.9, 0.0, 0.0, 0.0, 0.0])
    monkeypatch.setattr(measure, "take_round", lambda *_, **__: Round({}, next(shares)))
    taken = measure.take_rounds({}, rounds=3, seconds=0)
    assert [r.others for r in taken] == [0.0, 0.0, 0.0]
    shares = iter([0.9, 0.8, 0.3, 0.4, 0.5, 0.2, 0.1])
    taken = measure.take_rounds({}, rounds=3, seconds=0)
    assert [r.others for r in taken] == [0.8, 0.3, 0.4]  # of four, the quietest


def test_whole_steps_until_the_time_is_over():
    losses: list[float] = []
    found = timed(lambda: losses.append(1.0), losses.clear, seconds=0, steps=4, examples=8)
    assert (found.steps, found.examples) == (4, 32)
    assert found.value == pytest.approx(32 / found.seconds)
    assert timed_each(lambda: None, seconds=0, steps=3, examples=1).value < 1e3


def test_losses_must_agree_over_the_steps_that_can():
    def side(of, *losses: float) -> Timed:
        return Timed(of, child=None, facts={}, losses={None: losses})  # type: ignore[arg-type]

    case = next(c for c in CASES if c.name == "fm-train/din-bars-no-dropout")
    ours, theirs = side(EXACT, 0.7, 0.6, 0.4), side(FUXICTR, 0.7, 0.6, 0.5)
    assert difference(case, ours, theirs) == pytest.approx(0.2)
    assert difference(case, replace(ours, side=FAST), theirs) == 0  # updates differ: the start
    assert difference(case, side(EXACT, 0.7), side(BF16, 0.7)) is None  # too few to say


def test_count_of_the_public_din_is_the_known_one():
    """PERF: 12.0k examples/s at a peak of 500 GFLOP/s and 58 % full."""
    count = flops.train(PUBLIC["TaobaoAd_x1"].schema, DIN, tokens=29, pairs=0)
    assert 500e9 / count == pytest.approx(12.0e3, rel=0.05)


def unrolled(stack: Stack, x, *beside, key=None):
    """As a stack's call, every layer written out: XLA counts the body of a loop once."""
    graphdef, state = nnx.split(stack.layers)
    for i in range(stack.count):
        layer = jax.tree.map(lambda p, i=i: p[i], nnx.to_pure_dict(state))
        x = nnx.merge(graphdef, layer)(x, *beside, key=key)
    return x


@pytest.mark.parametrize(
    "name", ["deepfm", "wukong", "din", "dmin", "hstu", "interformer", "kunlun"]
)
def test_count_is_what_xla_counts_where_products_dominate(name, tmp_path, monkeypatch):
    monkeypatch.setattr(Stack, "__call__", unrolled)
    wide = {"hidden": (128, 64), "attention_hidden": (128, 64), "heads": 1, "behaviours": True}
    config = bench_cases.backbone(name, **wide)
    config = replace(config, tables=replace(config.tables, width=64))
    log = LogSpec(bench_cases.SCHEMA, rows=64, fill=1.0)  # as many events as slots
    spec = {**describe(log.schema, config, 64), **(facts := log(tmp_path))}
    subject = make_subject(spec)
    order = subject.config.train.order
    batch = GlobalBatches(subject.rows, subject.examples.batch, config=order)[0]
    graphdef, state = nnx.split(nnx.eval_shape(lambda: subject.build(nnx.Rngs(0))))
    forward = jax.jit(lambda s, b: nnx.merge(graphdef, s)(b, subject.past).logits_B)
    counted = forward.lower(state, batch).cost_analysis()["flops"] / 64
    found = flops.forward(log.schema, config, tokens=facts["tokens"], pairs=facts["pairs"])
    assert found == pytest.approx(counted, rel=0.15)


def test_generated_log_is_what_was_asked_for(tmp_path):
    schema = PUBLIC["TaobaoAd_x1"].schema
    log = LogSpec(schema, rows=4000)
    facts = log(tmp_path)
    assert facts["tokens"] == pytest.approx(0.58 * 50, rel=0.03)
    inputs = read_log(tmp_path / "log.npz", schema)
    first, rows = inputs.log["ids"], np.arange(4000)
    for i, f in enumerate(schema.categorical):
        local = first[:, i] - schema.offsets[f.name]
        assert local.min() >= 1 and local.max() < f.rows
    lengths = [inputs.log.ragged[n].lengths for n in schema.behaviours[0].history]
    assert all((x == lengths[0]).all() for x in lengths) and lengths[0].max() == 50
    assert 0.1 < inputs.log["label"].mean() < 0.5 and len(rows) == len(inputs.log)
    again = tmp_path / "again"
    again.mkdir()
    assert log(again) | {"log": ""} == facts | {"log": ""}


@pytest.mark.parametrize("fill", [0.1, 0.3, 0.58, 0.9, 1.0])
def test_lengths_have_the_asked_mean(fill):
    found = draw_lengths(np.random.default_rng(0), 20_000, longest=100, fill=fill)
    assert found.mean() / 100 == pytest.approx(fill, rel=0.03) and found.max() <= 100
