"""Learning tables by rows, against dense gradients, optax and plain numpy."""

from dataclasses import replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from backbone_cases import SCHEMA, B, make_features, model
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from noise import noisy, parts
from student_cases import PLAIN, make, make_batch, make_past

from loopfm_jax import row_rules, rows
from loopfm_jax.backbones import BackboneConfig, build
from loopfm_jax.optim import OptimConfig, make_optimiser
from loopfm_jax.row_rules import RULES
from loopfm_jax.tables import TableConfig
from loopfm_jax.vm.student import Student

V, E = 11, 3
FAST = tuple(RULES)
every_rule = pytest.mark.parametrize("rule", FAST)


# ------------------------------------------------------------------------------------- gradients


def deepfm():
    m = model("deepfm")
    batch = make_features()

    def loss(model):
        output = model(model.embed(batch), extra_BKE=m.extra_BKE)
        return jnp.square(output.logits_B).sum(), output.logits_B

    return loss, m.graphdef, m.params, m.rest


def raw_histories():
    """A student that looks ids of histories up, in its backbone's own table."""
    graphdef, params, rest = parts(make("raw"))
    past, batch = jax.tree.map(jnp.asarray, (make_past(), make_batch()))
    key = jax.random.key(0)

    def loss(model: Student):
        return model.loss(batch, past, key, config=PLAIN)

    return loss, graphdef, params, rest


@pytest.mark.parametrize("case", [deepfm, raw_histories])
def test_merged_rows_are_the_dense_gradient(case):
    loss, graphdef, params, rest = case()

    @jax.jit
    def both(params):
        dense, _ = jax.grad(lambda p: loss(nnx.merge(graphdef, p, rest)), has_aux=True)(params)
        found = rows.gradient(loss, graphdef, params, rest)
        tables = rows.split(params)[1]
        spread, seen = {}, {}
        for name, table in tables.items():
            scratch = jnp.full((len(table), 1), 7, jnp.int32)
            merged = found.asked[name].merge(found.rows[name], scratch, l2=0.0)
            zeros = jnp.zeros_like(table)
            spread[name] = zeros.at[merged.ids_N].add(merged.rows_NE, mode="drop")
            seen[name] = merged.ids_N
        return dense, rows.join(params, found.dense, spread), seen

    dense, by_rows, seen = both(params)
    assert set(seen) == set(rows.split(params)[1]) and seen
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), by_rows, dense)
    for name, ids in seen.items():
        told = np.asarray(ids)[np.asarray(ids) < len(rows.split(params)[1][name])]
        assert len(set(told)) == len(told) > 1


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(ids=st.lists(st.integers(0, V - 1), min_size=1, max_size=30), seed=st.integers(0, 9))
def test_merge_sums_what_belongs_to_one_row(ids, seed):
    rng = np.random.default_rng(seed)
    rows_NE = rng.normal(size=(len(ids), E)).astype(np.float32)
    scratch = rng.integers(-5, 99, (V, 1)).astype(np.int32)
    told, summed, _ = rows.merge(jnp.asarray(ids), jnp.asarray(rows_NE), jnp.asarray(scratch))
    want = np.zeros((V, E))
    np.add.at(want, ids, rows_NE)
    kept = np.asarray(told) < V
    assert sorted(np.asarray(told)[kept]) == sorted(set(ids))
    np.testing.assert_allclose(np.asarray(summed)[kept], want[np.asarray(told)[kept]], atol=1e-5)
    assert not np.asarray(summed)[~kept].any()


def test_split_and_join():
    params = model("deepfm").params
    dense, tables = rows.split(params)
    assert set(tables) == {"embedder/table/rows_VE", "first_order/table/table/rows_VE"}
    assert "table" not in dense.get("embedder", {})
    again = rows.join(params, dense, tables)
    assert jax.tree.structure(again) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, again, params)


# --------------------------------------------------------------------------------------- rules


@cache
def gradients(steps: int = 5) -> list[np.ndarray]:
    return list(np.random.default_rng(0).normal(size=(steps, V, E)).astype(np.float32))


def run(rule, ids: list[np.ndarray], grads: list[np.ndarray], start: float = 0.0):
    """Table and state after a step by each of `grads` [N,E], of the rows `ids`."""
    table = jnp.full((V, E), start)
    state = rule.init(table)
    for n, (i, g) in enumerate(zip(ids, grads, strict=True)):
        table, state = step(rule, state, table, i, g, n)
    return np.asarray(table), state


def step(rule, state, table, ids, grads, count: int):
    """Table and state after one step."""
    told = {"ids": jnp.asarray(ids), "count": jnp.int32(count)}
    updates, state = rule.update(jnp.asarray(grads), state, table, **told)
    return table.at[told["ids"]].add(updates, mode="drop"), state


def test_lazy_adam_is_adam_where_every_row_is_touched():
    order = np.random.default_rng(1).permutation(V)
    found, _ = run(row_rules.lazy_adam(0.1), [order] * 5, [g[order] for g in gradients()])
    adam, other = optax.adam(0.1, eps=1e-8), jnp.zeros((V, E))
    state = adam.init(other)
    for g in gradients():
        updates, state = adam.update(jnp.asarray(g), state, other)
        other = optax.apply_updates(other, updates)
    np.testing.assert_allclose(found, other, rtol=1e-5, atol=1e-6)


