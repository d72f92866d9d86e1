"""Codes stand for the same texts whatever the type; rows are ordered as by a full sort."""

from datetime import date

import numpy as np
import polars as pl
import pytest
from raw_logs import make_frame, make_raw, prepare_and_load, same_columns

from loopfm_jax.data import builder
from loopfm_jax.data.coding import Coded, by_appearance, code, dense
from loopfm_jax.data.events import _visible
from loopfm_jax.data.order import collapse_groups, order_log, order_rows

COLUMNS = {
    "small integers": pl.Series([3, 0, 2, 3, 1], dtype=pl.Int8),
    "with gaps": pl.Series([3, None, 2, 3, None], dtype=pl.Int32),
    "negative": pl.Series([-5, 7, -5, 0], dtype=pl.Int64),
    "huge": pl.Series([2**62, -(2**62), 2**62, 0]),
    "unsigned": pl.Series([2**64 - 1, 0, 2**64 - 1], dtype=pl.UInt64),
    "far from zero": pl.Series([10**12 + 5, 10**12, 10**12 + 5]),
    "text": pl.Series(["b", "", None, "a", "b"]),
    "floats": pl.Series([1.5, float("nan"), None, 1.5, 2.0]),
    "flags": pl.Series([True, None, False, True]),
    "categories": pl.Series(["x", "y", None, "x"], dtype=pl.Categorical),
    "enum": pl.Series(["buy", "pv", None, "buy"], dtype=pl.Enum(["pv", "cart", "buy"])),
    "dates": pl.Series([date(2020, 1, 2), None, date(2020, 1, 2)]),
    "only gaps": pl.Series([None, None], dtype=pl.Int64),
    "nothing": pl.Series([None, None]),
    "no rows": pl.Series([], dtype=pl.Int32),
}


@pytest.mark.parametrize("name", COLUMNS)
def test_codes_stand_for_texts(name):
    values = COLUMNS[name]
    coded = code(values)
    texts = values.cast(pl.String).fill_null("").to_list()
    assert [coded.texts[int(c)] for c in coded.codes] == texts
    counts = dict(zip(coded.texts, coded.counts(step=2), strict=True))
    assert {t: n for t, n in counts.items() if n} == {t: texts.count(t) for t in texts}
    numbers = by_appearance(coded)
    assert numbers.dtype == np.int32
    assert numbers.tolist() == [list(dict.fromkeys(texts)).index(t) for t in texts]


def test_weights_count():
    coded = Coded(np.array([0, 1, 1, 2]), pl.Series(["a", "b", "c"]))
    assert coded.counts(np.array([5, 0, 7, 1]), step=3).tolist() == [5, 7, 1]


def test_keys_of_any_type_are_in_the_order_of_their_values():
    for name in ("huge", "negative", "far from zero"):
        values = COLUMNS[name]
        assert dense(values).tolist() == [sorted(set(values)).index(v) for v in values]


@pytest.mark.parametrize("seed", range(8))
def test_rows_are_ordered_as_by_a_full_sort(seed):
    """With ties in all leading columns, gaps, NaN and lists."""
    few = [pl.col(n) % 2 for n in ("key", "item", "shop")]
    frame = make_frame(300, seed=seed).with_columns(
        pl.col("time") // 20_000,
        pl.col("label") * 0,
        pl.when(pl.col("price") > 10).then(float("nan")).otherwise(1.0).alias("price"),
        pl.when(pl.col("item") % 3 == 0).then(None).otherwise("surface").alias("surface"),
        pl.col("age") * 0,
        *few,
    )
    frame = collapse_groups(frame.sample(fraction=1.0, shuffle=True, seed=seed))
    others = [n for n in frame.columns if n not in ("time", "key")]
    ordered = frame[order_rows(frame, by=("time", "key"))]
    assert ordered.equals(frame.sort(["time", "key", *others]))


def slates(rows: int = 3000, *, times: int = 1000) -> pl.DataFrame:
    """Three rows of a key at a time, of which the items tell nothing about the labels."""
    rng, number = np.random.default_rng(0), np.arange(rows)
    label = rng.random(rows) < 0.3
    return pl.DataFrame(
        {
            "key": number // 3,
            "time": number // 3 % times * 1000,
            "label": label.astype(np.int64),
            "chance": np.where(label, 0.9, 0.1),
            "item": rng.permutation(rows),
            "price": rng.random(rows),
        }
    )


@pytest.mark.parametrize(
    ("times", "alike"), [(1000, []), (10, []), (1, []), (1, ["item", "price"])]
)
def test_a_place_among_ties_tells_nothing_of_what_stands_there(times, alike):
    """Neither of the label nor of any other column: each is alike at all places of a slate."""
    frame = slates(times=times).with_columns(pl.lit(0).alias(name) for name in alike)
    ordered = frame[order_log(frame, truth=["chance"])]
    assert ordered["time"].is_sorted()
    for name in ("label", "chance", "item", "price"):
        by_place = ordered[name].to_numpy().reshape(-1, 3).mean(axis=0)
        spread = ordered[name].std() / np.sqrt(len(frame) / 3)
        assert (abs(by_place - ordered[name].mean()) <= 4 * spread).all(), name


def test_labels_have_no_say_in_the_order():
    frame = slates()
    told = frame.with_columns(label=1 - pl.col("label"), chance=1 - pl.col("chance"))
    order, truth = order_log(frame, truth=["chance"]), ["chance"]
    assert order.equals(order_log(told, truth=truth))
    alike = frame.with_columns(item=0, price=0.0)
    mixed = alike.sample(fraction=1.0, shuffle=True, seed=1)
    once = alike[order_log(alike, truth=truth)]
    assert once.equals(mixed[order_log(mixed, truth=truth)])


@pytest.mark.parametrize("seed", range(5))
def test_visible_events(seed):
    rng = np.random.default_rng(seed)
    rows = np.zeros(200, [("number", "i4"), ("time", "i8"), ("what", "i4")])
    rows["number"], rows["time"] = rng.integers(3, 9, 200), rng.integers(50, 90, 200)
    rows["what"] = np.arange(200)
    number, time = rng.integers(3, 9, 40), rng.integers(0, 150, 40)
    seen, end, length = _visible(rows, number, time, length=4)
    kept = seen["what"].to_numpy()
    used = set()
    for i in range(40):
        mine = rows[(rows["number"] == number[i]) & (rows["time"] < time[i])]
        wanted = mine[np.lexsort((mine["what"], mine["time"]))]["what"][-4:]
        assert kept[end[i] - length[i] : end[i]].tolist() == wanted.tolist()
        used |= set(wanted.tolist())
    assert sorted(kept.tolist()) == sorted(used)


def test_a_split_of_many_files(tmp_path, monkeypatch):
    raw = make_raw(make_frame(203))
    whole = prepare_and_load(tmp_path / "whole", raw)
    monkeypatch.setattr(builder, "BLOCK_ROWS", 10)
    monkeypatch.setattr(builder, "SHARD_BLOCKS", 3)
    same_columns(whole, prepare_and_load(tmp_path / "parts", raw))
    files = sorted(p.name for p in (tmp_path / "parts").rglob("*fm.array_record*"))
    assert len(files) == 4  # 102 rows of the FM window: 11 blocks
