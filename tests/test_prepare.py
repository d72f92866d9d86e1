"""The prepared log: fitted on the FM window only, in time order, whatever order it came in."""

from dataclasses import replace
from datetime import UTC, datetime

import numpy as np
import polars as pl
import pytest
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordReader
from raw_logs import (
    COLUMNS,
    START_MS,
    files_of,
    make_frame,
    make_raw,
    prepare_and_load,
    prepare_into,
    same_columns,
    vocabulary,
)
from tensorflow_datasets.proto import tf_example_pb2

from loopfm_jax.data import builder
from loopfm_jax.data.coding import dense
from loopfm_jax.data.encode import encode
from loopfm_jax.data.log import Log, load
from loopfm_jax.data.order import collapse_groups, order_log
from loopfm_jax.data.prepare import cut
from loopfm_jax.data.raw import SPLITS, Column, RawLog, Windows, vm_windows
from loopfm_jax.data.schema import Schema
from loopfm_jax.errors import UserError

WINDOWS = Windows(fm_end="50%", vm_end="80%", test_end="100%")
FM = slice(0, 100)


def perturbed(frame: pl.DataFrame, rows: int) -> pl.DataFrame:
    """Other features from row `rows` on: new values, outliers, other lists."""
    later = make_frame(len(frame), seed=9)[rows:].with_columns(
        pl.col("item") + 100,
        pl.col("shop") + 100,
        pl.lit("billboard").alias("surface"),
        pl.col("age") * 50 - 900,
        pl.col("price") * 1e6,
        pl.col("rank") - 1e6,
    )
    return pl.concat([frame[:rows], later.with_columns(frame[rows:]["key"])])


@pytest.mark.parametrize("seed", range(3))
def test_everything_is_fitted_on_the_fm_window_only(tmp_path, seed):
    frame = make_frame(seed=seed)
    one = prepare_into(tmp_path / "one", make_raw(frame))
    two = prepare_into(tmp_path / "two", make_raw(perturbed(frame, FM.stop)))
    for name in ("schema.json", "vocabulary.parquet"):
        assert (one / name).read_bytes() == (two / name).read_bytes()
    (log, splits), (other, _) = load(one), load(two)
    assert splits["fm"] == FM
    same_columns(log, other, FM)
    later = slice(FM.stop, None)
    assert (log["ids"][later] != other["ids"][later]).any()


def test_the_last_fm_row_counts_and_the_first_vm_row_does_not(tmp_path):
    frame = make_frame()
    base = vocabulary(prepare_into(tmp_path / "base", make_raw(frame)), "surface")
    for row, known in ((FM.stop - 1, True), (FM.stop, False)):
        surface = frame["surface"].to_list()
        surface[row] = "rare"
        changed = make_raw(frame.with_columns(pl.Series("surface", surface)))
        now = vocabulary(prepare_into(tmp_path / str(row), changed), "surface")
        assert ("rare" in now) == known
        assert known or now == base


def test_ids_count_from_one_by_falling_frequency(tmp_path):
    folder = prepare_into(tmp_path / "log", make_raw(make_frame()))
    log, _ = load(folder)
    counts = make_frame()[FM].group_by("surface").len().sort("len", descending=True)
    known = vocabulary(folder, "surface")
    assert known == {value: i for i, value in enumerate(counts["surface"], start=1)}
    field = log.schema["surface"]
    assert field.rows == len(known) + 2  # padding and unknown


def test_unknown_and_rare_values_are_the_last_id_of_their_field(tmp_path):
    frame = make_frame().with_columns(
        pl.when(pl.int_range(pl.len()) == 150).then(-5).otherwise("item").alias("item")
    )
    frame = frame.with_columns(
        pl.when(pl.int_range(pl.len()) == 3).then(-7).otherwise("item").alias("item")
    )
    folder = prepare_into(tmp_path / "log", make_raw(frame))
    log, _ = load(folder)
    at = [f.name for f in log.schema.categorical].index("item")
    unknown = log.schema.offsets["item"] + log.schema["item"].rows - 1
    assert log["ids"][150, at] == unknown  # never seen in the FM window
    assert log["ids"][3, at] == unknown  # seen once, min_count is 2
    known = vocabulary(folder, "item")
    assert "-7" not in known and "-5" not in known
    seen = log.padded("seen", np.arange(200))
    assert (seen[log.ragged["seen"].lengths == 0] == 0).all()  # padding is the fused id 0
    assert log.ragged["seen"].values.min() > 0
    assert log.ragged["tags"].values.min() > log.schema.offsets["tags"]


