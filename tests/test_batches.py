"""Grain input: every row once an epoch, and an iterator whose state is one integer."""

import json
import time
from collections.abc import Callable

import grain
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loopfm_jax.data.batches import Batch, GlobalBatches, OrderConfig, iterate
from loopfm_jax.data.encode import Ragged
from loopfm_jax.data.log import Log
from loopfm_jax.data.schema import Field, Schema
from loopfm_jax.errors import UserError
from loopfm_jax.inputs import open_inputs
from loopfm_jax.packing import Parts

ROWS = np.arange(100, 123)


def rows_only(rows: np.ndarray, _: Parts) -> Batch:
    return {"row_B": rows}


def make(seed: int = 0, rows: np.ndarray = ROWS, **config) -> GlobalBatches:
    return GlobalBatches(rows, rows_only, config=OrderConfig(**config), seed=seed)


def real_rows(source: GlobalBatches) -> list[int]:
    return [int(r) for b in iterate(source) for r in b["row_B"][b["weight_B"] > 0]]


@settings(max_examples=60, deadline=None)
@given(
    count=st.integers(1, 70),
    batch=st.integers(1, 80),
    epochs=st.integers(1, 3),
    order=st.sampled_from(["time", "shuffled"]),
)
def test_every_row_is_seen_once_an_epoch(count, batch, epochs, order):
    rows = np.arange(count) * 3
    source = make(rows=rows, batch=batch, epochs=epochs, order=order)
    batches = [source[i] for i in range(len(source))]
    assert all(len(b["row_B"]) == len(b["weight_B"]) == batch for b in batches)
    seen = np.concatenate([b["row_B"][b["weight_B"] > 0] for b in batches])
    assert len(seen) == count * epochs
    for epoch in seen.reshape(epochs, count):
        np.testing.assert_array_equal(np.sort(epoch), rows)
    filled = np.concatenate([b["row_B"] for b in batches])
    assert set(filled) <= set(rows)
    assert sum(b["weight_B"].sum() for b in batches) == count * epochs


def test_only_the_last_batch_is_filled_up_and_its_filling_weighs_nothing():
    batches = list(iterate(make(batch=10)))
    assert [b["weight_B"].tolist() for b in batches] == [[1] * 10] * 2 + [[1] * 3 + [0] * 7]
    assert batches[2]["row_B"].tolist() == [120, 121, 122, 113, 114, 115, 116, 117, 118, 119]
    assert batches[0]["weight_B"].dtype == np.float32


def test_one_row_of_the_last_batch_is_not_all_that_its_statistics_see():
    rows = np.arange(4097)
    for order in ("time", "shuffled", "mixed"):
        last = make(rows=rows, batch=64, epochs=2, order=order)[129]
        assert last["weight_B"].sum() == 1 and len(set(last["row_B"])) == 64, order
    alone = make(rows=rows[:3], batch=8)[0]
    assert set(alone["row_B"]) == {0, 1, 2} and alone["weight_B"].sum() == 3


def test_time_order_and_shuffled_epochs():
    assert real_rows(make(batch=10, epochs=2)) == [*ROWS, *ROWS]
    shuffled = real_rows(make(batch=10, epochs=2, order="shuffled"))
    first, second = shuffled[: len(ROWS)], shuffled[len(ROWS) :]
    assert first != list(ROWS) and first != second
    assert shuffled == real_rows(make(batch=10, epochs=2, order="shuffled"))
    assert shuffled != real_rows(make(batch=10, epochs=2, order="shuffled", seed=1))
    assert shuffled == real_rows(make(batch=7, epochs=2, order="shuffled"))


@pytest.mark.parametrize("order", ["time", "shuffled"])
@pytest.mark.parametrize("stop", [0, 1, 3, 5])
def test_resumes_exactly_from_one_integer(order, stop):
    source = make(batch=10, epochs=2, order=order)
    whole = [b["row_B"].tolist() for b in iterate(source)]
    first = iterate(source)
    for _ in range(stop):
        next(first)
    state = json.loads(json.dumps(first.get_state()))  # what a checkpoint keeps
    numbers = [v for v in _leaves(state) if isinstance(v, int)]
    assert numbers == [stop] and len(_leaves(state)) == 1
    again = iterate(make(batch=10, epochs=2, order=order))
    again.set_state(state)
    assert [b["row_B"].tolist() for b in again] == whole[stop:]


