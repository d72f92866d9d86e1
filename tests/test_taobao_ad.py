"""TaobaoAd: what an example sees of a log of events, against a plain reading of the files."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from command_line import CommandLine
from raw_logs import files_of, vocabulary
from taobao_files import DAY_S, START_S, write_release

from loopfm_jax.data import events
from loopfm_jax.data.log import Log, load
from loopfm_jax.data.prepare import prepare
from loopfm_jax.data.taobao_ad import FILES, HISTORY, TARGET, USER, TaobaoAd
from loopfm_jax.errors import UserError
from loopfm_jax.inputs import open_inputs

LENGTH = 7
FM_END_S = START_S + 4 * DAY_S


def prepared_from(raw: Path, folder: Path, **kwargs) -> Path:
    source = TaobaoAd(raw_dir=raw, length=LENGTH, **{"min_count": 2, **kwargs})
    folder.mkdir(parents=True)
    prepare(source.read(), source.windows, name=source.name, card=source.card, directory=folder)
    return folder


def table(raw: Path, name: str) -> pl.DataFrame:
    """All values as the file spells them."""
    return pl.read_csv(raw / f"{name}.csv", infer_schema=False)


def rewrite(raw: Path, name: str, change: Callable[[pl.DataFrame], pl.DataFrame]) -> None:
    change(table(raw, name)).write_csv(raw / f"{name}.csv")


def decoded(folder: Path, log: Log, name: str, ids: np.ndarray) -> np.ndarray:
    """Fused ids -> values as text, `?` for unknown ones, "" for padding."""
    field = log.schema[name]
    known = {i: value for value, i in vocabulary(folder, field.shares or name).items()}
    texts = np.array(["", *(known[i] for i in range(1, len(known) + 1)), "?"])
    return texts[np.where(ids > 0, ids - log.schema.offsets[name], 0)]


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Users have about 15 events and 20 impressions, all on whole hours: many tie."""
    folder = write_release(tmp_path_factory.mktemp("taobao") / "raw", events=300)
    rewrite(folder, "behavior_log", _coarse)
    rewrite(folder, "raw_sample", _coarse)
    return folder


def _coarse(frame: pl.DataFrame) -> pl.DataFrame:
    time = pl.col("time_stamp").cast(pl.Int64) // 3600 * 3600
    return frame.with_columns(time.alias("time_stamp"))


@pytest.fixture(scope="module")
def folder(raw: Path) -> Path:
    return prepared_from(raw, raw.parent / "log")


