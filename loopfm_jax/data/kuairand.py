"""KuaiRand-Pure: a real short-video click log with real non-clicks (Gao et al., CIKM 2022).

Reads the official files, `.csv` or `.csv.gz`, from a folder (the whole release or any window of
its standard log), or downloads the release. Outcomes of a row (`play_time_ms`, `long_view`, `is_*`,
`*_stay_time`) are never its features; times come from `time_ms`, because `date` and `hourmin`
disagree with it now and then.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import polars as pl

from loopfm_jax.data.download import fetch_archive
from loopfm_jax.data.files import drop_duplicates, find_table, read_csv
from loopfm_jax.data.raw import Card, Column, RawLog, Windows
from loopfm_jax.errors import UserError
from loopfm_jax.identity import sha256

URL = "https://zenodo.org/records/10439422/files/KuaiRand-Pure.tar.gz"
STANDARD_ROWS = 1_436_609
USERS, VIDEOS = 27_285, 7_583
LOGS = ("log_standard_4_08_to_4_21_pure", "log_standard_4_22_to_5_08_pure")
SIDE_TABLES = ("user_features_pure", "video_features_basic_pure")
HOURS_EAST = 8  # the feed's users live in UTC+8

USER_COUNTS = ("follow_user_num", "fans_user_num", "friend_user_num", "register_days")
USER_CATEGORIES = (
    "user_active_degree",
    "is_lowactive_period",
    "is_live_streamer",
    "is_video_author",
    *(f"{count}_range" for count in USER_COUNTS),
    *(f"onehot_feat{i}" for i in range(18)),
)
VIDEO_CATEGORIES = ("author_id", "video_type", "upload_type", "music_type")
LOG_COLUMNS = {
    "user_id": pl.Int64,
    "video_id": pl.Int64,
    "time_ms": pl.Int64,
    "is_click": pl.Int64,
    "long_view": pl.Int64,
    "duration_ms": pl.Float64,
    "tab": pl.String,
}


@dataclass(frozen=True)
class KuaiRandPure:
    """The KuaiRand-Pure log."""

    raw_dir: Path | None = None
    """Folder with the official files; downloaded when absent."""
    label: Literal["is_click", "long_view"] = "is_click"
    url: str = URL
    cache_dir: Path = Path("~/.cache/loopfm_jax")
    """Where a download is kept."""
    windows: Windows = field(default_factory=Windows)
    behaviour_length: int = 50
    """Earlier positive videos that a sequence backbone reads."""
    min_count: int = 2
    """Users, videos and authors seen less often in the FM window share the unknown id."""

    def __post_init__(self) -> None:
        if self.behaviour_length < 1:
            raise UserError(
                f"data.behaviour_length is {self.behaviour_length}; at least 1 is needed"
            )

    @property
    def name(self) -> str:
        return "kuairand_pure"

    @property
    def card(self) -> Card:
        return Card(
            description="Standard-feed impressions of a short-video app, April to May 2022.",
            homepage="https://kuairand.com",
            citation="Gao et al. KuaiRand: An Unbiased Sequential Recommendation Dataset with "
            "Randomly Exposed Videos. CIKM 2022.",
            license="CC BY-SA 4.0",
        )

    def read(self) -> RawLog:
        folder, notes = self._folder()
        log, duplicates = drop_duplicates(_read_logs(folder))
        if self.raw_dir is None and len(log) + duplicates != STANDARD_ROWS:
            raise UserError(
                f"the release downloaded from {self.url} holds {len(log) + duplicates:,} standard "
                f"rows, not {STANDARD_ROWS:,}: delete {folder} and try again, or give "
                "--data.raw-dir"
            )
        counts = dict.fromkeys(USER_COUNTS, pl.Float64)
        users = read_csv(
            find_table(folder, "user_features_pure"),
            ("user_id", *USER_CATEGORIES, *USER_COUNTS),
            types={"user_id": pl.Int64, **counts},
        )
        videos = read_csv(
            find_table(folder, "video_features_basic_pure"),
            ("video_id", *VIDEO_CATEGORIES, "tag"),
            types={"video_id": pl.Int64},
        )
        _check_ids(log, "user_id", USERS, users)
        _check_ids(log, "video_id", VIDEOS, videos)
        columns = _columns(self.min_count)
        names = [column.name for column in columns]
        return RawLog(
            frame=_join(log, users, videos, label=self.label, names=names),
            columns=columns,
            item=("video_id", "author_id", "duration"),
            entity=("user_id", *USER_CATEGORIES),
            behaviour=("video_id", "author_id", "duration"),
            behaviour_length=self.behaviour_length,
            duplicates=duplicates,
            notes={**notes, "complete_release": len(log) + duplicates == STANDARD_ROWS},
        )

    def fingerprint(self) -> dict[str, str]:
        if self.raw_dir is None:
            return {"url": self.url}
        found = [find_table(self.raw_dir, name, needed=False) for name in (*LOGS, *SIDE_TABLES)]
        return {path.name: sha256(path) for path in found if path}

    def _folder(self) -> tuple[Path, dict[str, str]]:
        if self.raw_dir is not None:
            return self.raw_dir, {}
        cache = self.cache_dir.expanduser() / self.name
        members = [f"{name}.csv" for name in (*LOGS, *SIDE_TABLES)]
        digest = fetch_archive(self.url, cache, members=members)
        return cache, {"archive_sha256": digest}


def _read_logs(folder: Path) -> pl.DataFrame:
    found = [path for name in LOGS if (path := find_table(folder, name, needed=False))]
    if not found:
        raise UserError(
            f"{folder} holds no {LOGS[1]}.csv or .csv.gz: point --data.raw-dir at the folder of "
            "the official KuaiRand-Pure files"
        )
    return pl.concat([read_csv(path, LOG_COLUMNS, types=LOG_COLUMNS) for path in found])


def _check_ids(log: pl.DataFrame, name: str, limit: int, side: pl.DataFrame) -> None:
    ids = log[name]
    if empty := ids.null_count():
        raise UserError(f"{name} is empty in {empty:,} rows of the log: fill or drop those rows")
    bad = (ids < 0) | (ids >= limit)
    if bad.any():
        raise UserError(
            f"{name} {ids.filter(bad)[0]} is outside 0..{limit - 1}, the range of KuaiRand-Pure; "
            "is this another release?"
        )
    twice = side[name].is_duplicated()
    if twice.any():
        raise UserError(
            f"{name} {side[name].filter(twice)[0]} stands more than once in its side table; each "
            "must be there once, or rows of the log would be multiplied: fetch the file again"
        )
    missing = ~ids.is_in(side[name].implode())
    if missing.any():
        raise UserError(
            f"{name} {ids.filter(missing)[0]} of the log is not in the side table "
            f"({missing.sum():,} rows): the files do not belong together"
        )


def _join(
    log: pl.DataFrame, users: pl.DataFrame, videos: pl.DataFrame, *, label: str, names: list[str]
) -> pl.DataFrame:
    hour = (pl.col("time_ms") // 3_600_000 + HOURS_EAST) % 24
    return (
        log.with_columns(hour.alias("hour"))
        .join(users, on="user_id", how="left")
        .join(videos, on="video_id", how="left")
        .with_columns(
            pl.col("tag").str.split(",").alias("tag"),
            *(pl.col(n).fill_null(0.0).clip(0.0) for n in USER_COUNTS),
            pl.col("duration_ms").fill_null(0.0).alias("duration"),
            pl.col("user_id").alias("key"),
            pl.col("time_ms").alias("time"),
            pl.col(label).alias("label"),
        )
        .select("key", "time", "label", *names)
    )


def _columns(min_count: int) -> tuple[Column, ...]:
    ids = tuple(Column(n, min_count=min_count) for n in ("user_id", "video_id", "author_id"))
    categories = (*USER_CATEGORIES, *VIDEO_CATEGORIES[1:], "tab", "hour")
    return (
        *ids,
        Column("duration", kind="numeric", buckets=20),
        *(Column(name) for name in categories),
        Column("tag", kind="sequence", length=4),
        *(Column(name, kind="numeric", log=True) for name in USER_COUNTS),
    )
