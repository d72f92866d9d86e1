"""The jobs of rows that are not about a model's steps, at a size at which rates mean nothing."""

import bench_cases
import pytest

from loopfm_jax.bench.rows import export, nothing, structure
from loopfm_jax.bench.worker import JOBS


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
