"""Kinds of key: columns and pairs of them, several at once, watched-only histories."""

import json

import numpy as np
import pytest
from command_line import CommandLine
from hypothesis import given, settings
from hypothesis import strategies as st

from loopfm_jax.data.log import Log, load
from loopfm_jax.data.schema import Schema
from loopfm_jax.errors import UserError
from loopfm_jax.history.keys import key_values

NAMES = ("key", "item", "key+item", "item+topic+key")


def make_log(key, item, topic) -> Log:
    columns = {"key": np.array(key, np.int64)}
    columns |= {"key_item": np.array(item, np.int32), "key_topic": np.array(topic, np.int32)}
    return Log(Schema(()), columns, {})


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(st.lists(st.tuples(*[st.integers(0, 3)] * 3), min_size=1, max_size=20))
def test_two_rows_share_a_key_if_and_only_if_they_agree_in_all_its_parts(rows):
    key, item, topic = (list(column) for column in zip(*rows, strict=True))
    parts = {"key": key, "item": item, "topic": topic}
    found = key_values(make_log(key, item, topic), NAMES)
    for name in NAMES:
        whole = list(zip(*(parts[part] for part in name.split("+")), strict=True))
        for i in range(len(rows)):
            same = found[name] == found[name][i]
            assert same.tolist() == [other == whole[i] for other in whole]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("author",), "names 'author'; the prepared log can group by key, item, topic"),
        (("key+author",), "names 'author'"),
        (("key", "key"), "name each kind of key once"),
        ((), "at least one"),
    ],
)
def test_keys_that_are_not_there(names, message):
    with pytest.raises(UserError, match=message):
        key_values(make_log([0], [0], [0]), names)


@pytest.mark.parametrize("last", [2**21 - 1, 2**21])
def test_keys_that_would_not_fit_a_number_are_refused(last):
    """By two rows that 64 bits cannot tell apart once there are more than 2**21 values each."""
    log = make_log([0, 2**20, last], [0, 0, last], [0, 0, last])
    if last < 2**21:
        assert len(set(key_values(log, ("key+item+topic",))["key+item+topic"].tolist())) == 3
    else:
        with pytest.raises(UserError, match="2,097,153 x .* more than 2\\*\\*63 keys"):
            key_values(log, ("key+item+topic",))


def test_histories_by_several_keys_and_of_positive_entries(tmp_path, capsys):
    """By a plain rule on the stores on disk, and through a VM that reads both."""
    loopfm = CommandLine(tmp_path, capsys)
    told = ["--history.keys", "key", "item_id+key", "--history.keep", "positive"]
    told += ["--fm.taps", "hidden_0", "item"]
    loopfm.succeed("run", "--methods", "loopfm", *told)
    log, splits = load(loopfm.workdir / "data")
    first = splits["vm"].start
    time, logged, label = (log[n][first:] for n in ("time", "logged_time", "label"))
    item, user = log["key_item_id"][first:], log["key"][first:]
    for name, own in {"key": user, "item_id+key": item * 10**6 + user}.items():
        folder = loopfm.workdir / "history" / name
        end, length, row = (np.load(folder / f"{a}.npy") for a in ("end", "length", "row"))
        assert len(row) == label.sum() and label[row].all()
        for i in range(0, len(time), 7):
            seen = row[end[i] - length[i] : end[i]]
            may = np.flatnonzero((own == own[i]) & (logged < time[i]) & (label == 1))
            assert set(seen) <= set(may) and len(seen) == min(len(may), 5)
            if len(may) > 5:
                assert logged[seen].min() >= np.sort(logged[may])[-5]
    facts = json.loads((loopfm.workdir / "history/manifest.json").read_text())["facts"]
    codes = [np.load(path) for path in (loopfm.workdir / "history").glob("*/codes_*.npy")]
    assert len(codes) == 4  # two kinds of key, two taps
    assert facts["store_bytes"] == sum(code.nbytes for code in codes)
    assert set(facts["keys"]) == {"key", "item_id+key"}
