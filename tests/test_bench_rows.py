"""The jobs of rows that are not about a model's steps, at a size at which rates mean nothing."""

import bench_cases
import numpy as np
import pytest

from loopfm_jax.bench import flops
from loopfm_jax.bench.data import draw_lengths
from loopfm_jax.bench.rows import compress, devices, export, grow, nothing, read_codes, structure
from loopfm_jax.bench.worker import JOBS
from loopfm_jax.history.encoders import EncoderConfig, spec_of


def started(case, folder):
    """Jobs by side."""
    facts = case.prepare(folder)
    sides = (*case.ours, *case.peers)
    return {s.name: JOBS[(spec := {**case.spec, **facts, **s.spec})["job"]](spec) for s in sides}


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
    assert len(set(counts.values())) == 1 and counts["loopfm"] == log.rows // 16 * 16


def test_packed_and_padded_encoders_learn_the_same(tmp_path):
    jobs = started(bench_cases.ENCODER, tmp_path)
    packed, padded = (job.run(seconds=0, steps=4).losses for job in jobs.values())
    assert packed == pytest.approx(padded, rel=1e-5) and len(set(packed)) == 4


def test_the_encoder_row_counts_the_events_it_draws():
    case = bench_cases.ENCODER
    length_N = draw_lengths(np.random.default_rng(0), 16 * 32, longest=6, fill=0.3)
    tokens, pairs = length_N.mean(), (length_N * (length_N + 1) / 2).mean()
    config = EncoderConfig("dmin", width=8, heads=4)
    again = flops.dmin(spec_of(config).config, 8, tokens, pairs)
    want = 4 * again + 3 * (tokens + 1) * 2 * 8 * 8  # recomputed once, the projections not
    assert case.flops is not None and case.flops({}) == pytest.approx(want)


def test_tables_grow_in_all_fields_alike_and_learn_by_rows(tmp_path):
    case = bench_cases.TABLES
    jobs = started(case, tmp_path)
    large, small = jobs["loopfm"].facts["params"], jobs["0m-rows"].facts["params"]
    assert large - small > 0.98 * 4500 * (16 + 1)  # and a weight per row
    assert case.ours[0].spec["optim"]["tables"] == "rowwise_adagrad"
    losses = jobs["loopfm"].run(seconds=0, steps=3).losses
    assert losses[0] == pytest.approx(np.log(2), abs=1e-3) and losses[2] < losses[0]
    assert grow(bench_cases.SCHEMA, 7900).table_rows == pytest.approx(7900, rel=0.01)


def test_devices_are_simulated_in_the_sides_own_process():
    case = devices(8)
    assert "device_count=8" in case.ours[0].env["XLA_FLAGS"] and not case.peers[0].env
    assert case.ours[0].spec["mesh"] == (8, 1) and case.spec["backbone"]["tables"]["row_multiple"]


def test_codes_take_half_a_byte_a_number(tmp_path):
    ours, plain = started(compress(24, width=8, batch=16), tmp_path).values()
    assert ours.facts["code_bytes_per_row"] == 4 and plain.facts["code_bytes_per_row"] == 32
    assert ours.run(seconds=0, steps=3).examples == 48
    ours, plain = started(read_codes(width=8, batch=16, entries=50), tmp_path).values()
    assert 8 * ours.facts["store_bytes"] == plain.facts["store_bytes"] == 50 * 8 * 4
    assert plain.run(seconds=0, steps=3).examples == 48
