"""Factorisation machines and cross layers against plain numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from backbone_cases import (
    CASES,
    SCHEMA,
    TABLE,
    B,
    E,
    K,
    make_features,
    make_floats,
    make_ids,
    model,
)
from flax import nnx
from noise import named, noisy
from token_oracles import below, wukong_layer

from loopfm_jax.backbones.interactions import FirstOrder, pairwise


def test_pairwise_is_the_sum_over_pairs():
    x = np.random.default_rng(0).normal(size=(B, 5, E)).astype(np.float32)
    want = [sum(a[i] @ a[j] for i in range(5) for j in range(i)) for a in x]
    np.testing.assert_allclose(pairwise(jnp.asarray(x)).sum(1), want, rtol=1e-4)


def test_first_order_sums_a_weight_per_field_and_id():
    first = noisy(lambda rngs: FirstOrder(SCHEMA, TABLE, rngs=rngs))
    ids = make_ids()
    weights, total = np.asarray(first.table.table.rows_VE[...])[:, 0], np.zeros(B)
    start = 0
    for f in (*SCHEMA.categorical, *SCHEMA.sequences):
        local = np.where(ids[f.name] > 0, ids[f.name] - SCHEMA.offsets[f.name], 0)
        total += np.where(local > 0, weights[start + local], 0).sum(1)
        start += f.rows
    assert start == len(weights)
    total += make_floats() @ np.asarray(first.numeric_N[...])
    total += np.asarray(first.bias[...])
    embedded = jax.jit(model("fm2").embed)(make_features())
    np.testing.assert_allclose(first(embedded), total, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", ["fm2", "fmfm", "fmfm_matrix"])
def test_a_weight_per_pair_of_fields(case):
    """logit = first order + sum over pairs, extra fields included; the trunk is its vector."""
    m, features = model(case), make_features()
    embedded = m.embed(features)
    got = m.infer(embedded, m.extra_BKE)
    backbone = m.merged()
    x_BFE = np.asarray(got.taps["embedding"]).reshape(B, -1, E)
    fields = len(SCHEMA.fields) + len(SCHEMA.numeric) + K
    assert x_BFE.shape[1] == fields
    np.testing.assert_array_equal(x_BFE[:, -K:], m.extra_BKE)
    want_BE, pair = np.zeros((B, E)), 0
    for i in range(fields):
        for j in range(i + 1, fields):
            left_BE = x_BFE[:, i]
            if case != "fm2":
                weight = np.asarray(backbone.pairs_PE[...])[pair]
                left_BE = left_BE * weight if weight.ndim == 1 else left_BE @ weight
            want_BE += left_BE * x_BFE[:, j]
            pair += 1
    if case != "fm2":
        assert pair == len(backbone.pairs_PE[...])
    np.testing.assert_allclose(got.trunk_BW, want_BE, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(got.trunk_BW, got.taps["interaction"])
    first_B = jax.jit(lambda e: m.merged().first_order(e))(embedded)
    np.testing.assert_allclose(got.logits_B, first_B + want_BE.sum(1), rtol=1e-4, atol=1e-4)


def test_cross_layers_and_the_trunk_that_the_logit_reads():
    m = model("dcnv2")
    got = m.infer(m.embed(make_features()), m.extra_BKE)
    backbone = m.merged()
    start_BX = cross_BX = np.asarray(got.taps["embedding"])
    assert len(backbone.cross) == CASES["dcnv2"].cross_layers
    for layer in backbone.cross:
        product_BX = cross_BX @ np.asarray(layer.kernel[...]) + np.asarray(layer.bias[...])
        cross_BX = start_BX * product_BX + cross_BX
    np.testing.assert_allclose(got.taps["cross"], cross_BX, rtol=1e-3, atol=1e-3)
    deep, wide = backbone.dnn.out, backbone.cross_out
    kernel_X1 = np.concatenate([np.asarray(x.kernel[...]) for x in (wide, deep)])
    want_B1 = np.asarray(got.trunk_BW) @ kernel_X1 + np.asarray(deep.bias[...])
    np.testing.assert_allclose(got.logits_B, want_B1[:, 0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("case", ["wukong", "wukong_remat"])
def test_wukong_multiplies_all_pairs_of_fields_in_every_layer(case):
    m, config = model(case), CASES[case]
    got = m.infer(m.embed(make_features()), m.extra_BKE)
    x_BFE = np.asarray(got.taps["embedding"], np.float64).reshape(B, -1, E)
    p, nothing_GE = named(m.merged()), np.zeros((0, E))
    for i in range(config.layers):
        layer = below(p, "stack/layers", i)
        x_BFE = np.stack([wukong_layer(layer, x_FE, nothing_GE) for x_FE in x_BFE])
    np.testing.assert_allclose(got.taps["interaction"], x_BFE.reshape(B, -1), rtol=1e-3, atol=1e-3)


def test_a_stack_is_its_layers_and_remat_changes_no_gradient():
    kept, again = model("wukong").merged(), model("wukong_remat").merged()
    fields = kept.stack.layers.keep_FG[...].shape[1]
    x_BFE = jnp.asarray(np.random.default_rng(3).normal(size=(B, fields, E)), jnp.float32)

    def gradient(stack, remat):
        stack.remat = remat
        graphdef, params = nnx.split(stack)
        run = jax.jit(jax.grad(lambda p: (nnx.merge(graphdef, p)(x_BFE) ** 3).sum()))
        return run(nnx.to_pure_dict(params))

    for stack, count in ((kept.stack, 2), (again.stack, 3)):
        assert {len(p) for p in jax.tree.leaves(nnx.state(stack))} == {count}, "they lie stacked"
        found = [gradient(stack, remat) for remat in (False, True)]
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), *found)
