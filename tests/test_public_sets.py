"""The public data sets against PAPER section 5: configurations, and the shape of their schemas."""

from dataclasses import replace
from pathlib import Path

import pytest
from bars_files import amazon_rows, kuai_rows, taobao_rows, write_bars
from taobao_files import write_release

from loopfm_jax.bench.public import PUBLIC
from loopfm_jax.config import load as load_config
from loopfm_jax.data.bars_sets import AmazonElectronicsX1, KuaiVideoX1, TaobaoAdX1
from loopfm_jax.data.log import load
from loopfm_jax.data.prepare import prepare
from loopfm_jax.data.taobao_ad import TaobaoAd

CONFIGS = {
    "taobao_ad": "TaobaoAd_x1",
    "taobao_ad_x1": "TaobaoAd_x1",
    "kuaivideo_x1": "KuaiVideo_x1",
    "amazon_electronics_x1": "AmazonElectronics_x1",
}
SETS = {
    "taobao_ad": lambda raw: TaobaoAd(raw_dir=write_release(raw)),
    "taobao_ad_x1": lambda raw: TaobaoAdX1(raw_dir=write_bars(raw, taobao_rows), check=False),
    "kuaivideo_x1": lambda raw: KuaiVideoX1(raw_dir=write_bars(raw, kuai_rows), check=False),
    "amazon_electronics_x1": lambda raw: AmazonElectronicsX1(
        raw_dir=write_bars(raw, amazon_rows), check=False
    ),
}


@pytest.mark.parametrize("stem, public", CONFIGS.items())
def test_configurations_are_the_published_ones(stem, public):
    config = load_config(Path(__file__).parents[1] / "configs" / f"{stem}.py")
    known = PUBLIC[public]
    for found, name in ((config.fm.backbone, "dmin"), (config.vm.backbone, "deepfm")):
        tables = replace(found.tables, row_multiple=1)
        assert replace(found, tables=tables, behaviours=False) == known.config(name)
    assert config.data.name == stem


@pytest.mark.parametrize("name", SETS)
def test_schemas_have_the_shape_of_the_published_ones(name, tmp_path):
    """Then parameter counts are the published ones, whatever the vocabularies."""
    source, folder = SETS[name](tmp_path / "raw"), tmp_path / "log"
    folder.mkdir()
    prepare(source.read(), source.windows, name=name, card=source.card, directory=folder)
    log, _ = load(folder)
    shapes = [
        (
            len(schema.categorical),
            len(schema.numeric),
            sorted((f.length, f.frozen_width > 0) for f in schema.sequences),
            [len(b.history) for b in schema.behaviours],
        )
        for schema in (log.schema, PUBLIC[CONFIGS[name]].schema)
    ]
    assert shapes[0] == shapes[1]
    assert all(log.schema[f.shares].rows == f.rows for f in log.schema.fields if f.shares)
