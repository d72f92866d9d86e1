"""Contracts of every backbone, public parameter counts, and plain-numpy oracles of their parts."""

from dataclasses import replace
from functools import cache
from math import prod
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tyro
from flax import nnx
from public_schemas import PUBLIC, history

from loopfm_jax.backbones import BACKBONES, BackboneConfig, build
from loopfm_jax.backbones.config import SEQUENCE_BACKBONES, BackboneName
from loopfm_jax.backbones.deepfm import FirstOrder, pairwise
from loopfm_jax.backbones.dmin import Interests, TargetAttention
from loopfm_jax.backbones.layers import (
    Dice,
    Mlp,
    causal_mask,
    dense,
    dropout,
    masked_mean,
    masked_softmax,
    self_attend,
)
from loopfm_jax.data.schema import Behaviour, Field, Numeric, Schema
from loopfm_jax.errors import UserError
from loopfm_jax.tables import Features, TableConfig

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
CASES = {
    "deepfm": BackboneConfig("deepfm", **SMALL, dropout=0.2),
    "deepfm_norm": BackboneConfig("deepfm", **SMALL, activation="dice", norm="hidden"),
    "dmin": BackboneConfig("dmin", **SMALL),
    "dmin_full": BackboneConfig(
        "dmin",
        **SMALL,
        norm="input",
        heads=2,
        refiner=True,
        attention_activation="dice",
        dropout=0.1,
    ),
}
ONE_BEHAVIOUR = replace(SCHEMA, behaviours=SCHEMA.behaviours[:1])
SCHEMAS = {case: ONE_BEHAVIOUR if case == "dmin_full" else SCHEMA for case in CASES}
assert {c.name for c in CASES.values()} == set(BACKBONES) == set(get_args(BackboneName))
every_case = pytest.mark.parametrize("case", CASES)


def make_features(seed=0, lengths=LENGTHS) -> Features:
    rng, columns = np.random.default_rng(seed), []
    for f in (*SCHEMA.categorical, *SCHEMA.sequences):
        ids = SCHEMA.offsets[f.name] + rng.integers(1, f.rows, (B, f.length))
        real = np.arange(f.length) < np.array(lengths.get(f.name, [1] * B))[:, None]
        columns.append(np.where(real, ids, 0))
    floats = rng.normal(size=(B, len(SCHEMA.numeric)))
    ids = np.concatenate(columns, axis=1)
    return Features(jnp.asarray(ids, jnp.int32), jnp.asarray(floats, jnp.float32))


def make_key(seed: int):
    """A key whose generator compiles fast."""
    return jax.random.key(seed, impl="unsafe_rbg")


def fill(abstract, seed: int):
    """Noise for every abstract array (no compilation), so that zero biases hide nothing."""
    rng = np.random.default_rng(seed)

    def draw(path, x):
        around = {"scale": 1.0, "var": 1.0}.get(path[-1].key, 0.0)
        return jnp.asarray(around + rng.uniform(-0.6, 0.6, x.shape), x.dtype)

    return jax.tree_util.tree_map_with_path(draw, abstract)


def make(create, seed: int = 0):
    """The module that `create(rngs)` builds, as (graphdef, params, rest), filled with noise."""
    graphdef, *states = nnx.split(nnx.eval_shape(lambda: create(nnx.Rngs(0))), nnx.Param, ...)
    return graphdef, *(fill(nnx.to_pure_dict(s), seed + i) for i, s in enumerate(states))


def make_module(create):
    return nnx.merge(*make(create))


class Model:
    """A tiny backbone with jitted calls; `dtype` is its arithmetic."""

    def __init__(self, case: str, dtype=jnp.float32):
        self.graphdef, self.params, self.rest = make(
            lambda rngs: build(CASES[case], SCHEMAS[case], rngs=rngs, extra_fields=K, dtype=dtype)
        )
        extra_BKE = np.random.default_rng(1).normal(size=(B, K, E))
        self.extra_BKE = jnp.asarray(extra_BKE, jnp.float32)
        self.embed = jax.jit(lambda f: self.merged().embed(f))
        self.infer = jax.jit(lambda e, extra_BKE: self.merged()(e, extra_BKE=extra_BKE))
        self.train = jax.jit(self._train)

    def merged(self):
        return nnx.merge(self.graphdef, self.params, self.rest)

    def logits(self, features: Features) -> np.ndarray:
        return np.asarray(self.infer(self.embed(features), self.extra_BKE).logits_B)

    def _train(self, params, features: Features, key):
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


