"""One contract for all history encoders, and plain-numpy oracles of each."""

from dataclasses import replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from encoder_oracles import BY_HAND, CONFIG, W, draw
from flax import nnx
from noise import named, noisy

from loopfm_jax import packing
from loopfm_jax.backbones import blockwise
from loopfm_jax.backbones.self_attention import self_attend
from loopfm_jax.errors import UserError
from loopfm_jax.history.encoders import ENCODERS, TIMED, EncoderConfig
from loopfm_jax.sharding import MeshConfig, make_mesh, split

B, L, T, N, X, Q = 5, 4, 23, 14, 6, 3
LENGTH = np.array([3, 0, 4, 1, 2], np.int32)
END = np.array([3, 9, 8, 10, 13], np.int32)
"""Rows 0-2, none, 4-7, 9 and 11-12: no two examples share a row, some rows are nobody's."""
AGE = np.float32([900, 30, 2, 0, 8e6, 9e4, 9e4, 400, 0, 55, 0, 3600, 7, 0])
"""Seconds since every row; no younger than the next one of its example."""
ORDERED = {"dien", "dmin", "transformer"}
"""Encoders to which the order of entries matters."""
ASKING = {"din", "dien", "dmin", "transformer"}
"""Encoders that look at the query."""

LAYOUTS = {
    "pack": partial(packing.pack, slots=T, longest=L),
    "pad": partial(packing.pad, longest=L),
    "parts": partial(packing.pack, slots=B * (L + 1), longest=L, parts=B),
}
SLOTS = {"pack": T, "pad": B * L, "parts": B * (L + 1)}
every_encoder = pytest.mark.parametrize("name", ENCODERS)
every_layout = pytest.mark.parametrize("layout", ["pack", "pad"])


@cache
def encoder(name: str):
    return noisy(lambda rngs: ENCODERS[name](X, Q, CONFIG, rngs=rngs))


@cache
def compiled(name: str, layout: str):
    """Summaries and every slope of them; one forward and one backward pass, to compile fast."""
    graphdef, params = nnx.split(encoder(name))
    direction_O = draw(nnx.merge(graphdef, params).outputs)

    def summarise(params, store_NX, unreal_TX, query_BQ, end_B, length_B, age_N):
        tokens = LAYOUTS[layout](end_B, length_B)
        age_T = jnp.where(tokens.real_T, age_N[tokens.row_T], jnp.abs(unreal_TX[:, 0]))
        tokens = replace(tokens, age_T=jax.lax.stop_gradient(age_T))
        value_TX = jnp.where(tokens.real_T[:, None], store_NX[tokens.row_T], unreal_TX)
        return nnx.merge(graphdef, params)(value_TX, query_BQ, tokens)

    @jax.jit
    def run(store_NX, unreal_TX, query_BQ, end_B, length_B, age_N):
        summary_BO, backward = jax.vjp(
            lambda *x: summarise(*x, end_B, length_B, age_N), params, store_NX, unreal_TX, query_BQ
        )
        one_by_one = jnp.eye(B)[:, :, None] * direction_O[None, None]
        seeds = jnp.concatenate([one_by_one, 2 * summary_BO[None]])
        by_params, *slopes = jax.vmap(backward)(seeds)
        by_params = jax.tree.map(lambda g: g[B], by_params)  # of the sum of squares
        return summary_BO, [slope[:B] for slope in slopes], by_params

    return run


def run(name, layout, *, store=None, unreal=0.0, query=None, end=END, length=LENGTH, age=AGE):
    """(summaries [B,O], their slopes by (store [B,N,X], unreal slots [B,T,X], query [B,B,Q]),
    gradient by parameters)."""
    store = draw(N, X) if store is None else store
    query = draw(B, Q) if query is None else query
    unreal = np.broadcast_to(np.float32(unreal), (SLOTS[layout], X))
    results = compiled(name, layout)(store, unreal, query, end, length, age)
    return jax.tree.map(np.asarray, results)


