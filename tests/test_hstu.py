"""HSTU against its equations, event by event: the candidate is the newest token."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from noise import named, noisy

from loopfm_jax.backbones import BackboneConfig
from loopfm_jax.backbones.behaviours import Seen
from loopfm_jax.backbones.config import Spec
from loopfm_jax.backbones.hstu import HSTU, KNOTS, STEP
from loopfm_jax.data.schema import Behaviour, Field, Schema
from loopfm_jax.packing import lay_out
from loopfm_jax.tables import TableConfig

L, H, D, E, LAYERS = 4, 2, 6, 3, 2
LENGTH = np.array([3, 0, 4, 1])
B, T = len(LENGTH), 10
PAIR = Behaviour(("item",), ("items",))


def make(*, from_log: bool, age_T=None):
    """The module, and what it sees of a batch."""
    items = Field("items", 9, kind="sequence", length=L, shares="item", from_log=from_log)
    schema = Schema(fields=(Field("item", 9), items), behaviours=(PAIR,))
    config = BackboneConfig(
        "hstu", layers=LAYERS, heads=H, token_width=D, tables=TableConfig(width=E)
    )
    spec = Spec(config, schema)
    module = noisy(lambda rngs: HSTU(spec, PAIR, rngs=rngs))
    rng = np.random.default_rng(0)
    tokens = lay_out(jnp.asarray(LENGTH, jnp.int32), slots=T, longest=L).replace(age_T=age_T)
    events_TM = rng.normal(size=(T, E)) * np.asarray(tokens.real_T)[:, None]
    seen = Seen(*(jnp.asarray(x, jnp.float32) for x in (rng.normal(size=(B, E)), events_TM)),
                tokens, ids={})  # fmt: skip
    return module, seen


def silu(x):
    return x / (1 + np.exp(-x))


def normalise(p, name, x):
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    return x * p[f"{name}/scale"] + p[f"{name}/bias"]


def layer_by_hand(p: dict, x_SD: np.ndarray, age_S: np.ndarray | None) -> np.ndarray:
    """Tokens newest first; each sees itself and what follows."""
    made = silu(normalise(p, "norm", x_SD) @ p["into/kernel"])
    u, q, k, v = np.split(made, 4, axis=1)
    seen_SD = np.zeros_like(x_SD)
    for i in range(len(x_SD)):
        for j in range(i, len(x_SD)):
            bias = p["rank_N"][j - i]
            if age_S is not None:
                at = min(np.log1p(age_S[j] - age_S[i]) / STEP, KNOTS - 1)
                bias += np.interp(at, np.arange(KNOTS), p["time_K"])
            for h in range(H):
                part = slice(h * D // H, (h + 1) * D // H)
                weight = silu(q[i, part] @ k[j, part] + bias) / L
                seen_SD[i, part] += weight * v[j, part]
    gated = u * normalise(p, "norm_seen", seen_SD)
    return x_SD + gated @ p["out/kernel"] + p["out/bias"]


@pytest.mark.parametrize("timed", [False, True])
def test_the_candidate_is_the_newest_token(timed):
    age_T = np.random.default_rng(2).integers(0, 10**6, T).astype(np.float32)
    stops = np.cumsum(LENGTH)
    for start, stop in zip(stops - LENGTH, stops, strict=True):
        age_T[start:stop].sort()
    module, seen = make(from_log=timed, age_T=jnp.asarray(age_T) if timed else None)
    found_BD = jax.jit(lambda seen: module(seen, key=None))(seen)
    p = named(module)
    layers = [
        {n.removeprefix("stack/layers/"): x[i] for n, x in p.items() if n.startswith("stack")}
        for i in range(LAYERS)
    ]
    for b, (start, stop) in enumerate(zip(stops - LENGTH, stops, strict=True)):
        rows_SM = np.concatenate([seen.target_BM[b : b + 1], seen.events_TM[start:stop]])
        x_SD = rows_SM @ p["project/kernel"] + p["project/bias"]
        age_S = np.concatenate([[0], age_T[start:stop]]) if timed else None
        for layer in layers:
            x_SD = layer_by_hand(layer, x_SD, age_S)
        np.testing.assert_allclose(found_BD[b], x_SD[0], rtol=1e-4, atol=1e-5)


def test_times_that_are_not_known_have_no_parameters_and_are_not_read():
    untimed, seen = make(from_log=False)
    timed, _ = make(from_log=True)
    names = [set(named(module)) for module in (untimed, timed)]
    assert names[1] - names[0] == {"stack/layers/time_K"}
    aged = seen.replace(tokens=seen.tokens.replace(age_T=jnp.full(T, 9.0)))
    run = jax.jit(lambda seen: untimed(seen, key=None))
    np.testing.assert_array_equal(run(seen), run(aged))


def test_gradients_reach_every_parameter():
    module, seen = make(from_log=True, age_T=jnp.arange(T, dtype=jnp.float32) * 1e4)
    graphdef, state = nnx.split(module)
    run = jax.jit(jax.grad(lambda s: (nnx.merge(graphdef, s)(seen, key=None) ** 2).sum()))
    for path, g in jax.tree.leaves_with_path(nnx.to_pure_dict(run(state))):
        assert np.isfinite(g).all() and (g != 0).any(), jax.tree_util.keystr(path)
