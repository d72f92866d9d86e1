"""TaobaoAd, the paper's main data set, under its streaming protocol (PAPER section 2).

FM on 6-9 May 2017 (UTC+8), embeddings logged from 10 May, VMs in one pass in time order over 10-12
May, test 13 May; label `clk`. Histories by user, 50 entries, fp32 codes of 32 numbers.

    loopfm run configs/taobao_ad.py --data.raw-dir FOLDER --seeds 5

FOLDER holds raw_sample.csv, ad_feature.csv, user_profile.csv and behavior_log.csv of
https://tianchi.aliyun.com/dataset/56 (a login is needed).

No result measured: the files are not here. What `loopfm prepare` takes for a made-up log of this
size is in configs/README.md. The paper's table 1, AUC: DeepFM .5886, with KD .5980, LoopFM .6245,
both .6344.

Hyper-parameters are the public BARS ones (PAPER section 5); alpha, beta, gamma the paper's. The
paper does not say how long the FM trains: two shuffled epochs (BARS stops after four).
"""

from pathlib import Path

from loopfm_jax.backbones import BackboneConfig
from loopfm_jax.config import Config
from loopfm_jax.data.batches import OrderConfig
from loopfm_jax.data.taobao_ad import TaobaoAd
from loopfm_jax.fm.exporter import ExportConfig
from loopfm_jax.fm.teacher import FMConfig
from loopfm_jax.history.encoders import EncoderConfig
from loopfm_jax.history.store import HistoryConfig
from loopfm_jax.loop import TrainConfig
from loopfm_jax.optim import OptimConfig
from loopfm_jax.study.config import StudyConfig
from loopfm_jax.tables import TableConfig
from loopfm_jax.vm.student import DistilConfig, VMConfig

TABLES = TableConfig(width=32)
OPTIM = OptimConfig(learning_rate=1e-3, embedding_l2=5e-6)


def get_config() -> Config:
    return Config(
        data=TaobaoAd(),
        fm=FMConfig(
            backbone=BackboneConfig("dmin", tables=TABLES),
            train=TrainConfig(OrderConfig(order="shuffled", epochs=2, batch=8192), OPTIM),
        ),
        export=ExportConfig(code="fp32"),
        # The paper's raw histories hold a bucketised price as well; here the price is a number.
        history=HistoryConfig(length=50, raw=("adgroup_id", "campaign_id", "customer")),
        vm=VMConfig(
            backbone=BackboneConfig("deepfm", tables=TABLES, behaviours=True),
            encoder=EncoderConfig(name="dmin", width=32, heads=4),
            distil=DistilConfig(alpha=5.0, beta=5.0, gamma=10.0),
            train=TrainConfig(OrderConfig(order="time", batch=8192), OPTIM),
        ),
        study=StudyConfig(
            taps=("hidden_1", "hidden_2", "embedding", "all", "item", "entity"),
            vms=("fm2", "fmfm", "deepfm", "dien", "dmr", "dmin"),
            lengths=(10, 25, 50, 75, 100),
            keys=("key", "adgroup_id", "key+cate_id", "key,adgroup_id"),
        ),
        workdir=Path("runs/taobao_ad"),
    )
