"""An FM that goes on learning: days, cutoffs, aligned codes."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from command_line import CommandLine
from flax import nnx

from loopfm_jax.backbones import BackboneConfig
from loopfm_jax.data.log import load
from loopfm_jax.data.schema import Field, Schema
from loopfm_jax.errors import UserError
from loopfm_jax.fm import refresh
from loopfm_jax.fm.compressor import CompressorConfig
from loopfm_jax.fm.exporter import ExportConfig
from loopfm_jax.fm.teacher import FMConfig, Teacher
from loopfm_jax.rngs import Rngs
from loopfm_jax.tables import TableConfig

KINDS = ("fresh", "linear", "ema", "anchored")
FOUR_DAYS = ("--export.refresh-hours", "96")


def facts_of(loopfm: CommandLine, stage: str) -> dict:
    return json.loads((loopfm.workdir / stage / "manifest.json").read_text())["facts"]


@pytest.mark.parametrize(("hours", "starts"), [(24, [0, 2, 5]), (1, [0, 1, 2, 4, 5]), (999, [0])])
def test_days_start_where_time_does(hours, starts):
    time = np.array([0, 5, 24, 24.5, 30, 71]) * 3_600_000 + 17
    assert refresh.day_starts(time.astype(np.int64), hours=hours) == starts


def test_the_map_finds_a_rotation_and_a_shift():
    rng = np.random.default_rng(0)
    old = rng.uniform(-0.5, 0.5, (500, 4))
    turn, _ = np.linalg.qr(rng.normal(size=(4, 4)))
    new = (old - 0.1) @ turn.T
    found = refresh.fit_map(new, old)
    assert found.shape == (5, 4) and found.dtype == np.float32
    np.testing.assert_allclose(new @ found[:-1] + found[-1], old, atol=0.02)


def test_an_average_of_models_is_that_of_their_numbers():
    old, new = (nnx.Linear(3, 2, rngs=nnx.Rngs(seed)) for seed in range(2))
    mixed = refresh.average(old, new, kept=0.25)
    expected = 0.25 * old.kernel[...] + 0.75 * new.kernel[...]
    np.testing.assert_allclose(mixed.kernel[...], expected, rtol=1e-6)
    assert not jnp.array_equal(mixed.kernel[...], new.kernel[...])


def test_an_anchor_leaves_the_running_statistics_alone():
    schema = Schema((Field("item", 10),), item=("item",))
    config = FMConfig(
        BackboneConfig(hidden=(4,), norm="hidden", tables=TableConfig(width=2)),
        compressor=CompressorConfig(width=2, prefixes=(2,), hidden=(4,)),
    )
    ids_BF = jnp.arange(1, 9, dtype=jnp.int32)[:, None]
    batch = {"ids_BF": ids_BF, "floats_BN": jnp.zeros((8, 0)), "events": {}}
    batch |= {"label_B": jnp.ones(8), "weight_B": jnp.ones(8)}
    batch |= {"anchor": {"hidden_0": jnp.zeros((8, 2))}}

    def statistics(weight: float) -> list[np.ndarray]:
        model = Teacher(schema, config, rngs=Rngs(0))
        key = jax.random.key(0)
        refresh.anchored(model, batch, None, key, config=config, weight=weight)
        return jax.tree.leaves(nnx.to_pure_dict(nnx.state(model, nnx.BatchStat)))

    for held, free in zip(statistics(1.0), statistics(0.0), strict=True):
        np.testing.assert_array_equal(held, free)


def test_every_day_is_logged_by_an_fm_that_saw_the_days_before_and_no_more(exported):
    """Cutoffs, drift and codes of all kinds, from one FM."""
    fixed = np.load(exported.workdir / "fm/export/codes_hidden_0.npy")
    log, splits = load(exported.workdir / "data")
    first = splits["vm"].start
    rows, times = np.arange(first, len(log)), log["time"]
    drift, soft = {}, {}
    for kind in KINDS:
        exported.succeed("export", "--force", "--export.refresh", kind, *FOUR_DAYS)
        facts = facts_of(exported, "fm/export")
        starts = [rows[i] for i in refresh.day_starts(times[rows], hours=96)]
        assert [start for start, _ in facts["cutoffs"]] == [int(times[row]) for row in starts]
        for (start, cutoff), row in zip(facts["cutoffs"], starts, strict=True):
            known = log["logged_time"][:row]
            assert cutoff == known[known < start].max() < start
        codes = np.load(exported.workdir / "fm/export/codes_hidden_0.npy")
        day = starts[1] - first
        np.testing.assert_array_equal(codes[:day], fixed[:day])  # the first day is the frozen FM's
        assert (codes[day:] != fixed[day:]).any()
        drift[kind] = facts["drift"][-1]
        soft[kind] = np.load(exported.workdir / "fm/export/soft.npy")
    assert len(facts["drift"]) == len(starts) - 1
    for kind in ("linear", "ema", "anchored"):
        assert drift[kind]["centroid"] < drift["fresh"]["centroid"]
        assert drift[kind]["cosine"] > drift["fresh"]["cosine"]
    np.testing.assert_array_equal(soft["linear"], soft["fresh"])  # the map is for codes alone
    assert (soft["ema"] != soft["fresh"]).any()


def test_a_label_that_comes_late_is_learned_with_a_later_day(monkeypatch):
    """Every row once, by the first day after its label; a day of nothing new keeps its FM."""

    @dataclass(frozen=True)
    class Logs:
        """An exporter that only notes who logs which rows."""

        lessons: Any
        model: int = 0
        learner: int = 0

        def run(self, rows, writers, *, title):
            logged.append((self.model, rows.tolist()))

    hour = 3_600_000
    time = np.array([-9, -9, 0, 1, 24, 25, 48, 72, 96, 97], np.int64) * hour
    late = np.array([0, 39, 0, 80, 80, 1, 30, 0, 0, 0], np.int64) * hour
    log = {"time": time, "logged_time": time + late}
    learned, logged = [], []

    def learn(first, before, rows, *args, day, **kwargs):
        learned.append((day, rows.tolist()))
        return replace(before, model=day)

    monkeypatch.setattr(refresh, "_learn", learn)
    monkeypatch.setattr(refresh, "_drift", lambda first, now, rows: {"rows": len(rows)})
    lessons = SimpleNamespace(inputs=SimpleNamespace(log=log))
    how = {"cutoff_ms": -1, "seed": 0, "directory": Path()}
    found = refresh.run(Logs(lessons), ExportConfig(), None, np.arange(2, 10), {}, **how)
    assert learned == [(1, [2]), (2, [1, 5]), (4, [3, 6, 7])]
    assert logged == [(0, [2, 3]), (1, [4, 5]), (2, [6]), (2, [7]), (4, [8, 9])]
    assert [cutoff // hour for _, cutoff in found["cutoffs"]] == [-1, 0, 30, 30, 81]
    assert [(d["day"], d["rows"]) for d in found["drift"]] == [(1, 1), (2, 2), (4, 3)]


def test_vms_take_refreshed_codes_and_a_leak_is_refused(exported, monkeypatch):
    told = ["--export.refresh", "fresh", "--methods", "kd+loopfm", *FOUR_DAYS]
    with monkeypatch.context() as patch:  # every checkpoint claims to have seen its own day
        late = lambda first, *args, **kwargs: {"cutoffs": [[0, 2**50]], "drift": []}  # noqa: E731
        patch.setattr(refresh, "run", late)
        exported.succeed("export", "--force", *told)
        exported.succeed("structure", *told)
        message = exported.fail(exported.argv("train-vm", *told))
        assert "the codes would leak" in message
    exported.succeed("export", "--force", *told)
    exported.succeed("structure", *told)
    assert set(exported.succeed("train-vm", *told)) == {"base", "kd+loopfm"}


@pytest.mark.parametrize(
    "knobs", [{"ema": 1.5}, {"refresh_hours": 0}, {"anchor": -1}, {"books": 0}]
)
def test_settings_that_make_no_sense(knobs):
    with pytest.raises(UserError, match=f"export.{next(iter(knobs))}"):
        ExportConfig(**knobs)


def test_a_second_round_reads_the_first_and_both_keep_to_their_windows(exported):
    """Self-LoopFM: the first FM learns half of the FM window and logs the rest."""
    exported.succeed("run", "--methods", "loopfm", "self")
    log, splits = load(exported.workdir / "data")
    middle = splits["vm"].start // 2
    first = facts_of(exported, "self/first_round/fm/export")
    assert first["first"] == middle
    assert first["cutoffs"][0][1] < log["time"][middle] == first["cutoffs"][0][0]
    second = facts_of(exported, "self/fm/export")
    assert second["first"] == splits["vm"].start
    plain = facts_of(exported, "fm/teacher")
    assert facts_of(exported, "self/fm/teacher")["params"] > plain["params"]
    read = json.loads((exported.workdir / "self/fm/teacher/manifest.json").read_text())["inputs"]
    made = json.loads((exported.workdir / "self/first_round/history/manifest.json").read_text())
    assert read["history"] == made["content"]
    assert Path(exported.workdir / "self/vm/self/seed_0/prediction.npy").exists()
