"""Trainable codes: bytes name rows of a table of the VM instead of the FM's vectors. The choice of
fields of raw histories."""

import shutil
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from command_line import CommandLine
from flax import nnx
from noise import noisy, parts

from loopfm_jax import packing
from loopfm_jax.config import Config
from loopfm_jax.data.schema import Field, Schema
from loopfm_jax.errors import UserError
from loopfm_jax.flow import Flow
from loopfm_jax.fm.exporter import ExportConfig
from loopfm_jax.fm.teacher import FMConfig
from loopfm_jax.history.codes import Codec
from loopfm_jax.history.encoders import EncoderConfig
from loopfm_jax.history.reader import CODE_RMS, Entries, Past, Readers, Reading
from loopfm_jax.history.store import HistoryConfig
from loopfm_jax.tables import TableConfig
from loopfm_jax.vm.student import VMConfig

N, K, Z, T, L = 9, 3, 5, 16, 3
SCHEMA = Schema(fields=(Field("user", 7), Field("item", 6)), item=("item",))
RQ = Codec("rq", Z, np.random.default_rng(2).uniform(-1, 1, (K, 256, Z)).astype(np.float32))
STORED_NK = np.random.default_rng(3).integers(0, 256, (N, K)).astype(np.uint8)
KEYS = ("key", "item")
TRAINED = EncoderConfig(name="mean", width=4, trainable_codes=True)


def make(encoder: EncoderConfig, codec: Codec = RQ, contents=("loopfm", "soft")) -> Readers:
    reading = Reading(contents, KEYS, (), {"hidden_0": codec}, "hidden_0")
    return noisy(lambda rngs: Readers(reading, SCHEMA, encoder, TableConfig(width=2), rngs=rngs))


def count(module: nnx.Module) -> int:
    return sum(x.size for x in jax.tree.leaves(parts(module)[1]))


def test_a_token_is_the_sum_of_the_rows_that_its_bytes_name():
    entries = Entries({"hidden_0": STORED_NK}, None, None, None, None, longest=L)
    past = Past(dict.fromkeys(KEYS, entries), {"hidden_0": RQ})
    end_B, length_B = np.array([2, 5, 9], np.int32), np.array([2, 0, 3], np.int32)
    tokens = packing.pack(jnp.asarray(end_B), jnp.asarray(length_B), slots=T, longest=L)
    readers = make(TRAINED)
    # One table per kind of key, none for soft labels.
    assert count(readers) - count(make(replace(TRAINED, trainable_codes=False))) == 2 * K * 256 * Z
    graphdef, params, _ = parts(readers)

    @jax.jit
    def told(params):
        return nnx.merge(graphdef, params)._values(past, tokens, 0, lambda ids: ids)

    vectors_KCZ = np.asarray(params["books"][0]["vectors_KCZ"])
    rows_TK = STORED_NK[np.asarray(tokens.row_T)]
    expected_TZ = sum(vectors_KCZ[k, rows_TK[:, k]] for k in range(K))
    real_T = np.asarray(tokens.real_T)
    np.testing.assert_allclose(told(params), expected_TZ * real_T[:, None], atol=1e-6)

    slopes = jax.grad(lambda params: told(params).sum())(params)["books"]
    learns = {(k, c) for k, c, _ in np.argwhere(np.asarray(slopes[0]["vectors_KCZ"])).tolist()}
    assert learns == {(k, c) for row in rows_TK[real_T].tolist() for k, c in enumerate(row)}


def test_vectors_start_at_the_scale_of_codes():
    reading = Reading(("loopfm",), ("key",), (), {"hidden_0": RQ}, "hidden_0")
    readers = Readers(reading, SCHEMA, TRAINED, TableConfig(width=2), rngs=nnx.Rngs(0))
    vectors_KCZ = np.asarray(readers.books[0].vectors_KCZ[...])
    np.testing.assert_allclose(vectors_KCZ.std(), CODE_RMS / K**0.5, rtol=0.05)
    assert abs(vectors_KCZ.mean()) < 0.02


def test_codes_that_name_no_vectors_cannot_be_trained():
    with pytest.raises(UserError, match="but fp32 codes name none: add --export.code rq"):
        make(TRAINED, Codec("fp32", Z))
    make(TRAINED, Codec("fp32", Z), contents=("soft",))  # reads no codes
    for knobs in ({"vm": VMConfig(encoder=TRAINED)}, {"fm": FMConfig(encoder=TRAINED)}):
        with pytest.raises(UserError, match="but int4 codes name none"):
            Config(**knobs)
        Config(**knobs, export=ExportConfig(code="rq"))


def test_a_vm_trains_and_serves_them(tmp_path, capsys):
    command = CommandLine(tmp_path, capsys)
    options = ("--export.code", "rq", "--export.books", "2", "--vm.encoder.trainable-codes")
    found = command.succeed("run", *options, "--methods", "loopfm")
    fixed = 4 * 32 + (32 + 1) * 2 * 4  # project, and the summary's two fields
    fields = 2 * 4 * 8  # of the first hidden layer
    more = found["methods"]["loopfm"]["params"] - found["methods"]["base"]["params"]
    assert more == 2 * 256 * 4 + fixed + fields


def test_a_choice_of_raw_fields_makes_another_vm_from_the_same_store(tmp_path, capsys):
    command = CommandLine(tmp_path, capsys)
    options = ("--methods", "raw", "--seeds", "1")
    params = command.succeed("run", *options)["methods"]["raw"]["params"]  # item_id, topic
    store = (command.workdir / "history/manifest.json").stat().st_mtime_ns
    chosen = (*options, "--history.raw", "surface", "user_id", "hour")
    assert "raw was None, now ['surface', 'user_id', 'hour']" in command.fail(
        command.argv("run", *chosen)
    )
    shutil.rmtree(command.workdir / "vm/raw")
    assert command.succeed("run", *chosen)["methods"]["raw"]["params"] == params + 4 * 32
    assert (command.workdir / "history/manifest.json").stat().st_mtime_ns == store
    shutil.rmtree(command.workdir / "vm/raw")
    hidden = command.fail(command.argv("run", *options, "--history.raw", "signal"))
    assert "names 'signal'" in hidden and "(user_id, topic, hour, surface, item_id)" in hidden


def test_only_vms_that_read_raw_histories_are_told_of_the_fields(tmp_path):
    config = Config(workdir=tmp_path)
    one, two = (
        Flow(replace(config, history=HistoryConfig(raw=raw)), shared=True)
        for raw in ((), ("item_id",))
    )
    assert one.history == two.history and one.vm("loopfm", 0) == two.vm("loopfm", 0)
    assert one.vm("raw", 0) != two.vm("raw", 0)
