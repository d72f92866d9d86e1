"""Packed and padded tokens against plain numpy, and against Grain's packer."""

from functools import partial
from unittest.mock import patch

import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mesh_steps import collectives

from loopfm_jax import packing
from loopfm_jax.packing import BLOCK, LARGE, SMALL, Parts, Tokens, budget
from loopfm_jax.sharding import MeshConfig, make_mesh, split

B, L, T = 6, 4, 25  # one slot more than B * L: a packed batch always has an unreal one
LENGTHS = {
    "mixed": [2, 0, 4, 1, 0, 3],
    "empty ends": [0, 0, 3, 4, 0, 0],
    "only the last": [0, 0, 0, 0, 0, 2],
    "all full": [L] * B,
    "all empty": [0] * B,
    "ones": [1] * B,
}
END = np.array([7, 0, 12, 1, 30, 30], np.int32)
END_OF = {name: np.maximum(END, lengths).astype(np.int32) for name, lengths in LENGTHS.items()}

pack = jax.jit(partial(packing.pack, slots=T, longest=L))
parts = jax.jit(partial(packing.pack, slots=27, longest=L, parts=3))
pad = jax.jit(partial(packing.pad, longest=L))


@jax.jit
def pack_many(end_B, length_B) -> Tokens:
    """As more examples than FEW are packed."""
    with patch.object(packing, "FEW", 0):
        return packing.pack(end_B, length_B, slots=T, longest=L)


LAYOUTS = {"pack": pack, "parts": parts, "pad": pad}
spread, total, count, softmax = map(
    jax.jit, (Tokens.spread, Tokens.sum, Tokens.count, Tokens.softmax)
)
to_padded, to_tokens = jax.jit(Tokens.pad), jax.jit(Tokens.unpad)

every_layout = pytest.mark.parametrize("layout", LAYOUTS)
every_case = pytest.mark.parametrize("case", LENGTHS)


def tokens_of(layout: str, case: str) -> Tokens:
    return LAYOUTS[layout](END_OF[case], np.array(LENGTHS[case], np.int32))


def real_slots(tokens: Tokens) -> list[tuple[int, int, int, int]]:
    """(segment, rank, row, slot) of every real slot, in slot order."""
    columns = (tokens.segment_T, tokens.rank_T, tokens.row_T, np.arange(len(tokens.row_T)))
    return [tuple(int(x) for x in t) for t in np.stack(columns, 1)[np.asarray(tokens.real_T)]]


def expected(case: str) -> list[tuple[int, int, int]]:
    """(segment, rank, row), newest first: the last row of the slice has rank 0."""
    slots = []
    for b, (end, length) in enumerate(zip(END_OF[case], LENGTHS[case], strict=True)):
        slots += [(b, rank, int(end) - 1 - rank) for rank in range(length)]
    return slots


def garbage(shape, *, seed=0) -> np.ndarray:
    """Numbers for every slot, unreal ones too, far from zero."""
    return np.random.default_rng(seed).uniform(1, 3, shape).astype(np.float32)


@every_layout
@every_case
def test_holds_exactly_the_slices_newest_first(layout, case):
    tokens = tokens_of(layout, case)
    assert [slot[:3] for slot in real_slots(tokens)] == expected(case)
    by_part = np.asarray(tokens.segment_T).reshape(tokens.parts, -1)
    assert (np.diff(by_part) >= 0).all()  # segment_sum is told so
    assert (np.asarray(tokens.row_T)[~np.asarray(tokens.real_T)] == 0).all()
    assert (tokens.examples, tokens.length) == (B, L)


@every_case
def test_many_examples_are_packed_as_few(case):
    length_B = np.array(LENGTHS[case], np.int32)
    assert packing.FEW >= B
    jax.tree.map(
        np.testing.assert_array_equal,
        pack_many(END_OF[case], length_B),
        pack(END_OF[case], length_B),
    )


@every_case
def test_packed_slots_stand_side_by_side(case):
    tokens = tokens_of("pack", case)
    assert [slot[3] for slot in real_slots(tokens)] == list(range(sum(LENGTHS[case])))
    assert (np.asarray(tokens.segment_T)[~np.asarray(tokens.real_T)] == B).all()


