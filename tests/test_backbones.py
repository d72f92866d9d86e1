"""Contracts of every backbone."""

from dataclasses import replace
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tyro
from backbone_cases import (
    ARMS,
    CASES,
    LENGTHS,
    SCHEMA,
    B,
    E,
    K,
    L,
    Model,
    all_finite,
    flat,
    make_features,
    make_floats,
    make_ids,
    make_key,
    model,
)
from flax import nnx
from packed import pack_batch

from loopfm_jax.backbones import BACKBONES, BackboneConfig, build, product
from loopfm_jax.backbones.config import SEQUENCE_BACKBONES, BackboneName
from loopfm_jax.backbones.dien import Gru
from loopfm_jax.data.schema import Behaviour
from loopfm_jax.errors import UserError
from loopfm_jax.packing import lay_out, pad
from loopfm_jax.tables import TableConfig

assert {c.name for c in CASES.values()} == set(BACKBONES) == set(get_args(BackboneName))
every_case = pytest.mark.parametrize("case", CASES)


@every_case
def test_output_is_finite_and_its_taps_are_named(case):
    m = model(case)
    output = m.infer(m.embed(make_features()), m.extra_BKE)
    assert output.logits_B.shape == (B,) and output.logits_B.dtype == jnp.float32
    shapes = {name: x.shape for name, x in output.taps.items()}
    wide = shapes.pop("embedding")
    own = {"fm2": {"interaction": (B, E)}, "fmfm": {"interaction": (B, E)}}
    hidden = {"hidden_0": (B, 8), "hidden_1": (B, 6)}
    arms = {"interaction": wide, "summary": (B, 2 * 8 * ARMS["token_width"])}
    more = {"dcnv2": {"cross": wide}, "wukong": {"interaction": wide}, "hstu": {"summary": (B, 12)}}
    more |= {"interformer": arms, "kunlun": arms}
    name = CASES[case].name
    assert shapes == own.get(name, hidden | more.get(name, {}))
    assert wide[0] == B and len(wide) == 2
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
    mixed = {
        n: np.where(np.arange(B)[:, None] == 2, make_ids(1)[n], x) for n, x in make_ids().items()
    }
    before, after = m.logits(features), m.logits(pack_batch(SCHEMA, mixed, make_floats()))
    rest = np.arange(B) != 2
    assert before[2] != after[2]
    np.testing.assert_array_equal(before[rest], after[rest])


@every_case
def test_what_stands_at_unreal_slots_is_not_read(case):
    m = model(case)
    embedded = m.embed(make_features())
    poison = {
        n: jnp.where(embedded.tokens[n].real_T[:, None], x, jnp.nan)
        for n, x in embedded.sequences.items()
    }
    got = m.infer(embedded.replace(sequences=poison), m.extra_BKE)
    want = m.infer(embedded, m.extra_BKE)
    jax.tree.map(np.testing.assert_array_equal, got, want)


@every_case
def test_how_many_slots_are_unreal_changes_nothing(case):
    m = model(case)
    got, want = m.logits(make_features(spare=0)), m.logits(make_features())
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


@every_case
def test_padded_is_another_layout_of_the_same(case):
    """L slots for every example, where most are unreal: the reference of the packed layout."""
    m = model(case)
    embedded = m.embed(make_features())

    def padded(name: str, x: jax.Array) -> jax.Array:
        return embedded.tokens[name].pad(x).reshape(-1, *x.shape[1:])

    layout = {}
    for name, tokens in embedded.tokens.items():
        length_B = np.bincount(tokens.segment_T[np.asarray(tokens.real_T)], minlength=B)
        layout[name] = pad(np.cumsum(length_B), jnp.asarray(length_B), longest=tokens.length)
    wide = embedded.replace(
        ids=embedded.ids | {n: padded(n, embedded.ids[n]) for n in layout},
        sequences={n: padded(n, x) for n, x in embedded.sequences.items()},
        tokens=layout,
    )
    assert len(layout["items"].real_T) == B * L
    got, want = m.infer(wide, m.extra_BKE), m.infer(embedded, m.extra_BKE)
    np.testing.assert_allclose(got.logits_B, want.logits_B, rtol=1e-4, atol=1e-5)


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
    m, usual = model(case), make_features()["events"]
    slots = {group: events["ids_PSG"].shape[1] for group, events in usual.items()}  # compiled for
    features = make_features(lengths={name: [0] * B for name in LENGTHS}, spare=slots)
    assert np.isfinite(m.logits(features)).all()
    assert all_finite(m.train(m.params, features, make_key(0)))


