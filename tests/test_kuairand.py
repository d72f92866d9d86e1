"""KuaiRand-Pure: the real window is read as its files say, and outcomes never become features."""

import csv
import gzip
import random
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from kuairand_files import (
    EARLY_LOG,
    LATE_LOG,
    LOG,
    OUTCOMES,
    START_MS,
    log_rows,
    user_rows,
    video_rows,
    write_release,
)

from loopfm_jax.data.kuairand import STANDARD_ROWS, KuaiRandPure
from loopfm_jax.data.log import load
from loopfm_jax.data.prepare import prepare
from loopfm_jax.data.raw import Windows
from loopfm_jax.errors import UserError

WINDOWS = Windows(
    fm_end="2022-05-01T00:00+08:00",
    validation_start="2022-05-06T00:00+08:00",
    vm_end="2022-05-07T00:00+08:00",
    test_end="2022-05-09T00:00+08:00",
)
ARRAYS = ("ids", "floats", "label", "time", "logged_time", "key", "example_id")

Prepare = Callable[..., Path]


def prepared_from(source: KuaiRandPure, folder: Path) -> Path:
    folder.mkdir(parents=True)
    prepare(source.read(), source.windows, name=source.name, card=source.card, directory=folder)
    return folder


@pytest.fixture
def tiny(tmp_path: Path) -> Prepare:
    """Writes a tiny release and prepares it: keywords as of `write_release`."""
    count = iter(range(100))

    def make(**files) -> Path:
        n = next(count)
        raw = write_release(tmp_path / f"raw{n}", **files)
        return prepared_from(KuaiRandPure(raw_dir=raw), tmp_path / f"log{n}")

    return make


def same_bytes(one: Path, two: Path) -> bool:
    names = sorted(p.relative_to(one) for p in one.rglob("*") if p.is_file())
    assert names == sorted(p.relative_to(two) for p in two.rglob("*") if p.is_file())
    return all((one / n).read_bytes() == (two / n).read_bytes() for n in names)


@pytest.fixture(scope="module")
def window_rows(kuairand_window: Path) -> list[dict[str, str]]:
    with gzip.open(kuairand_window / f"{LATE_LOG}.gz", "rt", newline="") as file:
        header, *lines = list(csv.reader(file))
    assert header == LOG
    return [dict(zip(header, line, strict=True)) for line in lines]


