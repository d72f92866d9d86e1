"""Slices found range by range are those of the whole log, wherever the cuts go."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loopfm_jax.history import ranges
from loopfm_jax.history.ranges import Asked, Ranges, cut, slices_of
from loopfm_jax.history.slices import SliceConfig, slices

few = settings(max_examples=300, deadline=None, derandomize=True, database=None)


@few
@given(
    st.lists(st.tuples(st.integers(0, 2), st.integers(0, 9)), max_size=6),
    st.lists(st.tuples(st.integers(-1, 3), st.integers(-1, 10)), max_size=12),
)
def test_a_range_is_how_many_cuts_are_not_later(cuts, events):
    cuts = sorted(set(cuts))
    key, time = np.array(cuts, np.int64).reshape(-1, 2).T
    found = Ranges(key, time).of(*np.array(events, np.int64).reshape(-1, 2).T)
    assert found.tolist() == [sum(c <= event for c in cuts) for event in events]


rows = st.lists(
    st.tuples(st.sampled_from([0, 0, 0, 1, 5]), st.integers(0, 12), st.integers(0, 3)),
    min_size=1,
    max_size=30,
)
"""(key, time, how long after it the entry is logged); one key owns most rows, ties abound."""


@few
@given(rows, st.integers(1, 5), st.integers(0, 4), st.integers(1, 30), st.integers(1, 6))
def test_equals_the_whole(log, length, delay, retention, size):
    key, time, wait = np.array(log, np.int64).T
    logged, kept = time + wait, np.arange(len(key)) % 3 > 0
    config = SliceConfig(length, delay / 1000, retention / 86_400_000)
    for kept_or_all in (None, kept):
        mine = np.arange(len(key)) if kept_or_all is None else np.flatnonzero(kept)
        whole = slices(
            entry_key=key[mine],
            entry_time=logged[mine],
            query_key=key,
            query_time=time,
            config=config,
        )
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ranges, "RANGE", size)
            found = slices_of(Asked(key, time, logged, kept_or_all), config)
        assert found.order.tolist() == mine[whole.order].tolist()
        assert found.end.tolist() == whole.end.tolist()
        assert found.length.tolist() == whole.length.tolist()


def test_cuts_go_through_a_key_that_owns_much():
    rng = np.random.default_rng(0)
    key = np.where(rng.random(20_000) < 0.5, 7, rng.integers(0, 1000, 20_000))
    time = np.sort(rng.integers(0, 10**9, len(key)))
    found = cut(Asked(key, time, time), size=1000)
    sizes = np.bincount(found.of(key, time), minlength=len(found))
    assert len(found) == 20 and (found.key == 7).sum() >= 9
    assert sizes.max() < 1500
