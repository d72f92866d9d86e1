"""Tiny BARS data sets in the exact layout of their converters: headers, order, `^`-joined lists."""

import hashlib
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import polars as pl

Row = dict[str, object]
SHOWN = 3
"""KuaiVideo: rows with one timestamp."""


def joined(values) -> str:
    return "^".join(map(str, values))


def taobao_rows(rng: np.random.Generator, count: int) -> list[Row]:
    def row(i: int) -> Row:
        past = int(rng.integers(0, 6))
        profile = ("cms_segid", "cms_group_id", "final_gender_code", "age_level", "pvalue_level",
                   "shopping_level", "occupation", "new_user_class_level")  # fmt: skip
        return {
            "clk": int(rng.random() < 0.4),
            "btag_his": joined(rng.integers(1, 5, past)),
            "cate_his": joined(rng.integers(1, 8, past)),
            "brand_his": joined(rng.integers(1, 9, max(past - 1, 0))),  # brand 0 is left out
            "userid": int(rng.integers(1, 9)),
            **{name: int(rng.integers(0, 3)) for name in profile},
            "adgroup_id": int(rng.integers(1, 20)),
            "cate_id": int(rng.integers(1, 8)),
            "campaign_id": int(rng.integers(1, 9)),
            "customer": int(rng.integers(1, 9)),
            "brand": int(rng.integers(0, 9)),
            "price": round(float(rng.random()), 6),
            "pid": int(rng.integers(1, 3)),
            "btag": 1,
        }

    return [row(i) for i in range(count)]


def kuai_rows(rng: np.random.Generator, count: int) -> list[Row]:
    """Histories are the first values of one list a user, growing."""
    lists = {(u, kind): rng.integers(0, 30, 200) for u in range(6) for kind in ("pos", "neg")}
    rows = []
    for i in range(count):
        user = int(rng.integers(0, 6))
        rows.append(
            {
                "timestamp": i // SHOWN,
                "user_id": user,
                "item_id": int(rng.integers(0, 30)),
                "is_click": int(rng.random() < 0.4),
                "is_like": 0,
                "is_follow": 0,
                "pos_items": joined(lists[user, "pos"][: i // 4]),
                "neg_items": joined(lists[user, "neg"][: i // 3]),
            }
        )
    return rows


def amazon_rows(rng: np.random.Generator, count: int) -> list[Row]:
    cate = rng.integers(0, 5, 40)
    rows = []
    for i in range(count):
        if i % 2 == 0:
            user, past = int(rng.integers(0, 12)), rng.integers(0, 40, rng.integers(1, 7))
        item = int(rng.integers(0, 40))
        rows.append(
            {
                "label": 1 - i % 2,
                "user_id": user,
                "item_id": item,
                "cate_id": int(cate[item]),
                "item_history": joined(past),
                "cate_history": joined(cate[past]),
            }
        )
    return rows


def write_bars(
    folder: Path,
    rows: Callable[[np.random.Generator, int], list[Row]],
    *,
    train: int = 350,
    test: int = 50,
    seed: int = 0,
) -> Path:
    """train.csv and test.csv; KuaiVideo's with its embeddings."""
    folder.mkdir(parents=True, exist_ok=True)
    made = rows(np.random.default_rng(seed), train + test)
    pl.DataFrame(made[:train]).write_csv(folder / "train.csv")
    pl.DataFrame(made[train:]).write_csv(folder / "test.csv")
    if rows is kuai_rows:
        write_embeddings(folder / "item_visual_emb_dim64.h5")
    return folder


def write_embeddings(path: Path, *, items: int = 30, width: int = 4) -> Path:
    with h5py.File(path, "w") as file:
        file.create_dataset("key", data=list(range(items)))
        file.create_dataset("value", data=np.arange(items * width).reshape(items, width) / 7.0)
    return path


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()