# ---------------------------------------------------------------- public parameter counts


@pytest.mark.parametrize("name", ["dmin", "deepfm"])
@pytest.mark.parametrize("data", PUBLIC)
def test_parameter_count_is_the_public_one(data, name):
    public = PUBLIC[data]
    config, expected = public.config(name), public.models[name][1]
    abstract = nnx.eval_shape(lambda: build(config, public.schema, rngs=nnx.Rngs(0)))
    leaves = jax.tree.leaves(nnx.state(abstract, nnx.Param))
    assert sum(prod(x.shape) for x in leaves) == expected


# ---------------------------------------------------------------- contracts of every backbone


@every_case
def test_output_is_finite_and_its_taps_are_named(case):
    m = model(case)
    output = m.infer(m.embed(make_features()), m.extra_BKE)
    assert output.logits_B.shape == (B,) and output.logits_B.dtype == jnp.float32
    assert list(output.taps) == ["embedding", "hidden_0", "hidden_1"]
    assert [output.taps[f"hidden_{i}"].shape for i in (0, 1)] == [(B, 8), (B, 6)]
    assert output.taps["embedding"].shape[0] == B and output.taps["embedding"].ndim == 2
    assert output.trunk_BW.shape == (B, m.merged().trunk_width)
    assert all_finite(output)


@every_case
def test_every_field_and_extra_field_reaches_the_logits(case):
    m = model(case)
    embedded = m.embed(make_features())
    before = m.infer(embedded, m.extra_BKE).logits_B
    for name, x in embedded.fields.items():
        fields = embedded.fields | {name: x + 0.5}
        after = m.infer(embedded.replace(fields=fields), m.extra_BKE).logits_B
        assert (before != after).all(), name
    for name, x in embedded.sequences.items():
        sequences = embedded.sequences | {name: x + 0.5}
        after = m.infer(embedded.replace(sequences=sequences), m.extra_BKE).logits_B
        assert (before != after).tolist() == [n > 0 for n in LENGTHS[name]], name
    for i in range(K):
        after = m.infer(embedded, m.extra_BKE.at[:, i].add(0.5)).logits_B
        assert (before != after).all(), i


@every_case
def test_missing_extra_fields_are_an_error(case):
    m = model(case)
    with pytest.raises(ValueError, match="extra_fields=2"):
        jax.eval_shape(lambda f: m.merged()(m.merged().embed(f)), make_features())


@every_case
def test_inference_treats_examples_alone(case):
    m, features = model(case), make_features()
    other = make_features(seed=1)
    mixed = jax.tree.map(lambda x, y: x.at[2].set(y[2]), features, other)
    before, after = m.logits(features), m.logits(mixed)
    rest = np.arange(B) != 2
    assert before[2] != after[2]
    np.testing.assert_array_equal(before[rest], after[rest])


@every_case
def test_what_stands_at_padding_is_not_read(case):
    m = model(case)
    embedded = m.embed(make_features())
    poison = {
        n: jnp.where(embedded.masks[n][..., None], x, jnp.nan)
        for n, x in embedded.sequences.items()
    }
    got = m.infer(embedded.replace(sequences=poison), m.extra_BKE)
    want = m.infer(embedded, m.extra_BKE)
    jax.tree.map(np.testing.assert_array_equal, got, want)


@every_case
def test_more_padding_changes_nothing(case):
    m = model(case)
    embedded = m.embed(make_features())
    short = embedded.replace(
        sequences={n: x[:, : L - 1] for n, x in embedded.sequences.items()},
        masks={n: x[:, : L - 1] for n, x in embedded.masks.items()},
    )
    got, want = m.infer(short, m.extra_BKE), m.infer(embedded, m.extra_BKE)
    np.testing.assert_allclose(got.logits_B, want.logits_B, rtol=1e-5)


