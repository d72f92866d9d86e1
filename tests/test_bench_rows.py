"""The jobs of rows that are not about a model's steps, at a size at which rates mean nothing."""

from dataclasses import replace
from pathlib import Path

import bench_cases
import numpy as np
import pytest

from loopfm_jax.bench import flops
from loopfm_jax.bench.data import draw_lengths
from loopfm_jax.bench.exporting import BATCHES
from loopfm_jax.bench.feeding import COMPARED, content
from loopfm_jax.bench.rows import (
    CASES,
    EXACT,
    EXACT_BF16,
    ON_ACCELERATORS,
    LogSpec,
    choose,
    compress,
    devices,
    export,
    fm_train,
    grow,
    nothing,
    read_codes,
    structure,
)
from loopfm_jax.bench.worker import job_of
from loopfm_jax.history.encoders import EncoderConfig, spec_of
from loopfm_jax.inputs import open_inputs


def started(case, folder, facts=None):
    """Jobs by side; those in FuxiCTR's interpreter are left out."""
    facts = case.prepare(folder) if facts is None else facts
    sides = [s for s in (*case.ours, *case.peers) if s.worker == "ours"]
    return {s.name: job_of({**case.spec, **facts, **s.spec}) for s in sides}


@pytest.mark.parametrize("mean_history", [3, 20])
def test_structuring_and_the_loop_read_the_same_log(tmp_path, mean_history):
    case = structure(2000, mean_history)
    assert case.prepare is nothing
    ours, loop = started(case, tmp_path).values()
    assert ours.facts == loop.facts == {"events": 2000}  # so few that the loop takes all keys
    found, slow = (job.run(seconds=0, steps=2) for job in (ours, loop))
    assert found.steps == slow.steps == 2 and found.examples == slow.examples == 4000
    assert found.more["mean_length"] == pytest.approx(mean_history, rel=0.2)


def test_export_stores_half_a_byte_a_number(tmp_path):
    log = bench_cases.LOG
    jobs = started(export(bench_cases.DIN, batch=16, prepare=log), tmp_path)
    assert jobs["loopfm"].facts == {"code_bytes_per_row": 32}
    counts = {name: job.run(seconds=0, steps=1).examples for name, job in jobs.items()}
    assert len(set(counts.values())) == 1 and counts["loopfm"] == BATCHES * 16


def test_packed_and_padded_encoders_learn_the_same(tmp_path):
    jobs = started(bench_cases.ENCODER, tmp_path)
    packed, padded = (job.run(seconds=0, steps=4).losses for job in jobs.values())
    assert packed == pytest.approx(padded, rel=1e-5) and len(set(packed)) == 4


def test_the_encoder_row_counts_the_events_it_draws():
    case = bench_cases.ENCODER
    length_N = draw_lengths(np.random.default_rng(0), 16 * 32, longest=6, fill=0.3)
    tokens, pairs = length_N.mean(), (length_N * (length_N + 1) / 2).mean()
    config = EncoderConfig("dmin", width=8, heads=4)
    deep = flops.dmin(spec_of(config).config, 8, tokens, pairs)
    want = 3 * deep + (2 * tokens + 3) * 2 * 8 * 8  # no gradient goes into the codes
    assert case.flops is not None and case.flops({}) == pytest.approx(want)


def test_in_bf16_the_start_is_the_same_within_its_digits(tmp_path):
    """What a CPU computes of it shows that the sides are told."""
    case = bench_cases.TRAIN
    assert [(s.mode, s.dtype, s.where) for s in case.ours] == [
        ("exact", "float32", "everywhere"), ("fast", "float32", "everywhere"),
        ("exact", "bfloat16", "accelerator"), ("fast", "bfloat16", "accelerator"),
    ]  # fmt: skip
    wide, narrow = (
        started(replace(case, ours=(side,), peers=()), tmp_path)["loopfm"].run(seconds=0, steps=3)
        for side in (case.ours[0], case.ours[2])
    )
    assert narrow.losses != wide.losses
    np.testing.assert_allclose(narrow.losses, wide.losses, rtol=1e-2)


def test_sides_in_bf16_run_where_it_is_faster():
    slow = {"platform": "cpu", "flops": 2e11, "flops_bfloat16": 1.9e11}
    fast, gpu = {**slow, "flops_bfloat16": 4e11}, {**slow, "platform": "gpu"}
    sides = {s.where: s for s in (EXACT, EXACT_BF16, *ON_ACCELERATORS)}
    runs = {where: [side.runs(x) for x in (slow, fast, gpu)] for where, side in sides.items()}
    assert runs == {
        "everywhere": [True, True, True],
        "bfloat16": [False, True, True],
        "accelerator": [False, False, True],
    }


def test_tables_grow_in_all_fields_alike_and_learn_by_rows(tmp_path):
    case = bench_cases.TABLES
    jobs = started(case, tmp_path)
    large, small = jobs["loopfm"].facts["params"], jobs["0m-rows"].facts["params"]
    assert large - small > 0.98 * 4500 * (16 + 1)  # and a weight per row
    assert case.ours[0].spec["optim"]["tables"] == "rowwise_rms"
    losses = jobs["loopfm"].run(seconds=0, steps=3).losses
    assert losses[0] == pytest.approx(np.log(2), abs=1e-3) and losses[2] < losses[0]
    assert grow(bench_cases.SCHEMA, 7900).table_rows == pytest.approx(7900, rel=0.01)


