"""Rows of files -> a log in time order, in files, by the workers of a Beam pipeline.

    parts of files -> moments, without duplicates -> stretches of time, each in order

Rows that are seen together meet before anything is cut by time. An element is a frame, never a row;
no worker holds more than a part of a file or a stretch.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

import numpy as np
import polars as pl

from loopfm_jax.data.checks import check
from loopfm_jax.data.files import concat, drop_duplicates, read_table, row_parts
from loopfm_jax.data.order import collapse_groups, order_log
from loopfm_jax.data.tabular import TabularLog
from loopfm_jax.engine import BeamConfig, import_beam, run_pipeline

STRETCH = 1 << 21
"""Rows of a stretch, and of what is read at once, about."""
SAMPLE = 64
"""Every so many rows' times are looked at to cut the log into stretches."""


def empty_table(source: TabularLog) -> pl.DataFrame:
    """The columns of all files together, and no rows."""
    return concat([read_table(p, source.needed, rows=slice(0, 0)) for p in source.paths()])


def sort(source: TabularLog, scratch: Path, beam: BeamConfig) -> tuple[list[Path], int]:
    """Writes the stretches into `scratch`; they, and how many duplicates were dropped."""
    empty = empty_table(source)
    parts = [(path, rows) for path in source.paths() for rows in row_parts(path, STRETCH)]
    told, sorter = scratch / "told.json", _Sorter(source, empty, len(parts), scratch)

    def build(pipeline: Any) -> None:
        beam = import_beam()
        moments = (
            pipeline
            | beam.Create(parts)
            | beam.Reshuffle()
            | "deal" >> beam.FlatMap(sorter.deal)
            | "moments" >> beam.GroupByKey()
            | "collapse" >> beam.Map(sorter.collapse)
        )
        seen = moments | "look" >> beam.Map(_look) | beam.CombineGlobally(_seen)
        _ = (
            moments
            | "cut" >> beam.FlatMap(sorter.cut, seen=beam.pvalue.AsSingleton(seen))
            | "stretches" >> beam.GroupByKey()
            | "sort" >> beam.Map(sorter.write)
        )
        _ = seen | "tell" >> beam.Map(lambda found: told.write_text(json.dumps(found[1])))

    run_pipeline(beam, build)
    return sorted(scratch.glob("stretch-*.parquet")), json.loads(told.read_text())


class _Sorter(NamedTuple):
    """Rows of files -> stretches of time."""

    source: TabularLog
    empty: pl.DataFrame
    """The columns of all files together."""
    buckets: int
    scratch: Path

    def deal(self, part: tuple[Path, slice]) -> Iterator[tuple[int, pl.DataFrame]]:
        """Rows that are seen together, and so duplicates too, go to one place."""
        path, rows = part
        frame = concat([self.empty, read_table(path, self.source.needed, rows=rows)])
        bucket = frame.select(self.source.moment).hash_rows(seed=0) % max(1, self.buckets)
        yield from _groups(frame, bucket.to_numpy())

    def collapse(self, dealt: tuple[int, Iterable[pl.DataFrame]]) -> tuple[pl.DataFrame, int]:
        frame, duplicates = drop_duplicates(pl.concat(dealt[1]))
        raw = self.source.shape(frame)
        check(raw)
        return collapse_groups(raw.frame), duplicates

    def cut(
        self, found: tuple[pl.DataFrame, int], *, seen: "Seen"
    ) -> Iterator[tuple[int, pl.DataFrame]]:
        frame, (rows, _, sample) = found[0], seen
        count = -(-rows // STRETCH)
        cuts = np.unique(np.sort(sample)[len(sample) * np.arange(1, count) // count])
        yield from _groups(frame, np.searchsorted(cuts, frame["time"].to_numpy(), side="right"))

    def write(self, dealt: tuple[int, Iterable[pl.DataFrame]]) -> None:
        frame = pl.concat(dealt[1])
        write_frame(frame[order_log(frame)], self.scratch / f"stretch-{dealt[0]:06}.parquet")


Seen = tuple[int, int, np.ndarray]
"""Rows, duplicates, and times of some rows."""


def _look(found: tuple[pl.DataFrame, int]) -> Seen:
    return len(found[0]), found[1], found[0]["time"].to_numpy()[::SAMPLE]


def _seen(parts: Iterable[Seen]) -> Seen:
    parts = [(0, 0, np.zeros(0, np.int64)), *parts]
    rows, duplicates, samples = zip(*parts, strict=True)
    return sum(rows), sum(duplicates), np.concatenate(samples)


def _groups(frame: pl.DataFrame, number: np.ndarray) -> Iterator[tuple[int, pl.DataFrame]]:
    for one in np.unique(number).tolist():
        yield one, frame.filter(pl.Series(number == one))


def write_frame(frame: pl.DataFrame, path: Path) -> None:
    """Workers that do the same write the same file; it is there when it is complete."""
    unfinished = path.with_name(f".{uuid4().hex}")
    frame.write_parquet(unfinished)
    unfinished.rename(path)