@every_case
def test_padding_rows_get_no_gradient(case):
    m = model(case)
    grads, _, _ = m.train(m.params, make_features(), make_key(2))
    tables = {n: g for n, g in flat(grads).items() if "rows_VE" in n}
    assert tables
    for name, g in tables.items():
        assert (g[0] == 0).all() and (g[1:] != 0).any(), name


@every_case
def test_no_history_is_finite(case):
    m = model(case)
    features = make_features(lengths={name: [0] * B for name in LENGTHS})
    assert np.isfinite(m.logits(features)).all()
    assert all_finite(m.train(m.params, features, make_key(0)))


@every_case
def test_training_uses_its_key_and_updates_only_statistics(case):
    m, features, config = model(case), make_features(), CASES[case]
    _, rest, a = m.train(m.params, features, make_key(0))
    _, _, b = m.train(m.params, features, make_key(1))
    drops = config.dropout > 0 or config.name in SEQUENCE_BACKBONES
    assert (np.asarray(a) != np.asarray(b)).any() == drops
    before, after = flat(m.rest), flat(rest)
    changed = {n for n in before if (before[n] != after[n]).any()}
    assert changed == {n for n in before if n.endswith(("['mean']", "['var']"))}


@every_case
def test_bfloat16_stays_close(case):
    features = make_features()
    want, got = model(case).logits(features), model(case, jnp.bfloat16).logits(features)
    assert got.dtype == np.float32 and (got != want).any()
    np.testing.assert_allclose(got, want, atol=0.1 * np.abs(want).max())


@pytest.mark.parametrize("case", ["deepfm", "dmin"])
def test_what_nobody_reads_costs_nothing(case):
    m = model(case)
    embedded = m.embed(make_features())

    def flops(pick):
        run = jax.jit(lambda e, extra_BKE: pick(m.merged()(e, extra_BKE=extra_BKE)))
        return run.lower(embedded, m.extra_BKE).compile().cost_analysis()["flops"]

    assert flops(lambda o: o.taps["hidden_0"]) < flops(lambda o: o.logits_B)


@pytest.mark.parametrize("name", BACKBONES)
def test_config_reads_from_a_command_line(name):
    args = ["--name", name, "--hidden", "64", "32", "--activation", "dice", "--tables.width", "8"]
    want = BackboneConfig(name, (64, 32), activation="dice", tables=TableConfig(width=8))
    assert tyro.cli(BackboneConfig, args=args) == want
    assert want.reads_behaviours == (name in SEQUENCE_BACKBONES)
    assert replace(want, behaviours=True).reads_behaviours


# ---------------------------------------------------------------- a user's mistakes


@pytest.mark.parametrize(
    ("config", "schema", "message"),
    [
        (CASES["dmin"], SCHEMA.without_behaviours(), "`behaviours`"),
        (replace(CASES["dmin"], heads=3), SCHEMA, "heads=3"),
        (
            CASES["dmin"],
            replace(SCHEMA, behaviours=(Behaviour(("item",), ("items", "cates")),)),
            "as many",
        ),
        (
            CASES["dmin"],
            replace(SCHEMA, behaviours=(Behaviour(("item", "user"), ("items", "tags")),)),
            "one length",
        ),
        (BackboneConfig(hidden=()), SCHEMA, "hidden"),
    ],
)
def test_what_cannot_be_built_says_what_to_change(config, schema, message):
    with pytest.raises(UserError, match=message):
        nnx.eval_shape(lambda: build(config, schema, rngs=nnx.Rngs(0)))


# ---------------------------------------------------------------- layers


def test_masked_mean_and_softmax():
    x = np.random.default_rng(0).normal(size=(2, 3, 4)).astype(np.float32)
    mask = jnp.array([[True, False, True], [False] * 3])
    want = np.stack([(x[0, 0] + x[0, 2]) / 2, np.zeros(4)])
    np.testing.assert_allclose(masked_mean(jnp.asarray(x), mask), want, rtol=1e-6)
    weights = masked_softmax(jnp.array([[1.0, 9.0, 3.0], [1.0, 2.0, 3.0]]), mask)
    e = np.exp([1.0, 3.0])
    want = [[e[0] / e.sum(), 0, e[1] / e.sum()], [0, 0, 0]]
    np.testing.assert_allclose(weights, want, rtol=1e-6)


