"""InterFormer and Kunlun against their equations, one example at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from noise import named, noisy
from token_oracles import (
    PAIR,
    B,
    D,
    E,
    H,
    L,
    attend,
    below,
    dense,
    examples,
    make_ages,
    make_events,
    make_spec,
    make_tokens,
    normalise,
    sigmoid,
    silu,
    turned,
    wukong_layer,
)

from loopfm_jax.backbones import build
from loopfm_jax.backbones.interformer import RECENT, InterFormer
from loopfm_jax.backbones.kunlun import TERMS, Moving, Resting
from loopfm_jax.backbones.rotary import FASTEST, LONGEST, SLOWEST
from loopfm_jax.tables import Embedded

WINDOW, HALF = 2, D // H // 2


def gate(p: dict, name: str, x_GD: np.ndarray) -> np.ndarray:
    return sigmoid(dense(p, f"{name}/weigh", x_GD)) * x_GD


def rank_angles(count: int) -> np.ndarray:
    return np.arange(1, count + 1)[:, None] * LONGEST ** -(np.arange(HALF) / HALF)


def time_angles(age_S: np.ndarray) -> np.ndarray:
    return np.log1p(age_S)[:, None] * np.geomspace(FASTEST, SLOWEST, HALF)


def interformer_by_hand(p, x_FD, s_SD, _):
    across_RD = gate(p, "gate_fields", p["fields_FR"].T @ x_FD)
    tokens_ND = np.concatenate([p["cls_FG"].T @ x_FD, s_SD])  # events do not see the first ones
    count = len(tokens_ND) - len(s_SD)
    reduced_NR = dense(p, "reduce", normalise(p, "norm_forward", tokens_ND))
    tokens_ND = tokens_ND + reduced_NR @ dense(p, "matrix", across_RD)
    q_ND, k_ND, v_ND = np.split(dense(p, "qkv", normalise(p, "norm_attend", tokens_ND)), 3, axis=1)
    angle_NP = np.concatenate([np.zeros((count, HALF)), rank_angles(len(s_SD))])
    q_ND, k_ND = turned(q_ND, angle_NP), turned(k_ND, angle_NP)
    seen_ND = attend(q_ND, k_ND, v_ND, lambda n: slice(max(n, count), None))
    tokens_ND = tokens_ND + dense(p, "out", seen_ND)
    cls_GD, s_SD = tokens_ND[:count], tokens_ND[count:]
    k_SD, v_SD = np.split(dense(p, "pool", s_SD), 2, axis=1)
    pooled_GD = attend(p["seeds_GD"], k_SD, v_SD, lambda _: slice(None))
    recent_GD = np.zeros((RECENT, D))
    recent_GD[: len(s_SD)] = s_SD[:RECENT]
    return s_SD, gate(p, "gate_told", np.concatenate([cls_GD, pooled_GD, recent_GD]))


def pool_by_hand(p, s_SD):
    k_SD, v_SD = np.split(dense(p, "kv", normalise(p, "norm", s_SD)), 2, axis=1)
    found_PD = attend(p["seeds_PD"], k_SD, v_SD, lambda _: slice(None))
    mixes, turns = (np.split(p[name], TERMS, axis=1) for name in ("mix_PX", "turn_DX"))
    return sum(z_PG.T @ found_PD @ w_DD for z_PG, w_DD in zip(mixes, turns, strict=True))


def moving_by_hand(p, x_FD, s_SD, age_S):
    k_RD, v_RD = np.split(dense(p, "kv", p["fields_FR"].T @ x_FD), 2, axis=1)
    q_SD, seen_SD = dense(p, "query", normalise(p, "norm_answer", s_SD)), np.zeros_like(s_SD)
    for h in range(H):
        part = slice(h * D // H, (h + 1) * D // H)
        seen_SD[:, part] = silu(q_SD[:, part] @ k_RD[:, part].T / L) @ v_RD[:, part]
    s_SD = s_SD + dense(p, "out_answer", seen_SD)
    q_SD, k_SD, v_SD = np.split(dense(p, "qkv", normalise(p, "norm_attend", s_SD)), 3, axis=1)
    angle_SP = rank_angles(len(s_SD)) if age_S is None else time_angles(age_S)
    q_SD, k_SD = turned(q_SD, angle_SP), turned(k_SD, angle_SP)
    seen_SD = attend(q_SD, k_SD, v_SD, lambda s: slice(s, s + WINDOW))
    s_SD = s_SD + dense(p, "out_attend", seen_SD)
    return s_SD, pool_by_hand(below(p, "pool"), s_SD)


def resting_by_hand(p, x_FD, s_SD, _):
    return s_SD, pool_by_hand(below(p, "pool"), s_SD)


ARMS = {
    "interformer": (InterFormer, interformer_by_hand, False),
    "moving": (Moving, moving_by_hand, False),
    "moving in time": (Moving, moving_by_hand, True),
    "resting": (Resting, resting_by_hand, False),
}


@pytest.mark.parametrize("name", ARMS)
def test_a_sequence_arm_is_its_equations(name):
    kind, by_hand, timed = ARMS[name]
    spec = make_spec("kunlun", window=WINDOW)
    arm = noisy(lambda rngs: kind(spec, PAIR, rngs=rngs))
    x_BFD = np.random.default_rng(3).normal(size=(B, spec.fields, D)).astype(np.float32)
    s_TD, age_T = make_events(D), make_ages() if timed else None
    run = jax.jit(lambda s, x: arm(s, x, make_tokens(age_T), key=None))
    events_TD, told_BGD = run(jnp.asarray(s_TD), jnp.asarray(x_BFD))
    assert told_BGD.shape == (B, kind.told(spec, PAIR), D)
    p = named(arm)
    for b, own in enumerate(examples()):
        age_S = None if age_T is None else age_T[own]
        want_SD, want_GD = by_hand(p, x_BFD[b], s_TD[own], age_S)
        np.testing.assert_allclose(events_TD[own], want_SD, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(told_BGD[b], want_GD, rtol=1e-4, atol=1e-4)


ORDERS = {
    "interformer": (interformer_by_hand,),
    "kunlun": (moving_by_hand, resting_by_hand),
}


@pytest.mark.parametrize("name", ORDERS)
def test_the_arms_take_turns(name):
    """Events merged, then by layer: the sequence arm, then Wukong's on what it told."""
    layers, tokens = 2, make_tokens()
    spec = make_spec(name, window=WINDOW, layers=layers, mix_hidden=(7,), hidden=(5,))
    backbone = noisy(lambda rngs: build(spec.config, spec.schema, rngs=rngs))
    drawn = np.random.default_rng(4).normal(size=(2, B, E)).astype(np.float32)
    events_TM = make_events(E)
    embedded = Embedded(
        ids={},
        floats_BN=jnp.zeros((B, 0)),
        fields=dict(zip(("item", "user"), map(jnp.asarray, drawn), strict=True)),
        sequences={"items": jnp.asarray(events_TM)},
        tokens={"items": tokens},
    )
    taps = jax.jit(lambda e: backbone(e).taps)(embedded)
    p = named(backbone)
    for b, own in enumerate(examples()):
        x_FD = dense(p, "project", drawn[:, b])
        masked_SM = events_TM[own] * sigmoid(dense(p, "merge/0/mask", events_TM[own]))
        s_SD, told_GD = dense(p, "merge/0/out", masked_SM), np.zeros((0, D))
        for layer in range(layers):
            unit = below(p, "stack/layers", layer)
            for i, by_hand in enumerate(ORDERS[name]):
                own_p = below(unit, f"layers/{i}")
                s_SD, told_GD = by_hand(below(own_p, "arms/0"), x_FD, s_SD, None)
                x_FD = wukong_layer(below(own_p, "interact"), x_FD, told_GD)
        np.testing.assert_allclose(taps["summary"][b], told_GD.ravel(), rtol=1e-3, atol=1e-3)
        want_X = dense(p, "back", x_FD).ravel()
        np.testing.assert_allclose(taps["interaction"][b], want_X, rtol=1e-3, atol=1e-3)
