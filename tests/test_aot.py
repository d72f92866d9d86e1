"""`loopfm compile`: collectives as the compiler writes them, the account, the command itself."""

import json
from dataclasses import replace
from importlib.util import find_spec

import bench_cases
import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding

from loopfm_jax.aot import account, chips, shapes, work
from loopfm_jax.aot.hlo import Collective, collectives
from loopfm_jax.aot.programs import PROGRAMS, Setting
from loopfm_jax.bench import flops
from loopfm_jax.bench.model import make_subject
from loopfm_jax.bench.rows import LogSpec, describe
from loopfm_jax.config import Config
from loopfm_jax.data.batches import GlobalBatches, OrderConfig
from loopfm_jax.fm.compressor import CompressorConfig
from loopfm_jax.fm.teacher import FMConfig
from loopfm_jax.history.encoders import EncoderConfig
from loopfm_jax.history.store import HistoryConfig
from loopfm_jax.loop import TrainConfig
from loopfm_jax.optim import OptimConfig
from loopfm_jax.sharding import FSDP, MeshConfig, gather, make_mesh, mesh_of, split
from loopfm_jax.vm.student import VMConfig

HLO = """
HloModule step

%add (x: f32[], y: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%x, %y)
}

%body (state: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %gathered = f32[8,4]{1,0} all-gather(%part), channel_id=1, replica_groups=[2,4]<=[8], dimensions={0}
}

%spread (x: f32[16]) -> f32[16] {
  %again = f32[16]{0} all-reduce(%x), channel_id=2, replica_groups={{0,1},{2,3}}, to_apply=%add
}

%all-reduce-scatter.1 (x: f32[15]) -> f32[8] {
  %summed = f32[16]{0} all-reduce(%x), channel_id=5, replica_groups={{0,1},{2,3}}, to_apply=%add
}

ENTRY %main (a: f32[8,4]) -> f32[8,4] {
  %once = f32[16]{0} all-reduce(%x), channel_id=2, replica_groups={{0,1},{2,3}}, to_apply=%add
  %twice = f32[16]{0} fusion(%x), kind=kCustom, calls=%spread
  %loop = (s32[], f32[8,4]{1,0}) while(%init), condition=%more, body=%body, backend_config={"known_trip_count":{"n":"3"}}
  %cut = f32[8]{0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.1
  %moved = (bf16[6]{0}, bf16[6]{0}, u32[], u32[]) collective-permute-start(%b), channel_id=3
  %scattered = f32[2]{0} reduce-scatter(%x), channel_id=4, replica_groups=mesh['a'=2,'b'=4] {'b'}, to_apply=%add
}
"""  # noqa: E501


def test_collectives_are_counted_by_what_a_device_receives():
    assert collectives(HLO, devices=8) == [
        Collective("all-gather", 3, 3 * 8 * 4 * 4 * 3 / 4),  # three trips, a quarter is its own
        Collective("all-reduce", 1, 2 * 16 * 4 / 2),  # one channel, written twice
        Collective("reduce-scatter", 2, 3 * 2 * 4 + 16 * 4 / 2),  # and one as TPUs write it
        Collective("collective-permute", 1, 6 * 2),
    ]


BACKBONE = bench_cases.backbone("din", hidden=(16, 8))
BACKBONE = replace(BACKBONE, tables=replace(BACKBONE.tables, row_multiple=8))
TRAIN = TrainConfig(OrderConfig(batch=16), OptimConfig(tables="rowwise_adagrad"))


def setting(data: int = 2, **compile_options) -> Setting:
    config = Config(
        fm=FMConfig(BACKBONE, compressor=CompressorConfig(width=8, prefixes=(4,)), train=TRAIN),
        vm=VMConfig(BACKBONE, encoder=EncoderConfig("mean", width=8), train=TRAIN),
        history=HistoryConfig(length=6),
    )
    options = replace(config.compile, store_rows=100, **compile_options)
    mesh = make_mesh(MeshConfig(data=data))
    return Setting(replace(config, compile=options), bench_cases.SCHEMA, mesh)


def test_batches_have_the_shapes_of_those_that_pipelines_make(tmp_path):
    """Of sequences that are all half full."""
    schema = bench_cases.SCHEMA
    facts = LogSpec(schema, rows=16, fill=0.5)(tmp_path)
    subject = make_subject({**describe(schema, BACKBONE, 16), **facts})
    order = OrderConfig(batch=16)
    want = GlobalBatches(subject.rows, subject.examples.batch, config=order)[0]
    found = shapes.batch(schema, make_mesh(MeshConfig()), examples=16, fill=0.5)
    assert jax.tree.structure(found) == jax.tree.structure(want)
    for path, leaf in jax.tree_util.tree_leaves_with_path(want):
        own = jax.tree_util.tree_leaves_with_path(found)
        [shape] = [x for p, x in own if p == path]
        assert (shape.dtype, len(shape.shape)) == (leaf.dtype, leaf.ndim), path
        if "ids_PSG" not in str(path):
            assert shape.shape == leaf.shape, path


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_compiles_and_its_bytes_are_told_by_kind(name):
    one = setting()
    program = PROGRAMS[name](one)
    told = account.account(program, program.lowered.compile(), devices=2)
    kinds = told["bytes"]
    rows = bench_cases.SCHEMA.table_rows
    assert kinds["tables"] >= rows * 4 * 4 / 2, "a half of the rows is on a device"
    assert ("store" in kinds) == (name == "vm-train")
    assert ("optimiser" in kinds) == (name != "export")
    assert told["total_bytes"] == sum(kinds.values()) and told["collective_bytes"] > 0
    chip = chips.Chip(flops=1e12, memory=told["total_bytes"], bandwidth=1e9, links=1e9)
    work_of = work.work_of(one, name, program.examples)
    found = account.estimate(told, chip, flops=work_of, devices=2)
    assert not found["fits"], "a part of the memory is not for programs"
    assert found["arithmetic_s"] == pytest.approx(work_of / 2 / 1e12)
    assert found["at_best_s"] <= found["at_worst_s"] <= 3 * found["at_best_s"]
    assert found["links_s"] == pytest.approx(told["collective_bytes"] / 1e9)