def test_dropout_keeps_the_mean_and_needs_a_key():
    x = jnp.ones((200, 50))
    assert dropout(x, 0.3, None) is x and dropout(x, 0.0, jax.random.key(0)) is x
    y = np.asarray(dropout(x, 0.3, jax.random.key(0)))
    assert abs((y == 0).mean() - 0.3) < 0.02 and abs(y.mean() - 1) < 0.03


def test_dice_follows_its_formula_and_statistics_skip_padding():
    x = np.random.default_rng(0).normal(2.0, 3.0, (2, 3, 2)).astype(np.float32)
    mask = np.array([[True, True, False], [True, False, False]])
    dice = Dice(2, rngs=nnx.Rngs(0))
    dice.alpha_W[...] = jnp.array([0.3, -0.5])

    def formula(mean, var):
        p = 1 / (1 + np.exp(-(x - mean) / np.sqrt(var + 1e-9)))
        return p * x + np.array([0.3, -0.5]) * (1 - p) * x

    got = dice(jnp.asarray(x), mask=jnp.asarray(mask))
    np.testing.assert_allclose(got, formula(0, 1), rtol=1e-5)
    mean, var = x[mask].mean(0), x[mask].var(0)
    got = dice(jnp.asarray(x), train=True, mask=jnp.asarray(mask))
    np.testing.assert_allclose(got, formula(mean, var), rtol=1e-4)
    np.testing.assert_allclose(dice.norm.mean[...], 0.01 * mean, rtol=1e-5)
    np.testing.assert_allclose(dice.norm.var[...], 0.99 + 0.01 * var, rtol=1e-5)


def test_mlp_returns_each_hidden_activation_then_its_output():
    mlp = make_module(lambda rngs: Mlp(3, (5, 4), out=2, rngs=rngs))
    x = np.random.default_rng(0).normal(size=(6, 3)).astype(np.float32)
    want = []
    for layer in (*mlp.layers, mlp.out):
        x = x @ np.asarray(layer.kernel[...]) + np.asarray(layer.bias[...])
        x = np.maximum(x, 0) if layer is not mlp.out else x
        want.append(x)
    got = mlp(jnp.asarray(np.random.default_rng(0).normal(size=(6, 3)), jnp.float32))
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_kernels_start_xavier_normal_and_biases_at_zero():
    layer = dense(300, 200, rngs=nnx.Rngs(0))
    assert abs(float(layer.kernel[...].std()) / np.sqrt(2 / 500) - 1) < 0.02
    assert layer.bias is not None and (layer.bias[...] == 0).all()


def test_events_see_the_real_past_and_themselves():
    mask = np.array([[True, True, False, True, False]])
    sees = np.asarray(causal_mask(jnp.asarray(mask)))[0]
    want = [[j == i or (j < i and mask[0, j]) for j in range(L)] for i in range(L)]
    np.testing.assert_array_equal(sees, want)
    qkv = jax.random.normal(jax.random.key(0), (1, L, 12))

    def attend(x):
        return self_attend(x, causal_mask(jnp.asarray(mask)), heads=2).sum((0, 2, 3))

    jacobian = np.abs(jax.jit(jax.jacobian(attend))(qkv)[:, 0]).sum(-1)
    np.testing.assert_array_equal(jacobian > 0, want)


# ---------------------------------------------------------------- oracles


def test_pairwise_is_the_sum_over_pairs():
    x = np.random.default_rng(0).normal(size=(B, 5, E)).astype(np.float32)
    want = [sum(a[i] @ a[j] for i in range(5) for j in range(i)) for a in x]
    np.testing.assert_allclose(pairwise(jnp.asarray(x)), want, rtol=1e-4)


def test_first_order_sums_a_weight_per_field_and_id():
    first = make_module(lambda rngs: FirstOrder(SCHEMA, TABLE, rngs=rngs))
    features = make_features()
    weights, total = np.asarray(first.table.rows_VE[...])[:, 0], np.zeros(B)
    start = 0
    for f in (*SCHEMA.categorical, *SCHEMA.sequences):
        ids = np.asarray(features.ids_BC[:, SCHEMA.columns[f.name]])
        local = np.where(ids > 0, ids - SCHEMA.offsets[f.name], 0)
        total += np.where(local > 0, weights[start + local], 0).sum(1)
        start += f.rows
    assert start == len(weights)
    total += np.asarray(features.floats_BN) @ np.asarray(first.numeric_N[...])
    total += np.asarray(first.bias[...])
    np.testing.assert_allclose(first(features), total, rtol=1e-4, atol=1e-5)


