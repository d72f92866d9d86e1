"""Leakage (R6): by gradient, by perturbation, by a plain rule; planted mutants must be caught.

Every check says who influences whom exactly, so it also fails where somebody sees too little.
"""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from leak_world import (
    CODE_WIDTH,
    DELAY_MS,
    LONGEST,
    METHOD,
    TAP,
    VM,
    World,
    changed,
    compiled,
    depends,
    logits,
    matrix,
    mutated,
    names,
    order_seen,
    stored_codes,
)

from loopfm_jax import flow, inputs, packing, stages
from loopfm_jax.errors import UserError
from loopfm_jax.history import codes, join, ranges, reader, slices, store, structure
from loopfm_jax.history.codes import Codec
from loopfm_jax.history.slices import SliceConfig
from loopfm_jax.sharding import MeshConfig, make_mesh
from loopfm_jax.vm import train


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    return World.create(tmp_path_factory.mktemp("leak") / "run")


# ---------------------------------------------------------------------------------- checks


def check_histories(world: World, _) -> None:
    """By gradient: codes reach exactly the examples that may see them, newest first."""
    examples = world.examples()
    np.testing.assert_array_equal(depends(world, examples), matrix(world.may_see()))
    assert order_seen(world, examples) == world.may_see()


def check_labels(world: World, monkeypatch, *, every: int = 15) -> None:
    """By perturbation of the log: a label reaches later examples of its key, never its own."""
    label, seen, first = world.log["label"], world.may_see(), world.exported[0]

    def liked(label):
        return [world.log["ids"][rows] for rows in world.liked(label)[first:]]

    before, liked_before = logits(world), liked(label)
    for j in range(0, len(label), every):
        flipped = label.copy()
        flipped[j] = 1 - flipped[j]
        with monkeypatch.context() as patch:
            world.relabelled(patch, flipped)
            changed = logits(world) != before
        past = list(zip(liked_before, liked(flipped), strict=True))
        seen_by = np.array([j - first in rows for rows in seen])
        # The backbone pools its sequences: another order of the same events may go unnoticed.
        may = seen_by | [not np.array_equal(a, b) for a, b in past]
        must = seen_by | [not np.array_equal(np.sort(a, 0), np.sort(b, 0)) for a, b in past]
        assert not changed[~may].any() and changed[must].all()


def check_behaviours(world: World, _) -> None:
    """Every row's `past_` columns hold its key's positive rows of before, padded in front."""
    read = inputs.open_inputs(world.flow.data, reader="vm", behaviours=True)
    rows = np.arange(len(world.log))
    ids = read.batch(rows)["ids_BF"]
    for column, name in enumerate(("item_id", "topic")):
        past = read.log.padded(f"past_{name}", rows)
        own = ids[:, column]
        for row, liked in zip(past, world.liked(world.log["label"]), strict=True):
            assert row.tolist() == [0] * (len(row) - len(liked)) + own[liked].tolist()


def check_ages(world: World, _) -> None:
    """Every event that is seen brings its own age, and no other's."""
    read = inputs.open_inputs(world.flow.data, reader="vm", behaviours=True, timed=True)
    rows = np.arange(len(world.log))
    (events,) = (e for e in read.batch(rows)["events"].values() if "age_PS" in e)
    logged, time = world.log["logged_time"], world.log["time"]
    liked = world.liked(world.log["label"])
    want = [(time[i] - logged[j]) / 1000 for i in rows for j in reversed(liked[i])]
    np.testing.assert_allclose(events["age_PS"][0, : len(want)], want, rtol=1e-6)
    assert min(want) > 0 and not events["age_PS"][0, len(want) :].any()


def check_swapped(world: World, _) -> None:
    """By gradient: swapped histories are all of other keys and of before, and as long as before
    where another key's was."""
    examples = world.examples(swap=True)
    key, time, logged = (world.log[n][world.exported] for n in ("key", "time", "logged_time"))
    sees = depends(world, examples)
    assert not (sees & (key[:, None] == key)).any()
    assert not (sees & (logged >= time[:, None])).any()
    own = np.array([len(s) for s in world.may_see()])
    known = [own[:i][key[:i] != key[i]].max(initial=0) for i in range(len(own))]
    np.testing.assert_array_equal(sees.sum(axis=1), np.minimum(own, known))


CHECKS = (check_histories, check_labels, check_behaviours, check_ages, check_swapped)


@pytest.mark.parametrize("check", CHECKS)
def test_nothing_leaks_and_everything_arrives(world, monkeypatch, check):
    check(world, monkeypatch)


def test_no_label_of_the_log_leaks(world, monkeypatch):
    check_labels(world, monkeypatch, every=2)


def test_turning_a_stored_row_over_changes_exactly_who_may_see_it(world):
    """By perturbation of INT4 codes and outcomes on the device."""
    examples = world.examples()
    past, batch = world.past_of(examples), world.batch_of(examples)
    codec = Codec("int4", CODE_WIDTH)
    int4 = codes.quantise(np.tanh(stored_codes(past)), codec)
    stored = replace(changed(past, codes=int4), codecs={TAP: codec})
    *after_SB, before_B = np.asarray(
        compiled("turned over", world.schema, reader.pack)(batch, stored)
    )
    changed_SB = np.stack(after_SB) != before_B
    expected = matrix(world.may_see())
    np.testing.assert_array_equal(changed_SB.T, expected[:, names(past)])


