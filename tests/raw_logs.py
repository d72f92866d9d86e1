"""Small raw logs with every kind of column, and ways to look at what became of them."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import polars as pl

from loopfm_jax.data.log import Log, load
from loopfm_jax.data.prepare import prepare
from loopfm_jax.data.raw import Card, Column, RawLog, Windows

START_MS = 1_700_000_000_000
COLUMNS = (
    Column("item", min_count=2),
    Column("shop", fm_only=True),
    Column("surface"),
    Column("age", kind="numeric", buckets=4),
    Column("tags", kind="sequence", length=3),
    Column("seen", kind="sequence", shares="item", length=4),
    Column("price", kind="numeric", log=True),
    Column("rank", kind="numeric", fm_only=True),
)


def make_frame(rows: int = 200, *, seed: int = 0) -> pl.DataFrame:
    """Rows a second apart, of 7 keys; lists are often empty."""
    rng = np.random.default_rng(seed)

    def lists(most: int, values: int) -> list[list[int]]:
        return [rng.integers(values, size=rng.integers(most)).tolist() for _ in range(rows)]

    return pl.DataFrame(
        {
            "key": rng.integers(7, size=rows),
            "time": START_MS + 1000 * np.arange(rows),
            "label": np.arange(rows) % 2,
            "item": rng.integers(20, size=rows),
            "shop": rng.integers(5, size=rows),
            "surface": rng.choice(["feed", "search"], size=rows),
            "age": rng.uniform(0, 80, size=rows),
            "tags": lists(6, 9),
            "seen": lists(6, 25),
            "price": rng.exponential(10.0, size=rows),
            "rank": rng.normal(3.0, 2.0, size=rows),
        }
    )


def make_raw(frame: pl.DataFrame, columns: tuple[Column, ...] = COLUMNS, **kwargs) -> RawLog:
    return RawLog(frame=frame, columns=columns, item=("item",), **kwargs)


def prepare_into(folder: Path, raw: RawLog, windows: Windows | None = None) -> Path:
    folder.mkdir(parents=True)
    prepare(raw, windows or Windows(), name="small", card=Card("A small log."), directory=folder)
    return folder


def prepare_and_load(folder: Path, raw: RawLog, windows: Windows | None = None) -> Log:
    return load(prepare_into(folder, raw, windows))[0]


def vocabulary(folder: Path, name: str) -> Mapping[str, int]:
    """Value -> local id."""
    table = pl.read_parquet(folder / "vocabulary.parquet").filter(pl.col("field") == name)
    return dict(zip(table["value"], table["id"], strict=True))


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file's bytes by its path: equal dicts are byte-identical folders."""
    paths = sorted(p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): p.read_bytes() for p in paths}


def same_columns(one: Log, two: Log, rows: slice = slice(None)) -> None:
    """Asserts that two logs hold the same values at `rows`."""
    assert one.columns.keys() == two.columns.keys()
    for name in one.columns:
        np.testing.assert_array_equal(one[name][rows], two[name][rows], err_msg=name)
    assert one.ragged.keys() == two.ragged.keys()
    at = np.arange(min(len(one), len(two)))[rows]
    for name in one.ragged:
        a, b = (log.padded(name, at) for log in (one, two))
        np.testing.assert_array_equal(a, b, err_msg=name)
