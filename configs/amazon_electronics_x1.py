"""AmazonElectronics_x1: which good a user reviewed next; no times, the given order is shuffled.

FM on four sevenths of train.csv, VMs in one pass over the rest, test on test.csv (PAPER section 2:
given order cut into eight chunks). The two rows of a test user are one moment.

    loopfm run configs/amazon_electronics_x1.py --data.raw-dir FOLDER

FOLDER holds train.csv and test.csv of https://huggingface.co/datasets/reczoo/AmazonElectronics_x1.

No result measured: the files are not here. The paper's table 8, AUC: DeepFM .8035, with KD .8119,
LoopFM .8127, both .8179.

Hyper-parameters are the public BARS ones (PAPER section 5); alpha, beta, gamma the paper's, though
at a label mean of 1/2 alpha 5 clips most soft labels. The history length and how long the FM trains
are not given: 100 as the data set's own, two shuffled epochs (BARS stops after ten).
"""

from pathlib import Path

from loopfm_jax.backbones import BackboneConfig
from loopfm_jax.config import Config
from loopfm_jax.data.bars_sets import AmazonElectronicsX1
from loopfm_jax.data.batches import OrderConfig
from loopfm_jax.fm.exporter import ExportConfig
from loopfm_jax.fm.teacher import FMConfig
from loopfm_jax.history.encoders import EncoderConfig
from loopfm_jax.history.store import HistoryConfig
from loopfm_jax.loop import TrainConfig
from loopfm_jax.optim import OptimConfig
from loopfm_jax.study.config import StudyConfig
from loopfm_jax.tables import TableConfig
from loopfm_jax.vm.student import DistilConfig, VMConfig

TABLES = TableConfig(width=64)
HIDDEN = (1024, 512, 256)
OPTIM = OptimConfig(learning_rate=5e-4, embedding_l2=5e-3)
FM = BackboneConfig(
    "dmin",
    hidden=HIDDEN,
    dropout=0.1,
    norm="input",
    heads=8,
    refiner=True,
    attention_hidden=(256, 128),
    attention_activation="dice",
    attention_dropout=0.1,
    tables=TABLES,
)
VM = BackboneConfig(
    "deepfm", hidden=HIDDEN, dropout=0.1, norm="hidden", tables=TABLES, behaviours=True
)


def get_config() -> Config:
    return Config(
        data=AmazonElectronicsX1(),
        fm=FMConfig(
            backbone=FM,
            train=TrainConfig(OrderConfig(order="shuffled", epochs=2, batch=1024), OPTIM),
        ),
        export=ExportConfig(code="fp32"),
        history=HistoryConfig(length=100),
        vm=VMConfig(
            backbone=VM,
            encoder=EncoderConfig(name="dmin", width=32, heads=4),
            distil=DistilConfig(alpha=5.0, beta=5.0, gamma=10.0),
            train=TrainConfig(OrderConfig(order="time", batch=1024), OPTIM),
        ),
        study=StudyConfig(
            taps=("hidden_1", "hidden_2", "embedding", "all", "item", "entity"),
            vms=("deepfm", "dien", "dmr", "dmin"),
            lengths=(10, 25, 50, 100),
            keys=("key", "item_id", "key+cate_id", "key,item_id"),
        ),
        workdir=Path("runs/amazon_electronics_x1"),
    )