def test_the_world_has_the_hard_cases(world):
    """Ties, rows asked before they were logged, entries too fresh, too old or too many."""
    key, time, logged = (world.log[n][world.exported] for n in ("key", "time", "logged_time"))
    lengths = np.array([len(s) for s in world.may_see()])
    assert {0, 1, 2, LONGEST} == set(lengths.tolist())
    waited = (time[:, None] - logged)[key[:, None] == key]
    assert (waited == 0).any() and (waited == DELAY_MS).any()
    assert ((0 < waited) & (waited < DELAY_MS)).any()
    assert (logged > time).mean() > 0.2
    together = (time[:, None] == time) & (key[:, None] == key)
    assert together.sum() > 2 * len(key)


# --------------------------------------------------------------------------------- mutants

LEFT, END, START = 'side="left"', "end[rows] = stop", "time - retention)"
WRITE = "write_rows, path, values, row)"
RANK = "end_B[example_T] - 1 - rank_T"
PACK = (reader, "pack")
SLICES_OF_STORE, SLICES_OF_INPUTS = (ranges, "slices"), (inputs, "slices")
STRUCTURE, JOIN, READ = (flow, "structure_log"), (train, "Join"), (inputs, "open_inputs")
by_history, by_label, by_behaviour, by_age, by_swap = CHECKS


def unsorted(column: str) -> str:
    """A column is written in the order of the log."""
    rows = f"np.sort(row) if path.name.startswith({column!r}) else row"
    return f"write_rows, path, values, {rows})"


MUTANTS = {
    "ties count": (by_history, slices, LEFT, 'side="right"', SLICES_OF_STORE),
    "no delay": (by_history, slices, "time - delay)", "time)", SLICES_OF_STORE),
    "delay granted": (by_history, slices, "time - delay)", "time + delay)", SLICES_OF_STORE),
    "no key": (by_history, slices, "_pack(key, clock(", "_pack(0 * key, clock(", SLICES_OF_STORE),
    "one too new": (by_history, slices, END, "end[rows] = stop + 1", SLICES_OF_STORE),
    "one too old": (by_history, slices, END, "end[rows] = stop - 1", SLICES_OF_STORE),
    "answers in the order of asking": (
        by_history,
        slices,
        END,
        "end[part] = stop",
        SLICES_OF_STORE,
    ),
    "one too many": (
        by_history,
        slices,
        ", config.length)",
        ", config.length + 1)",
        SLICES_OF_STORE,
    ),
    "oldest kept": (
        by_history,
        slices,
        END,
        "end[rows] = start + np.clip(stop - start, 0, config.length)",
        SLICES_OF_STORE,
    ),
    "retention turned": (by_history, slices, START, "time + retention)", SLICES_OF_STORE),
    "no retention": (by_history, slices, START, "time - 10**12)", SLICES_OF_STORE),
    "unsorted search": (by_history, slices, "packed.sort()", "", SLICES_OF_STORE),
    "logged when asked": (
        by_history,
        structure,
        "logged_time=logged_time, kept",
        "logged_time=time, kept",
        STRUCTURE,
    ),
    "asked when logged": (
        by_history,
        structure,
        "(key, time=time",
        "(key, time=logged_time",
        STRUCTURE,
    ),
    "codes unsorted": (by_history, structure, WRITE, unsorted("codes_"), STRUCTURE),
    "outcomes unsorted": (by_label, structure, WRITE, unsorted("outcome"), STRUCTURE),
    "next example's slice": (
        by_history,
        join,
        "rows - self.first,",
        "rows - self.first - 1,",
        JOIN,
    ),
    "own slice kept": (by_swap, store, "key[1:] != key[:-1]", "key[1:] >= 0", (train, "swapped")),
    "slices of later": (by_swap, store, "order[start - 1]", "order[-1]", (train, "swapped")),
    "ranks turned": (
        by_history,
        packing,
        RANK,
        "end_B[example_T] - length_B[example_T] + rank_T",
        PACK,
    ),
    "rows of the next key": (by_history, packing, RANK, "end_B[example_T] - rank_T", PACK),
    "normalised over the batch": (
        by_history,
        packing,
        "self.spread(self.sum(weight))",
        "weight.sum(axis=0, keepdims=True)",
        PACK,
    ),
    "behaviours when asked": (
        by_behaviour,
        inputs,
        'log["logged_time"][positive]',
        'log["time"][positive]',
        READ,
    ),
    "behaviours until logged": (
        by_behaviour,
        inputs,
        'query_time=log["time"]',
        'query_time=log["logged_time"]',
        READ,
    ),
    "negatives liked": (
        by_behaviour,
        inputs,
        'flatnonzero(log["label"])',
        "arange(len(log))",
        READ,
    ),
    "behaviours unsorted": (by_behaviour, inputs, "made])[past.order]", "made])", READ),
    "ages unsorted": (by_age, inputs, "logged_ms[past.order]", "logged_ms", READ),
    "ages of others": (by_age, inputs, "np.repeat(asked_ms", "np.repeat(asked_ms[::-1]", READ),
    "behaviours with ties": (
        by_behaviour,
        slices,
        LEFT,
        'side="right"',
        SLICES_OF_INPUTS,
    ),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_planted_leak_is_caught(world, monkeypatch, name):
    check, module, old, new, (user, what) = MUTANTS[name]
    monkeypatch.setattr(user, what, getattr(mutated(module, old, new), what))
    with pytest.raises(AssertionError):
        check(world, monkeypatch)


# ------------------------------------------------------------------------------- the swap


@settings(max_examples=1000, deadline=None, derandomize=True, database=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 9)), min_size=2, max_size=16))
def test_no_swapped_example_sees_a_row_of_its_key_or_of_its_future(log):
    key, time = np.array(sorted(log, key=lambda row: row[1]), np.int64).T
    order, end, length = slices.slices(
        entry_key=key, entry_time=time, query_key=key, query_time=time, config=SliceConfig()
    )
    nothing = np.zeros(0)
    own = store.Store({}, *[nothing] * 4, end, length)
    if len(set(key)) == 1:
        with pytest.raises(UserError, match="needs at least 2 keys"):
            store.swap(own, key)
        return
    swapped_end, swapped_length = store.swap(own, key)
    for i in range(len(key)):
        rows = order[swapped_end[i] - swapped_length[i] : swapped_end[i]]
        assert len(rows) == swapped_length[i] and not (key[rows] == key[i]).any()
        assert (time[rows] < time[i]).all()
        # As long as before, or as the longest that any other key had by then.
        others = np.flatnonzero(key[:i] != key[i])
        assert swapped_length[i] == min(length[i], length[others].max(initial=0))
        if length[i] and length[i] in length[others]:  # of the latest whose was as long
            assert swapped_end[i] == end[others[length[others] == length[i]][-1]]


