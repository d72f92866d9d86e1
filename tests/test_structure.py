"""The files of the stage against a plain loop over events, and in small parts."""

from dataclasses import replace

import numpy as np
import pytest

from loopfm_jax.bench.structuring import (
    Events,
    call_structure,
    draw_events,
    structure_by_loop,
)
from loopfm_jax.history import files, slices
from loopfm_jax.history.store import HistoryConfig

CONFIGS = {
    "plain": HistoryConfig(length=5),
    "late": HistoryConfig(length=50, delay_s=86_400),
    "short": HistoryConfig(length=50, retention_days=2.5),
}
EVENTS = draw_events(2000, mean_history=22, width=6)


def read(folder) -> dict[str, np.ndarray]:
    return {p.stem: np.load(p) for p in (folder / "key").glob("*.npy")}


@pytest.mark.parametrize("name", CONFIGS)
def test_histories_are_those_of_a_plain_loop(tmp_path, name):
    facts = call_structure(EVENTS, CONFIGS[name], tmp_path)
    made, expected = read(tmp_path), list(structure_by_loop(EVENTS, CONFIGS[name]))
    assert facts["mean_length"] == np.mean([len(rows) for rows in expected]) > 3
    for end, length, rows in zip(made["end"], made["length"], expected, strict=True):
        newest_first = slice(end - length, end)
        assert made["row"][newest_first][::-1].tolist() == rows
        codes = made["codes_hidden_0"][newest_first][::-1]
        np.testing.assert_array_equal(codes, EVENTS.codes[rows])


def test_keys_times_and_rows_that_do_not_fit_into_one_integer(tmp_path):
    """Numbers far apart change no history."""
    far = replace(EVENTS, key=EVENTS.key * 2**55 - 2**60)
    times = {name: getattr(EVENTS, name) * 2**28 for name in ("time", "logged_time")}
    config = HistoryConfig(length=5, retention_days=1e10)
    whole = []
    for i, events in enumerate((EVENTS, far, replace(EVENTS, **times), replace(far, **times))):
        (tmp_path / str(i)).mkdir()
        call_structure(events, config, tmp_path / str(i))
        whole.append(read(tmp_path / str(i)))
    for made in whole[1:]:
        for name in ("row", "end", "length", "codes_hidden_0"):
            np.testing.assert_array_equal(made[name], whole[0][name])


def test_order_of_the_log_does_not_matter(tmp_path):
    shuffled = np.random.default_rng(1).permutation(len(EVENTS.key))
    mixed = Events(*(getattr(EVENTS, f)[shuffled] for f in ("key", "time", "logged_time", "codes")))
    for folder, events in (("in_order", EVENTS), ("mixed", mixed)):
        (tmp_path / folder).mkdir()
        call_structure(events, CONFIGS["plain"], tmp_path / folder)
    made, again = read(tmp_path / "in_order"), read(tmp_path / "mixed")
    np.testing.assert_array_equal(again["length"], made["length"][shuffled])
    np.testing.assert_array_equal(again["end"], made["end"][shuffled])


@pytest.mark.parametrize("keep", ["all", "positive"])
def test_small_parts_make_the_same_files(tmp_path, monkeypatch, keep):
    config = HistoryConfig(length=5, keep=keep)
    outcome = np.arange(len(EVENTS.key)) % 3 == 0
    found = []
    for part_bytes in (files.PART_BYTES, 700):
        monkeypatch.setattr(files, "PART_BYTES", part_bytes)
        monkeypatch.setattr(files, "HELD_BYTES", part_bytes)
        monkeypatch.setattr(files, "BLOCK_BYTES", 100)
        monkeypatch.setattr(slices, "PART", 64 if part_bytes == 700 else slices.PART)
        folder = tmp_path / str(part_bytes)
        folder.mkdir()
        call_structure(EVENTS, config, folder, outcome=outcome)
        found.append({p.relative_to(folder): p.read_bytes() for p in folder.rglob("*.npy")})
    assert len(found[0]) == 7 and found[0] == found[1]
