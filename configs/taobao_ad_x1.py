"""TaobaoAd_x1, the BARS version of TaobaoAd: no times, so its given order stands for them.

FM on four sevenths of train.csv, VMs in one pass over the rest, test on test.csv. Rows of one page
view cannot be told apart here and may see each other's embeddings: configs/taobao_ad.py, on the raw
files, is the paper's protocol.

    loopfm run configs/taobao_ad_x1.py --data.raw-dir FOLDER

FOLDER holds train.csv and test.csv of https://huggingface.co/datasets/reczoo/TaobaoAd_x1.

No result measured: the files are not here. Hyper-parameters are the public BARS ones (PAPER section
5); alpha, beta, gamma the paper's.
"""

import runpy
from dataclasses import replace
from pathlib import Path

from loopfm_jax.config import Config
from loopfm_jax.data.bars_sets import TaobaoAdX1

RAW = Path(__file__).with_name("taobao_ad.py")


def get_config() -> Config:
    raw: Config = runpy.run_path(str(RAW))["get_config"]()
    return replace(raw, data=TaobaoAdX1(), workdir=Path("runs/taobao_ad_x1"))
