"""The student: which channel each method opens, the auxiliary heads, what entries tell."""

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
from loopfm_jax.history.codes import Codec
from loopfm_jax.history.encoders import EncoderConfig
from loopfm_jax.history.join import Join
from loopfm_jax.history.reader import Entries, Past, Readers, Reading
from loopfm_jax.history.store import Exported, Histories, Store
from loopfm_jax.tables import TableConfig
from loopfm_jax.vm.methods import CHANNELS, Method, find_method
from loopfm_jax.vm.student import ADAPTER_HIDDEN, DistilConfig, Student, VMConfig, now_taps
from loopfm_jax.vm.train import Examples

B, N, Z, L, T, E = 6, 9, 5, 3, 16, 3
SCHEMA = Schema(
    fields=(Field("user", 7), Field("item", 6), Field("cate", 4)),
    numeric=(Numeric("price"),),
    item=("item", "cate"),
    entity=("user",),
)
VM = VMConfig(
    backbone=BackboneConfig(hidden=(7, 6), tables=TableConfig(width=E, row_multiple=1)),
    encoder=EncoderConfig(name="mean", width=4, fields=2),
)
TAPS = ("hidden_0", "item", "entity")
KEYS = ("key", "item")
PLAIN = DistilConfig()
LENGTH = np.array([2, 0, 3, 1, 0, 2], np.int32)
END = np.array([2, 0, 5, 6, 0, 9], np.int32)
NAMES = (
    "base", "kd", "kd+adapter", "fitnets", "current", "entity", "loopfm", "kd+loopfm", "raw",
    "raw+loopfm", "soft", "item-only", "self", "kd+raw+loopfm+outcome",
)  # fmt: skip
every_method = pytest.mark.parametrize("name", NAMES)


def make_batch(seed: int = 0) -> dict:
    rng = np.random.default_rng(seed)
    offsets = np.array([SCHEMA.offsets[f.name] for f in SCHEMA.fields])
    local = rng.integers(1, [f.rows for f in SCHEMA.fields], (B, 3))
    own = {"end_B": END, "length_B": LENGTH, "slot_T": np.zeros(T, np.uint8)}
    turned = own | {"end_B": END[::-1].copy(), "length_B": LENGTH[::-1].copy()}
    return {
        "ids_BC": (offsets + local).astype(np.int32),
        "floats_BN": rng.normal(size=(B, 1)).astype(np.float32),
        "label_B": (np.arange(B) % 2).astype(np.float32),
        "weight_B": np.array([1, 1, 1, 1, 1, 0], np.float32),
        "teacher_B": np.linspace(0.05, 0.95, B, dtype=np.float32),
        "codes": {tap: rng.uniform(-1, 1, (B, Z)).astype(np.float32) for tap in TAPS},
        "slices": {"key": own, "item": turned},
        "seconds_B": np.full(B, 5_000, np.int32),
    }


def make_past(code: codes.Code = "fp32") -> Past:
    rng = np.random.default_rng(1)

    def entries() -> Entries:
        z = {tap: rng.uniform(-1, 1, (N, Z)).astype(np.float32) for tap in TAPS}
        return Entries(
            codes={tap: codes.quantise(jnp.asarray(z[tap]), Codec(code, Z)) for tap in TAPS},
            ids_SF=jnp.asarray(7 + rng.integers(1, 4, (N, 2)) + [[0, 6]], jnp.int32),
            seconds=jnp.asarray(rng.integers(0, 5_000, N), jnp.int32),
            outcome=jnp.asarray(rng.integers(0, 2, N), jnp.uint8),
            soft=jnp.asarray(rng.uniform(size=N), jnp.float32),
            longest=L,
        )

    return Past({key: entries() for key in KEYS}, {tap: Codec(code, Z) for tap in TAPS})


def make_reading(method: Method, keys: tuple[str, ...] = KEYS) -> Reading:
    codecs = {tap: Codec("fp32", Z) for tap in TAPS}
    return Reading(method.contents, keys, method.side, codecs, "hidden_0")


def make(name: str) -> Student:
    method = find_method(name)
    return noisy(lambda rngs: Student(SCHEMA, VM, method, make_reading(method), rngs=rngs))


