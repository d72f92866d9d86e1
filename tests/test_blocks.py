"""A log whose wide columns wait in their blocks gives the same batches as one in memory."""

import json
from dataclasses import replace

import chex
import grain
import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loopfm_jax import memory
from loopfm_jax.config import Config
from loopfm_jax.data import batches, blocks, builder, log
from loopfm_jax.data.batches import GlobalBatches, Mixture, OrderConfig, iterate
from loopfm_jax.data.blocks import Blocks
from loopfm_jax.data.prepare import prepare
from loopfm_jax.data.synthetic import Synthetic
from loopfm_jax.errors import UserError
from loopfm_jax.flow import Flow
from loopfm_jax.inputs import Inputs, open_inputs
from loopfm_jax.packing import Parts

ROWS = 64
"""Of a block here."""
TINY = Synthetic(rows=2000, rows_per_user=20, topics=3, items_per_topic=5)


@pytest.fixture(scope="module")
def small_blocks():
    """Blocks of 64 rows in windows of 3, of which 6 stay decoded."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (blocks, builder, batches):
            patch.setattr(module, "BLOCK_ROWS", ROWS)
        for module in (blocks, batches):
            patch.setattr(module, "WINDOW_BLOCKS", 3)
        for module in (blocks, log):
            patch.setattr(module, "HELD_BLOCKS", 6)
        yield


@pytest.fixture(scope="module")
def folder(small_blocks, tmp_path_factory):
    """A prepared log of 2,000 rows in many blocks."""
    found = tmp_path_factory.mktemp("blocks") / "data"
    found.mkdir()
    prepare(TINY.read(), TINY.windows, name=TINY.name, card=TINY.card, directory=found)
    return found


def both(folder, reader="fm", behaviours=True) -> tuple[Inputs, Inputs]:
    return (
        open_inputs(folder, reader=reader, behaviours=behaviours, residency="memory"),
        open_inputs(folder, reader=reader, behaviours=behaviours, residency="blocks"),
    )


@pytest.mark.parametrize("order", ["time", "mixed"])
@pytest.mark.parametrize(
    "reader, behaviours, windows",
    [("fm", True, ("fm",)), ("fm", False, ("fm",)), ("vm", True, ("vm", "validation"))],
)
@pytest.mark.parametrize("size", [ROWS, 50, 300])
def test_batches_are_those_of_a_log_in_memory(folder, order, reader, behaviours, windows, size):
    inputs = both(folder, reader, behaviours)
    assert inputs[1].log.blocks is not None
    config = OrderConfig(order=order, epochs=2, batch=size)
    rows = inputs[0].rows(*windows)[:-7]  # so that the last batch is filled up
    whole, read = (GlobalBatches(rows, i.batch, config=config, seed=3) for i in inputs)
    assert len(whole) == len(read) and len(rows) % size
    for a, b in zip(iterate(whole), iterate(read), strict=True):
        chex.assert_trees_all_equal(a, b)
        assert all(x.dtype == y.dtype for x, y in zip(_leaves(a), _leaves(b), strict=True))


def _leaves(batch) -> list[np.ndarray]:
    import jax

    return jax.tree.leaves(batch)


def test_any_rows_may_be_asked_for(folder):
    whole, read = both(folder)
    rng = np.random.default_rng(0)
    for rows in (np.array([1234]), rng.permutation(2000)[:500], np.array([5, 5, 1999, 0, 5])):
        rows = rows[rows < len(whole.log)]
        chex.assert_trees_all_equal(whole.batch(rows), read.batch(rows))


def test_a_pass_decodes_every_block_once(folder, monkeypatch):
    _, read = both(folder)
    assert read.log.blocks is not None
    seen: list[int] = []

    def watched(number: int):
        seen.append(number)
        return one(number)

    one = read.log.blocks.read
    opened = replace(read, log=replace(read.log, blocks=replace(read.log.blocks, read=watched)))
    rows = opened.rows("fm")
    for order in ("time", "mixed"):
        seen.clear()
        source = GlobalBatches(rows, opened.batch, config=OrderConfig(order=order, batch=50))
        assert len(list(iterate(source))) == len(source)
        if order == "mixed":
            assert seen != sorted(seen)
        assert sorted(seen) == list(range(-(-len(rows) // ROWS)))
        opened = replace(opened, log=replace(opened.log))  # nothing decoded is left


@pytest.mark.parametrize("order", ["time", "mixed"])
def test_processes_make_parts_of_the_same_batches_and_read_their_blocks(folder, order, monkeypatch):
    """Of two; a batch is of four blocks, so that each process has two of them."""
    whole, read = both(folder)
    rows, config = whole.rows("fm"), OrderConfig(order=order, batch=4 * ROWS)
    source = GlobalBatches(rows, whole.batch, config=config, parts=Parts(2, (0, 1)))
    halves, asked = [], []
    for own in (0, 1):
        opened = replace(read, log=replace(read.log))  # nothing decoded is left
        blocks, numbers = opened.log.blocks, []
        one = lambda n, read=blocks.read, numbers=numbers: numbers.append(n) or read(n)  # noqa: E731
        opened = replace(opened, log=replace(opened.log, blocks=replace(blocks, read=one)))
        halves.append(GlobalBatches(rows, opened.batch, config=config, parts=Parts(2, (own,))))
        asked.append(numbers)
    for n in range(len(source)):
        both_halves = jax.tree.map(lambda *x: np.concatenate(x), *(half[n] for half in halves))
        chex.assert_trees_all_equal(both_halves, source[n])
    number = -(-len(rows) // ROWS)
    assert sorted({*asked[0], *asked[1]}) == list(range(number))
    assert max(map(len, asked)) < 0.8 * number


@settings(max_examples=60, deadline=None)
@given(
    count=st.integers(1, 1500),
    kept=st.floats(0.05, 1),
    start=st.integers(0, 200),
    batch=st.integers(1, 400),
    seed=st.integers(0, 3),
)
def test_a_mixed_epoch_has_every_row_once(small_blocks, count, kept, start, batch, seed):
    chosen = np.random.default_rng(seed).random(count) < kept
    chosen[0] = True
    rows = start + np.flatnonzero(chosen)
    config = OrderConfig(order="mixed", epochs=2, batch=batch)
    source = GlobalBatches(rows, lambda r, _: {"row_B": r}, config=config, seed=seed)
    items = [source[i] for i in range(len(source))]
    seen = np.concatenate([b["row_B"][b["weight_B"] > 0] for b in items])
    for epoch in seen.reshape(2, len(rows)):
        np.testing.assert_array_equal(np.sort(epoch), rows)
    if len(rows) > max(50, 2 * batch):  # a batch itself stands in the order of time
        assert (seen[: len(rows)] != seen[len(rows) :]).any() and (np.diff(seen) < 0).any()


def test_a_window_holds_the_rows_of_some_blocks(small_blocks):
    rows = np.arange(10, 10 + 20 * ROWS)
    mixture = Mixture(rows, seed=0)
    windows = [mixture.part(1, low, low + 3 * ROWS) for low in range(0, 18 * ROWS, 3 * ROWS)]
    for window in windows:
        assert len(np.unique((window - 10) // ROWS)) == 3
    firsts = [window[0] // ROWS for window in windows]
    assert firsts != sorted(firsts)
    again, other = Mixture(rows, seed=0), Mixture(rows, seed=1)
    np.testing.assert_array_equal(again.part(1, 100, 200), mixture.part(1, 100, 200))
    assert (other.part(1, 100, 200) != mixture.part(1, 100, 200)).any()
    assert (mixture.part(0, 100, 200) != mixture.part(1, 100, 200)).any()


@pytest.mark.parametrize("order", ["time", "mixed"])
@pytest.mark.parametrize("stop", [0, 1, 7, 30])
def test_resumes_exactly_from_one_integer(folder, order, stop):
    def start() -> grain.DatasetIterator:
        _, read = both(folder)
        config = OrderConfig(order=order, epochs=2, batch=48)
        return iterate(GlobalBatches(read.rows("fm"), read.batch, config=config))

    first = start()
    for _ in range(stop):
        next(first)
    state = json.loads(json.dumps(first.get_state()))  # what a checkpoint keeps
    assert len(json.dumps(state)) < 100
    again = start()
    again.set_state(state)
    rest = list(first)
    assert len(rest) > 10
    for a, b in zip(rest, again, strict=True):
        chex.assert_trees_all_equal(a, b)


def test_auto_looks_at_the_memory_of_the_machine(folder, monkeypatch):
    whole, splits = log.load(folder)
    held = sum(x.nbytes for x in whole.columns.values())
    rows = {name: s.stop - s.start for name, s in splits.items()}
    size = builder.size(folder / json.loads((folder / "schema.json").read_text())["folder"], rows)
    assert held < size < 3 * held
    for share, blocks_used in ((0.9, True), (1.1, False)):
        monkeypatch.setattr(memory, "host_bytes", lambda s=share: s * size / log.SHARE)
        found, _ = log.load(folder, residency="auto")
        assert (found.blocks is not None) == blocks_used
    assert log.load(folder)[0].blocks is None


def test_what_is_one_number_a_row_stays_in_memory(folder):
    whole, _ = log.load(folder)
    read, _ = log.load(folder, residency="blocks")
    for name in ("label", "time", "logged_time", "key"):
        np.testing.assert_array_equal(read[name], whole[name])
    assert len(read) == len(whole) and not {"ids", "floats"} & read.columns.keys()
    with pytest.raises(UserError, match="'ids' of any row.*--log-residency memory"):
        read["ids"]


def test_ids_of_rows_that_rise(folder, monkeypatch):
    monkeypatch.setattr(log, "PIECE", 100)
    whole, read = both(folder)
    names = [f.name for f in whole.schema.categorical][1:3]
    rows = np.flatnonzero(whole.log["label"])
    assert len(rows) > 100
    found = read.log.ids_of(rows, names)
    np.testing.assert_array_equal(found, whole.log["ids"][rows][:, 1:3])
    np.testing.assert_array_equal(found, whole.log.ids_of(rows, names))


def test_a_full_permutation_needs_memory(folder, monkeypatch):
    def opened(residency, order) -> Inputs:
        return open_inputs(folder, reader="fm", behaviours=True, residency=residency, order=order)

    monkeypatch.setattr(memory, "host_bytes", lambda: 0)
    for order in ("time", "mixed"):
        assert opened("auto", order).log.blocks is not None
    for residency in ("auto", "memory"):
        assert opened(residency, "shuffled").log.blocks is None
    with pytest.raises(UserError, match="--fm.train.order.order mixed"):
        opened("blocks", "shuffled")


def test_a_log_that_is_cut_otherwise_is_refused(folder, monkeypatch):
    monkeypatch.setattr(builder, "BLOCK_ROWS", 2 * ROWS)
    with pytest.raises(UserError, match="records where .* are due.*prepare the log again"):
        log.load(folder, residency="blocks")


def test_groups_name_the_block_of_every_row():
    cut = Blocks(lambda number: {}, np.array([0, 4, 8, 10]))
    groups, place_B = cut.groups(np.array([9, 0, 4, 3, 8]))
    assert [number for number, _ in groups] == [0, 1, 2]
    rows = np.concatenate([cut.bounds[number] + at for number, at in groups])
    assert rows[place_B].tolist() == [9, 0, 4, 3, 8]


def test_prepared_ahead_is_a_window_where_rows_are_mixed(small_blocks):
    def ahead(**config) -> int:
        source = GlobalBatches(np.arange(9), lambda r, _: {}, config=OrderConfig(**config))
        return source.ahead

    assert ahead(batch=8) == ahead(batch=8, order="shuffled") == 2
    assert ahead(batch=8, order="mixed") == 3 * ROWS // 8
    assert ahead(batch=1, order="mixed") == 64 and ahead(batch=999, order="mixed") == 2


def test_a_run_from_blocks_gives_the_same_models_and_tells_the_wait(small_blocks, loopfm):
    loopfm.succeed("prepare")
    mixed = ("--fm.train.order.order", "mixed")
    curves, files = [], []
    for where in ("memory", "blocks"):
        for command in ("train-fm", "export", "train-vm"):
            force = ("--force",) if where == "blocks" else ()
            loopfm.succeed(command, "--log-residency", where, *mixed, *force)
        manifest = json.loads((loopfm.workdir / "fm/teacher/manifest.json").read_text())
        curves.append(manifest["facts"]["curve"])
        assert 0 <= manifest["measured"]["wait_share"] <= 1
        names = ("fm/export/soft.npy", "vm/base/seed_0/prediction.npy")
        files.append([np.load(loopfm.workdir / name) for name in names])
    assert curves[0] == curves[1] and len(curves[0]) > 5
    chex.assert_trees_all_equal(*files)


def test_what_needs_the_whole_log_is_refused(small_blocks, loopfm):
    loopfm.succeed("prepare")
    blocks_only = ("--log-residency", "blocks")
    told = loopfm.fail(loopfm.argv("train-fm", *blocks_only, "--fm.train.order.order", "shuffled"))
    assert "use order mixed" in told
    loopfm.succeed("train-fm", *blocks_only)  # in time order
    told = loopfm.fail(loopfm.argv("export", *blocks_only, "--export.refresh", "fresh"))
    assert "--log-residency memory" in told


def test_where_the_log_waits_makes_no_other_stage():
    here, there = (Flow(Config(log_residency=where)) for where in ("memory", "blocks"))
    assert here._train_fm == there._train_fm
    assert here._train_vm("base", 0, "own") == there._train_vm("base", 0, "own")
