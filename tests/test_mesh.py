"""Steps of one model on any mesh: losses, what is sent, what is split, checkpoints."""

import re

import jax
import numpy as np
import pytest
from mesh_steps import CONFIG, MANY, MESHES, collectives, steps

from loopfm_jax import checkpoint
from loopfm_jax.backbones import blockwise
from loopfm_jax.data.batches import GlobalBatches, OrderConfig, iterate

every_mesh = pytest.mark.parametrize("shape", MESHES[1:])


@pytest.fixture(scope="module", autouse=True)
def small_blocks():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blockwise, "BLOCK", 64)
        patch.setattr(blockwise, "ONE_BLOCK", 64)
        patch.setattr(blockwise, "LEAST", 8)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("log")


@every_mesh
def test_twenty_steps_have_the_losses_of_one_device(shape, folder):
    one, many = steps(MESHES[0], folder).losses, steps(shape, folder).losses
    assert one[0] - min(one) > 1e-3, "something must have been learned"
    np.testing.assert_allclose(many, one, rtol=1e-5)


@pytest.mark.parametrize("shape", [(8, 1), (4, 2)])
def test_tables_learned_by_rows_too(shape, folder):
    """And what is sent is of no table's size either.

    Not by rowwise_adagrad: at ten times the rate, a row whose gradient is rounding (1e-10) moves
    enough that one ReLU more or less fires.
    """
    rule = "rowwise_rms"
    one, many = (steps(s, folder, tables=rule) for s in (MESHES[0], shape))
    assert one.losses[0] - min(one.losses) > 1e-3, "something must have been learned"
    np.testing.assert_allclose(many.losses, one.losses, rtol=1e-5)
    table = MANY.table_rows * CONFIG.tables.width
    assert max(collectives(many.hlo)) < table / 2


@pytest.mark.parametrize("shape", [(8, 1), (4, 2)])
def test_kernels_split_over_data_too_give_the_same_losses(shape, folder):
    one, many = steps(MESHES[0], folder), steps(shape, folder, fsdp=True)
    np.testing.assert_allclose(many.losses, one.losses, rtol=1e-5)


@every_mesh
@pytest.mark.parametrize("fsdp", [False, True])
def test_no_collective_is_of_a_tables_size(shape, fsdp, folder):
    """Whole steps with dense Adam; what is sent is at most a few times the looked-up rows."""
    table = MANY.table_rows * CONFIG.tables.width
    sent = collectives(steps(shape, folder, fsdp=fsdp).hlo)
    assert sent and max(sent) < table / 2, (max(sent), table)
    assert collectives(f"x = f32[{table}] all-gather(y)") == [table]


def test_a_step_sends_rows_and_gradients_and_no_tokens(folder):
    """19 collectives; tokens that did not lie where their examples lie added 12."""
    sent = collectives(steps((8, 1), folder).hlo)
    assert len(sent) < 22, sent


def by_path(tree) -> dict[str, jax.Array]:
    return {jax.tree_util.keystr(p): x for p, x in jax.tree_util.tree_leaves_with_path(tree)}


@pytest.mark.parametrize("fsdp", [False, True])
def test_tables_and_dnn_are_split_with_their_moments_and_nothing_else(fsdp, folder):
    state = steps((4, 2), folder, fsdp=fsdp).state
    parts = {
        name: x.size // x.addressable_shards[0].data.size for name, x in by_path(state).items()
    }
    tables = {name for name in parts if "rows_VE" in name}
    kernels = {name for name in parts if re.search(r"'dnn'.*'layers'.*'kernel'", name)}
    assert len(tables) == 3 * 1 and len(kernels) == 3 * 2, "parameters and two moments"
    assert {parts[name] for name in tables} == {8}
    assert {parts[name] for name in kernels} == {8 if fsdp else 2}
    assert {n for name, n in parts.items() if name not in tables | kernels} == {1}


@pytest.mark.parametrize("onto", [(1, 1), (8, 1), (1, 8)])
def test_a_checkpoint_of_one_mesh_is_restored_on_another_bit_equal(onto, folder, tmp_path):
    saved = steps((4, 2), folder, fsdp=True).state
    other = steps(onto, folder).state  # as far along: the restored one must replace it
    order = OrderConfig(epochs=1, batch=4)
    batches = iterate(GlobalBatches(np.arange(16), lambda rows, _: {"rows": rows}, config=order))
    next(batches)
    with checkpoint.Saver(tmp_path, every=1) as saver:
        saver.save(20, saved, batches, {})
    fresh = jax.tree.map(lambda x: jax.device_put(np.zeros_like(x), x.sharding), other)
    with checkpoint.Saver(tmp_path, every=1) as saver:
        restored, _ = saver.restore(fresh, batches)
    found, want, like = by_path(restored), by_path(saved), by_path(other)
    for name, x in want.items():
        np.testing.assert_array_equal(found[name], x, err_msg=name)
        assert found[name].sharding == like[name].sharding, name