def test_devices_are_simulated_in_the_sides_own_process():
    case = devices(8)
    assert "device_count=8" in case.ours[0].env["XLA_FLAGS"] and not case.peers[0].env
    assert (
        case.ours[0].spec["mesh"] == {"data": 8} and case.spec["backbone"]["tables"]["row_multiple"]
    )


def test_devices_learn_of_the_batches_that_one_device_does(tmp_path):
    """Also where some need a larger budget only if they are laid out in parts."""
    log = LogSpec(bench_cases.SCHEMA, rows=1280, fill=0.24)
    tables = replace(bench_cases.DIN.tables, row_multiple=4, init_std=0.1)
    case = fm_train("tiny", replace(bench_cases.DIN, tables=tables), batch=64, prepare=log)
    spec = {**case.spec, **log(tmp_path)}
    mesh, parts = {"mesh": {"data": 4}}, {"parts": (1, 4)}
    sides = mesh | parts, parts, mesh
    many, one, other = (job_of({**spec, **side}).run(seconds=0, steps=6).losses for side in sides)
    assert many == pytest.approx(one, rel=1e-5)
    assert many != pytest.approx(other, rel=1e-3)


def test_codes_take_half_a_byte_a_number(tmp_path):
    ours, plain = started(compress(24, width=8, batch=16), tmp_path).values()
    assert ours.facts["code_bytes_per_row"] == 4 and plain.facts["code_bytes_per_row"] == 32
    assert ours.run(seconds=0, steps=3).examples == 48
    ours, plain = started(read_codes(width=8, batch=16, entries=50), tmp_path).values()
    assert 8 * ours.facts["store_bytes"] == plain.facts["store_bytes"] == 50 * 8 * 4
    assert plain.run(seconds=0, steps=3).examples == 48


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """What the rows `input` read."""
    return bench_cases.PREPARED(tmp_path_factory.mktemp("input"))


def test_the_rows_input_are_memory_and_blocks_with_the_same_content_and_bytes():
    cases = choose(CASES, ("input",))
    assert [c.name.removeprefix("input/") for c in cases] == [
        "memory", "blocks", "blocks-mixed", "bytes-disk", "bytes-memory",
    ]  # fmt: skip
    assert len({c.prepare for c in cases}) == 1  # written once
    assert [c.check is not None for c in cases] == [True, True, False, False, False]
    assert [c.more_is_better for c in cases] == [True, True, True, False, False]
    assert {p.spec["loader"] for c in cases[1:3] for p in c.peers} == {"blocks"}
    assert [p.spec["format"] for p in cases[3].peers] == ["npz", "parquet"]


def test_batches_from_blocks_have_the_content_of_those_in_memory(tmp_path, written):
    told = {}
    for case in bench_cases.INPUT[:3]:
        (job,) = started(case, tmp_path, written).values()
        told[case.name] = job.run(seconds=0, steps=COMPARED).losses
        assert job.run(seconds=0, steps=2).examples == 2 * 64
    assert told["input/memory"] == told["input/blocks"] and len(set(told["input/memory"])) == 4
    assert not set(told["input/blocks-mixed"]) & set(told["input/blocks"])


def test_content_by_the_book(written):
    schema = bench_cases.SCHEMA
    inputs = open_inputs(Path(written["prepared"]), reader="fm", behaviours=True)
    rows, log = np.arange(7, 12), inputs.log
    total = 0.0
    for place, row in enumerate(rows, start=1):
        own = float(log["label"][row]) + float(log["floats"][row].sum())
        for i, f in enumerate(schema.categorical):
            own += (i + 1) * (int(log["ids"][row, i]) - schema.offsets[f.name])
        for f in schema.sequences:
            newest_first = log.padded(f.name, rows)[place - 1][::-1]
            for age, event in enumerate(newest_first, start=1):
                own += age * (int(event) - schema.offsets[f.name]) * bool(event)
        total += place * own
    assert content(inputs.batch(rows), schema) == pytest.approx(total / 25, rel=1e-12)
    swapped = content(inputs.batch(rows[[1, 0, 2, 3, 4]]), schema)
    assert swapped != pytest.approx(total / 25, rel=1e-9)


def test_bytes_of_a_row(tmp_path, written):
    disk, held = (started(case, tmp_path, written)["loopfm"] for case in bench_cases.INPUT[3:])
    folder = Path(written["prepared"])
    found = disk.run(seconds=0, steps=1)
    whole = sum(p.stat().st_size for p in folder.glob("generated/**/*.array_record*"))
    log = open_inputs(folder, reader="fm", behaviours=True).log
    assert found.value == pytest.approx(whole / len(log))
    events = sum(r.values.nbytes for r in log.ragged.values()) / len(log)
    ids, floats, lengths, label, times_and_keys = 4 * 3, 4, 2 * 4, 1, 4 * 8
    fixed = ids + floats + lengths + label + times_and_keys
    assert held.run(seconds=0, steps=1).value == pytest.approx(fixed + events)
