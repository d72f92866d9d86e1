"""Where stores wait changes nothing: tokens of a batch by the device's rows and by the host's."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from command_line import CommandLine
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from noise import noisy, parts

from loopfm_jax.config import load
from loopfm_jax.flow import Flow
from loopfm_jax.history import join
from loopfm_jax.history.encoders import EncoderConfig
from loopfm_jax.history.join import token_rows
from loopfm_jax.packing import Parts, pack
from loopfm_jax.sharding import MeshConfig, make_mesh
from loopfm_jax.vm.methods import find_method
from loopfm_jax.vm.student import Student
from loopfm_jax.vm.train import Examples, Sources, open_examples

METHOD = find_method("kd+raw+loopfm+outcome", side=("age",))
"""Reads every column of a store but one."""
KEYS = ("key", "item_id+key")


@pytest.fixture(scope="module")
def flow(tmp_path_factory) -> Flow:
    """Histories of a tiny log, under two kinds of key."""
    command = CommandLine(tmp_path_factory.mktemp("join"), None)  # type: ignore
    config = load(command.config)
    vm = replace(config.vm, encoder=EncoderConfig("din", width=4, score_hidden=(4,)))
    made = Flow(
        replace(
            config,
            vm=vm,
            history=replace(config.history, keys=KEYS, side=("age",)),
            workdir=command.workdir,
        )
    )
    made.prepare()
    made.teach()
    return made


def open_as(flow: Flow, residency="auto", method=METHOD) -> Examples:
    sources = Sources(flow.data, flow.exported, flow.history, residency=residency)
    return open_examples(sources, flow.config.vm, method)


def test_loss_and_gradient_are_the_same_bit_for_bit(flow):
    """On one device: over several, XLA adds up in another order."""
    vm, found = flow.config.vm, []
    for residency in ("device", "host"):
        examples = open_as(flow, residency)
        graphdef, params, rest = parts(
            noisy(
                lambda rngs, e=examples: Student(e.inputs.schema, vm, METHOD, e.reading, rngs=rngs)
            )
        )
        batch = examples.batch(examples.inputs.rows("test")[-50:])
        batch["weight_B"] = np.ones(50, np.float32)

        @jax.jit
        def run(params, batch, past, graphdef=graphdef, rest=rest):
            def objective(params):
                model = nnx.merge(graphdef, params, rest)
                return model.loss(batch, past, jax.random.key(0), config=vm.distil)[0]

            return jax.value_and_grad(objective)(params)

        found.append(run(params, batch, examples.past(make_mesh(MeshConfig()))))
    jax.tree.map(np.testing.assert_array_equal, *found)
    assert all(np.any(x) for x in jax.tree.leaves(found[0][1]["readers"]["summaries"]))


def test_a_batch_brings_what_its_tokens_read(flow):
    examples = open_as(flow, "host")
    assert examples.join is not None
    assert not examples.past(make_mesh(MeshConfig())).entries
    on_device = open_as(flow, "device").past(make_mesh(MeshConfig())).entries
    rows = examples.inputs.rows("test")[-50:]
    for key, brought in examples.batch(rows)["slices"].items():
        entries, slots = brought["entries"], brought["slot_PS"].size
        end_B, length_B = jnp.asarray(brought["end_B"]), jnp.asarray(brought["length_B"])
        tokens = pack(end_B, length_B, slots=slots, longest=entries.longest)
        assert entries.gathered and 0 < length_B.sum() < slots
        stored = on_device[key]
        assert entries.codes["hidden_0"].dtype == np.uint8  # still packed
        for name in ("ids_SF", "seconds", "outcome"):
            own, whole = getattr(entries, name), getattr(stored, name)
            assert own.shape[:2] == (1, slots) and own.dtype == whole.dtype
            real = np.asarray(tokens.real_T)
            np.testing.assert_array_equal(own[0][real], np.asarray(whole[tokens.row_T])[real])
        assert entries.soft is None and stored.soft is None


@pytest.mark.parametrize("residency", ["device", "host"])
def test_every_process_brings_its_part_of_the_batch(flow, residency):
    examples = open_as(flow, residency)
    rows = examples.inputs.rows("test")[-48:]
    whole = examples.batch(rows, Parts(4, (0, 1, 2, 3)))
    halves = [examples.batch(rows, Parts(4, own)) for own in ((0, 1), (2, 3))]
    jax.tree.map(lambda x, *y: np.testing.assert_array_equal(np.concatenate(y), x), whole, *halves)
    apart = examples.batch(rows, Parts(4, (0, 3)))  # a mesh may deal devices out in any order
    jax.tree.map(
        lambda x, y: np.testing.assert_array_equal(np.split(y, 4)[3], np.split(x, 2)[1]),
        apart,
        whole,
    )


def test_nothing_is_brought_that_waits_on_the_device(flow):
    examples = open_as(flow, "device")
    found = examples.batch(examples.inputs.rows("test")[:8])["slices"]
    assert all(set(one) == {"end_B", "length_B", "slot_PS"} for one in found.values())


def test_auto_by_the_memory_of_the_device(flow, monkeypatch):
    """Codes 2 bytes, ids of 2 fields 8, seconds 4, outcome 1: by two kinds of key."""
    entries = len(open_as(flow).join.histories.stores["key"].row)  # type: ignore
    needed = 2 * entries * (2 + 8 + 4 + 1) / join.SHARE
    for memory, there in ((needed, True), (needed - 8, False)):
        monkeypatch.setattr(join, "device_bytes", lambda memory=memory: memory)
        examples = open_as(flow)
        assert examples.join is not None and examples.join.on_device == there
    assert open_as(flow, "device").join.on_device  # type: ignore


def test_memory_is_known():
    assert join.device_bytes() > 1 << 28


def test_where_stores_wait_makes_no_other_vm(flow):
    config = flow.config
    other = replace(config, history=replace(config.history, residency="host"))
    assert Flow(other)._train_vm("loopfm", 0, "own") == flow._train_vm("loopfm", 0, "own")
    assert Flow(other)._structure == flow._structure
    assert not Flow(other).examples("loopfm", 0).join.on_device  # type: ignore


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=6), st.integers(0, 9))
def test_rows_of_tokens_are_those_of_the_packed_layout(lengths, more):
    length_B = np.array(lengths, np.int32)
    end_B = (np.cumsum(length_B) + more).astype(np.int32)
    tokens = pack(jnp.asarray(end_B), jnp.asarray(length_B), slots=32, longest=5)
    expected = np.asarray(tokens.row_T)[np.asarray(tokens.real_T)]
    np.testing.assert_array_equal(token_rows(end_B, length_B), expected)