def _leaves(value) -> list:
    if isinstance(value, dict):
        return [leaf for v in value.values() for leaf in _leaves(v)]
    return [value]


def test_a_checkpoint_of_the_iterator(tmp_path):
    import orbax.checkpoint as ocp

    first = iterate(make(batch=5, order="shuffled"))
    next(first), next(first)
    with ocp.CheckpointManager(tmp_path) as manager:
        manager.save(2, args=ocp.args.Composite(data=grain.checkpoint.CheckpointSave(first)))
        manager.wait_until_finished()
        again = iterate(make(batch=5, order="shuffled"))
        restore = grain.checkpoint.CheckpointRestore(again)
        manager.restore(2, args=ocp.args.Composite(data=restore))
    assert next(again)["row_B"].tolist() == next(first)["row_B"].tolist()


def test_the_description_holds_no_address():
    assert repr(make()) == repr(make())
    assert "0x" not in repr(make()) and "rows=23" in repr(make())


@pytest.mark.parametrize("name", ["batch", "epochs"])
def test_numbers_below_one(name):
    with pytest.raises(UserError, match=f"order.{name} is 0"):
        OrderConfig(**{name: 0})


@settings(max_examples=80, deadline=None)
@given(
    counts=st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=8),
    longest=st.integers(1, 7),
)
def test_events_are_the_last_ones_newest_first(counts, longest):
    """Two ragged columns side by side: the shorter one lacks its oldest events."""
    names, counts = ("a", "b"), np.array(counts)
    fields = tuple(Field(n, 99, kind="sequence", length=longest) for n in names)
    ragged = {
        n: Ragged(np.arange(1, c.sum() + 1, dtype=np.int32), c)
        for n, c in zip(names, counts.T, strict=True)
    }
    log = Log(Schema(fields), {"label": np.zeros(len(counts))}, ragged)
    rows = np.arange(len(counts))[::-1]
    found = log.events(names, rows)
    at = 0
    for row, length in zip(rows, found.length_B, strict=True):
        assert length == min(counts[row].max(), longest)
        for i, n in enumerate(names):
            end, kept = counts[: row + 1, i].sum(), min(counts[row, i], length)
            want = list(range(end, end - kept, -1)) + [0] * (length - kept)
            assert found.ids_TG[at : at + length, i].tolist() == want, n
        at += length
    assert at == len(found.ids_TG)


def test_batches_of_a_prepared_log(prepared):
    inputs = open_inputs(prepared, reader="fm", behaviours=True)
    log, schema = inputs.log, inputs.schema
    source = GlobalBatches(inputs.rows("vm"), inputs.batch, config=OrderConfig(batch=64))
    start = inputs.splits["vm"].start
    for i, batch in enumerate(iterate(source)):
        rows = start + np.arange(i * 64, i * 64 + int(batch["weight_B"].sum()))
        assert batch["ids_BF"].shape == (64, len(schema.categorical))
        np.testing.assert_array_equal(batch["label_B"][: len(rows)], log["label"][rows])
        np.testing.assert_array_equal(batch["floats_BN"][: len(rows)], log["floats"][rows])
        columns = dict(zip([f.name for f in schema.categorical], batch["ids_BF"].T, strict=True))
        for group, names in schema.groups.items():
            events = batch["events"][group]
            (ids_SG,) = events["ids_PSG"]
            assert not ids_SG[events["length_B"].sum() :].any()
            columns |= dict(zip(names, ids_SG.T, strict=True))
        for name, ids in columns.items():
            low = schema.offsets[name]
            assert ((ids == 0) | ((ids > low) & (ids < low + schema[name].rows))).all()
    assert columns.keys() == {f.name for f in schema.fields}
    assert "signal" not in {f.name for f in schema.for_vm().fields}


def rate(run: Callable[[], int]) -> float:
    started = time.monotonic()
    return run() / (time.monotonic() - started)


def test_rate(prepared):
    """Printed, not asserted: `pytest -s -k rate`."""
    inputs = open_inputs(prepared, reader="vm", behaviours=False)
    rows = np.resize(inputs.rows("fm"), 200_000)
    source = GlobalBatches(rows, inputs.batch, config=OrderConfig(batch=4096))
    found = rate(lambda: sum(len(b["label_B"]) for b in iterate(source)))
    print(f"\ninput: {found / 1e6:.2f} M rows/s into host batches of 4096")