def rows_of(example: int, end=END, length=LENGTH) -> list[int]:
    """Store rows of an example, newest first."""
    return [int(end[example]) - 1 - rank for rank in range(int(length[example]))]


def close(actual, expected, tolerance: float = 1e-5) -> None:
    np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance)


# ------------------------------------------------------------------------------ contract


@pytest.mark.parametrize("other", ["pad", "parts"])
@every_encoder
def test_layouts_agree_in_numbers_and_gradients(name, other):
    packed, (by_store, _, by_query), by_params = run(name, "pack")
    differently, (by_store_too, _, by_query_too), by_params_too = run(name, other)
    assert packed.shape == (B, encoder(name).outputs) and packed.dtype == np.float32
    close(packed, differently)
    close(by_store, by_store_too)
    close(by_query, by_query_too)
    scale = max(abs(g).max() for g in jax.tree.leaves(by_params))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * scale), by_params, by_params_too
    )
    kernels = [g for path, g in jax.tree.leaves_with_path(by_params) if "kernel" in str(path)]
    assert all(abs(g).max() > 1e-3 * scale for g in kernels)  # every one is used


@every_layout
@every_encoder
def test_empty_histories_give_zeros_and_finite_gradients(name, layout):
    summary, *slopes = run(name, layout)
    assert not summary[1].any() and summary[[0, 2, 3, 4]].any(axis=1).all()
    nothing, *slopes_of_nothing = run(name, layout, length=np.zeros(B, np.int32))
    assert not nothing.any()
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((slopes, slopes_of_nothing)))
    assert not any(x.any() for x in jax.tree.leaves(slopes_of_nothing))


@every_layout
@every_encoder
def test_an_example_depends_on_its_own_entries_and_query_alone(name, layout):
    _, (by_store, _, by_query), _ = run(name, layout)
    depends_BN = (by_store != 0).any(axis=2)
    expected_BN = np.zeros((B, N), bool)
    for b in range(B):
        expected_BN[b, rows_of(b)] = True
    np.testing.assert_array_equal(depends_BN, expected_BN)
    asks_B = (name in ASKING) & (LENGTH > 1)  # a single entry has weight 1 whatever is asked
    np.testing.assert_array_equal((by_query != 0).any(axis=2), np.diag(asks_B))


@every_layout
@every_encoder
def test_perturbing_an_example_changes_no_other(name, layout):
    before = run(name, layout)[0]
    for b in np.flatnonzero(LENGTH):
        store = draw(N, X)
        store[rows_of(b)] += 1
        query = draw(B, Q)
        query[b] -= 1
        changed = (run(name, layout, store=store, query=query)[0] != before).any(axis=1)
        np.testing.assert_array_equal(changed, np.arange(B) == b)


@every_layout
@every_encoder
@pytest.mark.parametrize("garbage", [-50.0, 50.0])
def test_unreal_slots_have_no_influence(name, layout, garbage):
    with_zeros = run(name, layout)
    with_garbage = run(name, layout, unreal=garbage)
    np.testing.assert_array_equal(with_garbage[0], with_zeros[0])
    assert not with_garbage[1][1].any()  # nor has it a slope
    scale = max(abs(g).max() for g in jax.tree.leaves(with_zeros[2]))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * scale),
        with_garbage[2],
        with_zeros[2],
    )


@every_layout
@every_encoder
def test_permuting_examples_permutes_summaries(name, layout):
    order = np.array([2, 4, 1, 0, 3])
    moved = run(name, layout, query=draw(B, Q)[order], end=END[order], length=LENGTH[order])[0]
    close(moved, run(name, layout)[0][order])


@every_layout
@every_encoder
def test_order_of_entries_matters_only_where_it_should(name, layout):
    store = draw(N, X)
    for b in range(B):
        store[rows_of(b)] = store[rows_of(b)[::-1]]
    turned, straight = run(name, layout, store=store)[0], run(name, layout)[0]
    differs = np.abs(turned - straight).max(axis=1) > 1e-4
    np.testing.assert_array_equal(differs, (name in ORDERED) & (LENGTH > 1))


