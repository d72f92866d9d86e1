"""Parameter counts of the public runs: they pin every shape of every backbone."""

from math import prod

import jax
import pytest
from flax import nnx

from loopfm_jax.backbones import BACKBONES, build
from loopfm_jax.bench.public import PUBLIC

EVERY = [(data, name) for data, public in PUBLIC.items() for name in public.models]
OWN = {"wukong"}
"""Backbones of which there is no public run on these sets."""


def test_every_backbone_but_those_without_public_runs_is_counted():
    for public in PUBLIC.values():
        assert set(public.models) == set(BACKBONES) - OWN


def count(data: str, name) -> int:
    public = PUBLIC[data]
    config = public.config(name)
    abstract = nnx.eval_shape(lambda: build(config, public.schema, rngs=nnx.Rngs(0)))
    return sum(prod(x.shape) for x in jax.tree.leaves(nnx.state(abstract, nnx.Param)))


@pytest.mark.parametrize(("data", "name"), EVERY, ids=[f"{n}-{d}" for d, n in EVERY])
def test_parameter_count_is_the_public_one(data, name):
    public = PUBLIC[data]
    _, published = public.models[name]
    assert count(data, name) + public.unread.get(name, 0) == published