@cache
def program(name: str, distil: DistilConfig):
    """(loss, its terms, answer, gradient), compiled."""
    method = find_method(name)
    vm = replace(VM, distil=distil)
    graphdef, params, rest = parts(
        noisy(lambda rngs: Student(SCHEMA, vm, method, make_reading(method), rngs=rngs))
    )

    @jax.jit
    def run(batch, past, params=params):
        def objective(params):
            model = nnx.merge(graphdef, params, rest)
            value, terms = model.loss(batch, past, jax.random.key(0), config=distil)
            return value, (terms, nnx.merge(graphdef, params, rest)(batch, past))

        (value, (terms, answer)), slopes = jax.value_and_grad(objective, has_aux=True)(params)
        return value, terms, answer, slopes

    return run


def run(name: str, *, distil: DistilConfig = PLAIN, batch=None, **arguments):
    batch = make_batch() if batch is None else batch
    return jax.tree.map(np.asarray, program(name, distil)(batch, make_past(), **arguments))


def count(module: nnx.Module) -> int:
    return sum(x.size for x in jax.tree.leaves(parts(module)[1]))


def cross_entropy(logits, target, weight) -> float:
    p = 1 / (1 + np.exp(-logits.astype(np.float64)))
    losses = -(target * np.log(p) + (1 - target) * np.log1p(-p))
    return float((losses * weight).sum() / weight.sum())


def same(a, b, *, scale: float = 1.0, rtol: float = 2e-5, atol: float = 1e-7) -> None:
    close = partial(np.testing.assert_allclose, rtol=rtol, atol=atol)
    jax.tree.map(lambda x, y: close(x, scale * y), a, b)


# --------------------------------------------------------------------------------- names


def test_a_method_is_the_sum_of_its_channels():
    assert find_method("base") == Method()
    assert {name: find_method(name) for name in CHANNELS if name != "outcome"} == {
        name: method for name, method in CHANNELS.items() if name != "outcome"
    }
    found = find_method("kd+raw+loopfm+outcome")
    assert (found.heads, found.contents) == (("kd",), ("raw", "loopfm"))
    assert found.side == ("outcome", "age") and found.teacher == "fm"
    assert find_method("kd+self").teacher == "self"
    assert [n for n in NAMES if find_method(n).needs_fm] == ["current"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("lopfm", "no channel 'lopfm', did you mean 'loopfm'.*A method is base, or some of kd,"),
        ("kd+", "no channel ''"),
        ("base+kd", "no channel 'base'"),
        ("kd+kd", "opens a channel twice"),
        ("loopfm+self", "opens a channel twice"),
        ("kd+outcome", "reads none; add loopfm or raw"),
    ],
)
def test_names_that_mean_nothing(name, message):
    with pytest.raises(UserError, match=message):
        find_method(name)


def test_a_side_setting_adds_to_every_method_that_reads_histories():
    assert find_method("kd", side=("age",)).side == ()
    assert find_method("loopfm", side=("age",)).side == ("age",)
    assert sorted(find_method("loopfm+outcome", side=("age",)).side) == ["age", "outcome"]


# ------------------------------------------------------------------------------ channels


@every_method
def test_parameters_are_the_backbones_and_those_of_the_open_channels(name):
    method, model = find_method(name), make(name)
    fields = VM.encoder.fields
    extra = fields * (len(KEYS) * len(method.contents) + len(method.features))
    backbone = noisy(lambda rngs: build(VM.backbone, SCHEMA, extra_fields=extra, rngs=rngs))
    expected = count(backbone)
    if name == "base":
        assert count(model) == expected
    width = {"loopfm": Z, "item-only": Z, "soft": 1, "raw": 2 * E}
    for content in method.contents * len(KEYS):
        expected += (width[content] + len(method.side)) * 4 + (4 + 1) * fields * E
    expected += len(method.features) * (Z + 1) * fields * E
    adapter = (6 + 1) + 2 * ADAPTER_HIDDEN + ADAPTER_HIDDEN + 1
    heads = {"kd": 6 + 1, "adapter": adapter, "fitnets": (6 + 1) * Z}
    assert count(model) == expected + sum(heads[head] for head in method.heads)


