"""How behaviours become vectors, against the equations of PAPER section 5, event by event."""

import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from backbone_cases import CASES, B, L
from flax import nnx
from noise import noisy

from loopfm_jax.backbones import BackboneConfig, attention, blockwise
from loopfm_jax.backbones.attention import FEW, Asked, Query, Scores
from loopfm_jax.backbones.behaviours import Interest, Seen
from loopfm_jax.backbones.config import Spec
from loopfm_jax.backbones.dien import DIEN
from loopfm_jax.backbones.din import DIN
from loopfm_jax.backbones.dmin import DMIN
from loopfm_jax.backbones.dmr import DMR
from loopfm_jax.data.schema import Behaviour, Field, Schema
from loopfm_jax.packing import lay_out

M, E = 4, 2
ITEM, CATE = Field("item", 9), Field("cate", 6)
PAIR = Behaviour(("cate", "item"), ("cates", "items"))
SCHEMA = Schema(
    fields=(
        ITEM,
        CATE,
        *(
            Field(f"{f.name}s", f.rows, kind="sequence", length=L, shares=f.name)
            for f in (ITEM, CATE)
        ),
    ),
    behaviours=(PAIR,),
)


def make_interest(kind: type[Interest], case: str, **options) -> Interest:
    config = CASES[case]
    options = dict(attention_activation="relu") | options
    spec = Spec(replace(config, tables=replace(config.tables, width=E), **options), SCHEMA)
    return noisy(lambda rngs: kind(spec, PAIR, rngs=rngs))


def make_padded() -> dict[str, np.ndarray]:
    """Events of 4 examples, one without any, oldest first, padded in front."""
    rng = np.random.default_rng(0)
    mask_BL = np.arange(L) >= L - np.array([3, 0, 5, 2])[:, None]
    return {
        "target": rng.normal(size=(B, M)),
        "events": rng.normal(size=(B, L, M)) * mask_BL[..., None],
        "mask": mask_BL,
        "item": rng.integers(1, ITEM.rows, B),
        "cate": rng.integers(1, CATE.rows, B),
    }


def make_seen(padded: dict[str, np.ndarray], *, spare: int = 3) -> Seen:
    """The same events packed, newest first."""
    length_B = padded["mask"].sum(axis=1)
    events = [e[m][::-1] for e, m in zip(padded["events"], padded["mask"], strict=True)]
    events_TM = np.concatenate([*events, np.zeros((spare, M))])
    tokens = lay_out(jnp.asarray(length_B), slots=len(events_TM), longest=L)
    ids = {"item": padded["item"], "cate": ITEM.rows + padded["cate"]}
    return Seen(
        target_BM=jnp.asarray(padded["target"], jnp.float32),
        events_TM=jnp.asarray(events_TM, jnp.float32),
        tokens=tokens,
        ids={name: jnp.asarray(x, jnp.int32) for name, x in ids.items()},
    )


def check(interest: Interest, by_hand, **tolerance) -> None:
    """Compares with `by_hand(interest, target [M], events [L,M], mask [L], item, cate)`."""
    padded = make_padded()
    got = jax.jit(lambda seen: interest(seen, key=None))(make_seen(padded))
    assert got.shape == (B, interest.width)
    want = [by_hand(interest, *x) for x in zip(*padded.values(), strict=True)]
    np.testing.assert_allclose(got, np.stack(want), **dict(rtol=1e-3, atol=1e-4) | tolerance)


# ---------------------------------------------------------------- pieces, for one example


def linear(layer, x):
    bias = 0 if layer.bias is None else np.asarray(layer.bias[...])
    return x @ np.asarray(layer.kernel[...]) + bias


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def relu(x):
    return np.maximum(x, 0)


def score(scores: Scores, queries, events):
    """The MLP on [t, H, t-H, t*H], for each event with its query: [L]."""
    found = []
    for query, event in zip(queries, events, strict=True):
        x = np.concatenate([query, event, query - event, query * event])
        for layer in scores.mlp.layers:
            x = relu(linear(layer, x))
        found.append(linear(scores.mlp.out, x)[0])
    return np.array(found)


def softmax(scores, mask):
    w = np.exp(scores) * mask
    return w / max(w.sum(), 1e-30)


