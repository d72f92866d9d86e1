"""The student: which channel each method opens, ExFM's auxiliary head, what entries tell."""

from dataclasses import replace
from functools import cache, partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from noise import noisy, parts

from loopfm_jax.backbones import BackboneConfig, build
from loopfm_jax.data.schema import Field, Numeric, Schema
from loopfm_jax.errors import UserError
from loopfm_jax.history import codes, packing
from loopfm_jax.history.store import Store
from loopfm_jax.tables import TableConfig
from loopfm_jax.vm import student
from loopfm_jax.vm.encoders import EncoderConfig
from loopfm_jax.vm.methods import METHODS, Method, find_method
from loopfm_jax.vm.student import DistilConfig, History, Student, VMConfig, read_entries
from loopfm_jax.vm.train import Examples

B, N, Z, L, T = 6, 9, 5, 3, 16
SCHEMA = Schema(
    fields=(Field("user", 7), Field("item", 6), Field("cate", 4)),
    numeric=(Numeric("price"),),
    item=("item", "cate"),
)
VM = VMConfig(
    backbone=BackboneConfig(hidden=(7, 6), tables=TableConfig(width=3, row_multiple=1)),
    encoder=EncoderConfig(name="mean", width=4),
)
PLAIN = DistilConfig()
LENGTH = np.array([2, 0, 3, 1, 0, 2], np.int32)
END = np.array([2, 0, 5, 6, 0, 9], np.int32)
every_method = pytest.mark.parametrize("name", METHODS)


