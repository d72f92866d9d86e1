"""Tiny files in the exact layout of the KuaiRand-Pure release."""

import csv
import gzip
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

LOG = (
    "user_id,video_id,date,hourmin,time_ms,is_click,is_like,is_follow,is_comment,is_forward,"
    "is_hate,long_view,play_time_ms,duration_ms,profile_stay_time,comment_stay_time,"
    "is_profile_enter,is_rand,tab"
).split(",")
USER = (
    "user_id,user_active_degree,is_lowactive_period,is_live_streamer,is_video_author,"
    "follow_user_num,follow_user_num_range,fans_user_num,fans_user_num_range,friend_user_num,"
    "friend_user_num_range,register_days,register_days_range"
).split(",") + [f"onehot_feat{i}" for i in range(18)]
VIDEO = (
    "video_id,author_id,video_type,upload_dt,upload_type,visible_status,video_duration,"
    "server_width,server_height,music_id,music_type,tag"
).split(",")
OUTCOMES = ("is_like is_follow is_comment is_forward is_hate play_time_ms profile_stay_time "
            "comment_stay_time is_profile_enter").split()  # fmt: skip
LATE_LOG = "log_standard_4_22_to_5_08_pure.csv"
EARLY_LOG = "log_standard_4_08_to_4_21_pure.csv"
START_MS = 1_650_880_000_000
USERS, VIDEOS = 6, 9

Row = dict[str, Any]


def log_rows(count: int = 120) -> list[Row]:
    """Unlike rows, one every 100 s of changing users, about half of them clicked."""
    rows = []
    for i in range(count):
        row = dict.fromkeys(LOG, 0) | {
            "user_id": i * 5 % USERS,
            "video_id": i * 7 % VIDEOS,
            "date": 20220425,
            "hourmin": 1800,
            "time_ms": START_MS + 100_000 * i,
            "is_click": int(i % 7 in (0, 2, 3)),
            "long_view": int(i % 5 == 0),
            "play_time_ms": 13 * i,
            "duration_ms": 1000 * (i * 7 % VIDEOS + 1),
            "tab": i % 3,
        }
        rows.append(row)
    return rows


def user_rows() -> list[Row]:
    return [
        dict.fromkeys(USER, 0)
        | {"user_id": u, "user_active_degree": "full_active", "follow_user_num": 10 * u}
        | {"fans_user_num_range": "[1,10)", "register_days": 30 + u}
        for u in range(USERS)
    ]


def video_rows() -> list[Row]:
    tags = ["39", "39,41", "", "7,8,9,10,11"]
    return [
        dict.fromkeys(VIDEO, 0)
        | {"video_id": v, "author_id": 1000 + v // 2, "video_type": "NORMAL", "tag": tags[v % 4]}
        for v in range(VIDEOS)
    ]


def write_release(
    folder: Path,
    *,
    log: Sequence[Row] | None = None,
    users: Sequence[Row] | None = None,
    videos: Sequence[Row] | None = None,
    suffix: str = "",
    early: Sequence[Row] = (),
) -> Path:
    """Writes the official files (`suffix` ".gz": compressed) and returns the folder."""
    write_table(folder / (LATE_LOG + suffix), LOG, log_rows() if log is None else log)
    if early:
        write_table(folder / (EARLY_LOG + suffix), LOG, early)
    write_table(folder / f"user_features_pure.csv{suffix}", USER, users or user_rows())
    write_table(folder / f"video_features_basic_pure.csv{suffix}", VIDEO, videos or video_rows())
    return folder


def write_table(path: Path, columns: Iterable[str], rows: Sequence[Mapping[str, Any]]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(columns), extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    data = text.getvalue().encode()
    path.write_bytes(gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)
