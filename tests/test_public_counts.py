"""Parameter counts of the public runs: they pin every shape of every backbone."""

from math import prod

import jax
import pytest
from flax import nnx

from loopfm_jax.backbones import BACKBONES, BackboneConfig, build
from loopfm_jax.bench.public import PUBLIC, Public

EVERY = [(data, name) for data, public in PUBLIC.items() for name in public.models]
OWN = {"wukong", "hstu", "interformer", "kunlun"}
"""Backbones of which there is no public run on these sets."""
INTERFORMER = {
    "TaobaoAd_x1": (44.73, 42.44),
    "KuaiVideo_x1": (43.61, 42.56),
    "AmazonElectronics_x1": (7.18, 5.20),
}
"""Millions of parameters: those its paper (arXiv 2411.09852) publishes, without the layers' sizes,
and ours; configs/README.md says what lies between."""


def test_every_backbone_but_those_without_public_runs_is_counted():
    for public in PUBLIC.values():
        assert set(public.models) == set(BACKBONES) - OWN


def count(public: Public, config: BackboneConfig) -> int:
    abstract = nnx.eval_shape(lambda: build(config, public.schema, rngs=nnx.Rngs(0)))
    return sum(prod(x.shape) for x in jax.tree.leaves(nnx.state(abstract, nnx.Param)))


@pytest.mark.parametrize(("data", "name"), EVERY, ids=[f"{n}-{d}" for d, n in EVERY])
def test_parameter_count_is_the_public_one(data, name):
    public = PUBLIC[data]
    _, published = public.models[name]
    assert count(public, public.config(name)) + public.unread.get(name, 0) == published


@pytest.mark.parametrize("data", INTERFORMER)
def test_interformer_stands_beside_its_published_count(data):
    """With the DNN of the public DMIN, tokens as wide as fields, and this package's defaults."""
    public, (published, ours) = PUBLIC[data], INTERFORMER[data]
    dmin = public.config("dmin")
    config = BackboneConfig(
        "interformer", hidden=dmin.hidden, tables=dmin.tables, token_width=public.width
    )
    found = count(public, config) / 1e6
    print(f"{data}: InterFormer {found:.2f}M parameters, published {published:.2f}M")
    assert found == pytest.approx(ours, abs=0.005)
