"""Tables split over devices: rows asked of their owners, and what a whole step sends."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from mesh_steps import CONFIG, MANY, MESHES, collectives, steps

from loopfm_jax import exchange
from loopfm_jax.backbones import blockwise
from loopfm_jax.sharding import MeshConfig, make_mesh, split

E = 3
every_mesh = pytest.mark.parametrize("shape", MESHES[1:])


def draw_ids(seed: int, table_rows: int) -> list[np.ndarray]:
    """A few ids, most of them one id, and padding."""
    rng = np.random.default_rng(seed)
    few = rng.integers(0, table_rows, (16, 2))
    hot = np.where(rng.random((24, 3)) < 0.6, 5, rng.integers(0, 20, (24, 3)))
    return [few.astype(np.int32), np.where(rng.random((24, 3)) < 0.2, 0, hot).astype(np.int32)]


@every_mesh
def test_rows_and_their_gradients_are_those_of_one_device(shape):
    mesh, rng = make_mesh(MeshConfig(*shape)), np.random.default_rng(1)
    table_VE = rng.normal(size=(64, E)).astype(np.float32)
    ids = draw_ids(2, len(table_VE))
    weights = [rng.normal(size=(*i.shape, E)).astype(np.float32) for i in ids]

    @jax.jit
    def learn(table_VE, ids):
        def loss(table_VE):
            with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
                assert exchange.applies(table_VE, ids)
                found = exchange.look_up(table_VE, ids)
            return sum((w * x).sum() for w, x in zip(weights, found, strict=True)), found

        return jax.grad(loss, has_aux=True)(table_VE)

    placed = jax.device_put(table_VE, NamedSharding(mesh, exchange.ROWS))
    gradient, found = learn(placed, jax.device_put(ids, split(mesh, "examples")))
    want = np.zeros_like(table_VE)
    for i, w, rows_XE in zip(ids, weights, found, strict=True):
        np.testing.assert_array_equal(rows_XE, np.where(i[..., None] > 0, table_VE[i], 0))
        np.add.at(want, i, np.where(i[..., None] > 0, w, 0))
    np.testing.assert_allclose(gradient, want, atol=1e-5)


def test_it_does_not_apply_on_one_device_or_where_sizes_do_not_divide():
    with jax.sharding.use_abstract_mesh(make_mesh(MeshConfig(4, 2)).abstract_mesh):
        assert exchange.applies(jnp.zeros((16, 1)), [jnp.zeros(4)])
        assert not exchange.applies(jnp.zeros((12, 1)), [jnp.zeros(4)])
        assert not exchange.applies(jnp.zeros((16, 1)), [jnp.zeros(4), jnp.zeros(6)])
    assert not exchange.applies(jnp.zeros((16, 1)), [jnp.zeros(4)])


# ------------------------------------------------------------------------------- whole steps


@pytest.fixture(scope="module", autouse=True)
def small_blocks():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blockwise, "BLOCK", 64)
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
    """13 collectives; 25 where tokens do not lie where their examples lie."""
    sent = collectives(steps((8, 1), folder).hlo)
    assert len(sent) < 18, sent
