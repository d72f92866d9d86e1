"""`loopfm scale`: the dial, what a point needs, a sweep end to end, what is found again."""

import json
from dataclasses import replace
from functools import cache
from pathlib import Path

import bench_cases
import jax
import numpy as np
import pytest
from flax import nnx

from loopfm_jax.backbones import BackboneConfig
from loopfm_jax.bench.data import write_log
from loopfm_jax.bench.protocol import peak_rss_bytes
from loopfm_jax.config import Config
from loopfm_jax.data.batches import OrderConfig
from loopfm_jax.errors import UserError
from loopfm_jax.fm.compressor import CompressorConfig
from loopfm_jax.fm.teacher import FMConfig
from loopfm_jax.history.encoders import EncoderConfig
from loopfm_jax.history.store import HistoryConfig
from loopfm_jax.loop import TrainConfig
from loopfm_jax.optim import OptimConfig
from loopfm_jax.scale import job, make, sweep
from loopfm_jax.scale.config import ScaleConfig
from loopfm_jax.scale.dial import Growth, measure, widen
from loopfm_jax.scale.plan import Point, builder, plan, schema_of
from loopfm_jax.tables import TableConfig
from loopfm_jax.units import short
from loopfm_jax.vm.student import VMConfig

TINY = ("--scale.table-rows", "1000", "--scale.examples", "256", "--scale.seconds", "0")
MACHINE = {"device": "x", "platform": "cpu", "devices": 1, "cores": 1}


def config(name: str = "deepfm", **scale) -> Config:
    tables = TableConfig(width=8, row_multiple=1)
    backbone = BackboneConfig(
        name, hidden=(64, 32), attention_hidden=(16, 8), tables=tables, behaviours=True
    )
    train = TrainConfig(OrderConfig(batch=32), OptimConfig(tables="rowwise_adagrad"))
    return Config(
        fm=FMConfig(backbone, compressor=CompressorConfig(width=8, prefixes=(4,)), train=train),
        vm=VMConfig(backbone, encoder=EncoderConfig("mean", width=8), train=train),
        history=HistoryConfig(length=6),
        scale=ScaleConfig(**{"table_rows": 1000, "rows": (1e3, 2e3), "examples": 64, **scale}),
    )


# --------------------------------------------------------------------------------- the dial


@pytest.mark.parametrize("name", ["deepfm", "dcnv2", "din", "dmin"])
def test_every_size_is_hit_and_counted_exactly(name):
    sizes = (3e5, 1e7, 1e9)
    points = plan(config(name, sizes=sizes, sweeps=("fm", "vm")), dtype="float32")
    assert [p.name for p in points[:3]] == ["fm 300k", "fm 10M", "fm 1B"]
    for point in points:
        assert point.size.dense == pytest.approx(point.target, rel=0.02), point.name
        hidden = point.spec["backbone"]["hidden"]
        assert hidden[0] / hidden[1] == pytest.approx(2, rel=0.1)
        assert point.spec["backbone"]["attention_hidden"] == (16, 8)  # the DNN alone grows


@pytest.mark.parametrize("name", ["wukong", "kunlun"])
def test_a_stack_grows_deeper_by_the_root_of_how_it_grows_wider(name):
    [point] = plan(config(name, sizes=(2e7,), sweeps=("fm",)), dtype="float32")
    grown = point.spec["backbone"]
    factor = grown["hidden"][0] / 64
    assert point.size.dense == pytest.approx(point.target, rel=0.03)
    assert grown["layers"] > 3 and grown["layers"] == pytest.approx(3 * factor**0.5, abs=0.6)
    assert name == "wukong" or grown["token_width"] == pytest.approx(64 * factor, rel=0.1)


def test_the_count_is_of_the_model_that_is_built():
    for name in ("fm", "vm"):
        build = builder(config(), name, config().fm.backbone, schema_of(1000))
        params = jax.tree.leaves_with_path(nnx.state(build(nnx.Rngs(0)), nnx.Param))
        tables = sum(x.size for path, x in params if "rows_VE" in jax.tree_util.keystr(path))
        size = measure(build)
        assert (size.tables, size.dense) == (tables, sum(x.size for _, x in params) - tables)


def test_attention_scores_grow_where_they_are_told_to():
    wide = widen(BackboneConfig("din", hidden=(64, 4), attention_hidden=(40,)), 4.1, Growth("all"))
    assert wide.hidden == (264, 16)  # wide layers are multiples of 8
    assert wide.attention_hidden == (160,)
    assert widen(wide, 1e-9, Growth("all")).hidden == (1, 1)


