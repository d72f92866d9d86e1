"""KuaiVideo_x1: micro-videos with fixed visual embeddings, histories of watched videos only.

FM on four sevenths of train.csv in its given order, VMs in one pass over the rest, test on
test.csv; label `is_click`. Rows with one timestamp are one moment. Only clicked rows enter
histories (PAPER section 2), 100 of them.

    loopfm run configs/kuaivideo_x1.py --data.raw-dir FOLDER

FOLDER holds train.csv, test.csv and item_visual_emb_dim64.h5 of
https://huggingface.co/datasets/reczoo/KuaiVideo_x1.

No result measured: the files are not here. The paper's table 6, AUC: DeepFM .6877, with KD .6998,
LoopFM .6898 (mean .6919), both .6847 (mean .6965).

Hyper-parameters are the public BARS ones (PAPER section 5). The paper tuned alpha, beta and gamma
and does not give them: 1 each. Nor how long the FM trains: two shuffled epochs.
"""

from pathlib import Path

from loopfm_jax.backbones import BackboneConfig
from loopfm_jax.config import Config
from loopfm_jax.data.bars_sets import KuaiVideoX1
from loopfm_jax.data.batches import OrderConfig
from loopfm_jax.fm.exporter import ExportConfig
from loopfm_jax.fm.teacher import FMConfig
from loopfm_jax.history.encoders import EncoderConfig
from loopfm_jax.history.store import HistoryConfig
from loopfm_jax.loop import TrainConfig
from loopfm_jax.optim import OptimConfig
from loopfm_jax.study.config import StudyConfig
from loopfm_jax.tables import TableConfig
from loopfm_jax.vm.student import VMConfig

TABLES = TableConfig(width=64)
HIDDEN = (1024, 512, 256)
OPTIM = OptimConfig(learning_rate=1e-3, embedding_l2=1e-4)
FM = BackboneConfig(
    "dmin",
    hidden=HIDDEN,
    activation="dice",
    dropout=0.1,
    heads=2,
    position_width=0,
    tables=TABLES,
)


def get_config() -> Config:
    return Config(
        data=KuaiVideoX1(),
        fm=FMConfig(
            backbone=FM,
            train=TrainConfig(OrderConfig(order="shuffled", epochs=2, batch=4096), OPTIM),
        ),
        export=ExportConfig(code="fp32"),
        history=HistoryConfig(length=100, keep="positive"),
        vm=VMConfig(
            backbone=BackboneConfig("deepfm", hidden=HIDDEN, tables=TABLES, behaviours=True),
            encoder=EncoderConfig(name="dmin", width=32, heads=4),
            train=TrainConfig(OrderConfig(order="time", batch=4096), OPTIM),
        ),
        study=StudyConfig(
            taps=("hidden_1", "hidden_2", "embedding", "all", "item", "entity"),
            vms=("deepfm", "dien", "dmr", "dmin"),
            lengths=(10, 25, 50, 100),
            keys=("key", "item_id", "key,item_id"),
        ),
        workdir=Path("runs/kuaivideo_x1"),
    )
