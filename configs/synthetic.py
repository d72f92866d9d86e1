"""The embedded default: a simulated feed with known click probabilities, no download.

    loopfm run configs/synthetic.py        (what scripts/quickstart.sh runs)

The FM alone sees `signal`, a noisy reading of the user's current interest. The VM sees it only
through histories of the FM's embeddings. The result card is in configs/README.md.
"""

from pathlib import Path

from loopfm_jax.backbones import BackboneConfig
from loopfm_jax.config import Config
from loopfm_jax.data.batches import OrderConfig
from loopfm_jax.data.synthetic import Synthetic
from loopfm_jax.fm.teacher import FMConfig
from loopfm_jax.history.encoders import EncoderConfig
from loopfm_jax.history.store import HistoryConfig
from loopfm_jax.loop import TrainConfig
from loopfm_jax.tables import TableConfig
from loopfm_jax.vm.student import VMConfig

TABLES = TableConfig(width=16, init_std=0.01)


def get_config() -> Config:
    return Config(
        data=Synthetic(rows=150_000),
        fm=FMConfig(
            backbone=BackboneConfig("deepfm", hidden=(128, 64), tables=TABLES),
            train=TrainConfig(order=OrderConfig(order="shuffled", epochs=3, batch=256)),
        ),
        history=HistoryConfig(length=20),
        vm=VMConfig(
            backbone=BackboneConfig("deepfm", hidden=(64, 32), tables=TABLES),
            encoder=EncoderConfig(name="dmin", width=32, heads=2, score_hidden=(32,)),
            train=TrainConfig(order=OrderConfig(order="time", batch=256)),
        ),
        workdir=Path("runs/synthetic"),
    )