@pytest.mark.parametrize("rows", [1000, 100_000, 30_000_000])
def test_tables_have_the_rows_that_were_asked_for(rows):
    schema = schema_of(rows)
    assert schema.table_rows == pytest.approx(rows, rel=0.01)
    assert all(schema[f.shares].rows == f.rows for f in schema.sequences if f.shares)
    assert schema["pid"].rows == 4  # small vocabularies stay


def test_the_sweep_over_tables_learns_touched_rows_of_one_model():
    exact = config()
    train = replace(exact.fm.train, optim=OptimConfig())
    exact = replace(exact, fm=replace(exact.fm, train=train))
    points = plan(replace(exact, scale=replace(exact.scale, sweeps=("tables",))), dtype="float32")
    assert [p.table_rows for p in points] == [1000, 2000]
    assert points[0].size.dense == points[1].size.dense
    assert points[0].size.tables < points[1].size.tables
    assert {p.spec["optim"]["tables"] for p in points} == {"rowwise_adagrad"}


# --------------------------------------------------------------------------------- a point


def spec_of(point: Point, folder: Path) -> dict:
    schema = schema_of(point.table_rows)
    written = write_log(folder / "log.npz", schema, rows=64, fill=0.58)
    return {**point.spec, "log": str(folder / "log.npz"), **written}


@pytest.mark.parametrize("name", ["fm", "vm", "tables"])
def test_a_point_steps_and_tells_what_it_read(name, tmp_path):
    [point, *_] = plan(config(sizes=(3e4,), sweeps=(name,)), dtype="float32")
    spec = spec_of(point, tmp_path)
    pace = job.Pace(spec)
    measured = pace.run(seconds=0, steps=3)
    assert measured.steps == 3 and measured.examples == 96 and measured.more["step_s"] > 0
    assert pace.facts["params"] == point.size.dense + point.size.tables
    events = spec["tokens"] + (2 if name == "vm" else 0)  # histories of 2 in the mean
    assert pace.facts["tokens"] == pytest.approx(events, rel=0.05)


def test_a_step_needs_at_least_state_and_gradients(tmp_path):
    exact = config(sizes=(3e6,), sweeps=("fm",))
    [point] = plan(exact, dtype="float32")
    needs = job.Needs(spec_of(point, tmp_path)).facts
    assert needs["needs_bytes"] > 16 * point.size.dense
    process = peak_rss_bytes() or 0
    assert needs["needs_bytes"] < 24 * point.size.dense + process + 2**28
    assert needs["limit_bytes"] > 0


def test_a_point_that_needs_more_than_there_is_is_refused():
    needs = {"needs_bytes": 19 * 2**30, "limit_bytes": 20 * 2**30}
    assert "needs 19.00 GiB" in (sweep.refusal(needs, 0) or "")  # some is left free
    assert sweep.refusal({**needs, "limit_bytes": 24 * 2**30}, 0) is None
    assert sweep.refusal({**needs, "limit_bytes": None}, 0) is None  # nobody knows
    assert "--scale.memory-gib is 8.00 GiB" in (sweep.refusal(needs, 8) or "")
    assert sweep.refusal(needs, 19) is None


def test_batches_of_every_shape_are_met_before_the_clock_runs(tmp_path):
    [point] = plan(config(sizes=(3e4,), sweeps=("fm",)), dtype="float32")
    subject = job.make_subject(spec_of(point, tmp_path))
    source = job.source_of(subject)
    assert len(source) == 2

    def sizes(batches) -> set[str]:
        return {str(jax.tree.map(np.shape, batch)) for batch in batches}

    assert sizes(job.every_shape(source)) == sizes(source[i] for i in range(2))


# --------------------------------------------------------------------------------- a sweep


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=0")  # one device, as users
    monkeypatch.setattr(sweep, "LIMITS", bench_cases.LIMITS)
    monkeypatch.setattr(make, "ask_machine", cache(sweep.ask_machine))


