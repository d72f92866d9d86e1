"""Pipelines of Beam's DirectRunner write the files that one machine writes, byte for byte."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from command_line import CommandLine
from raw_logs import files_of

from loopfm_jax import stages
from loopfm_jax.bench.structuring import Events, call_structure, draw_events
from loopfm_jax.engine import BeamConfig
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
