"""Your own log: CSV, compressed or in several files, and Parquet give one and the same log."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from raw_logs import START_MS, files_of, make_frame, prepare_into

from loopfm_jax.data.checks import check
from loopfm_jax.data.log import load
from loopfm_jax.data.raw import Windows
from loopfm_jax.data.tabular import TabularLog
from loopfm_jax.errors import UserError

SOURCE = TabularLog(
    key="uid",
    time="when",
    time_unit="ms",
    label="click",
    categorical=("item", "surface"),
    numeric=("price",),
    sequence=("tags",),
    separator="|",
    length=3,
    min_count=1,
)


def make_table(rows: int = 120) -> pl.DataFrame:
    """As someone's log would be; `tags` are lists."""
    frame = make_frame(rows).rename({"key": "uid", "time": "when", "label": "click"})
    return frame.select(
        "uid", "when", "click", "item", "surface", "price", pl.col("tags").cast(pl.List(pl.String))
    )


def as_text(table: pl.DataFrame) -> pl.DataFrame:
    return table.with_columns(pl.col("tags").list.join("|"))


def prepared_from(source: TabularLog, folder: Path) -> Path:
    return prepare_into(folder, source.read(), source.windows)


@pytest.fixture
def csv(tmp_path: Path) -> Path:
    as_text(make_table()).write_csv(tmp_path / "log.csv")
    return tmp_path / "log.csv"


@pytest.mark.parametrize("stored", ["gzip", "parts", "parquet", "mixed", "twice", "[odd] name"])
def test_every_way_to_store_a_table_gives_the_same_log(tmp_path, csv, stored):
    table = make_table()
    expected = files_of(prepared_from(replace(SOURCE, files=(str(csv),)), tmp_path / "expected"))
    files = (str(tmp_path / "in" / "*"),)
    (tmp_path / "in").mkdir()
    if stored == "gzip":
        as_text(table).write_csv(tmp_path / "in" / "a.csv.gz", compression="gzip")
    elif stored == "parts":
        for start in (0, 50, 100):
            as_text(table)[start : start + 50].write_csv(tmp_path / "in" / f"{start}.csv")
    elif stored == "parquet":
        table.write_parquet(tmp_path / "in" / "a.parquet")
    elif stored == "mixed":
        as_text(table)[:70].write_csv(tmp_path / "in" / "a.csv")
        as_text(table)[70:].write_parquet(tmp_path / "in" / "b.pq")
    elif stored == "twice":
        as_text(table).write_csv(tmp_path / "in" / "a.csv")
        files = (*files, str(tmp_path / "in" / "a.csv"))
    else:
        as_text(table).write_csv(tmp_path / "in" / "[odd] name.csv")
        files = (str(tmp_path / "in" / "[odd] name.csv"),)
    source = replace(SOURCE, files=files)
    assert len(source.fingerprint()) == (3 if stored == "parts" else 2 if stored == "mixed" else 1)
    assert files_of(prepared_from(source, tmp_path / "found")) == expected


def test_what_is_read(tmp_path, csv):
    raw = replace(SOURCE, files=(str(csv),)).read()
    table = make_table()
    assert raw.frame["time"].to_list() == table["when"].to_list()
    assert raw.frame["tags"].to_list() == [tags or [""] for tags in table["tags"].to_list()]
    assert raw.item == raw.behaviour == ("item", "surface")
    assert raw.frame.columns == ["key", "time", "label", "item", "surface", "price", "tags"]
    log, _ = load(prepared_from(replace(SOURCE, files=(str(csv),)), tmp_path / "log"))
    assert log["label"].tolist() == table["click"].to_list()
    assert log.ragged["tags"].lengths.tolist() == [min(len(t), 3) for t in table["tags"].to_list()]


def test_exact_duplicates_of_all_columns_are_dropped(tmp_path, csv):
    table = as_text(make_table())
    again = table[::10]
    other = table[5:6].with_columns(pl.lit("elsewhere").alias("surface"))
    pl.concat([table, again, other]).write_csv(csv)
    raw = replace(SOURCE, files=(str(csv),)).read()
    assert (raw.duplicates, len(raw.frame)) == (len(again), len(table) + 1)


UNITS = {
    "s": lambda ms: ms // 1000,
    "ms": lambda ms: ms,
    "us": lambda ms: ms * 1000,
    "ns": lambda ms: ms * 1_000_000,
    "iso": lambda ms: (datetime(1970, 1, 1) + timedelta(milliseconds=ms)).isoformat(),
}


@pytest.mark.parametrize("kind", ["csv", "parquet"])
@pytest.mark.parametrize("unit", UNITS)
def test_time_units_are_exact(tmp_path, unit, kind):
    step = 1000 if unit == "s" else 1
    times = [START_MS + step * i for i in range(120)]
    table = as_text(make_table()).with_columns(pl.Series("when", map(UNITS[unit], times)))
    path = tmp_path / f"log.{kind}"
    table.write_csv(path) if kind == "csv" else table.write_parquet(path)
    raw = replace(SOURCE, files=(str(path),), time_unit=unit).read()
    assert raw.frame["time"].to_list() == times