@every_case
def test_a_part_holds_the_tokens_of_its_own_examples(case):
    tokens = tokens_of("parts", case)
    own = {(segment // 2, slot // 9) for segment, _, _, slot in real_slots(tokens)}
    assert all(of == at for of, at in own) and (own or case == "all empty")
    assert (np.asarray(tokens.segment_T)[~np.asarray(tokens.real_T)] == B).all()


@every_layout
@every_case
def test_spread_gives_every_token_its_example(layout, case):
    tokens, per_example = tokens_of(layout, case), garbage((B, 2))
    result = np.asarray(spread(tokens, per_example))
    for segment, _, _, slot in real_slots(tokens):
        np.testing.assert_array_equal(result[slot], per_example[segment])


@every_layout
@every_case
def test_sum_and_count(layout, case):
    tokens = tokens_of(layout, case)
    slots = len(tokens.row_T)
    per_token = np.where(np.asarray(tokens.real_T)[:, None], garbage((slots, 2)), 0)
    by_hand = np.zeros((B, 2))
    for segment, _, _, slot in real_slots(tokens):
        by_hand[segment] += per_token[slot]
    np.testing.assert_allclose(total(tokens, per_token), by_hand, rtol=1e-6)
    np.testing.assert_array_equal(count(tokens), LENGTHS[case])


@every_layout
@every_case
@pytest.mark.parametrize("shape", [(), (2,)])
def test_softmax(layout, case, shape):
    tokens = tokens_of(layout, case)
    score = garbage((len(tokens.row_T), *shape))
    weight = np.asarray(softmax(tokens, score))
    by_hand = np.zeros_like(score, np.float64)
    for b in range(B):
        slots = [slot for segment, _, _, slot in real_slots(tokens) if segment == b]
        e = np.exp(score[slots].astype(np.float64))
        by_hand[slots] = e / e.sum(axis=0)
    np.testing.assert_allclose(weight, by_hand, rtol=1e-5)
    assert not weight[~np.asarray(tokens.real_T)].any()


@every_layout
def test_softmax_of_huge_scores_is_stable_and_differentiable(layout):
    tokens = tokens_of(layout, "mixed")
    score_T = 1e4 * garbage(len(tokens.row_T))
    real = np.asarray(tokens.real_T)
    score_T[~real] = 3e38  # an unreal slot must not set the scale of the real ones
    weight_T, slope_T = jax.jit(
        lambda tokens, s: (tokens.softmax(s), jax.grad(lambda s: (tokens.softmax(s) ** 2).sum())(s))
    )(tokens, score_T)
    assert np.isfinite(weight_T).all() and np.isfinite(slope_T).all()
    sums = np.asarray(total(tokens, np.asarray(weight_T)))
    np.testing.assert_allclose(sums, np.array(LENGTHS["mixed"]) > 0, rtol=1e-6)
    assert not np.asarray(slope_T)[~real].any()


@every_layout
@every_case
def test_pad_and_unpad(layout, case):
    tokens = tokens_of(layout, case)
    per_token = garbage((len(tokens.row_T), 2))
    padded = np.asarray(to_padded(tokens, per_token))
    by_hand = np.zeros((B, L, 2), np.float32)
    for segment, rank, _, slot in real_slots(tokens):
        by_hand[segment, rank] = per_token[slot]
    np.testing.assert_array_equal(padded, by_hand)
    real = np.asarray(tokens.real_T)
    np.testing.assert_array_equal(np.asarray(to_tokens(tokens, padded))[real], per_token[real])


@pytest.mark.parametrize("shape", [(8, 1), (4, 2)])
def test_nothing_of_a_part_leaves_its_device(shape):
    """Forwards and backwards, of everything that tokens do with examples."""
    mesh, parts, each = make_mesh(MeshConfig(*shape)), shape[0], 16
    here = split(mesh, "examples")

    def run(end_B, length_B, value_TX):
        tokens = packing.pack(end_B, length_B, slots=parts * each, longest=L, parts=parts)

        def mixed(value_TX):
            weight_T = tokens.softmax(tokens.spread(tokens.mean(value_TX))[:, 0] + value_TX[:, 1])
            again_TX = tokens.unpad(tokens.pad(weight_T[:, None] * value_TX))
            return tokens.sum(again_TX)

        found_BX, back = jax.vjp(mixed, value_TX)
        return tokens.row_T, found_BX, back(jnp.ones_like(found_BX))

    shapes = [((16,), "i4"), ((16,), "i4"), ((parts * each, 2), "f4")]
    given = [jax.ShapeDtypeStruct(s, np.dtype(kind), sharding=here) for s, kind in shapes]
    hlo = jax.jit(run, out_shardings=here).lower(*given).compile().as_text()
    assert "scatter" in hlo and collectives(hlo) == []


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(
    st.sampled_from([1, 2, 3, 8]),
    st.lists(st.integers(0, 40), min_size=24, max_size=24),
    st.sampled_from([40, 40 * LARGE]),
)
def test_tokens_are_dealt_to_the_parts_that_the_budget_has_room_for(count, lengths, longest):
    lengths_B = np.array(lengths)
    slots = budget(lengths_B, longest=longest, parts=count)
    assert slots % count == 0 and (longest == 40 or slots % BLOCK == 0)
    assert slots // count >= lengths_B.reshape(count, -1).sum(axis=1).max()
    slots = count * 24 * 40 if longest > 40 else slots  # as large as it can be said in a test
    values_T = 1 + np.arange(lengths_B.sum())
    found = []
    for own in [tuple(range(count)), *((n,) for n in range(count))]:
        parts = Parts(count, own)
        length_b = parts.mine(lengths_B)
        first = lengths_B.reshape(count, -1)[: own[0]].sum()
        found.append(
            parts.deal(
                lambda tokens, out, first=first: np.copyto(out, values_T[first:][tokens]),
                length_b, slots=slots, shape=(), dtype=np.int64,
            )
        )  # fmt: skip
    whole_PS, *alone = found
    np.testing.assert_array_equal(np.concatenate(alone), whole_PS)
    for part_S, of_B in zip(whole_PS, np.split(lengths_B, count), strict=True):
        assert (part_S[: of_B.sum()] > 0).all() and not part_S[of_B.sum() :].any()
    np.testing.assert_array_equal(whole_PS[whole_PS > 0], values_T)


def test_agrees_with_grains_packer():
    """One bin as long as all sequences together: first fit puts them side by side, in order."""
    lengths, ends = [2, 4, 1, 3], np.array([7, 12, 1, 30], np.int32)
    rows = [np.arange(e - 1, e - 1 - n, -1) for e, n in zip(ends, lengths, strict=True)]
    source = grain.MapDataset.source([{"row": r} for r in rows]).to_iter_dataset()
    packer = grain.experimental.FirstFitPackIterDataset(
        source, length_struct={"row": sum(lengths)}, num_packing_bins=1
    )
    theirs = next(iter(packer))
    ours = packing.pack(ends, np.array(lengths, np.int32), slots=sum(lengths), longest=L)
    np.testing.assert_array_equal(ours.row_T, theirs["row"])
    np.testing.assert_array_equal(ours.segment_T, theirs["row_segment_ids"] - 1)
    np.testing.assert_array_equal(ours.rank_T, theirs["row_positions"])


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(st.integers(1, 60), st.lists(st.integers(0, 60), min_size=1, max_size=40), st.booleans())
def test_budget_holds_everything_in_few_shapes(longest, lengths, small):
    """Not more than the next larger one: of a quarter of all, or if it is large of 2^-1/2."""
    copies = 1 if small else -(-SMALL // (len(lengths) * longest))
    lengths_B = np.tile(np.minimum(lengths, longest), copies)
    whole, total, unit = len(lengths_B) * longest, lengths_B.sum(), 64 if small else BLOCK
    slots = budget(lengths_B, longest=longest)
    assert slots % unit == 0 and max(total, 1) <= slots < whole + unit
    least, step = (4, 4) if small else (8, 2**0.5)
    assert slots < max(step * total, whole / least) + unit
    evenly = [np.full(len(lengths_B), n) for n in range(longest + 1)]
    assert len({budget(x, longest=longest) for x in evenly}) <= (2 if small else 7)


def test_a_batch_without_any_history_still_has_slots():
    assert budget(np.zeros(3, np.int32), longest=5) == 64


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(fill=st.floats(0, 1))
def test_a_large_batch_wastes_a_twentieth_at_most(fill):
    lengths_B = np.full(LARGE // 16, round(32 * fill))
    slots = budget(lengths_B, longest=32)
    assert slots % BLOCK == 0
    assert lengths_B.sum() <= slots <= 1.05 * lengths_B.sum() + BLOCK
