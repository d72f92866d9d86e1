"""A simulated news feed: items are gone after hours, and what topics appeal changes by the week.

    loopfm study configs/news.py --tables stale --seeds 5

Item ids are hashed, so that a VM learns new items as they come; a frozen FM cannot. Its soft labels
say what was true in its own window, and lower the VM that distils them. What it knew about users
is still worth something, and reaches the VM through histories of codes. The result card is in
configs/README.md.
"""

from dataclasses import replace
from pathlib import Path

from loopfm_jax.backbones import BackboneConfig
from loopfm_jax.config import Config
from loopfm_jax.data.batches import OrderConfig
from loopfm_jax.data.synthetic import Synthetic
from loopfm_jax.fm.teacher import FMConfig
from loopfm_jax.history.encoders import EncoderConfig
from loopfm_jax.history.store import HistoryConfig
from loopfm_jax.loop import TrainConfig
from loopfm_jax.study.config import StudyConfig
from loopfm_jax.tables import TableConfig
from loopfm_jax.vm.student import DistilConfig, VMConfig

BACKBONE = BackboneConfig(hidden=(64, 32), tables=TableConfig(width=16, init_std=0.01))


def get_config() -> Config:
    return Config(
        data=Synthetic(
            name="news",
            rows=150_000,
            item_half_life_days=0.5,
            item_rows=20_000,
            trend=2.0,
            trend_half_life_days=5.0,
        ),
        fm=FMConfig(
            backbone=replace(BACKBONE, hidden=(128, 64)),
            train=TrainConfig(order=OrderConfig(order="shuffled", epochs=3, batch=256)),
        ),
        history=HistoryConfig(length=20),
        vm=VMConfig(
            backbone=BACKBONE,
            encoder=EncoderConfig(name="mean", width=32),
            distil=DistilConfig(gamma=3.0),
            train=TrainConfig(order=OrderConfig(order="time", batch=256)),
        ),
        study=StudyConfig(tables=("stale",), taps=()),
        workdir=Path("runs/news"),
    )