@every_method
def test_a_batch_holds_what_the_method_reads_and_no_more(name):
    rows, zeros = np.array([8, 10, 11, 12, 13]), np.zeros(8)
    inputs = SimpleNamespace(
        batch=lambda rows: {"label_B": rows},
        splits={"vm": slice(10, 14)},
        log={"time": 1_000 * np.arange(16) + 60_500},
    )
    length, end = np.array([3, 0, 1, 2, 3, 0], np.int32), np.arange(6) + 20
    store = Store({}, zeros, zeros, zeros, zeros, end, length)
    method = find_method(name)
    reading = make_reading(method, ("key",))
    histories = Histories({"key": store}, {}, 3, start_ms=60_000)
    join = Join(inputs, histories, reading, first=10)  # type: ignore
    taps = set(now_taps(method, reading).values())
    stored = {tap: np.arange(6)[:, None] for tap in TAPS}
    exported = Exported(stored, np.arange(6) / 8, {"first": 10}, {})
    examples = Examples(
        inputs,  # type: ignore
        method,
        reading,
        exported if method.reads_export else None,
        join if method.contents else None,
    )
    batch = examples.batch(rows[1:])
    assert ("teacher_B" in batch) == bool({"kd", "adapter"} & set(method.heads))
    if method.heads == ("kd",):
        assert batch["teacher_B"].tolist() == [0 / 8, 1 / 8, 2 / 8, 3 / 8]
    assert set(batch.get("codes", {})) == taps
    for tap in taps:
        assert batch["codes"][tap].tolist() == [[0], [1], [2], [3]]
    assert ("slices" in batch) == ("seconds_B" in batch) == bool(method.contents)
    if method.contents:
        found = join.batch(rows)
        own = found["slices"]["key"]
        assert own["end_B"].dtype == own["length_B"].dtype == np.int32
        assert own["end_B"].tolist()[1:] == [20, 21, 22, 23]
        assert own["length_B"].tolist() == [0, 3, 0, 1, 2]  # nothing was exported of row 8
        assert found["seconds_B"].tolist() == [8, 10, 11, 12, 13]
        assert len(own["slot_T"]) == packing.budget(own["length_B"], longest=3)


@every_method
def test_every_open_channel_is_trained(name):
    """A kernel without a gradient would be a channel that is wired to nothing."""
    for path, slope in jax.tree.leaves_with_path(run(name)[3]):
        assert slope.any(), path


READS = {
    "codes of entries": {"loopfm", "kd+loopfm", "raw+loopfm", "self", "kd+raw+loopfm+outcome"},
    "item codes of entries": {"item-only"},
    "soft labels of entries": {"soft"},
    "ids of entries": {"raw", "raw+loopfm", "kd+raw+loopfm+outcome"},
    "outcomes of entries": {"kd+raw+loopfm+outcome"},
    "age of entries": {"kd+raw+loopfm+outcome"},
    "code of the row": {"current"},
    "entity of the row": {"entity"},
}