@every_layout
@every_encoder
def test_age_matters_only_to_who_looks_at_time(name, layout):
    """And there by ratios: 1 + age twice as much for all entries changes nothing."""
    before = run(name, layout)[0]
    changed = np.abs(run(name, layout, age=AGE**1.2)[0] - before).max(axis=1) > 1e-4
    apart = np.array([len(set(AGE[rows_of(b)])) > 1 for b in range(B)])
    np.testing.assert_array_equal(changed, (name in TIMED) & apart)
    close(run(name, layout, age=2 * (1 + AGE) - 1)[0], before, 1e-4)


# ------------------------------------------------------------------------------- oracles


@every_layout
@every_encoder
def test_equals_plain_numpy(name, layout):
    p, store, query = named(encoder(name)), draw(N, X), draw(B, Q)
    summary = run(name, layout)[0]
    for b in np.flatnonzero(LENGTH):
        token_LX, age_L = store[rows_of(b)].astype(np.float64), AGE[rows_of(b)].astype(np.float64)
        close(summary[b], BY_HAND[name](p, token_LX, query[b], age_L))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_self_attention_sees_entries_as_old_or_older(layout):
    tokens = jax.jit(LAYOUTS[layout])(END, LENGTH)
    heads, slots = CONFIG.heads, SLOTS[layout]

    def mixed(qkv_TX):
        return self_attend(qkv_TX, tokens, heads=heads).sum((1, 2))

    slopes = jax.jit(jax.jacrev(mixed))(draw(slots, 3 * W))
    sees_TT = (np.asarray(slopes) != 0).any(axis=2)
    segment, rank, real = (np.asarray(x) for x in (tokens.segment_T, tokens.rank_T, tokens.real_T))
    older_TT = (segment[:, None] == segment) & (rank[None] >= rank[:, None]) & real
    np.testing.assert_array_equal(sees_TT[real], older_TT[real])


@pytest.mark.parametrize("devices", [1, 2])
def test_self_attention_by_block_is_that_of_all_at_once(devices, monkeypatch):
    """Values and gradients, of examples that begin in one block and end in the next."""
    length_B = np.array([3, 4, 0, 4, 1, 2], np.int32)
    tokens = jax.jit(lambda n: packing.lay_out(n, slots=16, longest=L))(length_B)
    real_T11 = np.asarray(tokens.real_T)[:, None, None]
    mesh = make_mesh(MeshConfig(devices))

    @partial(jax.grad, has_aux=True)
    def learn(qkv_TX):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            seen_THD = self_attend(qkv_TX, tokens, heads=CONFIG.heads)
        seen_THD = jnp.where(real_T11, seen_THD, 0)
        return jnp.sin(seen_THD).sum(), seen_THD

    given = jax.device_put(draw(16, 3 * W), split(mesh))
    whole = jax.jit(learn)(given)
    monkeypatch.setattr(blockwise, "BLOCK", 4)
    monkeypatch.setattr(blockwise, "ONE_BLOCK", 4)
    monkeypatch.setattr(blockwise, "LEAST", 4)
    jax.clear_caches()
    assert "scan" in str(jax.make_jaxpr(learn)(given))
    jax.tree.map(close, jax.jit(learn)(given), whole)


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"width": 0}, "encoder.width is 0"),
        ({"heads": 0}, "encoder.heads is 0"),
        ({"width": 32, "heads": 3}, "encoder.width 32 does not divide into encoder.heads 3"),
        ({"layers": 0}, "encoder.layers is 0"),
        ({"name": "transformer", "heads": 3}, "width 32 does not divide into encoder.heads 3"),
        (
            {"name": "transformer", "width": 6},
            r"heads = 3 numbers, but rotary positions turn pairs",
        ),
        ({"score_hidden": ()}, "encoder.score_hidden is empty"),
    ],
)
def test_shapes_that_cannot_be_built_are_refused(knobs, message):
    with pytest.raises(UserError, match=message):
        EncoderConfig(**knobs)