# --------------------------------------------------------------------------- the FM's cutoff


def test_an_fm_that_saw_the_vm_window_is_refused(world, monkeypatch):
    world.examples()
    first = int(world.log["time"][world.exported[0]])
    verify = stages.verify

    def open_with(*cutoffs: tuple[int, int], of: str = "history") -> None:
        def said(folder):
            found = verify(folder)
            changed = {"facts": found["facts"] | {"cutoffs": cutoffs}}
            return found | (changed if folder.name == of else {})

        monkeypatch.setattr(stages, "verify", said)
        train.open_examples(world.sources(), VM, METHOD)

    open_with((first, first - 1))
    open_with((first, first - 1), (first + 5, first + 4))  # an FM that is refreshed
    for late in (first, first + 1):
        with pytest.raises(UserError, match=f"until {late} ms, but exported rows from {first}"):
            open_with((first, late))
        with pytest.raises(UserError, match=f"until {late} ms, but exported rows from {first}"):
            open_with((first, late), of="export")
        # Whatever an export says of itself: the VM window starts where it starts.
        with pytest.raises(UserError, match=f"until {late} ms, but exported rows from {first}"):
            open_with((first + 10**6, late))
    with pytest.raises(UserError, match=f"until {first + 5} ms, but exported rows"):
        open_with((first, first - 1), (first + 5, first + 5))


def test_the_fm_learns_no_label_that_came_after_its_window(world):
    """An impression group may begin in the FM window and be logged in the VM window."""
    read = inputs.open_inputs(world.flow.data, reader="fm", behaviours=True)
    all_rows, first = read.rows("fm"), read.log["time"][world.exported[0]]
    late = read.log["logged_time"][all_rows] >= first
    assert late.any()
    before = read.splits["vm"].start
    np.testing.assert_array_equal(read.known(all_rows, before=before), all_rows[~late])
    with pytest.raises(UserError, match=f"labels of all {late.sum():,} rows came after"):
        read.known(all_rows[late], before=before)


@pytest.mark.parametrize(
    ("holdout", "windows"), [("test", ("vm", "validation")), ("validation", ("vm",))]
)
def test_vms_learn_no_label_that_came_after_their_windows(
    world, monkeypatch, tmp_path, holdout, windows
):
    examples, learned = world.examples(), []
    rows, log = examples.inputs.rows(*windows), examples.inputs.log
    late = np.arange(len(rows)) % 5 == 2
    logged = np.array(log["logged_time"])
    logged[rows[late]] = log["time"][examples.inputs.rows(holdout)[0]]
    log = replace(log, columns={**log.columns, "logged_time": logged})
    examples = replace(examples, inputs=replace(examples.inputs, log=log))

    class Stop(Exception): ...

    def note(task, rows, *args, **kwargs):
        learned.extend(rows)
        raise Stop

    monkeypatch.setattr(train.loop, "train", note)
    told = {"seed": 0, "holdout": holdout, "directory": tmp_path, "title": ""}
    with pytest.raises(Stop):
        train.train_vm(examples, VM, mesh=make_mesh(MeshConfig()), **told)
    np.testing.assert_array_equal(learned, rows[~late])
