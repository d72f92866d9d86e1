"""Every history encoder in plain numpy, one example at a time, entries newest first."""

import numpy as np

from loopfm_jax.backbones.rotary import FASTEST, SLOWEST
from loopfm_jax.history.encoders import EncoderConfig

W = 8
CONFIG = EncoderConfig(width=W, heads=2, score_hidden=(7, 5))
SCORES = "interest/scores"


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng((seed, *shape)).normal(size=shape).astype(np.float32)


def dense(p: dict, name: str, x: np.ndarray) -> np.ndarray:
    return x @ p[f"{name}/kernel"] + p.get(f"{name}/bias", 0)


def softmax(scores: np.ndarray) -> np.ndarray:
    e = np.exp(scores - scores.max())
    return e / e.sum()


def score_by_hand(p: dict, name: str, target_W: np.ndarray, token_LW: np.ndarray) -> np.ndarray:
    """MLP([t, h, t-h, t*h])."""
    target_LW = np.broadcast_to(target_W, token_LW.shape)
    parts = [target_LW, token_LW, target_LW - token_LW, target_LW * token_LW]
    x = np.concatenate(parts, axis=1)
    for i in range(len(CONFIG.score_hidden)):
        x = np.maximum(dense(p, f"{name}/mlp/layers/{i}", x), 0)
    return dense(p, f"{name}/mlp/out", x)[:, 0]


def din_by_hand(p: dict, token_LX: np.ndarray, query_Q: np.ndarray, _) -> np.ndarray:
    token_LW = dense(p, "project", token_LX)
    return softmax(score_by_hand(p, SCORES, dense(p, "query", query_Q), token_LW)) @ token_LW


def gru_by_hand(p: dict, name: str, token_LW: np.ndarray, factor_L: np.ndarray) -> np.ndarray:
    """States after every entry, newest first."""
    h, states = np.zeros(W), np.zeros((len(token_LW), W))
    for i in reversed(range(len(token_LW))):
        xu, xr, xn = np.split(dense(p, f"{name}/input", token_LW[i]), 3)
        hu, hr, hn = np.split(dense(p, f"{name}/state", h), 3)
        reset, update = 1 / (1 + np.exp(-(xr + hr))), factor_L[i] / (1 + np.exp(-(xu + hu)))
        h = (1 - update) * h + update * np.tanh(xn + reset * hn)
        states[i] = h
    return states


def dien_by_hand(p: dict, token_LX: np.ndarray, query_Q: np.ndarray, _) -> np.ndarray:
    token_LW = dense(p, "project", token_LX)
    interest_LW = gru_by_hand(p, "interest/extraction", token_LW, np.ones(len(token_LW)))
    attention_L = softmax(score_by_hand(p, SCORES, dense(p, "query", query_Q), interest_LW))
    return gru_by_hand(p, "interest/evolution", interest_LW, attention_L)[0]


def normalise(p: dict, name: str, x: np.ndarray, epsilon: float = 1e-6) -> np.ndarray:
    x = (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + epsilon)
    return x * p[f"{name}/scale"] + p[f"{name}/bias"]


def attend_by_hand(qkv_LX: np.ndarray, turn=lambda x: x) -> list[np.ndarray]:
    """Per head: what every entry gathers from itself and older ones, newest first."""
    length, size = len(qkv_LX), W // CONFIG.heads
    q, k, v = np.split(qkv_LX, 3, axis=1)
    heads = []
    for h in range(CONFIG.heads):
        part, mixed = slice(h * size, (h + 1) * size), np.zeros((length, size))
        for i in range(length):  # newest first: i and everything after it is as old or older
            seen = slice(i, length)
            scores = turn(k[:, part])[seen] @ turn(q[:, part])[i] / np.sqrt(size)
            mixed[i] = softmax(scores) @ v[seen, part]
        heads.append(mixed)
    return heads


def dmin_by_hand(p: dict, token_LX: np.ndarray, query_Q: np.ndarray, _) -> np.ndarray:
    token_LW, target_W = dense(p, "project", token_LX), dense(p, "query", query_Q)
    interests = []
    for h, mixed in enumerate(attend_by_hand(token_LW @ p["interest/qkv/kernel"])):
        head = f"interest/heads/{h}"
        x = token_LW + dense(p, f"{head}/out", mixed)
        x = normalise(p, f"{head}/forward/norm", x, 1e-5)
        grown = np.maximum(dense(p, f"{head}/forward/up", x), 0)
        x = x + dense(p, f"{head}/forward/down", grown)
        interests.append(softmax(score_by_hand(p, f"{head}/scores", target_W, x)) @ x)
    return np.concatenate(interests)


def transformer_by_hand(p: dict, token_LX, query_Q, age_L) -> np.ndarray:
    half = W // CONFIG.heads // 2
    frequency = np.exp(np.linspace(np.log(FASTEST), np.log(SLOWEST), half))
    rotary = np.exp(1j * np.log1p(age_L)[:, None] * frequency)

    def turn(x: np.ndarray) -> np.ndarray:
        turned = (x[:, :half] + 1j * x[:, half:]) * rotary
        return np.concatenate([turned.real, turned.imag], axis=1)

    x = dense(p, "project", token_LX)
    for i in range(CONFIG.layers):
        name = f"transformer/blocks/{i}"
        qkv = dense(p, f"{name}/attend", normalise(p, f"{name}/norm_attend", x))
        x = x + dense(p, f"{name}/mix", np.concatenate(attend_by_hand(qkv, turn), axis=1))
        grown = dense(p, f"{name}/grow", normalise(p, f"{name}/norm_grow", x))
        x = x + dense(p, f"{name}/shrink", np.maximum(grown, 0))
    x = normalise(p, "transformer/norm", x)
    return softmax(score_by_hand(p, SCORES, dense(p, "query", query_Q), x)) @ x


BY_HAND = {
    "mean": lambda p, token_LX, *_: dense(p, "project", token_LX.mean(axis=0)),
    "sum": lambda p, token_LX, *_: dense(p, "project", token_LX.sum(axis=0)),
    "din": din_by_hand,
    "dien": dien_by_hand,
    "dmin": dmin_by_hand,
    "transformer": transformer_by_hand,
}
