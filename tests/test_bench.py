"""`loopfm bench` over tiny cases: no timing is asserted, only what is said of it."""

import json
import subprocess
import sys
from pathlib import Path

import bench_cases
import pytest

from loopfm_jax import cli
from loopfm_jax.bench import make, rows, terms
from loopfm_jax.bench.child import ROOT, Child, Failed, ours
from loopfm_jax.serve import SHARES

KEYS = {
    "name", "mode", "dtype", "value", "unit", "peer", "peer_value", "ratio", "roofline_share",
    "peak_rss_bytes",
}  # fmt: skip
BRIEF = ["--rounds", "2", "--seconds", "0"]


@pytest.fixture
def tiny(monkeypatch):
    """`tiny(*cases)` makes them the only rows."""
    monkeypatch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=0")  # one device, as users

    def use(*cases: terms.Case) -> None:
        monkeypatch.setattr(rows, "CASES", cases)
        monkeypatch.setattr(make, "LIMITS", bench_cases.LIMITS)

    return use


@pytest.fixture
def no_workers(tiny, monkeypatch):
    """`no_workers(run_case)`: one row, of which nothing is started."""

    def use(run_case) -> None:
        tiny(bench_cases.TRAIN)
        limits = {"flops": 1e9, "stream_bytes_s": 1e9, "gather_rows_s": 1e6, "gather_width": 32}
        monkeypatch.setattr(make, "_limits", lambda: {**limits, "platform": "cpu", "device": "x"})
        monkeypatch.setattr(make, "run_case", run_case)

    return use


def run(capsys, *options: str) -> tuple[dict, str]:
    """The JSON of the last line, and what people read."""
    cli.main(["bench", *BRIEF, *options])
    said = capsys.readouterr()
    return json.loads(said.out.splitlines()[-1]), said.err


def test_command_writes_json_card_and_picture(tiny, capsys, tmp_path):
    tiny(bench_cases.HISTORIES, bench_cases.LATENCY)
    found, card = run(capsys, "--out", str(tmp_path))
    assert {"device", "versions", "commit", "limits", "results"} <= found.keys()
    trained, *asked = found["results"]
    assert (trained["name"], trained["peer"]) == ("vm-train/tiny", "base")
    assert [(a["name"], a["batch"]) for a in asked] == [
        (f"vm-infer/tiny-p50-batch-{size}", size) for size in (1, 8)
    ]
    for result in found["results"]:
        assert result.keys() >= KEYS and result["name"] in card
        assert result["value"] > 0 and result["valid"]
    assert trained["ratio"] > 0 and trained["rounds"] == 2
    for one in asked:
        assert one["ratio"] is None and len(SHARES) <= one["programs"] <= 2 * (len(SHARES) + 1)
    (written,) = tmp_path.glob("*.json")
    assert json.loads(written.read_text()) == found
    assert written.with_suffix(".svg").read_text().startswith("<svg")


def test_rows_choose_and_an_unknown_one_is_refused(tiny, capsys):
    tiny(bench_cases.TRAIN, bench_cases.LATENCY)
    assert rows.choose(rows.CASES, ("vm-infer",)) == (bench_cases.LATENCY,)
    assert rows.choose(rows.CASES, ("fm-train/tiny",)) == (bench_cases.TRAIN,)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["bench", "--rows", "fm-trian"])
    said = capsys.readouterr()
    assert stopped.value.code == 2 and "did you mean 'fm-train'" in said.err and not said.out


def test_without_the_peers_packages_rows_run_alone(no_workers, capsys, tmp_path):
    python = tmp_path / "python"  # an interpreter with no packages at all
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')
    python.chmod(0o755)
    no_workers(lambda case, bench: [] if bench.peer is None else pytest.fail("there is none"))
    _, said = run(capsys, "--peer", "fuxictr", "--peer-python", str(python))
    assert "no peer, rows run without ratio" in said and "pip install torch fuxictr" in said
    assert "has no torch and no fuxictr" in said


def test_an_interpreter_that_is_none_is_refused(tiny, capsys):
    tiny(bench_cases.INFER)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["bench", "--peer", "fuxictr", "--peer-python", "/no/python"])
    assert stopped.value.code == 2 and "/no/python" in capsys.readouterr().err


@pytest.mark.parametrize("folder", ["file", "file/below", "/proc/loopfm"])
def test_a_folder_that_cannot_be_written_is_found_before_measuring(
    no_workers, capsys, tmp_path, folder
):
    no_workers(lambda case, bench: pytest.fail("measured"))
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as stopped:
        cli.main(["bench", *BRIEF, "--out", str(tmp_path / folder)])
    said = capsys.readouterr()
    assert stopped.value.code == 2 and not said.out
    assert said.err.startswith("loopfm: ") and said.err.count("\n") == 1


def test_a_case_that_fails_is_said_and_the_others_run(no_workers, capsys):
    def fail(case, bench):
        raise Failed("out of memory")

    no_workers(fail)
    found, said = run(capsys)
    (result,) = found["results"]
    assert result["error"] == "out of memory" and not result["valid"]
    assert "fm-train/tiny: failed: out of memory" in said


def test_worker_answers_lines_and_keeps_prints_out_of_them():
    asked = [
        {"do": "run", "seconds": 0, "steps": 1},
        {"do": "setup", "spec": bench_cases.LIMITS},
        {"do": "run", "seconds": 0, "steps": 1},
        {"do": "close"},
    ]
    done = subprocess.run(
        [sys.executable, "-c", PRINTS],
        input="".join(json.dumps(line) + "\n" for line in asked),
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=True,
    )
    hello, early, facts, measured = map(json.loads, done.stdout.splitlines())
    assert hello == {"versions": {"x": "1"}}
    assert "run before setup" in early["error"]
    assert facts == {"facts": {"answer": 42}}
    assert measured["steps"] == 3 and measured["losses"] == [0.5] * 3
    assert measured["examples"] == 30 and measured["peak_rss_bytes"] > 0
    assert "from a library" in done.stderr


PRINTS = """
from dataclasses import replace
from loopfm_jax.bench.protocol import serve, timed
class Job:
    def __init__(self, spec):
        print("from a library")
        self.facts = {"answer": 42}
    def run(self, *, seconds, steps):
        losses = []
        return timed(lambda: losses.append(0.5), lambda: None, seconds=seconds, steps=3,
                     examples=10, losses=losses)
serve(Job, versions={"x": "1"})
"""


def test_a_worker_that_dies_says_its_last_words():
    with ours() as child, pytest.raises(Failed, match="KeyError"):
        child.setup({"job": "none such"})
    with pytest.raises(Failed, match="ended with status 1: .*No module named"):
        with Child("loopfm_jax.bench.no_worker", python=Path(sys.executable), env={}) as child:
            child.versions()
