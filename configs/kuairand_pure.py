"""KuaiRand-Pure, the paper's streaming protocol on a real short-video log."""

from pathlib import Path

from loopfm_jax.backbones import DeepFMConfig, DMINConfig
from loopfm_jax.config import Config
from loopfm_jax.data.batches import OrderConfig
from loopfm_jax.data.kuairand import KuaiRandPure
from loopfm_jax.data.raw import Windows
from loopfm_jax.fm.teacher import FMConfig
from loopfm_jax.loop import TrainConfig
from loopfm_jax.optim import OptimConfig
from loopfm_jax.tables import TableConfig
from loopfm_jax.vm.encoders import EncoderConfig
from loopfm_jax.vm.student import DistilConfig, VMConfig

WINDOWS = Windows(
    fm_end="2022-05-01T00:00+08:00",
    validation_start="2022-05-06T00:00+08:00",
    vm_end="2022-05-07T00:00+08:00",
    test_end="2022-05-09T00:00+08:00",
)


def get_config() -> Config:
    return Config(
        data=KuaiRandPure(windows=WINDOWS),
        fm=FMConfig(
            backbone="dmin",
            dmin=DMINConfig(hidden=(256, 128), attention_hidden=(64,), heads=2),
            tables=TableConfig(width=16),
            train=TrainConfig(order=OrderConfig(order="shuffled", epochs=2, batch=1024)),
        ),
        vm=VMConfig(
            backbone="deepfm",
            deepfm=DeepFMConfig(hidden=(128, 64)),
            tables=TableConfig(width=16),
            encoder=EncoderConfig(name="dmin", width=32, heads=2),
            distil=DistilConfig(alpha=1.0, beta=1.0, gamma=1.0),
            train=TrainConfig(
                order=OrderConfig(order="time", batch=512), optim=OptimConfig(learning_rate=1e-3)
            ),
        ),
        methods=("base", "kd", "loopfm", "kd+loopfm", "kd+loopfm+outcome"),
        workdir=Path("runs/kuairand_pure"),
    )