def test_sequences_share_the_vocabulary_they_name(tmp_path):
    frame = make_frame()
    folder = prepare_into(tmp_path / "log", make_raw(frame))
    log, _ = load(folder)
    known, rows = vocabulary(folder, "item"), log.schema["item"].rows
    assert log.schema.offsets["seen"] == log.schema.offsets["item"]
    assert log.schema["seen"].rows == rows and log.schema["seen"].shares == "item"
    seen = log.padded("seen", np.arange(len(frame)))
    for row, values in enumerate(frame["seen"].to_list()):
        expected = [known.get(str(v), rows - 1) + log.schema.offsets["item"] for v in values[-4:]]
        assert seen[row].tolist() == [0] * (4 - len(expected)) + expected
    both = pl.concat([frame[FM]["item"], frame[FM]["seen"].list.tail(4).explode().drop_nulls()])
    often = both.value_counts().filter(pl.col("count") >= 2)
    assert set(known) == {str(v) for v in often["item"]}


def test_numeric_columns_are_standardised_by_the_fm_window(tmp_path):
    frame = make_frame()
    log = prepare_and_load(tmp_path / "log", make_raw(frame))
    price = np.log1p(frame["price"].to_numpy())
    rank = frame["rank"].to_numpy()
    for i, values in enumerate((price, rank)):
        expected = (values - values[FM].mean()) / values[FM].std()
        np.testing.assert_allclose(log["floats"][:, i], expected, rtol=1e-5, atol=1e-6)
    constant = make_raw(frame.with_columns(price=pl.Series([0.1] * 100 + [0.2] * 100)))
    floats = prepare_and_load(tmp_path / "constant", constant)["floats"]
    assert np.abs(floats[:, 0]).max() < 1  # no division by rounding


def test_buckets_are_quantiles_of_the_fm_window(tmp_path):
    frame = make_frame()
    folder = prepare_into(tmp_path / "log", make_raw(frame))
    log, _ = load(folder)
    at = [f.name for f in log.schema.categorical].index("age")
    age = frame["age"].to_numpy()
    bucket = np.digitize(age, np.quantile(age[FM], [0.25, 0.5, 0.75]))
    known = vocabulary(folder, "age")
    expected = [known[str(b)] + log.schema.offsets["age"] for b in bucket]
    assert log["ids"][:, at].tolist() == expected
    assert len(known) == 4


