"""Tiny backbones of every kind and option, filled with noise, and batches for them."""

from dataclasses import replace
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from noise import noisy, parts
from packed import pack_batch

from loopfm_jax.backbones import BackboneConfig, build
from loopfm_jax.bench.public import history
from loopfm_jax.data.schema import Behaviour, Field, Numeric, Schema
from loopfm_jax.tables import TableConfig

B, E, L, K = 4, 4, 5, 2
ITEM, CATE, VISUAL = Field("item", 9), Field("cate", 6), Field("visual", 8, frozen_width=3)
SCHEMA = Schema(
    fields=(
        Field("user", 7),
        ITEM,
        CATE,
        VISUAL,
        Field("tags", 5, kind="sequence", length=3),
        history("items", ITEM, L),
        history("cates", CATE, L),
        history("visuals", VISUAL, L),
    ),
    numeric=(Numeric("price"), Numeric("age")),
    behaviours=(
        Behaviour(("item", "cate"), ("items", "cates")),
        Behaviour(("visual",), ("visuals",)),
    ),
)
TABLE = TableConfig(width=E, init_std=0.5, row_multiple=1)
LENGTHS = {"tags": [1, 0, 2, 3], "items": [2, 0, 4, 3], "cates": [2, 0, 4, 3]}
LENGTHS["visuals"] = LENGTHS["items"]

SMALL: dict[str, Any] = dict(hidden=(8, 6), attention_hidden=(6, 5), tables=TABLE)
DICE: dict[str, Any] = dict(activation="dice", attention_activation="dice")
ARMS: dict[str, Any] = dict(heads=2, token_width=8, rank=3, mix_hidden=(7,))
CASES = {
    "fm2": BackboneConfig("fm2", **SMALL),
    "fmfm": BackboneConfig("fmfm", **SMALL),
    "fmfm_matrix": BackboneConfig("fmfm", **SMALL, pair="matrix"),
    "deepfm": BackboneConfig("deepfm", **SMALL, dropout=0.2),
    "deepfm_norm": BackboneConfig("deepfm", **SMALL, **DICE, norm="hidden"),
    "dcnv2": BackboneConfig("dcnv2", **SMALL, cross_layers=2, dropout=0.1),
    "wukong": BackboneConfig("wukong", **SMALL, layers=2, rank=3, mix_hidden=(7,)),
    "wukong_remat": BackboneConfig(
        "wukong", **SMALL, layers=3, rank=3, mix_hidden=(7,), remat=True, dropout=0.1
    ),
    "din": BackboneConfig("din", **SMALL),
    "din_softmax": BackboneConfig("din", **SMALL, **DICE, attention_softmax=True),
    "dien": BackboneConfig("dien", **SMALL),
    "dmr": BackboneConfig("dmr", **SMALL),
    "dmr_u2i": BackboneConfig("dmr", **SMALL, **DICE, u2i=True, position_width=3),
    "dmin": BackboneConfig("dmin", **SMALL),
    "dmin_full": BackboneConfig(
        "dmin", **SMALL, **DICE, norm="input", heads=2, refiner=True, dropout=0.1
    ),
    "hstu": BackboneConfig("hstu", **SMALL, layers=2, heads=2, token_width=6),
    "interformer": BackboneConfig("interformer", **SMALL, **ARMS, layers=2),
    "kunlun": BackboneConfig("kunlun", **SMALL, **ARMS, layers=2, window=2, remat=True),
}
ONE_BEHAVIOUR = replace(SCHEMA, behaviours=SCHEMA.behaviours[:1])
SCHEMAS = {case: ONE_BEHAVIOUR if case == "dmin_full" else SCHEMA for case in CASES}


def make_ids(seed=0, lengths=LENGTHS) -> dict[str, np.ndarray]:
    """Fused ids by field, [B, length], oldest first, 0 = padding at the end."""
    rng, found = np.random.default_rng(seed), {}
    for f in (*SCHEMA.categorical, *SCHEMA.sequences):
        ids = SCHEMA.offsets[f.name] + rng.integers(1, f.rows, (B, f.length))
        real = np.arange(f.length) < np.array(lengths.get(f.name, [1] * B))[:, None]
        found[f.name] = np.where(real, ids, 0)
    return found


def make_floats(seed=0) -> np.ndarray:
    return np.random.default_rng((seed, 1)).normal(size=(B, len(SCHEMA.numeric)))


def make_features(seed=0, lengths=LENGTHS, schema=SCHEMA, **how) -> dict[str, Any]:
    return pack_batch(schema, make_ids(seed, lengths), make_floats(seed), **how)


def make_key(seed: int):
    """A key whose generator compiles fast."""
    return jax.random.key(seed, impl="unsafe_rbg")


class Model:
    """A tiny backbone with jitted calls; `dtype` is its arithmetic."""

    def __init__(self, case: str, dtype: DTypeLike = jnp.float32):
        def create(rngs: nnx.Rngs) -> nnx.Module:
            return build(CASES[case], SCHEMAS[case], rngs=rngs, extra_fields=K, dtype=dtype)

        self.graphdef, self.params, self.rest = parts(noisy(create))
        extra_BKE = np.random.default_rng(1).normal(size=(B, K, E))
        self.extra_BKE = jnp.asarray(extra_BKE, jnp.float32)
        self.embed = jax.jit(lambda f: self.merged().embed(f))
        self.infer = jax.jit(lambda e, extra_BKE: self.merged()(e, extra_BKE=extra_BKE))
        self.train = jax.jit(self._train)

    def merged(self):
        return nnx.merge(self.graphdef, self.params, self.rest)

    def logits(self, features: dict) -> np.ndarray:
        return np.asarray(self.infer(self.embed(features), self.extra_BKE).logits_B)

    def _train(self, params, features: dict, key):
        """Gradient of a training step's loss, its updated rest, and its logits."""

        def loss(params):
            model = nnx.merge(self.graphdef, params, self.rest)
            output = model(model.embed(features), extra_BKE=self.extra_BKE, key=key)
            rest = nnx.to_pure_dict(nnx.split(model, nnx.Param, ...)[2])
            return (output.logits_B**2).sum(), (rest, output)

        grads, (rest, output) = jax.grad(loss, has_aux=True)(params)
        return grads, rest, output.logits_B


model = cache(Model)


def flat(state) -> dict[str, np.ndarray]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(state)
    return {jax.tree_util.keystr(path): np.asarray(x) for path, x in leaves}


def all_finite(tree) -> bool:
    return all(np.isfinite(x).all() for x in jax.tree.leaves(tree))