def positioned(query: Query, target, i: int):
    return linear(query.project, np.concatenate([target, np.asarray(query.position_LP[...])[i]]))


# ---------------------------------------------------------------- attention


@pytest.mark.parametrize("rectified", [False, True])
@pytest.mark.parametrize("position_width", [0, 3])
@pytest.mark.parametrize(("slots", "platform"), [(FEW, "cpu"), (FEW + 1, "cpu"), (FEW + 1, "tpu")])
def test_first_score_layer_equals_its_concatenated_form(
    slots, platform, position_width, rectified, monkeypatch
):
    """Whole, by example and by token."""
    monkeypatch.setattr(attention.sharding, "platform", lambda: platform)
    config = BackboneConfig(attention_hidden=(6,))
    query = noisy(lambda rngs: Query(M, L, position_width, rngs=rngs))
    scores = noisy(lambda rngs: Scores(config, M, rngs=rngs, dtype=jnp.float32))
    seen = make_seen(make_padded())

    def concatenated(target_BM, events_TM):
        both = [seen.tokens.spread(target_BM)]
        if query.position_LP is not None:
            both.append(query.position_LP[...][L - 1 - seen.tokens.rank_T])
        t = query.project(jnp.concatenate(both, axis=1))
        t = jax.nn.relu(t) if rectified else t
        x = jnp.concatenate([t, events_TM, t - events_TM, t * events_TM], axis=1)
        return scores.mlp.layers[0](x)

    def split_up(target_BM, events_TM):
        first = scores.first(replace(query(target_BM), rectified=rectified), slots)
        return first(seen.tokens, events_TM)

    got, want = (jax.jit(f)(seen.target_BM, seen.events_TM) for f in (split_up, concatenated))
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def blocks_of(slots, monkeypatch):
    monkeypatch.setattr(blockwise, "BLOCK", slots)
    monkeypatch.setattr(blockwise, "ONE_BLOCK", slots)
    monkeypatch.setattr(blockwise, "LEAST", slots)


@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_scores_by_block_are_those_of_all_at_once(rate, monkeypatch):
    """Values and gradients; with dropout, that a block drops its own."""
    blocks_of(4, monkeypatch)
    config = BackboneConfig(attention_hidden=(6, 5), attention_dropout=rate)
    scores = noisy(lambda rngs: Scores(config, M, rngs=rngs, dtype=jnp.float32))
    graphdef, params = nnx.split(scores)
    seen = make_seen(make_padded(), spare=2)  # 12 slots
    key = jax.random.key(0) if rate else None

    def score(params, target_BM, events_TM, key):
        return nnx.merge(graphdef, params)(Asked(target_BM), events_TM, seen.tokens, key=key)

    def loss(*args):
        found_T = score(*args)
        return jnp.sin(found_T).sum(), found_T

    given = params, seen.target_BM, seen.events_TM
    blocks = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(*given, key)
    alike = params, jnp.tile(seen.target_BM[:1], (B, 1)), jnp.tile(seen.events_TM[:1], (12, 1))
    tiled = score(*alike, key)
    assert (len(np.unique(np.round(tiled, 5))) > 1) == (rate > 0)
    if not rate:
        monkeypatch.setattr(blockwise, "BLOCK", 2048)
        whole = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(*given, key)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), blocks, whole)


def test_only_the_first_layer_of_scores_is_computed_twice(monkeypatch):
    blocks_of(4, monkeypatch)
    config = BackboneConfig(attention_hidden=(7, 5))
    scores = noisy(lambda rngs: Scores(config, M, rngs=rngs, dtype=jnp.float32))
    graphdef, params = nnx.split(scores)
    seen = make_seen(make_padded(), spare=2)

    def loss(params):
        asked = Asked(seen.target_BM)
        return nnx.merge(graphdef, params)(asked, seen.events_TM, seen.tokens, key=None).sum()

    text = str(jax.make_jaxpr(jax.grad(loss))(params))
    forward = r":f32\[4,(\d+)\] = dot_general\[dimension_numbers=\(\(\[1\], \[0\]\)"
    assert sorted(re.findall(forward, text)) == ["1", "5", "7", "7"]


# ---------------------------------------------------------------- DIN, DIEN, DMR