@every_case
def test_training_uses_its_key_and_updates_only_statistics(case):
    m, features, config = model(case), make_features(), CASES[case]
    _, rest, a = m.train(m.params, features, make_key(0))
    _, _, b = m.train(m.params, features, make_key(1))
    attends = config.name in SEQUENCE_BACKBONES
    assert config.attention_dropout > 0
    drops = attends or (config.dropout > 0 and config.name not in ("fm2", "fmfm"))
    assert (np.asarray(a) != np.asarray(b)).any() == drops
    before, after = flat(m.rest), flat(rest)
    changed = {n for n in before if (before[n] != after[n]).any()}
    assert changed == {
        n for n in before if n.endswith(("['mean']", "['var']", "['mean_W']", "['variance_W']"))
    }


@every_case
def test_bfloat16_stays_close(case):
    features = make_features()
    want, got = model(case).logits(features), model(case, jnp.bfloat16).logits(features)
    assert got.dtype == np.float32 and (got != want).any() == (case != "fm2")
    np.testing.assert_allclose(got, want, atol=0.1 * np.abs(want).max())


@pytest.mark.parametrize("case", ["din", "dien", "dmin", "wukong_remat", "hstu"])
def test_gradients_in_bfloat16_stay_close(case, monkeypatch):
    """Also where kernels are applied to more rows than here."""
    monkeypatch.setattr(product, "IN_FLOAT32", 0)
    want, got = (
        flat(m.train(m.params, make_features(), make_key(0))[0])
        for m in (model(case), Model(case, jnp.bfloat16))
    )
    assert {x.dtype for x in got.values()} == {np.dtype("float32")}
    every = [np.concatenate([x.ravel() for x in tree.values()]) for tree in (want, got)]
    apart = np.linalg.norm(every[0] - every[1]) / np.linalg.norm(every[0])
    assert 0 < apart < 0.05


def test_a_kernel_used_at_every_event_sums_its_gradient_in_float32():
    """In bfloat16 the sum over 400 events is .05 off."""
    tokens = lay_out(jnp.full(80, 400, jnp.int32), slots=80 * 400, longest=400)
    x_TM = jax.random.normal(make_key(0), (80 * 400, 8))

    def to_kernel(dtype):
        graphdef, params = nnx.split(Gru(8, rngs=nnx.Rngs(0), dtype=dtype))

        def loss(params):
            return nnx.merge(graphdef, params)(x_TM.astype(dtype), tokens)[0].mean()

        return jax.jit(jax.grad(loss))(params)["state"]["kernel"][...]

    want, got = to_kernel(jnp.float32), to_kernel(jnp.bfloat16)
    assert 0 < jnp.linalg.norm(got - want) < 0.005 * jnp.linalg.norm(want)


DEEP = [name for name in BACKBONES if name not in ("fm2", "fmfm")]


@pytest.mark.parametrize("case", DEEP)
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
        *((CASES[n], SCHEMA.without_behaviours(), f"^{n} reads") for n in SEQUENCE_BACKBONES),
        (replace(CASES["dmin"], heads=3), SCHEMA, "heads=3"),
        (
            CASES["din"],
            replace(SCHEMA, behaviours=(Behaviour(("item",), ("items", "cates")),)),
            "as many",
        ),
        (
            CASES["dien"],
            replace(SCHEMA, behaviours=(Behaviour(("item", "user"), ("items", "tags")),)),
            "one length",
        ),
        (BackboneConfig(hidden=()), SCHEMA, "hidden"),
    ],
)
def test_what_cannot_be_built_says_what_to_change(config, schema, message):
    with pytest.raises(UserError, match=message):
        nnx.eval_shape(lambda: build(config, schema, rngs=nnx.Rngs(0)))


def test_limits_of_the_options():
    for options, message in (
        (dict(cross_layers=0), "backbone.cross_layers is 0"),
        (dict(attention_hidden=(8, 0)), r"backbone.attention_hidden\[1\] is 0"),
        (dict(mix_hidden=(0,)), r"backbone.mix_hidden\[0\] is 0"),
        (dict(layers=0), "backbone.layers is 0"),
        (dict(rank=0), "backbone.rank is 0"),
        (dict(window=-1), "backbone.window is -1"),
        (dict(name="hstu", heads=3), "backbone.token_width is 64; hstu .* a multiple of 3"),
        (dict(name="dmr", u2i=True, position_width=0), "backbone.position_width is 0"),
    ):
        with pytest.raises(UserError, match=message):
            BackboneConfig(**options)
