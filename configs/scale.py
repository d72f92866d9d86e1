"""Throughput against model size: FM and VM from 1M to 1B dense parameters, and tables to 30M rows.

    loopfm scale configs/scale.py                               (any machine, no data)
    loopfm scale configs/scale.py --fm.backbone.name dmin --scale.sweeps fm --scale.sizes 1e6 1e7
    loopfm scale configs/scale.py --fm.train.order.batch 4096 --vm.train.order.batch 4096

Examples are generated (TaobaoAd_x1's fields, behaviours of 29 events in the mean; VM: besides, 17
entries of 32 int4 numbers from a store of a million on the device). Tables are learned by touched
rows, so that what is measured is the dense part. The FM trains with its compressor, as in
`train-fm`.

Sizes that do not fit are left out by name. An accelerator wants larger batches (last line above).
Measured in configs/README.md.
"""

from pathlib import Path

from loopfm_jax.backbones import BackboneConfig
from loopfm_jax.config import Config
from loopfm_jax.data.batches import OrderConfig
from loopfm_jax.fm.teacher import FMConfig
from loopfm_jax.history.encoders import EncoderConfig
from loopfm_jax.history.store import HistoryConfig
from loopfm_jax.loop import TrainConfig
from loopfm_jax.optim import OptimConfig
from loopfm_jax.tables import TableConfig
from loopfm_jax.vm.student import VMConfig

BACKBONE = BackboneConfig(
    "deepfm", hidden=(512, 256, 128), tables=TableConfig(width=32), behaviours=True
)
TRAIN = TrainConfig(OrderConfig(batch=512), OptimConfig(tables="rowwise_adagrad"))


def get_config() -> Config:
    return Config(
        fm=FMConfig(backbone=BACKBONE, train=TRAIN),
        vm=VMConfig(
            backbone=BACKBONE,
            encoder=EncoderConfig(name="dmin", width=32, heads=4),
            train=TRAIN,
        ),
        history=HistoryConfig(length=50),
        workdir=Path("runs/scale"),
    )