@pytest.mark.parametrize("zone", [None, "UTC", "Asia/Shanghai"])
@pytest.mark.parametrize("unit", ["ms", "us", "ns"])
def test_a_datetime_column_needs_no_unit(tmp_path, zone, unit):
    times = pl.Series("when", [START_MS + 7 * i for i in range(120)]).cast(pl.Datetime("ms"))
    times = times.cast(pl.Datetime(unit))
    if zone:
        times = times.dt.replace_time_zone("UTC").dt.convert_time_zone(zone)
    make_table().with_columns(times).write_parquet(tmp_path / "log.parquet")
    raw = replace(SOURCE, files=(str(tmp_path / "log.parquet"),)).read()
    assert raw.frame["time"].to_list() == [START_MS + 7 * i for i in range(120)]


def test_fractions_of_seconds_and_zones(tmp_path, csv):
    def read(values: list[str], unit) -> list[int]:
        table = as_text(make_table(len(values))).with_columns(pl.Series("when", values))
        table.write_csv(csv)
        return replace(SOURCE, files=(str(csv),), time_unit=unit).read().frame["time"].to_list()

    assert read(["1700000000.001", "1700000000.999"], "s") == [START_MS + 1, START_MS + 999]
    assert read(["2023-11-15T06:13:20+08:00", "2023-11-14T22:13:20Z"], "iso") == [START_MS] * 2
    day = datetime(2024, 2, 29, tzinfo=UTC).timestamp() * 1000
    assert read(["2024-02-29", "2024-03-01"], "iso") == [day, day + 86_400_000]
    unpadded = read(["2024-2-29 10:00", "2024-02-29 10:00"], "iso")
    assert unpadded == [day + 36_000_000] * 2
    for month_or_day_first in ("01/02/2024 10:00", "01-02-2024", "1.2.2024"):
        with pytest.raises(UserError, match="not times in unit 'iso'"):
            read([month_or_day_first, "13/02/2024"], "iso")


def test_groups_are_read(tmp_path, csv):
    make_table().with_columns(request=pl.int_range(pl.len()) // 4).write_parquet(
        tmp_path / "log.parquet"
    )
    source = replace(SOURCE, files=(str(tmp_path / "log.parquet"),), group="request")
    log, _ = load(prepared_from(source, tmp_path / "log"))
    assert (log["logged_time"] >= log["time"]).all()
    assert (log["logged_time"] > log["time"]).any()


def test_a_sub_schema_for_the_vertical_models(tmp_path, csv):
    source = replace(SOURCE, files=(str(csv),), fm_only=("surface", "price"))
    log, _ = load(prepared_from(source, tmp_path / "whole"))
    without = replace(SOURCE, files=(str(csv),), categorical=("item",), numeric=())
    alone, _ = load(prepared_from(without, tmp_path / "alone"))
    part = log.select(log.schema.for_vm())
    assert part.schema == alone.schema
    np.testing.assert_array_equal(part["ids"], alone["ids"])
    np.testing.assert_array_equal(part.ragged["tags"].values, alone.ragged["tags"].values)
    assert "floats" not in part.columns


