"""TaobaoAd-shaped files of any size in the exact layout of the raw release.

    python tests/taobao_files.py FOLDER --rows 26500000 --events 100000000

writes a log of the size of the real one, for measuring what `loopfm prepare` takes.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import polars as pl

START_S = 1_494_000_000  # 2017-05-06 00:00 UTC+8
DAY_S = 86_400
PIDS = ("430548_1007", "430539_1007")
BTAGS = ("pv", "cart", "fav", "buy")
CHUNK = 5_000_000


def write_release(
    folder: Path,
    *,
    rows: int = 400,
    users: int = 20,
    ads: int = 30,
    events: int = 2000,
    cates: int = 12,
    brands: int = 15,
    seed: int = 0,
) -> Path:
    """One user in twenty has no profile, ads may lack a brand, profiles lack levels."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    cate, brand = rng.integers(1, cates + 1, ads), rng.integers(1, brands + 1, ads)
    _write(folder / "ad_feature.csv", [_ads(rng, cate, brand)])
    _write(folder / "user_profile.csv", [_profiles(rng, users)])
    samples = (_samples(rng, size, users, cate) for size in _chunks(rows))
    _write(folder / "raw_sample.csv", samples)
    log = (_events(rng, size, users, cates, brands) for size in _chunks(events))
    _write(folder / "behavior_log.csv", log)
    return folder


def _chunks(rows: int) -> Iterator[int]:
    for low in range(0, rows, CHUNK):
        yield min(CHUNK, rows - low)


def _write(path: Path, frames) -> None:
    with path.open("wb") as file:
        for i, frame in enumerate(frames):
            frame.write_csv(file, include_header=i == 0)


def _popular(rng: np.random.Generator, size: int, count: int) -> np.ndarray:
    """Numbers 0 .. count-1, small ones far more often."""
    return np.minimum((count * rng.random(size) ** 3).astype(np.int64), count - 1)


def _ads(rng: np.random.Generator, cate: np.ndarray, brand: np.ndarray) -> pl.DataFrame:
    count = len(cate)
    number = pl.Series(brand).cast(pl.String)
    return pl.DataFrame(
        {
            "adgroup_id": np.arange(1, count + 1),
            "cate_id": cate,
            "campaign_id": rng.integers(1, count // 2 + 2, count),
            "customer": rng.integers(1, count // 3 + 2, count),
            "brand": number.set(pl.Series(rng.random(count) < 0.3), "NULL"),
            "price": rng.lognormal(5, 1, count).round(2),
        }
    )


def _profiles(rng: np.random.Generator, users: int) -> pl.DataFrame:
    user = np.arange(1, users + 1)
    user = user[user % 20 != 0]

    def some(low: int, high: int, *, missing: float = 0.0) -> pl.Series:
        values = pl.Series(rng.integers(low, high, len(user)))
        return values.set(pl.Series(rng.random(len(user)) < missing), None)

    return pl.DataFrame(
        {
            "userid": user,
            "cms_segid": some(0, 97),
            "cms_group_id": some(0, 13),
            "final_gender_code": some(1, 3),
            "age_level": some(0, 7),
            "pvalue_level": some(1, 4, missing=0.5),
            "shopping_level": some(1, 4),
            "occupation": some(0, 2),
            "new_user_class_level ": some(1, 5, missing=0.3),  # the release's own trailing blank
        }
    )


def _samples(rng: np.random.Generator, rows: int, users: int, cate: np.ndarray) -> pl.DataFrame:
    user, ad = _popular(rng, rows, users) + 1, _popular(rng, rows, len(cate))
    taste = (cate[ad] + user) % 3 == 0  # something to learn
    click = rng.random(rows) < np.where(taste, 0.5, 0.1)
    return pl.DataFrame(
        {
            "user": user,
            "time_stamp": START_S + rng.integers(0, 8 * DAY_S, rows),
            "adgroup_id": ad + 1,
            "pid": pl.Series(PIDS).gather(rng.integers(0, 2, rows)),
            "nonclk": 1 - click,
            "clk": click.astype(np.int8),
        }
    )


def _events(
    rng: np.random.Generator, rows: int, users: int, cates: int, brands: int
) -> pl.DataFrame:
    return pl.DataFrame(
        {
            "user": _popular(rng, rows, users) + 1,
            "time_stamp": START_S + rng.integers(-14 * DAY_S, 8 * DAY_S, rows),
            "btag": pl.Series(BTAGS).gather(rng.choice(4, rows, p=[0.9, 0.05, 0.03, 0.02])),
            "cate": _popular(rng, rows, cates) + 1,
            "brand": _popular(rng, rows, brands) + 1,
        }
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rows", type=int, default=26_500_000)
    parser.add_argument("--events", type=int, default=100_000_000)
    sizes = parser.parse_args()
    write_release(
        sizes.folder,
        rows=sizes.rows,
        events=sizes.events,
        users=1_140_000,
        ads=846_000,
        cates=13_000,
        brands=460_000,
    )
