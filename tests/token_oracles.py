"""A few packed events, and layers over them in plain numpy, one example at a time."""

from collections.abc import Iterator

import jax.numpy as jnp
import numpy as np

from loopfm_jax.backbones import BackboneConfig
from loopfm_jax.backbones.config import Spec
from loopfm_jax.data.schema import Behaviour, Field, Schema
from loopfm_jax.packing import Tokens, lay_out
from loopfm_jax.tables import TableConfig

L, H, D, E, R = 4, 2, 8, 3, 3
LENGTH = np.array([3, 0, 4, 1])
B, T = len(LENGTH), 10
PAIR = Behaviour(("item",), ("items",))


def make_spec(name: str, *, from_log: bool = False, **options) -> Spec:
    items = Field("items", 9, kind="sequence", length=L, shares="item", from_log=from_log)
    schema = Schema(fields=(Field("item", 9), Field("user", 5), items), behaviours=(PAIR,))
    config = BackboneConfig(
        name, heads=H, token_width=D, rank=R, tables=TableConfig(width=E), **options
    )
    return Spec(config, schema)


def make_ages() -> np.ndarray:
    """Seconds [T], the newest of an example first."""
    age_T = np.random.default_rng(2).integers(0, 10**6, T).astype(np.float32)
    for own in examples():
        age_T[own] = np.sort(age_T[own])
    return age_T


def make_tokens(age_T: np.ndarray | None = None) -> Tokens:
    tokens = lay_out(jnp.asarray(LENGTH, jnp.int32), slots=T, longest=L)
    return tokens.replace(age_T=None if age_T is None else jnp.asarray(age_T))


def make_events(width: int) -> np.ndarray:
    """[T,width], zeros where there is no event."""
    real_T = np.arange(T) < LENGTH.sum()
    drawn_TX = np.random.default_rng(0).normal(size=(T, width))
    return (drawn_TX * real_T[:, None]).astype(np.float32)


def examples() -> Iterator[slice]:
    """The slots of every example."""
    stops = np.cumsum(LENGTH)
    return (slice(start, stop) for start, stop in zip(stops - LENGTH, stops, strict=True))


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def softmax(x: np.ndarray) -> np.ndarray:
    return np.exp(x - x.max()) / np.exp(x - x.max()).sum()


def dense(p: dict, name: str, x: np.ndarray) -> np.ndarray:
    return x @ p[f"{name}/kernel"] + p.get(f"{name}/bias", 0)


def normalise(p: dict, name: str, x: np.ndarray) -> np.ndarray:
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    return x * p[f"{name}/scale"] + p[f"{name}/bias"]


def below(p: dict, name: str, layer: int | None = None) -> dict[str, np.ndarray]:
    """The parameters of a part; of one layer of a stack."""
    own = {n.removeprefix(f"{name}/"): x for n, x in p.items() if n.startswith(f"{name}/")}
    return own if layer is None else {n: x[layer] for n, x in own.items()}


def attend(q_SD: np.ndarray, k_ND: np.ndarray, v_ND: np.ndarray, sees) -> np.ndarray:
    """Softmax attention head by head, of s over what `sees(s)` names; nothing: zeros."""
    seen_SD = np.zeros((len(q_SD), D))
    for s in range(len(q_SD)):
        for h in range(H):
            part, seen = slice(h * D // H, (h + 1) * D // H), sees(s)
            if len(k_ND[seen]):
                scores = k_ND[seen, part] @ q_SD[s, part] / np.sqrt(D // H)
                seen_SD[s, part] = softmax(scores) @ v_ND[seen, part]
    return seen_SD


def turned(x_SD: np.ndarray, angle_SP: np.ndarray) -> np.ndarray:
    """Rotary: pair i, i + half of every head by angle i."""
    half, found = D // H // 2, np.zeros_like(x_SD)
    for h in range(H):
        a, b = (slice(h * 2 * half + n * half, h * 2 * half + (n + 1) * half) for n in (0, 1))
        spun = (x_SD[:, a] + 1j * x_SD[:, b]) * np.exp(1j * angle_SP)
        found[:, a], found[:, b] = spun.real, spun.imag
    return found


def wukong_layer(p: dict, own_FE: np.ndarray, beside_GE: np.ndarray) -> np.ndarray:
    """Products of all pairs of tokens; the own ones are made anew."""
    x_FE, made = np.concatenate([own_FE, beside_GE]), len(own_FE) // 2
    product_X = (x_FE @ x_FE.T @ p["project_FK"]).reshape(-1)
    hidden_X = np.maximum(dense(p, "mix/layers/0", normalise(p, "norm_products", product_X)), 0)
    made_GE = dense(p, "make", hidden_X).reshape(made, -1)
    new_FE = np.concatenate([made_GE, p["keep_FG"].T @ x_FE]) + own_FE
    return normalise(p, "norm", new_FE)