WRONG = {
    "no files": ({"files": ()}, ["data.files is empty"]),
    "no match": ({"files": ("/nowhere/*.csv",)}, ["'/nowhere/*.csv'"]),
    "a folder": ({"files": ("{tmp}",)}, ["is a folder"]),
    "label as feature": ({"categorical": ("item", "click")}, ["'click'", "leak"]),
    "twice": ({"numeric": ("item",)}, ["'item'", "more than once"]),
    "item of another kind": ({"item": ("price",)}, ["data.item", "'price'", "item, surface"]),
    "no such behaviour": ({"behaviour": ("itm",)}, ["data.behaviour", "'itm'"]),
    "no such fm_only": ({"fm_only": ("itm",)}, ["data.fm_only", "'itm'"]),
    "nothing to describe": ({"categorical": ("uid",)}, ["data.categorical"]),
    "all hidden": ({"fm_only": ("item", "surface")}, ["data.categorical"]),
    "sequence as key": ({"key": "tags"}, ["'tags'", "several values"]),
    "misspelt column": ({"numeric": ("prise",)}, ["'prise'", "did you mean 'price'"]),
    "no such time": ({"time": "ts"}, ["'ts'"]),
    "wrong unit": ({"time_unit": "iso"}, ["'1700000000000'", "'iso'", "data.time_unit"]),
    "text as number": ({"categorical": ("item",), "numeric": ("surface",)}, ["'surface'", "200"]),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_descriptions(tmp_path, csv, case):
    changes, words = WRONG[case]
    changes = {"files": (str(csv),)} | changes
    if "files" in changes:
        changes["files"] = tuple(f.replace("{tmp}", str(tmp_path)) for f in changes["files"])
    as_text(make_table(200)).write_csv(csv)
    with pytest.raises(UserError) as error:
        check(replace(SOURCE, **changes).read())
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize("name", ["log.jsonl", "log.csv.bak", "csv"])
def test_a_file_of_another_kind(tmp_path, name):
    path = tmp_path / name
    path.write_text('{"uid":255,"when":1}\n')
    with pytest.raises(UserError, match=f"{path} is not .* takes .csv, .csv.gz and .parquet"):
        replace(SOURCE, files=(str(path),)).fingerprint()


def column(name: str, values) -> pl.Series:
    return pl.Series(name, (values * 200)[:200], strict=False)


TABLES = {
    "lists as category": (column("item", [[1], [2]]), ["'item'", "List", "data.sequence"]),
    "lists as label": (column("click", [[1], [0]]), ["'click'", "List"]),
    "numbers as sequence": (column("tags", [1, 2]), ["'tags'", "data.sequence"]),
    "bytes": (column("surface", [b"\xff"]), ["'surface'", "Binary"]),
    "durations": (column("when", [timedelta(1)]), ["'when'", "Duration"]),
    "label 2": (column("click", [0, 1, 2]), ["2", "not 0 or 1"]),
    "label NaN": (column("click", [0.0, 1.0, float("nan")]), ["label"]),
    "NaN": (column("price", [1.0, float("nan")]), ["'price'", "100", "row 2 of", "of key 4 at 17"]),
    "infinite": (column("price", [1.0, float("inf")]), ["'price'", "infinite"]),
    "empty key": (column("uid", ["a", " "]), ["key", "100 rows", "row 2 of", "of key ' ' at 17"]),
    "NaN key": (column("uid", [1.0, float("nan")]), ["key", "100 rows"]),
    "negative times": (column("when", [-5, 5]), ["-5", "1990", "unit"]),
    "absurd times": (column("when", [4 * 10**15]), ["4,000,000,000,000,000", "2100"]),
    "no time": (column("when", [1_700_000_000_000, None]), ["time", "100 rows"]),
    "empty text": (column("when", ["soon"]), ["'soon'", "199 more", "data.time_unit"]),
}


@pytest.mark.parametrize("case", TABLES)
def test_wrong_values(tmp_path, case):
    values, words = TABLES[case]
    path = tmp_path / "log.parquet"
    make_table(200).with_columns(values, pl.int_range(pl.len()).alias("n")).write_parquet(path)
    with pytest.raises(UserError) as error:
        check(replace(SOURCE, files=(str(path),)).read())
    assert all(word in str(error.value) for word in words), error.value


def test_an_empty_group(tmp_path):
    table = make_table(200).with_columns(request=pl.Series([1, None] * 100))
    table.write_parquet(tmp_path / "log.parquet")
    with pytest.raises(UserError, match="the group column is empty in 100 rows"):
        check(replace(SOURCE, files=(str(tmp_path / "log.parquet"),), group="request").read())


@pytest.mark.parametrize("name", ["label", "group", "logged_time", "time", "key"])
def test_a_feature_may_not_be_called_as_what_steers(tmp_path, name):
    make_table(200).rename({"item": name}).write_parquet(tmp_path / "log.parquet")
    source = replace(SOURCE, files=(str(tmp_path / "log.parquet"),), categorical=(name, "surface"))
    with pytest.raises(UserError, match=f"'{name}'.*reserved"):
        source.read()


@pytest.mark.parametrize("name", ["a/b", "item/values"])
def test_what_histories_are_grouped_by_names_files(tmp_path, name):
    make_table(200).rename({"item": name}).write_parquet(tmp_path / "log.parquet")
    source = replace(SOURCE, files=(str(tmp_path / "log.parquet"),), categorical=(name, "surface"))
    with pytest.raises(UserError, match=f"grouped by '{name}'.*rename .* data.keys"):
        source.read()
    log, _ = load(prepared_from(replace(source, keys=("surface",)), tmp_path / "log"))
    assert log.schema.categorical[0].name == name  # as a mere feature it may stay


def test_columns_of_other_kinds_in_another_file(tmp_path):
    make_table().write_parquet(tmp_path / "a.parquet")
    make_table().with_columns(pl.concat_list("item")).write_parquet(tmp_path / "b.parquet")
    with pytest.raises(UserError, match="do not fit together"):
        replace(SOURCE, files=(str(tmp_path / "*.parquet"),)).read()


def test_lengths_below_one():
    for name in ("length", "behaviour_length"):
        with pytest.raises(UserError, match=f"data.{name} is 0"):
            replace(SOURCE, **{name: 0})


def test_windows_come_with_the_source(tmp_path, csv):
    windows = Windows(fm_end="25%", vm_end="50%", test_end="75%")
    log, splits = load(
        prepared_from(replace(SOURCE, files=(str(csv),), windows=windows), tmp_path / "log")
    )
    assert [splits[name].stop for name in ("fm", "validation", "test")] == [30, 60, 90]
    assert len(log) == 90
