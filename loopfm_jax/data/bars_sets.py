"""The three BARS data sets of the LoopFM paper (PAPER section 5), each in a few lines.

Vocabularies are fitted on the FM window, not on the whole training file as in BARS: nothing later
may leak into the FM. They are therefore smaller than the published ones.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import h5py
import numpy as np
import polars as pl

from loopfm_jax.data.bars import CHUNKS, PARTS, Layout, read_bars
from loopfm_jax.data.files import find_file, find_table
from loopfm_jax.data.raw import Card, Pretrained, RawLog, Windows
from loopfm_jax.data.schema import Behaviour
from loopfm_jax.errors import UserError, check_limits
from loopfm_jax.identity import sha256

HUB = "https://huggingface.co/datasets/reczoo/"
VISUAL = "item_visual_emb_dim64.h5"


@dataclass(frozen=True)
class Bars(ABC):
    """A BARS data set: a folder with train.csv and test.csv (or .csv.gz)."""

    raw_dir: Path | None = None
    """Folder of the files."""
    check: bool = True
    """Compare the files with the published md5."""
    windows: Windows = CHUNKS
    """Over given order as time: a chunk is a day from 2000-01-01 on, the test file the eighth."""
    length: int = 50
    """Values kept of a history, the last ones."""
    min_count: int = 10
    """Values seen less often in the FM window share the unknown id."""

    def __post_init__(self) -> None:
        check_limits("data", {"length": self.length, "min_count": self.min_count}, low=1)

    @property
    @abstractmethod
    def name(self) -> str: ...

    @property
    @abstractmethod
    def card(self) -> Card: ...

    @abstractmethod
    def read(self) -> RawLog: ...

    def fingerprint(self) -> dict[str, str]:
        found = [find_table(self.raw_dir, part) for part in PARTS]
        return {path.name: sha256(path) for path in found if path}

    def _read(self, layout: Layout, **kwargs) -> RawLog:
        return read_bars(
            layout,
            self.raw_dir,
            length=self.length,
            min_count=self.min_count,
            check=self.check,
            **kwargs,
        )


USER_FIELDS = (
    *("userid", "cms_segid", "cms_group_id", "final_gender_code", "age_level"),
    *("pvalue_level", "shopping_level", "occupation", "new_user_class_level"),
)
AD_FIELDS = ("adgroup_id", "cate_id", "campaign_id", "customer", "brand")


@final
@dataclass(frozen=True)
class TaobaoAdX1(Bars):
    """TaobaoAd_x1: TaobaoAd prepared for BARS, without times."""

    @property
    def name(self) -> str:
        return "taobao_ad_x1"

    @property
    def card(self) -> Card:
        return Card(
            description="25,029,426 ad impressions on Taobao (21,929,911 train, 3,099,515 test), "
            "last 50 shopping events of each user. Rows of one page view cannot be told apart: use "
            "the raw files (TaobaoAd) for the streaming protocol.",
            homepage=HUB + "TaobaoAd_x1",
            citation="Lyu et al. Deep Match to Rank Model for Personalized Click-Through Rate "
            "Prediction. AAAI 2020. Zhu et al. BARS. SIGIR 2022.",
            license="that of the raw files, https://tianchi.aliyun.com/dataset/56",
        )

    def read(self) -> RawLog:
        histories = {"cate_his": "cate_id", "brand_his": "brand", "btag_his": "btag"}
        layout = Layout(
            label="clk",
            key="userid",
            categorical=(*USER_FIELDS, *AD_FIELDS, "pid", "btag"),
            numeric=("price",),
            item=AD_FIELDS,
            entity=USER_FIELDS,
            histories=histories,
            given=(Behaviour(tuple(histories.values()), tuple(histories)),),
            md5={
                "train": "eaabfc8629f23519b04593e26c7522fc",
                "test": "f5ae6197e52385496d46e2867c1c8da1",
            },
        )
        return self._read(layout)


@final
@dataclass(frozen=True)
class KuaiVideoX1(Bars):
    """KuaiVideo_x1: micro-videos with a fixed 64-dimensional picture of each."""

    length: int = 100

    @property
    def name(self) -> str:
        return "kuaivideo_x1"

    @property
    def card(self) -> Card:
        return Card(
            description="13,661,383 impressions (10,931,092 train, 2,730,291 test) of 10,000 users "
            "of Kuaishou, their first 100 clicked and 100 unclicked videos, and visual embeddings "
            "of 3.2 million videos.",
            homepage=HUB + "KuaiVideo_x1",
            citation="Li et al. Routing Micro-videos via A Temporal Graph-guided Recommendation "
            "System. MM 2019. Zhu et al. BARS. SIGIR 2022.",
            license="that of the Kuaishou User Interest Modeling Challenge 2018 (check before use)",
        )

    def fingerprint(self) -> dict[str, str]:
        return super().fingerprint() | {VISUAL: sha256(self._visual)}

    @property
    def _visual(self) -> Path:
        path = find_file(self.raw_dir, VISUAL)
        if path is None:
            raise UserError(f"{VISUAL} is missing in {self.raw_dir}: it comes with the data set")
        return path

    def read(self) -> RawLog:
        target = ("item_id", "item_emb")
        pairs = [(f"{kind}_items", f"{kind}_items_emb") for kind in ("pos", "neg")]
        layout = Layout(
            label="is_click",
            key="user_id",
            categorical=("user_id", "item_id"),
            copies={"item_emb": "item_id"} | {copy: own for own, copy in pairs},
            item=target,
            entity=("user_id",),
            histories={name: to for pair in pairs for name, to in zip(pair, target, strict=True)},
            given=tuple(Behaviour(target, pair) for pair in pairs),
            moment=pl.col("timestamp"),
            moment_columns=("timestamp",),
            md5={
                "train": "16f13734411532cc313caf2180bfcd56",
                "test": "ba26c01caaf6c65c272af11aa451fc7a",
            },
        )
        return self._read(layout, pretrained={"item_emb": read_embeddings(self._visual)})


@final
@dataclass(frozen=True)
class AmazonElectronicsX1(Bars):
    """AmazonElectronics_x1: reviewed goods against drawn ones, in no order of time."""

    length: int = 100
    min_count: int = 1

    @property
    def name(self) -> str:
        return "amazon_electronics_x1"

    @property
    def card(self) -> Card:
        return Card(
            description="2,993,570 rows (2,608,764 train, 384,806 test): a good that one of "
            "192,403 users reviewed next, or one drawn at random, with the goods reviewed before.",
            homepage=HUB + "AmazonElectronics_x1",
            citation="Zhou et al. Deep Interest Network for Click-Through Rate Prediction. KDD "
            "2018. Zhu et al. BARS. SIGIR 2022.",
            license="that of https://cseweb.ucsd.edu/~jmcauley/datasets.html (research)",
        )

    def read(self) -> RawLog:
        histories = {"item_history": "item_id", "cate_history": "cate_id"}
        row, pair = pl.col("row"), pl.col("row") // 2
        layout = Layout(
            label="label",
            key="user_id",  # never a feature
            categorical=tuple(histories.values()),
            item=tuple(histories.values()),
            histories=histories,
            given=(Behaviour(tuple(histories.values()), tuple(histories)),),
            # the test file has the reviewed good and the drawn one of a user in turn
            moment=pl.when(pl.col("in_test")).then(pair).otherwise(row).cast(pl.Int64),
            md5={
                "train": "e9bf80b92985e463db18fdc753d347b5",
                "test": "57a20e82fe736dd495f2eaf0669bf6d0",
            },
        )
        return self._read(layout)


def read_embeddings(path: Path) -> Pretrained:
    """`key` [V] and `value` [V, width] of an HDF5 file.

    Raises:
      UserError: not such a file, or a key stands twice.
    """
    try:
        with h5py.File(path) as opened:
            file: Any = opened
            keys, values = file["key"][:], file["value"].astype(np.float32)[:]
    except (OSError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} cannot be read as HDF5 with `key` and `value`: {error}; fetch it again"
        ) from None
    if keys.ndim != 1 or values.ndim != 2 or len(keys) != len(values):
        raise UserError(
            f"{path} has keys of shape {keys.shape} and values of shape {values.shape}; it must be "
            "[V] and [V, width]"
        )
    ids = pl.Series(keys)
    if ids.is_duplicated().any():
        raise UserError(f"{path}: key {ids.filter(ids.is_duplicated())[0]} stands more than once")
    return Pretrained(ids, values)