def test_rowwise_rms_moves_a_rare_row_as_far_as_adam_does_in_the_end():
    """Rows of one number, so that a row's mean square is that number's."""
    dense = [np.zeros((V, 1), np.float32) for _ in range(400)]
    touched = {0: 3, 60: 5, 130: 3, 250: 5}
    for n, row in touched.items():
        dense[n][row] = 1.0 + n / 100
    adam, want = optax.adam(0.01, eps=1e-8), jnp.zeros((V, 1))
    state = adam.init(want)
    for g in dense:
        updates, state = adam.update(jnp.asarray(g), state, want)
        want = optax.apply_updates(want, updates)
    rule, found = row_rules.rowwise_rms(0.01), jnp.zeros((V, 1))
    own = rule.init(found)
    for n, row in touched.items():
        found, own = step(rule, own, found, [row], dense[n][row : row + 1], n)
    later = [3, 5]  # Adam's first steps are larger by its bias correction
    np.testing.assert_allclose(np.asarray(found)[later], np.asarray(want)[later], rtol=0.35)
    lazy, _ = run(
        row_rules.lazy_adam(0.01),
        [np.array([row]) for row in touched.values()],
        [np.full((1, E), dense[n][row, 0]) for n, row in touched.items()],
    )
    assert abs(lazy[5, 0]) < 0.5 * abs(float(want[5, 0])), "what it is there for"


@every_rule
def test_untouched_rows_and_their_state_stand_still(rule):
    ids = np.array([2, V, 5])  # V: another lookup stands for this one
    grads = [g[:3] * np.array([[1], [0], [1]], np.float32) for g in gradients()]
    table, state = run(RULES[rule](0.1), [ids] * 5, grads, start=1.0)
    assert np.flatnonzero((table != 1).any(axis=1)).tolist() == [2, 5]
    for leaf in jax.tree.leaves(state):
        assert np.flatnonzero(np.asarray(leaf).any(axis=1)).tolist() == [2, 5]


def test_rowwise_adagrad_by_hand():
    ids = [np.array([step, V - 1]) for step in range(5)]
    grads = [g[i] for i, g in zip(ids, gradients(), strict=True)]
    table, _ = run(row_rules.rowwise_adagrad(0.1), ids, grads)
    want, squares = np.zeros((V, E)), np.zeros(V)
    for i, g in zip(ids, grads, strict=True):
        squares[i] += np.square(g).mean(axis=1)
        want[i] -= 0.1 * g / np.sqrt(squares[i])[:, None]
    np.testing.assert_allclose(table, want, rtol=1e-4, atol=1e-6)


# --------------------------------------------------------------------------------------- steps


def learn(rule, *, l2: float = 0.0, steps: int = 3, width: int = 4, big: int = 0):
    """Parameters after some steps of DeepFM on one batch."""
    fields = tuple(replace(f, rows=max(f.rows, big)) for f in SCHEMA.fields[:3])
    schema = replace(SCHEMA, fields=fields, behaviours=())
    config = BackboneConfig("deepfm", (8,), tables=TableConfig(width=width, init_std=0.5))
    graphdef, params, rest = parts(noisy(lambda rngs: build(config, schema, rngs=rngs)))
    optimiser = make_optimiser(
        OptimConfig(learning_rate=0.01, embedding_l2=l2, tables=rule, clip_norm=1.0), steps=steps
    )
    whole = make_features()
    batch = whole | {"ids_BF": jnp.asarray(whole["ids_BF"][:, :3] % 7), "events": {}}

    def loss(model):
        return jnp.square(model(model.embed(batch)).logits_B - 3).mean(), ()

    def step(params, state):
        params, state, _ = optimiser.learn(loss, graphdef, params, rest, state)
        return params, state

    return params, jax.jit(step, donate_argnums=(0, 1)), optimiser.init(params)


@every_rule
@pytest.mark.parametrize("l2", [0.0, 0.1])
def test_a_step_learns_and_leaves_other_rows_alone(rule, l2):
    start, step, state = learn(rule, l2=l2)
    params = jax.tree.map(jnp.copy, start)
    for _ in range(3):
        params, state = step(params, state)
    for name, before in rows.split(start)[1].items():
        after = rows.split(params)[1][name]
        moved = np.flatnonzero((np.asarray(before) != np.asarray(after)).any(axis=1))
        assert 0 < len(moved) <= 3 * B < len(before), name


def test_lazy_adams_first_step_is_adams():
    """Clip and decay included: the rest of the rows has no gradient yet."""
    changes = []
    for rule in ("adam", "lazy_adam"):
        start, step, state = learn(rule)
        params, _ = step(jax.tree.map(jnp.copy, start), state)
        changes.append(jax.tree.map(lambda a, b: np.asarray(a - b), params, start))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-6), *changes)


@every_rule
def test_no_step_makes_anything_of_the_size_of_a_table(rule):
    params, step, state = learn(rule, big=50_000, width=16)
    table = rows.split(params)[1]["embedder/table/rows_VE"]
    used = step.lower(params, state).compile().memory_analysis().temp_size_in_bytes
    assert used < table.nbytes / 20
    params, step, state = learn("adam", big=50_000, width=16)
    used = step.lower(params, state).compile().memory_analysis().temp_size_in_bytes
    assert used > table.nbytes / 20, "the bound would not notice a dense gradient"


@pytest.mark.parametrize("shape", [(), (5,), (64,), (7, 9), (33, 32), (3, 5, 41)])
def test_squares_are_added_up_whatever_is_left_over(shape):
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    found = jax.jit(rows.square_sum)(jnp.asarray(x))
    np.testing.assert_allclose(found, np.square(x.astype(np.float64)).sum(), rtol=1e-6)