@pytest.mark.parametrize("seed", range(3))
def test_the_order_of_the_input_does_not_matter(tmp_path, seed):
    """Also among ties, whose rows differ in lists only."""
    frame = make_frame().with_columns(pl.col("time") // 20_000 * 20_000, pl.lit(1).alias("key"))
    frame = frame.with_columns(pl.col(n).first().over("time") for n in ("item", "price", "rank"))
    one = prepare_into(tmp_path / "one", make_raw(frame))
    mixed = make_raw(frame.sample(fraction=1.0, shuffle=True, seed=seed))
    assert files_of(one) == files_of(prepare_into(tmp_path / "two", mixed))


def test_ties_that_differ_only_in_a_list_have_an_order():
    frame = pl.DataFrame({"key": 1, "time": 5, "label": 0, "tags": [["b"], ["a", "c"], [], None]})
    mixed = [frame[list(o)] for o in ((0, 1, 2, 3), (3, 1, 0, 2), (2, 0, 3, 1))]
    ordered = [rows[order_log(collapse_groups(rows))] for rows in mixed]
    assert ordered[0].equals(ordered[1]) and ordered[1].equals(ordered[2])


def test_impression_groups_are_one_moment(tmp_path):
    frame = make_frame().with_columns(group=pl.int_range(pl.len()) // 8)
    log = prepare_and_load(tmp_path / "log", make_raw(frame))
    moments = frame.group_by("key", "group").agg(
        first=pl.col("time").min(), last=pl.col("time").max(), rows=pl.len()
    )
    expected = sorted(
        (first, last, key)
        for key, first, last, rows in moments.select("key", "first", "last", "rows").rows()
        for _ in range(rows)
    )
    found = zip(log["time"].tolist(), log["logged_time"].tolist(), log["key"].tolist(), strict=True)
    assert sorted(found) == expected
    assert (log["logged_time"] > log["time"]).any()
    assert (np.diff(log["time"]) >= 0).all()
    alone = prepare_and_load(tmp_path / "alone", make_raw(frame.drop("group")))
    np.testing.assert_array_equal(alone["time"], alone["logged_time"])


@pytest.mark.parametrize("block", [1, 7, 49, 50, 51, 4096])
def test_blocks_of_any_size_hold_every_row_once(tmp_path, monkeypatch, block):
    raw = make_raw(make_frame(203))
    whole = prepare_and_load(tmp_path / "whole", raw)
    monkeypatch.setattr(builder, "BLOCK_ROWS", block)
    folder = prepare_into(tmp_path / "blocks", raw)
    log, splits = load(folder)
    same_columns(whole, log)
    assert log["example_id"].tolist() == list(range(203))
    records = tfds.builder_from_directory(folder / "small" / "1.0.0").info.splits
    sizes = {name: s.stop - s.start for name, s in splits.items()}
    assert {n: records[n].num_examples for n in sizes} == {
        n: -(-rows // block) for n, rows in sizes.items()
    }


def test_the_folder_is_a_tfds_data_set(prepared):
    stored = tfds.builder_from_directory(prepared / "synthetic" / "1.0.0")
    assert set(stored.info.splits) == set(SPLITS)
    block = stored.as_data_source("fm")[0]
    log, splits = load(prepared)
    np.testing.assert_array_equal(block["ids"], log["ids"][splits["fm"]][: len(block["ids"])])
    assert block["time"].dtype == block["key"].dtype == np.int64
    assert block["ids"].dtype == block["tags/values"].dtype == np.int32
    assert block["label"].dtype == np.uint8
    assert Schema.from_json(log.schema.to_json()) == log.schema


def test_records_are_the_same_bytes_in_every_process(prepared):
    """Protobuf orders the columns of a record as each process likes, unless it is asked not to."""
    for path in (prepared / "synthetic" / "1.0.0").glob("*.array_record-*"):
        reader = ArrayRecordReader(str(path))
        for record in reader.read_all():
            example = tf_example_pb2.Example.FromString(record)
            assert record == example.SerializeToString(deterministic=True)
        reader.close()


def test_rows_after_the_test_window_are_left_out(tmp_path):
    windows = replace(
        WINDOWS, test_end=datetime.fromtimestamp(START_MS / 1000 + 190, UTC).isoformat()
    )
    log, splits = load(prepare_into(tmp_path / "log", make_raw(make_frame()), windows))
    assert (len(log), splits["test"]) == (190, slice(160, 190))


def test_validation_takes_the_end_of_the_vm_window():
    time = np.arange(0, 1000, 10)
    cuts, text = cut(time, Windows("50%", "80%", "100%", "70%"))
    assert cuts == {"fm": (0, 50), "vm": (50, 70), "validation": (70, 80), "test": (80, 100)}
    assert "validation until 80%" in text
    assert cut(np.arange(0, 1000), Windows("50%", "90%"))[0]["validation"] == (800, 900)
    with pytest.raises(UserError, match="must rise"):
        cut(time, Windows("50%", "80%", "100%", "85%"))


def test_vertical_models_never_learn_from_what_they_are_judged_on():
    assert vm_windows("test") == ("vm", "validation")
    assert vm_windows("validation") == ("vm",)


def test_a_row_at_the_end_of_a_window_belongs_to_the_next():
    marks = [datetime.fromtimestamp(s, UTC).isoformat() for s in (1.7e9 + 2, 1.7e9 + 4, 1.7e9 + 6)]
    time = START_MS + np.array([0, 1999, 2000, 2000, 3999, 4000, 6000])
    cuts, _ = cut(time, Windows(*marks))
    assert cuts == {"fm": (0, 2), "vm": (2, 4), "validation": (4, 5), "test": (5, 6)}


@pytest.mark.parametrize("mark", ["half", "nan%", "inf%", "1e999%", "%", "2022-13-01T00:00+00:00"])
def test_window_ends_that_mean_nothing(mark):
    with pytest.raises(UserError, match="neither a percentage"):
        cut(np.arange(10), Windows(fm_end=mark))


def test_the_fix_for_a_missing_zone_works():
    with pytest.raises(UserError) as error:
        cut(START_MS + np.arange(10), Windows(fm_end="2022-05-01"))
    fixed = str(error.value).split("write ")[1].split(",")[0]
    assert datetime.fromisoformat(fixed) == datetime(2022, 5, 1, tzinfo=UTC)


def test_keys_of_any_type():
    assert dense(pl.Series(["b", "a", "b", "c"])).tolist() == [1, 0, 1, 2]
    assert dense(pl.Series([-5, 2**62, 0])).tolist() == [0, 2, 1]


def test_what_vertical_models_see_is_a_log_of_its_own():
    """Selecting gives the ids that encoding without the other columns gives."""
    raw = make_raw(make_frame(), behaviour=("item", "surface"))
    kept = tuple(c for c in COLUMNS if not c.fm_only)
    alone = encode(replace(raw, columns=kept), raw.frame, fm_rows=100)
    whole = encode(raw, raw.frame, fm_rows=100)
    columns = {"ids": whole.ids, "floats": whole.floats, "label": raw.frame["label"].to_numpy()}
    log = Log(whole.schema, columns, whole.ragged)
    part = log.select(whole.schema.for_vm())
    assert part.schema == alone.schema
    np.testing.assert_array_equal(part["ids"], alone.ids)
    np.testing.assert_array_equal(part["floats"], alone.floats)
    for name, ragged in alone.ragged.items():
        np.testing.assert_array_equal(part.ragged[name].values, ragged.values)
    narrow = log.select(whole.schema.without_behaviours())
    assert narrow.schema.behaviours == () and not any(f.from_log for f in narrow.schema.fields)


def test_what_only_the_fm_sees_is_not_in_the_past_of_a_vertical_model():
    raw = make_raw(make_frame(), behaviour=("item", "shop"))
    schema = encode(raw, raw.frame, fm_rows=100).schema
    vm = schema.for_vm()
    assert {f.name for f in schema.fields if f.fm_only} == {"shop", "past_shop"}
    assert [b.history for b in vm.behaviours] == [("past_item",)]
    assert not any(f.from_log for f in vm.without_behaviours().fields)
    hidden = tuple(replace(c, fm_only=c.name == "item") for c in COLUMNS)
    shared = encode(replace(raw, columns=hidden), raw.frame, fm_rows=100).schema
    assert shared["seen"].fm_only  # its table is the item's
    assert shared.for_vm().offsets


def test_values_that_float32_cannot_hold(tmp_path):
    frame = make_frame().with_columns(
        pl.when(pl.int_range(pl.len()) == 190).then(1e300).otherwise("rank").alias("rank")
    )
    with pytest.raises(UserError, match="rank.*1e\\+300.*clip"):
        prepare_into(tmp_path / "log", make_raw(frame))


def test_a_log_of_one_column_only(tmp_path):
    raw = RawLog(make_frame().select("key", "time", "label", "item"), (Column("item"),), ("item",))
    log = prepare_and_load(tmp_path / "log", raw)
    assert "floats" not in log.columns and not log.ragged
    assert log["ids"].shape == (200, 1)
