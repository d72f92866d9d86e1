"""HSTU against its equations, event by event: the candidate is the newest token."""

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
    T,
    below,
    dense,
    examples,
    make_ages,
    make_events,
    make_spec,
    make_tokens,
    normalise,
    silu,
)

from loopfm_jax.backbones.behaviours import Seen
from loopfm_jax.backbones.hstu import HSTU, KNOTS, STEP

LAYERS = 2


def make(*, from_log: bool) -> HSTU:
    spec = make_spec("hstu", from_log=from_log, layers=LAYERS)
    return noisy(lambda rngs: HSTU(spec, PAIR, rngs=rngs))


def make_seen(age_T: np.ndarray | None) -> Seen:
    target_BM = np.random.default_rng(1).normal(size=(B, E)).astype(np.float32)
    return Seen(jnp.asarray(target_BM), jnp.asarray(make_events(E)), make_tokens(age_T), ids={})


def layer_by_hand(p: dict, x_SD: np.ndarray, age_S: np.ndarray | None) -> np.ndarray:
    """Tokens newest first; each sees itself and what follows."""
    u_SD, q_SD, k_SD, v_SD = np.split(silu(dense(p, "into", normalise(p, "norm", x_SD))), 4, axis=1)
    seen_SD = np.zeros_like(x_SD)
    for i in range(len(x_SD)):
        for j in range(i, len(x_SD)):
            bias = p["rank_N"][j - i]
            if age_S is not None:
                at = min(np.log1p(age_S[j] - age_S[i]) / STEP, KNOTS - 1)
                bias += np.interp(at, np.arange(KNOTS), p["time_K"])
            for h in range(H):
                part = slice(h * D // H, (h + 1) * D // H)
                weight = silu(q_SD[i, part] @ k_SD[j, part] + bias) / L
                seen_SD[i, part] += weight * v_SD[j, part]
    return x_SD + dense(p, "out", u_SD * normalise(p, "norm_seen", seen_SD))


@pytest.mark.parametrize("timed", [False, True])
def test_the_candidate_is_the_newest_token(timed):
    age_T = make_ages() if timed else None
    module, seen = make(from_log=timed), make_seen(age_T)
    found_BD = jax.jit(lambda seen: module(seen, key=None))(seen)
    p = named(module)
    for b, own in enumerate(examples()):
        rows_SM = np.concatenate([seen.target_BM[b : b + 1], seen.events_TM[own]])
        x_SD = dense(p, "project", rows_SM)
        age_S = None if age_T is None else np.concatenate([[0], age_T[own]])
        for layer in range(LAYERS):
            x_SD = layer_by_hand(below(p, "stack/layers", layer), x_SD, age_S)
        np.testing.assert_allclose(found_BD[b], x_SD[0], rtol=1e-4, atol=1e-5)


def test_times_that_are_not_known_have_no_parameters_and_are_not_read():
    untimed, timed = (make(from_log=from_log) for from_log in (False, True))
    assert set(named(timed)) - set(named(untimed)) == {"stack/layers/time_K"}
    run = jax.jit(lambda seen: untimed(seen, key=None))
    np.testing.assert_array_equal(run(make_seen(None)), run(make_seen(np.ones(T, np.float32))))