def test_first_score_layer_equals_its_concatenated_form():
    config, width = BackboneConfig("dmin", attention_hidden=(6,), position_width=3), 4
    attention = make_module(
        lambda rngs: TargetAttention(config, width, L, rngs=rngs, dtype=jnp.float32)
    )
    rng = np.random.default_rng(0)
    target, head = rng.normal(size=(B, 4)), rng.normal(size=(B, L, 4))

    def concatenated(target, head):
        position = jnp.broadcast_to(attention.position_LP[...][None], (B, L, 3))
        both = [jnp.broadcast_to(target[:, None], (B, L, 4)), position]
        t = attention.project(jnp.concatenate(both, axis=-1))
        x = jnp.concatenate([t, head, t - head, t * head], axis=-1)
        return attention.score.layers[0](x)

    def split_up(target, head):
        return attention.first_layer(attention.query(target, L), head)

    got, want = (jax.jit(f)(target, head) for f in (split_up, concatenated))
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def numpy_interests(module: Interests, q, events, mask, config: BackboneConfig) -> np.ndarray:
    """Equations of PAPER section 5 for one example, event by event: q [M], events [L,M]."""

    def linear(layer, x):
        bias = 0 if layer.bias is None else np.asarray(layer.bias[...])
        return x @ np.asarray(layer.kernel[...]) + bias

    def norm(layer, x):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
        return x * np.asarray(layer.scale[...]) + np.asarray(layer.bias[...])

    def feed(layer, x):
        x = norm(layer.norm, x)
        return x + linear(layer.down, np.maximum(linear(layer.up, x), 0))

    def attend(layer, x):
        heads, width = config.heads, x.shape[1] // config.heads
        q, k, v = (y.reshape(L, heads, width) for y in np.split(linear(layer, x), 3, axis=1))
        out = np.zeros((L, heads, width))
        for i in range(L):
            seen = [j for j in range(L) if j == i or (j < i and mask[j])]
            for h in range(heads):
                w = np.exp([q[i, h] @ k[j, h] / np.sqrt(width) for j in seen])
                out[i, h] = (w / w.sum()) @ v[seen, h]
        return out

    if config.refiner:
        r = module.refiner
        s = linear(r.out, attend(r.qkv, events).reshape(events.shape))
        events = feed(r.forward, events + s)
    seen, interests = attend(module.qkv, events), []
    for h, head in enumerate(module.heads):
        x = feed(head.forward, events + linear(head.out, seen[:, h]))
        scores = np.zeros(L)
        for i in range(L):
            t = np.concatenate([q, np.asarray(head.attention.position_LP[...])[i]])
            t = linear(head.attention.project, t)
            y = np.concatenate([t, x[i], t - x[i], t * x[i]])
            for layer in head.attention.score.layers:
                y = np.maximum(linear(layer, y), 0)
            scores[i] = linear(head.attention.score.out, y)[0]
        w = np.exp(scores) * mask
        interests.append((w / max(w.sum(), 1e-30)) @ x)
    return np.concatenate(interests)


@pytest.mark.parametrize("refiner", [False, True])
def test_interests_equal_the_oracle(refiner):
    config = replace(CASES["dmin"], heads=2, refiner=refiner)
    module = make_module(lambda rngs: Interests(config, 4, L, rngs=rngs, dtype=jnp.float32))
    rng = np.random.default_rng(0)
    mask = np.arange(L) < np.array([3, 0, 5, 1])[:, None]
    target = rng.normal(size=(B, 4)).astype(np.float32)
    events = (rng.normal(size=(B, L, 4)) * mask[..., None]).astype(np.float32)
    got = jax.jit(lambda *x: module(*x, key=None))(target, events, mask)
    want = [numpy_interests(module, *x, config) for x in zip(target, events, mask, strict=True)]
    np.testing.assert_allclose(got, np.stack(want), rtol=1e-3, atol=1e-4)
