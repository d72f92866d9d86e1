"""Pipelines of Beam's DirectRunner write the files that one machine writes, byte for byte."""

from dataclasses import replace
from functools import partial

import numpy as np
import polars as pl
import pytest
from command_line import CommandLine
from raw_logs import START_MS, files_of

from loopfm_jax import stages
from loopfm_jax.bench.structuring import Events, call_structure, draw_events
from loopfm_jax.data import beam_prepare, beam_sort, builder
from loopfm_jax.data.beam_prepare import prepare_by_beam
from loopfm_jax.data.prepare import prepare
from loopfm_jax.data.raw import Windows
from loopfm_jax.data.synthetic import Synthetic
from loopfm_jax.data.tabular import TabularLog
from loopfm_jax.engine import BeamConfig
from loopfm_jax.errors import UserError
from loopfm_jax.history import beam_store
from loopfm_jax.history.store import HistoryConfig
from loopfm_jax.history.structure import write_store

pytest.importorskip("apache_beam", reason="needs the extra [beam]")

EVENTS = draw_events(3000, mean_history=15, width=6)
MEMORY = BeamConfig(options=("direct_running_mode=in_memory",))


def hot(events: Events) -> Events:
    """One key owns 25 % of the rows."""
    return replace(events, key=np.where(np.arange(len(events.key)) % 4 == 0, 3, events.key))


def tied(events: Events) -> Events:
    """Few moments: most events share theirs with others."""
    day = 86_400_000
    return replace(
        events, time=events.time // day * day, logged_time=events.logged_time // day * day
    )


LOGS = {
    "uniform": (EVENTS, {}),
    "hot key": (hot(EVENTS), {"length": 7}),
    "ties": (tied(hot(EVENTS)), {"retention_days": 3.0}),
    "positive only": (hot(EVENTS), {"keep": "positive"}),
    "delay": (hot(EVENTS), {"delay_s": 86_400.0, "length": 20}),
}


@pytest.mark.parametrize("name", LOGS)
def test_stores_are_those_of_one_machine(tmp_path, monkeypatch, name):
    """Ranges smaller than what the hot key owns, blocks smaller than ranges."""
    monkeypatch.setattr(beam_store, "RANGE", 400)
    monkeypatch.setattr(beam_store, "BLOCK", 256)
    (events, options), found = LOGS[name], []
    config = HistoryConfig(**options)
    for write in (write_store, partial(beam_store.write_store, beam=MEMORY)):
        folder = tmp_path / str(len(found))
        folder.mkdir()
        outcome = np.arange(len(events.key)) % 3 == 0
        facts = call_structure(events, config, folder, outcome=outcome, write=write)
        found.append((facts, files_of(folder)))
    assert len(found[0][1]) == 7 and found[0] == found[1]


def test_no_entries_at_all(tmp_path):
    config, none = HistoryConfig(keep="positive"), np.zeros(len(EVENTS.key), np.uint8)
    write = partial(beam_store.write_store, beam=MEMORY)
    facts = call_structure(EVENTS, config, tmp_path, outcome=none, write=write)
    assert facts == {"mean_length": 0.0, "empty_share": 1.0}


def test_a_stage_of_one_engine_is_up_to_date_for_the_other(tmp_path, capsys):
    loopfm = CommandLine(tmp_path, capsys)
    keys = ["--history.keys", "key", "item_id+key"]
    beam = ["--engine", "beam", "--beam.options", *MEMORY.options]
    for stage in ("prepare", "train-fm", "export", "structure"):
        loopfm.succeed(stage, *keys)
    one = stages.verify(loopfm.workdir / "history")
    loopfm.succeed("structure", *keys, *beam)
    assert stages.verify(loopfm.workdir / "history")["seal"] == one["seal"]
    loopfm.succeed("structure", *keys, *beam, "--force")
    again = stages.verify(loopfm.workdir / "history")
    assert again["content"] == one["content"]  # the same files
    assert again["seal"] != one["seal"]  # but made again


# ------------------------------------------------------------------------------ prepare


def make_clicks(rows: int = 600) -> pl.DataFrame:
    """Ties, duplicates, missing values, impression groups; one user owns a quarter of it."""
    rng = np.random.default_rng(0)
    tags = [[f"t{v}" for v in rng.integers(0, 9, n)] for n in rng.integers(0, 5, rows)]
    clicks = pl.DataFrame(
        {
            "uid": np.where(rng.random(rows) < 0.25, "hot", rng.integers(0, 40, rows).astype(str)),
            "when": START_MS + rng.integers(0, rows // 4, rows) * 1000,
            "click": rng.integers(0, 2, rows),
            "item": rng.zipf(1.5, rows) % 50,
            "shop": pl.Series([None, "", "a", "b"])[rng.integers(0, 4, rows)],
            "price": rng.gamma(2, 10, rows),
            "tags": tags,
        }
    )
    clicks = clicks.with_columns(request=pl.col("when") // 5000)
    return pl.concat([clicks, clicks[::9]])


@pytest.mark.parametrize("kind", ["parquet", "csv"])
@pytest.mark.parametrize("group", [None, "request"])
def test_prepared_logs_are_those_of_one_machine(tmp_path, monkeypatch, kind, group):
    monkeypatch.setattr(beam_sort, "STRETCH", 100)
    for module in (builder, beam_prepare):
        monkeypatch.setattr(module, "BLOCK_ROWS", 16)
    monkeypatch.setattr(builder, "SHARD_BLOCKS", 3)
    clicks, files = make_clicks(), []
    for i, part in enumerate((clicks[:400], clicks[400:])):
        files.append(str(tmp_path / f"{i}.{kind}"))
        if kind == "parquet":
            part.write_parquet(files[-1])
        else:
            part.with_columns(pl.col("tags").list.join(",")).write_csv(files[-1])
    source = TabularLog(
        files=tuple(files),
        key="uid",
        time="when",
        time_unit="ms",
        label="click",
        group=group,
        categorical=("uid", "item", "shop"),
        numeric=("price",),
        sequence=("tags",),
        length=3,
        windows=Windows("50%", "80%", "95%"),
    )
    one, many = tmp_path / "one", tmp_path / "many"
    one.mkdir(), many.mkdir()
    told = {"name": source.name, "card": source.card, "directory": one}
    facts = prepare(source.read(), source.windows, **told)
    assert prepare_by_beam(source, directory=many, beam=MEMORY) == facts
    assert facts["rows"]["duplicates_dropped"] > 60
    assert files_of(many) == files_of(one) and len(files_of(one)) > 15


def test_mistakes_in_the_log_are_told_as_on_one_machine(tmp_path):
    make_clicks().with_columns(pl.lit(2).alias("click")).write_parquet(tmp_path / "log.parquet")
    source = TabularLog(
        files=(str(tmp_path / "log.parquet"),),
        key="uid",
        time="when",
        time_unit="ms",
        label="click",
        categorical=("item",),
    )
    with pytest.raises(UserError, match="^the label holds 2 .*make it binary first$"):
        prepare_by_beam(source, directory=tmp_path, beam=MEMORY)


def test_sources_that_are_not_files_are_refused(tmp_path):
    with pytest.raises(UserError, match="not synthetic: prepare it with --engine polars"):
        prepare_by_beam(Synthetic(), directory=tmp_path, beam=MEMORY)
