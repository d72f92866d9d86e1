import jax
import jax.numpy as jnp
import pytest

from loopfm_jax import compiler
from loopfm_jax.sharding import MeshConfig, make_mesh


@pytest.fixture
def fresh():
    """What an earlier test learned of this jaxlib is forgotten, and so is what this one does."""
    compiler._known.cache_clear()
    yield
    compiler._known.cache_clear()


def test_steps_on_cpu_are_compiled_with_what_is_asked_for(fresh):
    asked = compiler.options(make_mesh(MeshConfig()))
    assert asked == compiler.options() == compiler.ASKED["cpu", "float32"]
    assert compiler.options(make_mesh(MeshConfig(data=2))) == {}
    x = jnp.ones((64, 64))
    by_default, as_asked, narrow = (
        jax.jit(lambda x: x @ x, compiler_options=o).lower(x).compile().as_text()
        for o in ({}, asked, compiler.options(dtype="bfloat16"))
    )
    assert "ynn" in by_default and "ynn" not in as_asked and "ynn" in narrow


def test_an_option_that_this_jaxlib_does_not_have_is_left_out(fresh, monkeypatch):
    known = compiler.ASKED["cpu", "float32"]
    more = {**known, "xla_cpu_no_such_option": True}
    monkeypatch.setitem(compiler.ASKED, ("cpu", "float32"), more)
    assert compiler.options() == known


def test_other_platforms_ask_for_nothing(fresh):
    assert compiler._known("tpu", "bfloat16") == {}
