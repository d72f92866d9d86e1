"""Serving: the predictions that the trained VM wrote, without a program compiled on the way."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from command_line import CommandLine

from loopfm_jax.config import load
from loopfm_jax.errors import UserError
from loopfm_jax.flow import Flow
from loopfm_jax.history.encoders import EncoderConfig
from loopfm_jax.serve import SHARES, Predictor, fill, open_predictor, packed, room, smallest_share
from loopfm_jax.sharding import MeshConfig, make_mesh
from loopfm_jax.vm.train import load_vm

BUCKETS = (1, 8, 64)


@pytest.fixture(scope="module")
def flow(tmp_path_factory) -> Flow:
    command = CommandLine(tmp_path_factory.mktemp("serve"), None)  # type: ignore
    config = load(command.config)
    vm = replace(config.vm, encoder=EncoderConfig("mean", width=4))
    return Flow(replace(config, vm=vm, workdir=command.workdir))


def trained(flow: Flow, method: str) -> Predictor:
    flow.prepare()
    flow.teach()
    flow.train_vm(method, 0)
    examples = flow.examples(method, 0)
    model = load_vm(examples, flow.config.vm, flow.vm(method, 0), make_mesh(MeshConfig()))
    return open_predictor(model, examples, buckets=BUCKETS)


@pytest.fixture(scope="module")
def predictor(flow) -> Predictor:
    return trained(flow, "kd+loopfm")


@pytest.mark.parametrize("count", [1, 3, 8, 9, 64, 65, 200])
def test_any_number_of_rows_gets_the_predictions_of_training(flow, predictor, count):
    rows = predictor.examples.inputs.rows("test")
    expected = np.load(flow.vm("kd+loopfm", 0) / "prediction.npy")
    some = np.random.default_rng(count).permutation(len(rows))[:count]
    found = predictor(rows[some])
    assert found.shape == (count,) and found.dtype == np.float32
    np.testing.assert_allclose(found, expected[some], rtol=2e-5)


def test_what_was_trained_in_float32_answers_in_bfloat16(flow, predictor):
    examples, rows = predictor.examples, predictor.examples.inputs.rows("test")[:64]
    narrow = replace(flow.config.vm, train=replace(flow.config.vm.train, dtype="bfloat16"))
    model = load_vm(examples, narrow, flow.vm("kd+loopfm", 0), make_mesh(MeshConfig()))
    found, wanted = (p(rows) for p in (open_predictor(model, examples, buckets=(64,)), predictor))
    assert found.dtype == np.float32 and (found != wanted).any()
    np.testing.assert_allclose(found, wanted, rtol=0.02)


def test_no_request_compiles(predictor):
    compiled = []

    def listen(name: str, seconds: float, **_) -> None:
        if name == "/jax/core/compile/backend_compile_duration":
            compiled.append(seconds)

    rows = predictor.examples.inputs.rows("test")
    predictor(rows[:1])
    jax.monitoring.register_event_duration_secs_listener(listen)
    for count in (1, 2, 8, 9, 40, 64, 100, 200, 1):
        predictor(rows[:count])
    assert compiled == []
    jax.jit(lambda x: x * 3 + count)(np.float32(1))
    assert len(compiled) == 1  # the count counts


def test_histories_stay_in_their_files(predictor):
    assert not predictor.past.entries
    store = predictor.examples.join.histories.stores["key"]
    assert isinstance(store.codes["hidden_0"], np.memmap)


def test_a_model_without_histories(flow):
    predictor = trained(flow, "base")
    assert not predictor.past.entries
    expected = np.load(flow.vm("base", 0) / "prediction.npy")
    found = predictor(predictor.examples.inputs.rows("test"))
    np.testing.assert_allclose(found, expected, rtol=2e-5)


def test_rows_that_it_cannot_answer(predictor):
    assert predictor(np.array([], np.int64)).shape == (0,)
    first, stop = predictor.examples.inputs.splits["vm"].start, len(predictor.examples.inputs.log)
    for row in (-1, first - 1, stop):
        with pytest.raises(UserError, match=f"rows {row} to {row}, but .* {first} to {stop - 1}"):
            predictor(np.array([row]))


def test_what_is_no_list_of_row_numbers(predictor):
    first = predictor.examples.inputs.splits["vm"].start
    for rows in (first, [[first]], [float(first)], [np.nan], [True], ["a"], None, [[]]):
        with pytest.raises(UserError, match="row numbers .* whole ones, in one dimension"):
            predictor(rows)


@pytest.mark.parametrize("buckets", [(), (0, 4)])
def test_buckets_that_make_no_sense(predictor, buckets):
    with pytest.raises(UserError, match="buckets are"):
        open_predictor(None, predictor.examples, buckets=buckets)  # type: ignore


def test_every_request_has_a_program(predictor):
    """Also of examples whose histories and other sequences are all full."""
    examples = predictor.examples
    batch = examples.batch(examples.inputs.rows("test")[:8])
    assert {kind for kind, *_ in packed(examples)} == {"slices", "events"}
    for kind, name, longest in packed(examples):
        for length in (longest, longest // 2, 0):
            full = {**batch[kind][name], "length_B": np.full(8, length)}
            asked = batch | {kind: {**batch[kind], name: full}}
            found = smallest_share(examples, asked, 8, predictor.shares[8])
            assert room(8, longest, found) >= 8 * length
    assert set(predictor.programs) == {
        (size, share) for size in BUCKETS for share in predictor.shares[size]
    }


def test_a_share_is_just_above_what_most_requests_hold(predictor):
    """Also where the shares that are always there are far above it."""
    examples, rng = predictor.examples, np.random.default_rng(0)
    first, stop = examples.inputs.splits["vm"].start, len(examples.inputs.log)
    fits = []
    for _ in range(100):
        batch = examples.batch(rng.integers(first, stop, 64))
        share = smallest_share(examples, batch, 64, predictor.shares[64])
        fits.append(share not in SHARES)
    (own,) = set(predictor.shares[64]) - set(SHARES)
    below = max(share for share in SHARES if share < own)
    assert 0.5 < np.mean(fits) < 0.95 and below < own < below + 0.125


@pytest.mark.parametrize("share", SHARES)
def test_padding_has_no_tokens(predictor, share):
    examples = predictor.examples
    batch = examples.batch(examples.inputs.rows("test")[-3:])
    filled = fill(examples, batch, examples=8, share=share)
    for kind, name, longest in packed(examples):
        before, after = batch[kind][name], filled[kind][name]
        assert after["length_B"].tolist() == [*before["length_B"], 0, 0, 0, 0, 0]
        slots = {x.shape[1] for n, x in after.items() if n in ("slot_PS", "ids_PSG")}
        assert len(slots) == 1 and slots.pop() >= 8 * longest * share
    assert len(filled["ids_BF"]) == len(filled["floats_BN"]) == 8
