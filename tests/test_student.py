"""The student: which channel each method opens, and what entries tell."""

from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from noise import noisy
from student_cases import (
    END,
    KEYS,
    LENGTH,
    NAMES,
    PLAIN,
    SCHEMA,
    TAPS,
    VM,
    B,
    E,
    T,
    Z,
    count,
    make,
    make_batch,
    make_past,
    make_reading,
    program,
    run,
    same,
)

from loopfm_jax import packing
from loopfm_jax.backbones import build
from loopfm_jax.data.schema import Field
from loopfm_jax.errors import UserError
from loopfm_jax.history import codes
from loopfm_jax.history.codes import Codec
from loopfm_jax.history.encoders import EncoderConfig
from loopfm_jax.history.join import Join
from loopfm_jax.history.reader import Past, Readers, raw_fields
from loopfm_jax.history.store import Exported, Histories, Store
from loopfm_jax.sharding import MeshConfig, make_mesh
from loopfm_jax.tables import TableConfig
from loopfm_jax.vm.methods import find_method
from loopfm_jax.vm.student import ADAPTER_HIDDEN, DistilConfig, Student, now_taps
from loopfm_jax.vm.train import Examples

every_method = pytest.mark.parametrize("name", NAMES)


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
        batch=lambda rows, _: {"label_B": rows},
        splits={"vm": slice(10, 14)},
        log={"time": 1_000 * np.arange(16) + 60_500},
    )
    length, end = np.array([3, 0, 1, 2, 3, 0], np.int32), np.arange(6) + 20
    store = Store({}, zeros, zeros, zeros, zeros, end, length)
    method = find_method(name)
    reading = make_reading(method, ("key",))
    histories = Histories({"key": store}, {}, 3, start_ms=60_000)
    join = Join(inputs, histories, reading, first=10, residency="device")  # type: ignore
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
        assert own["slot_PS"].size == packing.budget(own["length_B"], longest=3)


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


@pytest.mark.parametrize("chosen", [(), ("user",), ("cate", "user", "item")])
def test_raw_entries_are_the_chosen_ids_of_the_rows_they_were(chosen):
    ids = np.random.default_rng(3).integers(1, 17, (16, 3))
    row, unread, first = np.array([3, 0, 2, 2]), np.zeros(4), 10
    store = Store({}, row, unread, unread, unread, unread, unread)
    reading = make_reading(find_method("raw"), ("key",), chosen)
    inputs = SimpleNamespace(schema=SCHEMA, log={"ids": ids})
    join = Join(inputs, Histories({"key": store}, {}, 3, start_ms=0), reading, first)  # type: ignore
    entries = join.past(make_mesh(MeshConfig())).entries["key"]
    wanted, column = chosen or ("item", "cate"), {"user": 0, "item": 1, "cate": 2}
    expected = [[ids[first + r, column[name]] for name in wanted] for r in row]
    assert np.asarray(entries.ids_SF).tolist() == expected
    tables = VM.backbone.tables
    readers = noisy(lambda rngs: Readers(reading, SCHEMA, VM.encoder, tables, rngs=rngs))
    assert count(readers) == len(wanted) * E * 4 + (4 + 1) * VM.encoder.fields * E


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        (("cat",), r"history.raw names 'cat', .* \(user, item, cate\)"),
        (("price",), "names 'price'"),
        (("picture",), "names 'picture'"),
        (("past",), "names 'past'"),
        (("item", "item"), "name each field once"),
    ],
)
def test_raw_fields_are_categorical_with_trained_tables(chosen, message):
    others = (Field("picture", 9, frozen_width=2), Field("past", 6, "sequence", 5, shares="item"))
    item = (*SCHEMA.item, "picture")
    schema = replace(SCHEMA, fields=(*SCHEMA.fields, *others), item=item)
    assert raw_fields(schema) == ("item", "cate")
    assert raw_fields(schema, ("user", "cate")) == ("user", "cate")
    with pytest.raises(UserError, match=message):
        raw_fields(schema, chosen)


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
