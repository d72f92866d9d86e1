"""A simulated world small enough to be learned whole: does the gain decomposition tell the truth?

    loopfm study configs/decomposition.py --seeds 3

The estimate comes as near to the truth as the VMs come to their limits, which `synthetic.py` with
its thousands of users does not let them in one pass. Here are 20 users, 4 topics and 20 items, an
interest that lasts for about 30 rows, and a million rows to learn from. The result card is in
configs/README.md.
"""

from pathlib import Path

from loopfm_jax.backbones import BackboneConfig
from loopfm_jax.config import Config
from loopfm_jax.data.batches import OrderConfig
from loopfm_jax.data.raw import Windows
from loopfm_jax.data.synthetic import Synthetic
from loopfm_jax.fm.teacher import FMConfig
from loopfm_jax.history.encoders import EncoderConfig
from loopfm_jax.history.store import HistoryConfig
from loopfm_jax.loop import TrainConfig
from loopfm_jax.optim import OptimConfig
from loopfm_jax.study.config import StudyConfig
from loopfm_jax.tables import TableConfig
from loopfm_jax.vm.student import VMConfig

TABLES = TableConfig(width=8, init_std=0.01)


def get_config() -> Config:
    return Config(
        data=Synthetic(
            name="decomposition",
            windows=Windows(fm_end="30%", vm_end="95%"),
            rows=2_000_000,
            rows_per_user=100_000,
            days=366,
            slate=1,
            topics=4,
            items_per_topic=5,
            item_half_life_days=100_000,
            interest_half_life_days=0.1,
            personalisation=0.5,
            appeal=0.5,
        ),
        fm=FMConfig(
            backbone=BackboneConfig(hidden=(128, 64), tables=TABLES),
            train=TrainConfig(order=OrderConfig(order="shuffled", batch=256)),
        ),
        history=HistoryConfig(length=16, side=("age",)),
        vm=VMConfig(
            backbone=BackboneConfig(hidden=(64, 32), tables=TABLES),
            encoder=EncoderConfig(name="dien", width=32, score_hidden=(32, 16)),
            train=TrainConfig(
                order=OrderConfig(order="shuffled", batch=512, epochs=3),
                optim=OptimConfig(learning_rate=5e-3, cooldown=0.9),
            ),
        ),
        study=StudyConfig(tables=("decomposition",), taps=()),
        workdir=Path("runs/decomposition"),
    )
