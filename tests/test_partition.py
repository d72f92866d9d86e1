"""A store split over the shards of batches: cuts, seats, steps that look histories up at home."""

from dataclasses import replace

import bench_cases
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from mesh_steps import Compiled, collectives

from loopfm_jax import infer, loop
from loopfm_jax.bench import rows
from loopfm_jax.bench.data import HistorySpec
from loopfm_jax.bench.model import make_subject
from loopfm_jax.data.batches import GlobalBatches, OrderConfig
from loopfm_jax.history.partition import cut, room
from loopfm_jax.history.slices import SliceConfig, slices
from loopfm_jax.history.store import Store
from loopfm_jax.optim import make_optimiser

LONGEST = 6


def make_store(seed: int, entries: int, keys: int, hot: float = 0.0) -> Store:
    """Of entries of some keys, one of which owns the share `hot`; every entry is an example too."""
    rng = np.random.default_rng(seed)
    key = np.where(rng.random(entries) < hot, 0, rng.integers(0, keys, entries))
    time = np.arange(entries)
    found = slices(
        entry_key=key,
        entry_time=time,
        query_key=key,
        query_time=time,
        config=SliceConfig(length=LONGEST),
    )
    number = np.arange(entries, dtype=np.int32)
    codes = {"hidden_0": rng.integers(0, 256, (entries, 4), np.uint8)}
    flat = np.zeros(entries, np.float32)
    return Store(codes, found.order.astype(np.int32), number, number, flat, found.end, found.length)


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(
    seed=st.integers(0, 99),
    parts=st.sampled_from([2, 3, 8]),
    keys=st.sampled_from([1, 3, 40]),
    hot=st.sampled_from([0.0, 0.25, 0.9]),
)
def test_everybody_sits_once_and_where_his_history_is(seed, parts, keys, hot):
    store = make_store(seed, 200, keys, hot)
    found = cut(store, parts)
    assert found.bounds[0] == 0 and found.bounds[-1] == 200 and (np.diff(found.bounds) >= 0).all()
    own = found.spread(np.arange(200)).reshape(parts, found.rows)
    batch = np.random.default_rng(seed).permutation(200)[:48]
    end, length = store.end[batch], store.length[batch]
    seats = found.seat(end, length).reshape(parts, -1)
    assert sorted(seats[seats >= 0]) == list(range(48)), "each once"
    for part, seated in enumerate(seats):
        for i in seated[seated >= 0]:
            stop = found.within(end[i : i + 1])[0]
            entries = own[part, stop - length[i] : stop]
            np.testing.assert_array_equal(entries, np.arange(end[i] - length[i], end[i]))


def test_parts_are_even_where_keys_are_small_and_a_hot_key_is_not_cut():
    even = cut(make_store(0, 4000, 500), 8)
    assert even.rows < 1.1 * 4000 / 8
    assert cut(make_store(0, 4000, 500, hot=0.25), 8).rows >= 1000


def test_sizes_of_parts_are_few():
    sizes = {room(count, 64) for count in range(1, 129)}
    assert min(sizes) == 64 and max(sizes) == 128 and len(sizes) == 9
    assert all(room(count, 64) >= count for count in range(1, 300))


def test_runs_are_rows_that_follow_one_another():
    assert infer.runs(np.array([4, 5, -1, 6, 9, 8])) == [(4, 0, 2), (6, 3, 4), (9, 4, 5), (8, 5, 6)]
    assert infer.runs(np.array([-1, 0, 1])) == [(0, 1, 3)]
    assert infer.runs(np.array([-1, -1])) == [] == infer.runs(np.zeros(0, int))


# ------------------------------------------------------------------------------- whole steps


def student(mesh: tuple[int, int], folder):
    """A student of histories over generated examples, and those with a store that can be cut."""
    schema = bench_cases.SCHEMA
    backbone = bench_cases.backbone("deepfm", hidden=(8,))
    backbone = replace(backbone, tables=replace(backbone.tables, row_multiple=8))
    spec = {
        **rows.describe(schema, backbone, 64),
        **rows.LogSpec(schema, rows=640)(folder),
        "encoder": {"name": "din", "width": 8, "score_hidden": (4,)},
        "histories": vars(HistorySpec(entries=640, length=LONGEST, mean=3, width=8)),
        "mesh": {"data": mesh[0], "model": mesh[1]},
    }
    subject = make_subject(spec)
    join = subject.examples.join
    histories = replace(join.histories, stores={"key": make_store(1, 640, 60)})
    join = replace(join, histories=histories, first=0)
    return subject, replace(subject.examples, join=join).on(subject.mesh)


def learn(mesh: tuple[int, int], folder, count: int = 6):
    """Losses of the first steps, the program of one, the store's shards, the batches' sizes."""
    subject, examples = student(mesh, folder)
    optimiser = make_optimiser(subject.config.train.optim, steps=count)
    graphdef, state, where = loop.create(subject.build, optimiser, subject.mesh, 0)
    step = Compiled(loop.make_step(subject.task, optimiser, graphdef, where))
    source = GlobalBatches(
        subject.rows,
        examples.batch,
        config=OrderConfig(batch=64),
        parts=loop.sharding.parts(subject.mesh),
        seating=examples.seating,
    )
    past, losses, sizes = examples.past(subject.mesh), [], []
    for n in range(count):
        batch = loop.put(source[n], subject.mesh)
        state, numbers = step(state, batch, past)
        losses.append(float(numbers["logloss"]))
        sizes.append(len(batch["label_B"]))
    return losses, step.text, past.entries["key"].codes["hidden_0"], sizes


def test_histories_are_looked_up_at_home_and_losses_are_those_of_one_device(tmp_path):
    one, _, _, _ = learn((1, 1), tmp_path)
    losses, text, codes, sizes = learn((4, 2), tmp_path)
    np.testing.assert_allclose(losses, one, rtol=1e-5)
    shard = codes.addressable_shards[0].data
    assert len(shard) == len(codes) // 4 < 1.3 * 640 / 4, "a device has its part"
    assert not any(" u8[" in line for line in collective_lines(text)), "no code travels"
    assert max(sizes) <= 2 * 64 and collectives(text)


def collective_lines(text: str) -> list[str]:
    kinds = (" all-gather(", " all-reduce(", " all-to-all(", " collective-permute(")
    return [line for line in text.splitlines() if any(kind in line for kind in kinds)]


def test_predictions_come_back_in_the_order_of_rows(tmp_path):
    """Of the same model, seated on four shards and on one."""
    found = []
    for mesh in ((1, 1), (4, 1)):
        subject, examples = student(mesh, tmp_path)
        optimiser = make_optimiser(subject.config.train.optim, steps=1)
        graphdef, state, _ = loop.create(subject.build, optimiser, subject.mesh, 0)
        model = loop.nnx.merge(graphdef, state.params, state.rest)
        written = {"prediction": np.full(150, np.nan, np.float32)}
        infer.run(
            model,
            infer.make_step(
                lambda model, batch, past: {"prediction": model(batch, past).logits_B},
                model,
                subject.mesh,
            ),
            subject.rows[:150],
            examples.batch,
            written,
            batch=64,
            mesh=subject.mesh,
            constants=examples.past(subject.mesh),
            title="test",
            seating=examples.seating,
        )
        found.append(written["prediction"])
    assert np.isfinite(found[0]).all() and len(set(found[0])) > 100
    np.testing.assert_allclose(*found, rtol=1e-4, atol=1e-6)