def test_a_sweep_is_written_and_found_again(quick, loopfm, monkeypatch):
    options = (*TINY, "--scale.sweeps", "fm", "--scale.sizes", "4e3", "1e4")
    said = loopfm.succeed("scale", *options)
    assert said["sweeps"]["fm"]["size"] == pytest.approx([4e3, 1e4], rel=0.05)
    assert said["sweeps"]["fm"]["law"] is None and not said["left_out"]
    folder = loopfm.workdir / "scale"
    written = json.loads((folder / "scale.json").read_text())
    first, second = written["sweeps"]["fm"]["points"]
    assert first["examples_s"] == pytest.approx(64 / first["step_s"])
    assert first["mfu"] == pytest.approx(first["flops_s"] / first["peak_flops_s"])
    assert second["flops_per_example"] > first["flops_per_example"] > 0
    assert first["memory_bytes"] > 0 and first["updates"] == "exact"
    lines = (folder / "scale.csv").read_text().splitlines()
    assert len(lines) == 3 and lines[0].startswith("sweep,target,dense")
    assert (folder / "scale.svg").read_text().startswith("<svg")
    assert "FM by dense parameters" in (folder / "scale.md").read_text()

    def attempt(machine, point, scratch, at):
        attempted.append(point.name)
        return sweep.LeftOut(point, "not now")

    attempted: list[str] = []
    monkeypatch.setattr(sweep, "_attempt", attempt)
    again = loopfm.succeed("scale", *options, "--scale.sizes", "4e3", "1e4", "2e4")
    assert attempted == ["fm 20k"] and again["left_out"][0]["reason"] == "not now"
    assert again["sweeps"]["fm"]["examples_s"] == said["sweeps"]["fm"]["examples_s"]
    damaged = next((folder / "points").glob("fm-4k-*.json"))
    damaged.write_text(damaged.read_text().replace('"steps": 3', '"steps": 4'))
    attempted.clear()
    loopfm.succeed("scale", *options)
    assert attempted == ["fm 4k"]
    attempted.clear()
    loopfm.succeed("scale", *options, "--scale.steps", "4")
    assert attempted == ["fm 4k", "fm 10k"]
    attempted.clear()
    loopfm.succeed("scale", *options, "--force")
    assert attempted == ["fm 4k", "fm 10k"]


def test_what_does_not_fit_is_left_out_by_name(quick, loopfm, monkeypatch):
    monkeypatch.setattr(make, "ask_machine", lambda: MACHINE)
    monkeypatch.setattr(sweep.Machine, "limits", {"flops": 1e9})
    options = ("--scale.sweeps", "vm", "--scale.sizes", "1e5", "--scale.memory-gib", "0.01")
    said = loopfm.succeed("scale", *TINY, *options)
    [left] = said["left_out"]
    assert (left["sweep"], left["size"]) == ("vm", "100k")
    assert "GiB" in left["reason"] and "--scale.memory-gib" in left["reason"]
    assert "vm 100k left out" in (loopfm.workdir / "scale" / "scale.md").read_text()
    assert not (loopfm.workdir / "scale" / "scale.svg").exists()


# --------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--scale.sizes", "100"], ("scale.sizes holds 100", "dense parameters")),
        (["--scale.sizes", "1e6", "1e6"], ("scale.sizes is [1e+06 1e+06]", "once")),
        (["--scale.rows", "10"], ("scale.rows[0] is 10", "1000")),
        (["--scale.steps", "1"], ("scale.steps is 1", "at least 3")),
        (["--scale.sizes", "-1"], ("scale.sizes[0] is -1",)),
        (["--fm.backbone.name", "fm2"], ("fm.backbone.name is fm2", "deepfm", "--scale.sweeps")),
        (["--vm.backbone.name", "dmr", "--scale.sweeps", "vm"], ("vm.backbone.name is dmr",)),
        (["--fm.train.order.batch", "512"], ("fm.train.order.batch is 512", "scale.examples")),
        (["--mesh.data", "99"], ("needs 99 devices",)),
    ],
)
def test_mistakes_get_one_message(options, words, loopfm, monkeypatch):
    monkeypatch.setattr(make, "ask_machine", lambda: MACHINE)
    message = loopfm.refuse("scale", *TINY, *options)
    assert all(word in message for word in words), message


def test_processes_that_do_not_start_are_said(monkeypatch):
    monkeypatch.setattr(sweep, "MODULE", "loopfm_jax.scale.none_such")
    with pytest.raises(UserError, match="does not start: .*No module named"):
        sweep.ask_machine()


def test_sizes_are_named_as_people_say_them():
    assert [short(x) for x in (999, 999.7, 1e3, 2.5e6, 999.7e6)] == [
        "999",
        "1k",
        "1k",
        "2.5M",
        "1B",
    ]
