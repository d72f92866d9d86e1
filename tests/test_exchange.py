"""Tables split over devices: rows are asked of their owners."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from mesh_steps import MESHES

from loopfm_jax import exchange
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