@pytest.mark.parametrize("normalised", [False, True])
def test_din_weighs_events_by_their_score(normalised):
    def by_hand(din: DIN, target, events, mask, *_):
        weights = score(din.scores, [target] * L, events) * mask
        return (softmax(weights, mask) if normalised else weights) @ events

    check(make_interest(DIN, "din", attention_softmax=normalised), by_hand)


def gru(cell, x, mask, attention):
    """States of h' = h + sigmoid(..) a (n - h), from zeros; padded steps keep the state."""
    h, states = np.zeros(M), []
    for t in range(L):
        if mask[t]:
            (xu, xr, xn), (hu, hr, hn) = (
                np.split(linear(layer, y), 3) for layer, y in ((cell.input, x[t]), (cell.state, h))
            )
            new = np.tanh(xn + sigmoid(xr + hr) * hn)
            h = h + sigmoid(xu + hu) * attention[t] * (new - h)
        states.append(h)
    return np.stack(states)


def test_dien_evolves_interests_towards_the_candidate():
    def by_hand(dien: DIEN, target, events, mask, *_):
        interests = gru(dien.extraction, events, mask, np.ones(L))
        weights = softmax(score(dien.scores, [target] * L, interests), mask)
        return gru(dien.evolution, interests, mask, weights)[-1]

    dien = make_interest(DIEN, "dien")
    check(dien, by_hand)
    padded = make_padded()
    turned = padded | {"events": padded["events"][:, ::-1], "mask": padded["mask"][:, ::-1]}
    one, other = (np.asarray(dien(make_seen(p), key=None)) for p in (padded, turned))
    assert not one[1].any(), "no history gives zeros"
    assert (one[2] != other[2]).all(), "order matters"


@pytest.mark.parametrize("u2i", [False, True])
def test_dmr_asks_with_positions_and_matches_the_user(u2i):
    def by_hand(dmr: DMR, target, events, mask, item, cate):
        query = [relu(positioned(dmr.query, target, i)) for i in range(L)]
        past = softmax(score(dmr.scores, query, events), mask) @ events
        if not u2i:
            return past
        match = dmr.match
        query = relu(linear(match.query, np.asarray(match.position_LP[...])))
        seen = softmax(score(match.scores, query, events), mask) @ events
        user = relu(linear(match.user, seen))
        rows = np.asarray(match.table.table.rows_VE[...])
        # The second table: cate first, as in the pair.
        candidate = np.concatenate([rows[cate], rows[CATE.rows + item]])
        return np.append(past, user @ candidate)

    check(make_interest(DMR, "dmr", u2i=u2i), by_hand)


# ---------------------------------------------------------------- DMIN


def norm(layer, x):
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    return x * np.asarray(layer.scale[...]) + np.asarray(layer.bias[...])


def feed(layer, x):
    x = norm(layer.norm, x)
    return x + linear(layer.down, relu(linear(layer.up, x)))


def attend(layer, x, mask, heads: int):
    """Causal self-attention among real events, the diagonal always open: [L,H,M/H]."""
    q, k, v = (y.reshape(L, heads, -1) for y in np.split(linear(layer, x), 3, axis=1))
    out = np.zeros_like(v)
    for i in range(L):
        seen = [j for j in range(L) if j == i or (j < i and mask[j])]
        for h in range(heads):
            w = np.exp([q[i, h] @ k[j, h] / np.sqrt(q.shape[2]) for j in seen])
            out[i, h] = (w / w.sum()) @ v[seen, h]
    return out


@pytest.mark.parametrize("refiner", [False, True])
def test_dmin_gives_an_interest_per_head(refiner):
    def by_hand(dmin: DMIN, target, events, mask, *_):
        if refiner:
            r = dmin.refiner
            seen = attend(r.qkv, events, mask, 2).reshape(events.shape)
            events = feed(r.forward, events + linear(r.out, seen))
        seen, interests = attend(dmin.qkv, events, mask, 2), []
        for h, head in enumerate(dmin.heads):
            x = feed(head.forward, events + linear(head.out, seen[:, h]))
            query = [positioned(head.query, target, i) for i in range(L)]
            interests.append(softmax(score(head.scores, query, x), mask) @ x)
        return np.concatenate(interests)

    check(make_interest(DMIN, "dmin", heads=2, refiner=refiner), by_hand)
