"""TaobaoAd: eight days of ad impressions with the users' shopping behaviour (Alibaba, Tianchi 56).

Reads the raw files, which have the times that the paper's streaming protocol needs and that the
BARS version (`data.bars.TaobaoAdX1`) has not. Rows whose user has no profile, or whose ad has no
features, are left out as in the public preparations (about 5 %: of 26,557,961 rows 25,029,426
remain there). Exact duplicates stay, as they do there: an ad may be shown twice in a second.

An example's three sequences are its user's last 50 events of `behavior_log.csv` (723 million rows,
read in batches) strictly before the impression. The candidate's own `btag` is `pv`: as in BARS, the
question is whether its page will be viewed.
"""

from dataclasses import dataclass
from pathlib import Path

import polars as pl

from loopfm_jax.data.files import find_table, reading, scan_csv
from loopfm_jax.data.raw import Card, Column, Events, RawLog, Windows
from loopfm_jax.data.schema import Behaviour
from loopfm_jax.errors import UserError, check_limits
from loopfm_jax.identity import sha256

FILES = ("raw_sample", "ad_feature", "user_profile", "behavior_log")
BTAGS = pl.Enum(["pv", "cart", "fav", "buy"])
USER = {
    "cms_segid": pl.Int16,
    "cms_group_id": pl.Int8,
    "final_gender_code": pl.Int8,
    "age_level": pl.Int8,
    "pvalue_level": pl.Int8,
    "shopping_level": pl.Int8,
    "occupation": pl.Int8,
    "new_user_class_level": pl.Int8,
}
AD = {"cate_id": pl.Int32, "campaign_id": pl.Int32, "customer": pl.Int32, "brand": pl.Int32}
TARGET, HISTORY = ("cate_id", "brand", "btag"), ("cate_his", "brand_his", "btag_his")
DAYS = Windows(
    fm_end="2017-05-10T00:00+08:00",
    validation_start="2017-05-12T00:00+08:00",
    vm_end="2017-05-13T00:00+08:00",
    test_end="2017-05-14T00:00+08:00",
)
"""PAPER section 2: FM on days 1-4 (from 6 May, UTC+8), VMs on days 5-7, test on day 8."""


@dataclass(frozen=True)
class TaobaoAd:
    """The raw TaobaoAd files."""

    raw_dir: Path | None = None
    """Folder with raw_sample, ad_feature, user_profile and behavior_log (.csv or .csv.gz)."""
    windows: Windows = DAYS
    length: int = 50
    """Events of the behaviour log that an example sees, the last ones before it."""
    min_count: int = 10
    """Values seen less often in the FM window share the unknown id (as in BARS)."""

    def __post_init__(self) -> None:
        check_limits("data", {"length": self.length, "min_count": self.min_count}, low=1)

    @property
    def name(self) -> str:
        return "taobao_ad"

    @property
    def card(self) -> Card:
        return Card(
            description="26,557,961 ad impressions of 1,141,729 users on Taobao, 6 to 13 May 2017 "
            "(5 % clicked), with 846,811 ads, 1,061,768 user profiles and 723,268,134 events of "
            "22 days. To get it: log in at the homepage and download raw_sample, ad_feature, "
            "user_profile and behavior_log.",
            homepage="https://tianchi.aliyun.com/dataset/56",
            citation="Tianchi. Ad Display/Click Data on Taobao.com. 2018.",
            license="CC BY-NC-SA 4.0 (as stated on the homepage: check before use)",
        )

    def fingerprint(self) -> dict[str, str]:
        found = [find_table(self.raw_dir, name) for name in FILES]
        return {path.name: sha256(path) for path in found if path}

    def read(self) -> RawLog:
        frame, rows = self._impressions()
        if not len(frame):
            raise UserError(
                f"none of the {rows:,} impressions has a user in user_profile and an ad in "
                "ad_feature: the files do not belong together"
            )
        ids = ("userid", *USER, "adgroup_id", *AD, "pid", "btag")
        return RawLog(
            frame=frame,
            columns=(
                *(Column(name, min_count=self.min_count) for name in ids),
                Column("price", kind="numeric", log=True),
            ),
            item=("adgroup_id", "cate_id", "campaign_id", "customer", "brand"),
            entity=("userid", *USER),
            given=(Behaviour(TARGET, HISTORY),),
            events=self._events(),
            notes={"impressions": rows, "without_profile_or_ad": rows - len(frame)},
        )

    def _impressions(self) -> tuple[pl.DataFrame, int]:
        """Impressions with the profile of their user and the features of their ad."""
        path = find_table(self.raw_dir, "raw_sample")
        types = {"user": pl.Int32, "time_stamp": pl.Int64, "adgroup_id": pl.Int32}
        samples = scan_csv(path, {**types, "pid": pl.Categorical, "clk": pl.Int8})
        users = _side_table(self.raw_dir, "user_profile", "userid", USER)
        ads = _side_table(self.raw_dir, "ad_feature", "adgroup_id", AD | {"price": pl.Float32})
        joined = samples.join(users.lazy(), left_on="user", right_on="userid").join(
            ads.lazy(), on="adgroup_id"
        )
        assert path is not None
        with reading(path):
            rows = samples.select(pl.len()).collect().item()
            frame = joined.select(
                pl.col("user").alias("key"),
                (pl.col("time_stamp") * 1000).alias("time"),
                pl.col("clk").alias("label"),
                *("adgroup_id", "pid", *USER, *AD, "price"),
            ).collect(engine="streaming")
        frame = frame.rechunk()  # rows are looked up by number: ten times faster in one piece
        btag = pl.lit("pv", dtype=BTAGS).alias("btag")
        return frame.with_columns(pl.col("key").alias("userid"), btag), rows

    def _events(self) -> Events:
        types = {"user": pl.Int32, "time_stamp": pl.Int64, "btag": BTAGS}
        scan = scan_csv(
            find_table(self.raw_dir, "behavior_log"), types | {"cate": pl.Int32, "brand": pl.Int32}
        )
        return Events(
            name="behavior_log",
            columns=tuple(
                Column(history, kind="sequence", shares=target, length=self.length)
                for target, history in zip(TARGET, HISTORY, strict=True)
            ),
            scan=scan.select(
                pl.col("user").alias("key"),
                (pl.col("time_stamp") * 1000).alias("time"),
                pl.col("cate").fill_null(0).alias("cate_his"),
                pl.col("brand").fill_null(0).alias("brand_his"),
                pl.col("btag").alias("btag_his"),
            ),
            length=self.length,
        )


def _side_table(folder: Path | None, name: str, key: str, types: dict) -> pl.DataFrame:
    """One row per user or ad. Ids pass through floats: some copies were saved as `17.0`."""
    path = find_table(folder, name)
    assert path is not None
    scan = scan_csv(path, {key: pl.Int32, **dict.fromkeys(types, pl.Float64)})
    with reading(path):
        table = scan.with_columns(pl.col(n).cast(t) for n, t in types.items()).collect()
    twice = table[key].is_duplicated()
    if twice.any():
        raise UserError(
            f"{key} {table[key].filter(twice)[0]} stands more than once in {path}; each must be "
            "there once, or impressions would be multiplied: fetch the file again"
        )
    return table