@every_method
def test_a_method_reads_its_channels_and_no_other(name):
    """By perturbation of everything that the FM left behind, for each kind of key."""
    batch, past = make_batch(), make_past()
    serve = program(name, PLAIN)
    before = np.asarray(serve(batch, past)[2].logits_B)

    def differs(batch, past) -> bool:
        return bool((np.asarray(serve(batch, past)[2].logits_B) != before).any())

    def entries(key, **changes):
        one = past.entries[key]
        return replace(past, entries={**past.entries, key: replace(one, **changes)})

    def codes_of(key, tap):
        one = past.entries[key].codes
        return entries(key, codes={**one, tap: one[tap] + 0.5})

    def now(tap):
        return batch | {"codes": batch["codes"] | {tap: batch["codes"][tap] + 0.5}}

    for key in KEYS:
        one = past.entries[key]
        found = {
            "codes of entries": differs(batch, codes_of(key, "hidden_0")),
            "item codes of entries": differs(batch, codes_of(key, "item")),
            "soft labels of entries": differs(batch, entries(key, soft=1 - one.soft)),
            "ids of entries": differs(batch, entries(key, ids_SF=one.ids_SF[::-1])),
            "outcomes of entries": differs(batch, entries(key, outcome=1 - one.outcome)),
            "age of entries": differs(batch, entries(key, seconds=one.seconds // 2)),
            "code of the row": differs(now("hidden_0"), past),
            "entity of the row": differs(now("entity"), past),
        }
        assert found == {what: name in methods for what, methods in READS.items()}


@every_method
def test_soft_labels_and_codes_of_the_row_are_never_served_but_where_they_are_features(name):
    """What is distilled changes losses and slopes, never a logit."""
    method, batch = find_method(name), make_batch()
    others = {"kd": {"teacher_B": np.full(B, 0.5, np.float32)}}
    others["adapter"] = others["kd"]
    others["fitnets"] = {"codes": {tap: -z for tap, z in batch["codes"].items()}}
    value, _, answer, _ = run(name)
    for head, other in others.items():
        value_too, _, answer_too, _ = run(name, batch=batch | other)
        if not (head == "fitnets" and method.features):
            np.testing.assert_array_equal(answer_too.logits_B, answer.logits_B)
        used = head in method.heads or (head == "fitnets" and bool(method.features))
        used |= head == "adapter" and "kd" in method.heads
        assert (value_too != value) == used


@every_method
def test_no_logit_knows_its_label(name):
    batch = make_batch()
    flipped = run(name, batch=batch | {"label_B": 1 - batch["label_B"]})
    jax.tree.map(np.testing.assert_array_equal, flipped[2], run(name)[2])


def test_rows_of_weight_zero_teach_nothing():
    other = make_batch()
    for column in ("label_B", "teacher_B"):
        other[column][5] = 1 - other[column][5]
    other["codes"]["hidden_0"][5] *= -1
    value, _, _, slopes = run("kd+adapter+fitnets+loopfm")
    value_too, _, _, slopes_too = run("kd+adapter+fitnets+loopfm", batch=other)
    np.testing.assert_allclose(value_too, value, rtol=1e-6)
    same(slopes_too, slopes)


# --------------------------------------------------------------------------------- heads


@pytest.mark.parametrize("alpha", [0.5, 3.0])
def test_loss_is_labels_plus_gamma_times_scaled_soft_labels(alpha):
    """At alpha = 3 most of alpha * y_F is above 1 and is cut there."""
    batch = make_batch()
    value, terms, answer, _ = run("kd", distil=DistilConfig(alpha=alpha, gamma=2.5))
    soft = np.minimum(alpha * batch["teacher_B"], 1)
    assert (soft == 1).sum() == (4 if alpha == 3 else 0)
    label = cross_entropy(answer.logits_B, batch["label_B"], batch["weight_B"])
    taught = cross_entropy(answer.kd_B, soft, batch["weight_B"])
    np.testing.assert_allclose(terms["logloss"], label, rtol=1e-5)
    np.testing.assert_allclose(terms["distillation"], taught, rtol=1e-5)
    np.testing.assert_allclose(value, label + 2.5 * taught, rtol=1e-5)


def test_the_adapter_learns_from_labels_and_teaches_the_third_head():
    """ExFM's student adapter: its own loss is of labels; the head's gradient stops before it."""
    batch = make_batch()
    value, terms, answer, slopes = run("adapter", distil=DistilConfig(gamma=2.5))
    weight = batch["weight_B"]
    adapted = 1 / (1 + np.exp(-answer.adapter_B))
    corrected = cross_entropy(answer.adapter_B, batch["label_B"], weight)
    taught = cross_entropy(answer.adapted_B, adapted, weight)
    label = cross_entropy(answer.logits_B, batch["label_B"], weight)
    np.testing.assert_allclose(value, label + corrected + 2.5 * taught, rtol=1e-5)
    _, _, _, untaught = run("adapter", distil=DistilConfig(gamma=0))
    same(slopes["adapter"], untaught["adapter"])


def test_fitnets_is_the_squared_error_to_the_code_of_the_row():
    batch = make_batch()
    value, terms, answer, _ = run("fitnets", distil=DistilConfig(fitnets=3.0))
    error = np.square(answer.code_BZ - batch["codes"]["hidden_0"]).mean(axis=1)
    expected = (error * batch["weight_B"]).sum() / batch["weight_B"].sum()
    np.testing.assert_allclose(terms["fitnets"], expected, rtol=1e-5)
    np.testing.assert_allclose(value, terms["logloss"] + 3 * expected, rtol=1e-5)


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
        same(found["kd"], plain["kd"], scale=gamma)  # the head itself learns in full
    same(run("kd", distil=DistilConfig(beta=5))[2], run("kd")[2], atol=1e-6)  # no logit changes


def test_the_distillation_head_is_not_in_the_serving_logits():
    _, _, answer, _ = run("kd")
    _, params, _ = parts(make("kd"))
    params["kd"] = jax.tree.map(lambda x: x + 1, params["kd"])
    _, _, other, _ = run("kd", params=params)
    np.testing.assert_array_equal(other.logits_B, answer.logits_B)
    assert (np.abs(other.kd_B - answer.kd_B) > 0.1).all()
    base = run("base", params={"backbone": params["backbone"]})[2]
    np.testing.assert_allclose(base.logits_B, answer.logits_B, rtol=1e-6)


# ------------------------------------------------------------------------------- entries


def values(name: str, past: Past, batch: dict) -> tuple[np.ndarray, packing.Tokens]:
    """What the first reader of a method sees, [T,X]."""
    method = find_method(name)
    readers = noisy(
        lambda rngs: Readers(
            make_reading(method), SCHEMA, VM.encoder, VM.backbone.tables, rngs=rngs
        )
    )
    tokens = readers._tokens(jax.tree.map(jnp.asarray, batch), "key", past.entries["key"])
    table = jnp.arange(20 * E, dtype=jnp.float32).reshape(20, E)
    return np.asarray(readers._values(past, tokens, 0, lambda ids: table[ids])), tokens


@pytest.mark.parametrize("code", [c for c in codes.CODES if c not in codes.FITTED])
def test_entries_tell_code_outcome_and_age(code):
    past, batch = make_past(code), make_batch()
    batch["seconds_B"] = np.array([9_000, 0, 4_000, 5_000, 0, 10**6], np.int32)
    value_TX, _ = values("loopfm+outcome", past, batch)
    entries = past.entries["key"]
    assert value_TX.shape == (T, Z + 2) and value_TX.dtype == np.float32
    assert not value_TX[LENGTH.sum() :].any()
    z_NZ = np.asarray(codes.dequantise(entries.codes["hidden_0"], Codec(code, Z)))
    slot = 0
    for b in range(B):
        for rank in range(LENGTH[b]):
            row = END[b] - 1 - rank
            # Nothing is younger than now: an entry of a later second has age 0.
            age = max(int(batch["seconds_B"][b]) - int(entries.seconds[row]), 0)
            told = [1.0 if entries.outcome[row] else -1.0, np.log1p(age / 60) / np.log1p(7 * 1440)]
            np.testing.assert_allclose(value_TX[slot], [*z_NZ[row], *told], rtol=1e-5)
            slot += 1


def test_raw_and_soft_entries_are_ids_through_the_table_and_soft_labels():
    past, batch = make_past(), make_batch()
    entries = past.entries["key"]
    raw_TX, tokens = values("raw", past, batch)
    soft_TX, _ = values("soft", past, batch)
    rows = np.asarray(tokens.row_T)[: LENGTH.sum()]
    first = np.asarray(entries.ids_SF)[rows] * E
    expected = np.concatenate([first[:, :1] + np.arange(E), first[:, 1:] + np.arange(E)], axis=1)
    np.testing.assert_array_equal(raw_TX[: LENGTH.sum()], expected)
    np.testing.assert_array_equal(soft_TX[: LENGTH.sum(), 0], np.asarray(entries.soft)[rows])
    assert not raw_TX[LENGTH.sum() :].any() and not soft_TX[LENGTH.sum() :].any()


def test_a_fresh_student_starts_from_the_base_model():
    """The summary joins as fields about as small as the table's rows, whatever the codes."""
    config = replace(VM, backbone=replace(VM.backbone, tables=TableConfig(width=3, init_std=1e-4)))
    method = find_method("loopfm+current")

    @jax.jit
    def start(key):
        model = Student(SCHEMA, config, method, make_reading(method), rngs=nnx.Rngs(key))
        states = [*model.readers.summaries, *model.summaries]  # type: ignore
        return [nnx.to_pure_dict(nnx.state(summary)) for summary in states]

    for summary in start(jax.random.key(0)):
        assert 0 < np.abs(summary["kernel"]).max() < 1e-3 and not np.asarray(summary["bias"]).any()


@pytest.mark.parametrize(
    ("build_config", "message"),
    [
        (lambda: DistilConfig(alpha=-1), "distil.alpha is -1"),
        (lambda: DistilConfig(beta=-0.5), "distil.beta is -0.5"),
        (lambda: DistilConfig(gamma=float("nan")), "distil.gamma is nan"),
        (lambda: DistilConfig(fitnets=-1), "distil.fitnets is -1"),
        (lambda: EncoderConfig(fields=0), "encoder.fields is 0; it must be at least 1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(build_config, message):
    with pytest.raises(UserError, match=message):
        build_config()