@pytest.fixture(scope="module")
def window_log(kuairand_window: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = KuaiRandPure(raw_dir=kuairand_window, windows=WINDOWS)
    return prepared_from(source, tmp_path_factory.mktemp("window") / "data")


def test_window_has_the_rows_of_its_files(kuairand_window, window_rows, window_log):
    raw = KuaiRandPure(raw_dir=kuairand_window).read()
    kept = {tuple(row.values()) for row in window_rows}
    assert len(window_rows) == 228_329
    assert raw.duplicates == len(window_rows) - len(kept) == 5_460
    assert len(raw.frame) == len(kept) == 222_869
    assert raw.notes["complete_release"] is False
    assert len(window_rows) < STANDARD_ROWS

    times = np.sort([int(row[LOG.index("time_ms")]) for row in kept])
    marks = (WINDOWS.fm_end, WINDOWS.validation_start, WINDOWS.vm_end, WINDOWS.test_end)
    ends = [datetime.fromisoformat(str(mark)).timestamp() * 1000 for mark in marks]
    stops = [0, *(int((times < end).sum()) for end in ends)]
    log, splits = load(window_log)
    assert [(s.start, s.stop) for s in splits.values()] == list(
        zip(stops[:-1], stops[1:], strict=True)
    )
    assert [s.stop - s.start for s in splits.values()] == [92_220, 88_275, 13_582, 28_792]
    np.testing.assert_array_equal(log["time"], times)


def test_window_rows_say_what_the_files_say(window_rows, window_log):
    """Every row, decoded through the vocabulary, is a row of the file; known ids only from FM."""
    log, splits = load(window_log)
    names = [f.name for f in log.schema.categorical]
    vocabulary = pl.read_parquet(window_log / "vocabulary.parquet")
    decoded = {}
    for name in ("video_id", "tab", "hour"):
        known = vocabulary.filter(pl.col("field") == name)
        field, local = log.schema[name], log["ids"][:, names.index(name)] - log.schema.offsets[name]
        values = np.array(["<pad>", *known.sort("id")["value"], "<unknown>"])
        assert field.rows == len(values) and local.min() >= 1 and local.max() < field.rows
        decoded[name] = values[local]
    users = sorted({int(row["user_id"]) for row in window_rows})
    ours = zip(np.array(users)[log["key"]].tolist(), log["time"].tolist(), decoded["tab"].tolist(),
               log["label"].tolist(), decoded["video_id"].tolist(), strict=True)  # fmt: skip
    file = {
        (int(r["user_id"]), int(r["time_ms"]), r["tab"], int(r["is_click"])): r["video_id"]
        for r in window_rows
    }
    some = random.Random(0).sample(list(ours), 5000)
    shared_moment = 0
    for *row, video in some:
        assert tuple(row) in file
        shared_moment += video not in (file[tuple(row)], "<unknown>")
    assert shared_moment < 50  # two videos at one moment: the dict keeps one
    assert "<unknown>" not in decoded["tab"][splits["fm"]]
    assert (np.diff(log["time"]) >= 0).all()
    hours = (log["time"] // 3_600_000 + 8) % 24
    np.testing.assert_array_equal(decoded["hour"].astype(int), hours)


def test_no_outcome_is_a_feature(tmp_path):
    raw = KuaiRandPure(raw_dir=write_release(tmp_path)).read()
    names = {column.name for column in raw.columns}
    assert not names & {*OUTCOMES, "is_click", "long_view", "date", "hourmin", "is_rand", "time_ms"}
    assert set(raw.frame.columns) == {"key", "time", "label", *names}


def test_outcomes_and_clock_columns_change_no_feature(tiny):
    rows, changed = log_rows(), log_rows()
    for i, row in enumerate(changed):
        row |= {name: i % 3 + 1 for name in OUTCOMES} | {"long_view": i % 2}
        row |= {"date": 20200101, "hourmin": 5 * i, "is_rand": 1}
    assert same_bytes(tiny(log=rows), tiny(log=changed))


def test_the_label_changes_only_the_label(tiny):
    flipped = [row | {"is_click": 1 - row["is_click"]} for row in log_rows()]
    (one, _), (two, _) = load(tiny()), load(tiny(log=flipped))
    np.testing.assert_array_equal(one["label"], 1 - two["label"])
    for name in set(ARRAYS) - {"label"}:
        np.testing.assert_array_equal(one[name], two[name])


def test_long_view_as_label(tmp_path):
    raw = write_release(tmp_path / "raw")
    log, _ = load(prepared_from(KuaiRandPure(raw_dir=raw, label="long_view"), tmp_path / "log"))
    assert log["label"].tolist() == [row["long_view"] for row in log_rows()]


@pytest.mark.parametrize("layout", ["gzip", "data folder", "two files", "shuffled", "duplicates"])
def test_how_the_rows_are_stored_does_not_matter(tiny, tmp_path, layout):
    rows = log_rows()
    plain = tiny(log=rows)
    if layout == "gzip":
        other = tiny(log=rows, suffix=".gz")
    elif layout == "data folder":
        raw = tmp_path / "release"
        write_release(raw / "data", log=rows)
        other = prepared_from(KuaiRandPure(raw_dir=raw), tmp_path / "other")
    elif layout == "two files":
        other = tiny(log=rows[50:], early=rows[:50])
    elif layout == "duplicates":
        other = tiny(log=[*rows, *rows[::9]])
    else:
        mixed = random.Random(1).sample(rows, len(rows))
        other = tiny(log=mixed, users=user_rows()[::-1], videos=video_rows()[::-1])
    assert same_bytes(plain, other)


def test_ties_do_not_depend_on_the_order_of_the_file(tiny):
    rows = [row | {"time_ms": START_MS + 1000 * (i // 12)} for i, row in enumerate(log_rows())]
    mixed = random.Random(2).sample(rows, len(rows))
    assert same_bytes(tiny(log=rows), tiny(log=mixed))


def test_tags_are_several_values(tiny):
    log, _ = load(tiny())
    lengths = log.ragged["tag"].lengths
    videos = [row["video_id"] for row in log_rows()]
    assert lengths.tolist() == [(1, 2, 0, 4)[v % 4] for v in videos]  # the last 4 of 5
    padded = log.padded("tag", np.arange(len(log)))
    first, second = padded[videos.index(0)], padded[videos.index(1)]
    assert first[:3].tolist() == [0, 0, 0] and second[:2].tolist() == [0, 0]
    assert first[3] == second[2]  # 39 is the same id in "39" and in "39,41"
    assert second[3] not in (0, first[3])


def test_the_fingerprint_names_the_changed_file(tmp_path):
    folder = write_release(tmp_path / "raw", early=log_rows(30))
    before = KuaiRandPure(raw_dir=folder).fingerprint()
    assert set(before) >= {LATE_LOG, EARLY_LOG}
    (folder / LATE_LOG).write_bytes((folder / LATE_LOG).read_bytes()[:-1])
    after = KuaiRandPure(raw_dir=folder).fingerprint()
    assert [n for n in before if before[n] != after[n]] == [LATE_LOG]


@pytest.mark.parametrize(
    "files, words",
    [
        ({"log": [row | {"user_id": 27_285} for row in log_rows()]}, ["27285", "0..27284"]),
        ({"log": [row | {"video_id": -1} for row in log_rows()]}, ["-1", "0..7582"]),
        ({"users": user_rows()[:-1]}, ["user_id 5", "20 rows", "side table"]),
        ({"videos": video_rows() + video_rows()[:1]}, ["video_id 0", "more than once"]),
        ({"users": [r | {"fans_user_num": "many"} for r in user_rows()]}, ["'many'", "fans"]),
        ({"videos": [r | {"video_id": "x"} for r in video_rows()]}, ["'x'", "video_id"]),
    ],
)
def test_refuses_files_that_do_not_fit(tmp_path, files, words):
    folder = write_release(tmp_path / "raw", **files)
    with pytest.raises(UserError) as error:
        KuaiRandPure(raw_dir=folder).read()
    assert all(word in str(error.value).replace("`", "'") for word in words), error.value


def test_a_release_without_a_log(tmp_path):
    folder = write_release(tmp_path / "raw")
    (folder / LATE_LOG).unlink()
    with pytest.raises(UserError, match="--data.raw-dir"):
        KuaiRandPure(raw_dir=folder).read()
    with pytest.raises(UserError, match="is not a folder"):
        replace(KuaiRandPure(), raw_dir=tmp_path / "nothing").read()