def make_batch(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    offsets = np.array([SCHEMA.offsets[f.name] for f in SCHEMA.fields])
    local = rng.integers(1, [f.rows for f in SCHEMA.fields], (B, 3))
    return {
        "ids_BC": (offsets + local).astype(np.int32),
        "floats_BN": rng.normal(size=(B, 1)).astype(np.float32),
        "label_B": (np.arange(B) % 2).astype(np.float32),
        "weight_B": np.array([1, 1, 1, 1, 1, 0], np.float32),
        "teacher_B": np.linspace(0.05, 0.95, B, dtype=np.float32),
        "end_B": END,
        "length_B": LENGTH,
        "seconds_B": np.full(B, 5_000, np.int32),
        "slot_T": np.zeros(T, np.uint8),
    }


def make_history(code: codes.Code = "fp32") -> History:
    rng = np.random.default_rng(1)
    z_NZ = rng.uniform(-1, 1, (N, Z)).astype(np.float32)
    return History(
        codes=codes.quantise(jnp.asarray(z_NZ), code),
        seconds=jnp.asarray(rng.integers(0, 5_000, N), jnp.int32),
        outcome=jnp.asarray(rng.integers(0, 2, N), jnp.uint8),
        code=code,
        width=Z,
        longest=L,
    )


def make(name: str) -> Student:
    return noisy(lambda rngs: Student(SCHEMA, VM, METHODS[name], code_width=Z, rngs=rngs))


@cache
def program(name: str, distil: DistilConfig):
    """(loss, its terms, serving and distillation logits, gradient), compiled."""
    graphdef, params, rest = parts(make(name))

    @jax.jit
    def run(batch, history, params=params):
        def objective(params):
            model = nnx.merge(graphdef, params, rest)
            value, terms = student.loss(model, batch, history, jax.random.key(0), config=distil)
            return value, (terms, nnx.merge(graphdef, params, rest)(batch, history))

        (value, (terms, logits)), slopes = jax.value_and_grad(objective, has_aux=True)(params)
        return value, terms, logits, slopes

    return run


def run(name: str, *, distil: DistilConfig = PLAIN, batch=None, **arguments):
    batch = make_batch() if batch is None else batch
    return jax.tree.map(np.asarray, program(name, distil)(batch, make_history(), **arguments))


def count(module: nnx.Module) -> int:
    return sum(x.size for x in jax.tree.leaves(parts(module)[1]))


def cross_entropy(logits, target, weight) -> float:
    p = 1 / (1 + np.exp(-logits.astype(np.float64)))
    losses = -(target * np.log(p) + (1 - target) * np.log1p(-p))
    return float((losses * weight).sum() / weight.sum())


def same(a, b, *, scale: float = 1.0, rtol: float = 2e-5, atol: float = 1e-7) -> None:
    close = partial(np.testing.assert_allclose, rtol=rtol, atol=atol)
    jax.tree.map(lambda x, y: close(x, scale * y), a, b)


def test_methods_by_name():
    for name, method in METHODS.items():
        assert method.kd == ("kd" in name) and method.history == ("loopfm" in name)
        assert method.side == (("outcome", "age") if "outcome" in name else ())
        assert find_method(name) == method
    assert METHODS["base"] == Method()
    with pytest.raises(UserError, match="no method 'lopfm': methods are base, kd, loopfm"):
        find_method("lopfm")


def test_a_side_setting_adds_to_every_method_that_reads_histories():
    assert find_method("kd", side=("age",)).side == ()
    assert find_method("loopfm", side=("age",)).side == ("age",)
    assert sorted(find_method("loopfm+outcome", side=("age",)).side) == ["age", "outcome"]


@every_method
def test_parameters_are_the_backbones_and_those_of_the_open_channels(name):
    def backbone(extra: int):
        create = partial(build, VM.backbone, SCHEMA, extra_fields=extra)
        return noisy(lambda rngs: create(rngs=rngs))

    method, model = METHODS[name], make(name)
    expected = count(backbone(VM.summary_fields if method.history else 0))
    expected += (6 + 1) if method.kd else 0
    if method.history:
        summary = VM.summary_fields * VM.backbone.tables.width
        expected += (Z + len(method.side)) * 4 + (4 + 1) * summary
    assert count(model) == expected
    if name == "base":
        assert count(model) == count(model.backbone)


@every_method
def test_a_batch_holds_what_the_method_reads_and_no_more(name):
    rows, zeros = np.arange(10, 14), np.zeros(8)
    inputs = SimpleNamespace(
        batch=lambda rows: {"label_B": rows},
        splits={"vm": slice(8, 12)},
        log={"time": 1_000 * np.arange(16) + 60_500},
    )
    length, end = np.array([0, 0, 1, 2, 3, 0, 0, 0], np.int32), np.arange(8)
    store = Store(zeros, zeros, zeros, zeros, end, length, np.arange(8) / 8, start_ms=60_000)
    method = METHODS[name]
    batch = Examples(inputs, store, end, length, 3, method).batch(rows)  # type: ignore
    assert ("teacher_B" in batch) == method.kd
    if method.kd:
        assert batch["teacher_B"].tolist() == [2 / 8, 3 / 8, 4 / 8, 5 / 8]
    kept = {"end_B", "length_B", "seconds_B", "slot_T"} & set(batch)
    assert len(kept) == (4 if method.history else 0)
    if method.history:
        assert batch["end_B"].tolist() == [2, 3, 4, 5] and batch["end_B"].dtype == np.int32
        assert batch["length_B"].tolist() == [1, 2, 3, 0]
        assert batch["seconds_B"].tolist() == [10, 11, 12, 13]
        assert len(batch["slot_T"]) == packing.budget(batch["length_B"], longest=3)


@pytest.mark.parametrize("alpha", [0.5, 3.0])
def test_loss_is_labels_plus_gamma_times_scaled_soft_labels(alpha):
    """At alpha = 3 most of alpha * y_F is above 1 and is cut there."""
    batch = make_batch()
    value, terms, (serving, distil), _ = run("kd", distil=DistilConfig(alpha=alpha, gamma=2.5))
    soft = np.minimum(alpha * batch["teacher_B"], 1)
    assert (soft == 1).sum() == (4 if alpha == 3 else 0)
    label = cross_entropy(serving, batch["label_B"], batch["weight_B"])
    taught = cross_entropy(distil, soft, batch["weight_B"])
    np.testing.assert_allclose(terms["logloss"], label, rtol=1e-5)
    np.testing.assert_allclose(terms["distillation"], taught, rtol=1e-5)
    np.testing.assert_allclose(value, label + 2.5 * taught, rtol=1e-5)


def test_beta_scales_the_gradient_of_the_distillation_head_into_the_trunk():
    def slopes(beta: float, gamma: float = 1.0):
        return run("kd", distil=DistilConfig(beta=beta, gamma=gamma))[3]

    label_only, plain = slopes(1, 0), slopes(1)
    taught = jax.tree.map(np.subtract, plain["backbone"], label_only["backbone"])
    assert max(abs(g).max() for g in jax.tree.leaves(taught)) > 1e-3
    for beta, gamma in ((0.0, 1.0), (5.0, 1.0), (5.0, 10.0)):
        found = slopes(beta, gamma)
        into_trunk = jax.tree.map(np.subtract, found["backbone"], label_only["backbone"])
        same(into_trunk, taught, scale=beta * gamma, rtol=1e-3, atol=1e-4 * gamma)
        same(found["distil"], plain["distil"], scale=gamma)  # the head itself learns in full
    same(run("kd", distil=DistilConfig(beta=5))[2], run("kd")[2])  # and no logit changes


def test_the_distillation_head_is_not_in_the_serving_logits():
    _, _, (serving, distil), _ = run("kd")
    _, params, _ = parts(make("kd"))
    params["distil"] = jax.tree.map(lambda x: x + 1, params["distil"])
    _, _, (serving_too, distil_too), _ = run("kd", params=params)
    np.testing.assert_array_equal(serving_too, serving)
    assert (np.abs(distil_too - distil) > 0.1).all()
    _, _, (serving_base, _), _ = run("base", params={"backbone": params["backbone"]})
    np.testing.assert_allclose(serving_base, serving, rtol=1e-6)


@every_method
def test_soft_labels_reach_only_methods_that_distil(name):
    other = make_batch() | {"teacher_B": np.full(B, 0.5, np.float32)}
    value, terms, logits, slopes = run(name)
    value_too, _, logits_too, slopes_too = run(name, batch=other)
    jax.tree.map(np.testing.assert_array_equal, logits_too, logits)  # never an input
    assert (value_too != value) == METHODS[name].kd
    assert ("distillation" in terms) == (logits[1] is not None) == METHODS[name].kd
    if not METHODS[name].kd:
        jax.tree.map(np.testing.assert_array_equal, slopes_too, slopes)


@every_method
def test_no_logit_knows_its_label(name):
    batch = make_batch()
    flipped = run(name, batch=batch | {"label_B": 1 - batch["label_B"]})
    jax.tree.map(np.testing.assert_array_equal, flipped[2], run(name)[2])


def test_rows_of_weight_zero_teach_nothing():
    other = make_batch()
    for column in ("label_B", "teacher_B"):
        other[column][5] = 1 - other[column][5]
    value, _, _, slopes = run("kd+loopfm")
    value_too, _, _, slopes_too = run("kd+loopfm", batch=other)
    np.testing.assert_allclose(value_too, value, rtol=1e-6)
    same(slopes_too, slopes)


@every_method
def test_every_open_channel_is_trained(name):
    """A kernel without a gradient would be a channel that is wired to nothing."""
    for path, slope in jax.tree.leaves_with_path(run(name)[3]):
        assert slope.any(), path


@pytest.mark.parametrize("code", codes.NUMPY_TYPE)
@pytest.mark.parametrize("side", [(), ("outcome",), ("age",), ("outcome", "age")])
def test_entries_tell_code_outcome_and_age(code, side):
    history, seconds_B = make_history(code), np.array([9_000, 0, 4_000, 5_000, 0, 10**6], np.int32)
    tokens = packing.pack(END, LENGTH, slots=T, longest=L)
    read = jax.jit(read_entries, static_argnames="side")
    value_TX = np.asarray(read(history, tokens, seconds_B, side=side))
    assert value_TX.shape == (T, Z + len(side)) and value_TX.dtype == np.float32
    assert not value_TX[LENGTH.sum() :].any()
    z_NZ = np.asarray(codes.dequantise(history.codes, code, width=Z))
    slot = 0
    for b in range(B):
        for rank in range(LENGTH[b]):
            row = END[b] - 1 - rank
            told = {
                "outcome": 1.0 if history.outcome[row] else -1.0,
                # Nothing is younger than now: an entry of a later second has age 0.
                "age": np.log1p(max(int(seconds_B[b]) - int(history.seconds[row]), 0) / 60)
                / np.log1p(7 * 24 * 60),
            }
            expected = [*z_NZ[row], *(told[s] for s in side)]
            np.testing.assert_allclose(value_TX[slot], expected, rtol=1e-5)
            slot += 1


def test_a_fresh_student_starts_from_the_base_model():
    """The summary joins as fields about as small as the table's rows, whatever the codes."""
    config = replace(VM, backbone=replace(VM.backbone, tables=TableConfig(width=3, init_std=1e-4)))

    @jax.jit
    def start(key):
        model = Student(SCHEMA, config, METHODS["loopfm"], code_width=Z, rngs=nnx.Rngs(key))
        return nnx.to_pure_dict(nnx.state(model.summary))

    summary = start(jax.random.key(0))
    assert 0 < np.abs(summary["kernel"]).max() < 1e-3 and not np.asarray(summary["bias"]).any()


@pytest.mark.parametrize(
    ("build_config", "message"),
    [
        (lambda: DistilConfig(alpha=-1), "distil.alpha is -1"),
        (lambda: DistilConfig(beta=-0.5), "distil.beta is -0.5"),
        (lambda: DistilConfig(gamma=float("nan")), "distil.gamma is nan"),
        (lambda: VMConfig(summary_fields=0), "vm.summary_fields is 0; it must be at least 1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(build_config, message):
    with pytest.raises(UserError, match=message):
        build_config()