def test_an_example_sees_the_last_events_strictly_before_it(raw, folder):
    samples, log_of = table(raw, "raw_sample"), {}
    for user, time, btag, cate, brand in table(raw, "behavior_log").rows():
        log_of.setdefault(user, []).append((int(time), int(cate), int(brand), btag))
    order = {"pv": 0, "cart": 1, "fav": 2, "buy": 3}
    expected = {}
    for user, time in samples.select("user", "time_stamp").unique().rows():
        past = [e for e in log_of.get(user, []) if e[0] < int(time)]
        past.sort(key=lambda e: (*e[:3], order[e[3]]))
        expected[user, int(time)] = past[-LENGTH:]

    log, _ = load(folder)
    rows = np.arange(len(log))
    users = decoded(folder, log, "userid", log["ids"][:, 0])
    found = [decoded(folder, log, n, log.padded(n, rows)) for n in HISTORY]
    cate, brand, btag = found
    lengths = set()
    for row in rows[users != "?"]:
        past = expected[users[row], int(log["time"][row]) // 1000]
        lengths.add(len(past))
        pad = [""] * (LENGTH - len(past))
        for seen, wanted in ((cate, 1), (brand, 2), (btag, 3)):
            texts = [*pad, *(str(e[wanted]) for e in past)]
            assert all(a in (b, "?") for a, b in zip(seen[row], texts, strict=True)), row
    assert {0, LENGTH} < lengths
    assert (cate == "?").mean() < 0.1


def test_only_what_examples_see_is_stored(raw, folder):
    log, _ = load(folder)
    end, length = log["behavior_log/end"], log["behavior_log/length"]
    size = len(log.sequences["cate_his"])
    covered = np.zeros(size, bool)
    for stop, count in zip(end, length, strict=True):
        covered[stop - count : stop] = True
    assert covered.all() and size < len(table(raw, "behavior_log"))
    assert log.sequences["btag_his"].dtype == np.uint8
    assert not list(folder.glob(".events*"))


def test_vocabularies_know_what_rows_of_the_fm_window_hold(raw, folder):
    log, splits = load(folder)
    fm = np.arange(len(log))[splits["fm"]]
    for target, history in zip(TARGET, HISTORY, strict=True):
        at = [f.name for f in log.schema.categorical].index(target)
        own = decoded(folder, log, target, log["ids"][fm, at])
        past = decoded(folder, log, history, log.padded(history, fm))
        known = set(vocabulary(folder, target))
        assert known <= {*own.tolist(), *past.ravel().tolist(), ""}
        assert log.schema[history].rows == log.schema[target].rows == len(known) + 2
    assert vocabulary(folder, "btag")["pv"] == 1


def test_nothing_after_the_fm_window_changes_a_vocabulary(raw, folder, tmp_path):
    other = tmp_path / "raw"
    other.mkdir()
    for name in FILES:
        (other / f"{name}.csv").write_bytes((raw / f"{name}.csv").read_bytes())
    later = pl.col("time_stamp").cast(pl.Int64) >= FM_END_S
    rewrite(other, "behavior_log", lambda f: f.with_columns(
        pl.when(later).then(pl.lit("99")).otherwise("cate").alias("cate")))  # fmt: skip
    again = prepared_from(other, tmp_path / "log")
    for name in ("vocabulary.parquet", "schema.json"):
        assert (again / name).read_bytes() == (folder / name).read_bytes()
    (one, splits), (two, _) = load(folder), load(again)
    at = np.arange(len(one))
    same = one.padded("cate_his", at) == two.padded("cate_his", at)
    assert same[splits["fm"]].all() and not same[splits["test"]].all()


def test_the_order_of_the_files_does_not_matter(raw, folder, tmp_path, monkeypatch):
    other = tmp_path / "raw"
    other.mkdir()
    for name in FILES:
        mixed = table(raw, name).sample(fraction=1.0, shuffle=True, seed=3)
        mixed.write_csv(other / f"{name}.csv")
    monkeypatch.setattr(events, "BATCH", 50)
    assert files_of(prepared_from(other, tmp_path / "log")) == files_of(folder)


def test_copies_with_floats_as_ids_give_the_same_log(raw, folder, tmp_path):
    other = tmp_path / "raw"
    other.mkdir()
    for name in FILES:
        (other / f"{name}.csv").write_bytes((raw / f"{name}.csv").read_bytes())
    for name, column in (("ad_feature", "brand"), ("user_profile", "pvalue_level")):
        value = pl.col(column)
        floats = (
            pl.when(value.is_null() | (value == "NULL")).then(pl.lit("")).otherwise(value + ".0")
        )
        rewrite(other, name, lambda f, c=column, v=floats: f.with_columns(v.alias(c)))
    assert files_of(prepared_from(other, tmp_path / "log")) == files_of(folder)


def test_rows_without_profile_are_left_out_and_missing_values_are_values(raw, folder):
    source = TaobaoAd(raw_dir=raw, length=LENGTH)
    read = source.read()
    known = set(table(raw, "user_profile")["userid"])
    samples = table(raw, "raw_sample")
    kept = [user in known for user in samples["user"]]
    assert len(read.frame) == sum(kept) < len(samples)
    assert read.notes == {"impressions": len(samples), "without_profile_or_ad": kept.count(False)}
    assert "" in vocabulary(folder, "brand") and "" in vocabulary(folder, "pvalue_level")
    assert "" in vocabulary(folder, "new_user_class_level")  # behind the header's trailing blank
    assert {c.name for c in read.columns} >= {"userid", *USER, *TARGET, "price"}


def test_days_are_those_of_the_protocol(folder):
    log, splits = load(folder)
    day = (log["time"] // 1000 - START_S) // DAY_S + 1
    assert {name: sorted(set(day[rows])) for name, rows in splits.items()} == {
        "fm": [1, 2, 3, 4],
        "vm": [5, 6],
        "validation": [7],
        "test": [8],
    }


def test_models_get_the_events_side_by_side(folder):
    inputs = open_inputs(folder, reader="vm", behaviours=True)
    rows, log = inputs.rows("test")[:9], inputs.log
    batch = inputs.batch(rows)
    assert batch["ids_BF"].shape[1] == 16
    (group, names), events = *inputs.schema.groups.items(), batch["events"]
    assert set(names) == set(HISTORY) and list(events) == [group]
    (ids_TG,), length_B = events[group]["ids_PSG"], events[group]["length_B"]
    assert ids_TG.dtype == np.int32 and not ids_TG[length_B.sum() :].any()
    for i, name in enumerate(names):
        padded = log.padded(name, rows)
        real = padded > 0
        assert (np.diff(real.astype(int), axis=1) >= 0).all()  # padded in front
        assert (real.sum(axis=1) == length_B).all()
        newest_first = np.concatenate([row[row > 0][::-1] for row in padded])
        np.testing.assert_array_equal(ids_TG[: length_B.sum(), i], newest_first)
        low = inputs.schema.offsets[name]
        assert (newest_first > low).all()
        assert (newest_first < low + inputs.schema[name].rows).all()
    narrow = open_inputs(folder, reader="vm", behaviours=False)
    assert narrow.batch(rows)["events"] == {}


def test_a_user_without_events_and_a_log_without_events(tmp_path):
    raw = write_release(tmp_path / "raw", events=1)
    log, _ = load(prepared_from(raw, tmp_path / "log"))
    assert log["behavior_log/length"].max() <= 1
    rewrite(raw, "behavior_log", lambda f: f.clear())
    log, _ = load(prepared_from(raw, tmp_path / "empty"))
    assert not log["behavior_log/length"].any()
    assert not log.padded("cate_his", np.arange(len(log))).any()


WRONG = {
    "no behaviour log": (lambda raw: (raw / "behavior_log.csv").unlink(), ["behavior_log.csv"]),
    "a column of another name": (
        lambda raw: rewrite(raw, "ad_feature", lambda f: f.rename({"customer": "custumer"})),
        ["ad_feature.csv", "'customer'", "did you mean 'custumer'"],
    ),
    "another kind of event": (
        lambda raw: rewrite(raw, "behavior_log", lambda f: f.with_columns(pl.lit("ipv")
                                                                          .alias("btag"))),
        ["behavior_log", "ipv"],
    ),
    "no kind of event": (
        lambda raw: rewrite(raw, "behavior_log", lambda f: f.with_columns(
            pl.when(pl.int_range(pl.len()) % 5 > 0).then("btag").alias("btag"))),
        ["behavior_log", "without a btag", "fill or drop"],
    ),
    "text as user": (
        lambda raw: rewrite(raw, "raw_sample", lambda f: f.with_columns(pl.lit("u1")
                                                                        .alias("user"))),
        ["raw_sample.csv", "u1"],
    ),
    "a user twice": (
        lambda raw: rewrite(raw, "user_profile", lambda f: pl.concat([f, f[:1]])),
        ["userid 1", "more than once", "user_profile.csv"],
    ),
    "other users": (
        lambda raw: rewrite(raw, "user_profile", lambda f: f.with_columns(
            (pl.col("userid").cast(pl.Int64) + 5000).alias("userid"))),
        ["none of the 400 impressions", "do not belong together"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_refuses_files_that_do_not_fit(tmp_path, case):
    spoil, words = WRONG[case]
    raw = write_release(tmp_path / "raw")
    spoil(raw)
    with pytest.raises(UserError) as error:
        prepared_from(raw, tmp_path / "log")
    assert all(word in str(error.value) for word in words), error.value
    assert not list((tmp_path / "log").rglob("*")) or not list(tmp_path.rglob(".events*"))


def test_where_the_data_is_must_be_said(tmp_path):
    with pytest.raises(UserError, match="--data.raw-dir"):
        TaobaoAd().read()
    with pytest.raises(UserError, match="data.length is 0"):
        TaobaoAd(length=0)


def test_the_whole_loop(tmp_path, capsys):
    raw = write_release(tmp_path / "raw", rows=1500)
    line = CommandLine(tmp_path, capsys)
    line.configure(f"TaobaoAd(raw_dir=Path({str(raw)!r}), length=5, min_count=2)")
    options = ("--vm.backbone.behaviours", "--vm.encoder.name", "dmin")
    found = line.succeed("run", "--methods", "loopfm", *options)
    assert found["dataset"] == "taobao_ad"
    assert set(found["methods"]) == {"base", "loopfm"}