@pytest.mark.parametrize(
    ("code", "encoder", "prefix"),
    [("kmeans4", {}, 0), ("rq", {}, 0), ("rq", {"trainable_codes": True}, 0), ("int4", {}, 4)],
)
def test_every_code_that_can_be_exported_can_be_compiled_for(code, encoder, prefix):
    one = setting()
    config = one.config
    config = replace(
        config,
        export=replace(config.export, code=code, prefix=prefix),
        vm=replace(config.vm, encoder=replace(config.vm.encoder, **encoder)),
    )
    for name in ("export", "vm-train"):
        program = PROGRAMS[name](replace(one, config=config))
        assert program.lowered.compile()


def test_work_is_that_of_the_bench():
    one = setting(fill=1.0)
    length = bench_cases.SCHEMA["item_his"].length
    pairs = length * (length + 1) / 2
    each = flops.train(bench_cases.SCHEMA, BACKBONE, tokens=length, pairs=pairs)
    compressor, inputs = one.config.fm.compressor, 16  # hidden_0
    train = each + flops.compressor_train(compressor, inputs)
    assert work.work_of(one, "fm-train", 10) == pytest.approx(10 * train)
    export = each / 3 + flops.compressor(compressor, inputs)
    assert work.work_of(one, "export", 10) == pytest.approx(10 * export)
    assert flops.compressor(compressor, inputs) == 2 * (16 * 128 + 128 * 8)
    assert work.work_of(one, "vm-train", 10) > 10 * each


def test_the_command_writes_its_files(loopfm, monkeypatch):
    monkeypatch.setattr(chips, "simulate", lambda topologies: None)  # there are eight already
    options = ("--compile.programs", "export", "--compile.table-rows", "1000")
    said = loopfm.succeed("compile", "--topology", "cpu:1", "cpu:2", *options)
    one, two = said["programs"]
    assert one["collective_bytes"] == 0 < two["collective_bytes"]
    folder = loopfm.workdir / "compile"
    written = json.loads((folder / "compile.json").read_text())
    assert [row["mesh"] for row in written["programs"]] == [
        {"data": 1, "model": 1},
        {"data": 2, "model": 1},
    ]
    assert "cpu:2" in (folder / "compile.md").read_text()
    assert (folder / "compile.svg").read_text().startswith("<svg")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--topology", "v9:2x2"], ("v9:2x2", "v5e")),
        (["--topology", "v5e"], ("v5e", "16x16")),
        (["--topology", "cpu:99"], ("cpu:99", "simulated")),
        (["--topology", "cpu:4", "--mesh.model", "3"], ("mesh.model = 3", "1, 2, 4")),
        (["--topology", "cpu:1", "cpu:1"], ("compile.topology", "once")),
        (["--compile.table-rows", "0", "--topology", "cpu:1"], ("loopfm prepare",)),
    ],
)
def test_mistakes_get_one_message(options, words, loopfm, monkeypatch):
    monkeypatch.setattr(chips, "simulate", lambda topologies: None)
    message = loopfm.refuse("compile", *options)
    assert all(word in message for word in words), message


@pytest.fixture
def libtpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """It ends the process at the first of these tests' flags, which are for CPU."""
    if find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed (extra [aot])")
    jax.devices("cpu")  # they are read before
    monkeypatch.delenv("XLA_FLAGS")


@pytest.mark.usefixtures("libtpu")
def test_the_gradient_of_a_kernel_that_fsdp_splits_is_summed_in_its_parts():
    devices = chips.find("v5p:2x2x2")
    mesh = mesh_of(MeshConfig(4, 2), devices.devices)
    kernel = jax.ShapeDtypeStruct((512, 1024), jnp.float32, sharding=NamedSharding(mesh, FSDP))
    x_BX = jax.ShapeDtypeStruct((64, 512), jnp.float32, sharding=split(mesh, "examples"))

    def loss(kernel, x_BX):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return jnp.square(x_BX @ gather(kernel)).sum()

    step = jax.jit(jax.grad(loss), out_shardings=kernel.sharding).lower(kernel, x_BX).compile()
    sent = {c.kind: c.bytes for c in collectives(step.as_text() or "", devices=8)}
    part = 512 * 1024 / 2 * 2 * 3 / 4  # of a half of the columns, in bfloat16 or float32
    assert part <= sent["all-gather"] <= 2 * part and part <= sent["reduce-scatter"] <= 2 * part
    assert sent.get("all-reduce", 0) < part / 100


@pytest.mark.usefixtures("libtpu")
def test_the_smallest_tpu_slice_is_compiled_for():
    devices = chips.find("v5e:1x1")
    assert devices.platform == "tpu" and len(devices.devices) == 1
    one = replace(setting(), mesh=mesh_of(MeshConfig(), devices.devices))
    program = PROGRAMS["export"](one)
    told = account.account(program, program.lowered.compile(), devices=1)
    assert told["bytes"]["program"] > 0 and told["bytes"]["activations"] > 0
    assert told["collective_bytes"] == 0
    assert not account.estimate(told, replace(devices.chip, memory=1), flops=1.0, devices=1)["fits"]
