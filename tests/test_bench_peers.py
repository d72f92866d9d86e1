"""Benchmarks beside FuxiCTR, tiny: from our weights both sides have the same losses."""

import json
import sys

import bench_cases
import pytest

from loopfm_jax import cli
from loopfm_jax.bench import make, rows

pytestmark = pytest.mark.peers
CASES = (*bench_cases.TRAINED, bench_cases.INFER, bench_cases.LATENCY, *bench_cases.INPUT)


def test_first_losses_agree(monkeypatch, capsys):
    pytest.importorskip("torch", reason="torch is missing: pip install -e .[dev,peers]")
    pytest.importorskip("fuxictr", reason="fuxictr is missing: pip install -e .[dev,peers]")
    monkeypatch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=0")
    monkeypatch.setattr(rows, "CASES", CASES)
    monkeypatch.setattr(make, "LIMITS", bench_cases.LIMITS)
    brief = ["--rounds", "1", "--seconds", "0"]
    cli.main(["bench", *brief, "--peer", "fuxictr", "--peer-python", sys.executable])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    checked = {c.row(batch): c.check is not None for c in CASES for batch in c.batches}
    for result in found["results"]:
        assert result["valid"] and result["ratio"] > 0 and result["peer_value"] > 0, result
        if checked[result["name"]]:
            limit = 1e-2 if result["peer_dtype"] == "bfloat16" else 1e-4
            assert result["loss_difference"] < limit
    wanted = {(c.row(b), side.name) for c in CASES for side in c.peers for b in c.batches}
    assert {(r["name"], r["peer"]) for r in found["results"]} == wanted
