"""Slices against a plain-Python oracle; leakage rules (1)-(3), (6) and (7) as properties (R6)."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loopfm_jax.errors import UserError
from loopfm_jax.history.slices import SliceConfig, slices

DAY_MS = 86_400_000
cases = settings(max_examples=1000, deadline=None, derandomize=True, database=None)

events = st.lists(
    st.tuples(st.integers(0, 2), st.integers(0, 12), st.integers(0, 3)), min_size=1, max_size=10
)
"""(key, time, how long after it the entry is logged); few keys and times, so that ties abound."""
configs = st.builds(
    lambda length, delay, retention: SliceConfig(
        length=length, delay_s=delay / 1000, retention_days=retention / DAY_MS
    ),
    st.integers(1, 4),
    st.integers(0, 5),
    st.one_of(st.integers(1, 10), st.just(DAY_MS)),
)


def find(entries, queries, config):
    """Histories of queries [(key, time)] over entries [(key, time)], each newest first: numbers of
    entries."""
    entry = np.array(entries, np.int64).reshape(-1, 2)
    query = np.array(queries, np.int64).reshape(-1, 2)
    order, end, length = slices(
        entry_key=entry[:, 0],
        entry_time=entry[:, 1],
        query_key=query[:, 0],
        query_time=query[:, 1],
        config=config,
    )
    assert (length >= 0).all() and (end >= length).all() and (end <= len(entry)).all()
    assert sorted(order.tolist()) == list(range(len(entry)))
    assert length.dtype == np.int32
    return [
        order[e - n : e][::-1].tolist() for e, n in zip(end.tolist(), length.tolist(), strict=True)
    ]


def oracle(entries, query, config):
    """What one query may see: newest first, of ties the later entry first."""
    (key, now), delay = query, round(config.delay_s * 1000)
    retention = round(config.retention_days * DAY_MS)
    seen = [
        (time, i)
        for i, (k, time) in enumerate(entries)
        if k == key and time + delay < now and time >= now - retention
    ]
    return [i for _, i in sorted(seen, reverse=True)][: config.length]


def split(log):
    """Entries (logged) and queries (asked) of the same rows."""
    return [(k, t + wait) for k, t, wait in log], [(k, t) for k, t, _ in log]


@cases
@given(events, configs)
def test_equals_the_oracle(log, config):
    entries, queries = split(log)
    queries = [*queries, (1, 13), (7, 20)]  # at a time, of a key that the log does not have
    assert find(entries, queries, config) == [oracle(entries, q, config) for q in queries]


@cases
@given(events, configs)
def test_never_itself_a_tie_another_key_or_too_early(log, config):
    entries, queries = split(log)
    for i, seen in enumerate(find(entries, queries, config)):
        key, now = queries[i]
        assert i not in seen and len(seen) <= config.length
        for j in seen:
            assert entries[j][0] == key
            assert entries[j][1] / 1000 + config.delay_s < now / 1000
            assert log[j][1] < now


@cases
@given(events, events, configs)
def test_later_events_change_no_earlier_history(log, later, config):
    entries, queries = split(log)
    last = max(now for _, now in queries)
    appended = [(k, last + t + wait) for k, t, wait in later]
    assert find([*entries, *appended], queries, config) == find(entries, queries, config)


@cases
@given(events, configs, st.randoms(use_true_random=False))
def test_order_of_the_input_does_not_matter(log, config, random):
    """Of entries tied at the cut either may stay, so times are compared."""
    order = random.sample(range(len(log)), len(log))

    def seen_times(log):
        entries, queries = split(log)
        return [[entries[j][1] for j in seen] for seen in find(entries, queries, config)]

    whole = seen_times(log)
    assert seen_times([log[i] for i in order]) == [whole[i] for i in order]


@cases
@given(events, configs, st.integers(1, 3))
def test_number_of_shards_does_not_matter(log, config, shards):
    entries, queries = split(log)
    whole = find(entries, queries, config)
    for shard in range(shards):
        mine = [i for i, (key, _) in enumerate(queries) if key % shards == shard]
        found = find([entries[i] for i in mine], [queries[i] for i in mine], config)
        assert [[mine[j] for j in seen] for seen in found] == [whole[i] for i in mine]


huge = st.one_of(st.integers(0, 3), st.integers(2**62 - 3, 2**62), st.integers(0, 2**62))


@cases
@given(st.lists(st.tuples(huge, huge), max_size=8), st.lists(st.tuples(huge, huge), max_size=4))
def test_huge_keys_and_times(entries, queries):
    config = SliceConfig(length=3, retention_days=36_500)
    queries = [*queries, *entries]
    assert find(entries, queries, config) == [oracle(entries, q, config) for q in queries]


def test_no_entries_and_no_queries():
    config = SliceConfig()
    assert find([], [(0, 1), (1, 2)], config) == [[], []]
    assert find([(0, 1)], [], config) == []
    assert find([], [], config) == []


def test_many_singletons_beside_one_giant_key():
    rng = np.random.default_rng(0)
    key = np.concatenate([np.zeros(25_000, np.int64), np.arange(1, 75_001)])
    time = rng.integers(0, DAY_MS, len(key))
    config = SliceConfig(length=5)
    _, end, length = slices(
        entry_key=key, entry_time=time, query_key=key, query_time=time, config=config
    )
    assert (length[25_000:] == 0).all()
    earlier = np.searchsorted(np.sort(time[:25_000]), time[:25_000])
    np.testing.assert_array_equal(length[:25_000], np.minimum(earlier, 5))
    np.testing.assert_array_equal(end[:25_000], earlier)


@pytest.mark.parametrize(
    ("knob", "value"),
    [
        ("length", 0),
        ("delay_s", -0.001),
        ("delay_s", float("nan")),
        ("delay_s", float("inf")),
        ("retention_days", 0),
        ("retention_days", float("nan")),
        ("retention_days", float("inf")),
    ],
)
def test_a_setting_that_would_leak_or_make_no_sense_is_refused(knob, value):
    with pytest.raises(UserError, match=rf"history\.{knob} is {value:g}"):
        SliceConfig(**{knob: value})
