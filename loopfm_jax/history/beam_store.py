"""The store of one kind of key, written by the workers of a Beam pipeline.

    parts of the log -> pieces of ranges -> a range, sorted -> its rows of the store's files
                                                            -> slices -> blocks of end, length

An element is a block of columns, never a row. What happens within a range is what this machine
would do (`ranges`), so the files are the same, byte for byte. A range is one worker's memory: a key
that owns many rows is several ranges. Workers write rows of files that lie where all see them; a
bundle that is run again writes the same bytes again.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from loopfm_jax.engine import BeamConfig, import_beam, run_pipeline
from loopfm_jax.history.ranges import (
    Asked,
    Part,
    Ranges,
    asked_ranges,
    cut,
    earlier,
    entry_ranges,
    latest,
    slices_within,
    tail,
)
from loopfm_jax.history.rowfile import Column, RowFile, write_at
from loopfm_jax.history.slices import SliceConfig

RANGE = 1 << 21
"""Events of a range, about."""
BLOCK = 1 << 19
"""Rows of the log that one element holds."""


class Before(NamedTuple):
    """What ranges behind one must know of it."""

    entries: int
    tail: np.ndarray


class Piece(NamedTuple):
    """What a block of the log has for one range."""

    first: int
    """Row of the log."""
    entries: Part
    told: Mapping[str, np.ndarray]
    """Of the entries."""
    asked: Part


Found = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Rows of the log, and their `end` and `length`."""


def write_store(
    folder: Path,
    asked: Asked,
    told: Mapping[str, Column],
    *,
    config: SliceConfig,
    beam: BeamConfig,
) -> None:
    """As `store.write_store`. Columns in memory travel to the workers: large ones are files."""
    ranges, blocks = cut(asked, size=RANGE), _blocks(len(asked))
    _make_files(folder, asked, told, blocks)
    deal = _Deal(asked, told, ranges, config)
    write = _Write(folder, ranges, config)

    def build(pipeline: Any) -> None:
        beam = import_beam()
        parts = pipeline | beam.Create(blocks) | beam.Reshuffle()
        counted = (
            parts
            | "look" >> beam.FlatMap(deal.look)
            | "count" >> beam.CombinePerKey(_together(config.length))
        )
        found = (
            parts
            | "deal" >> beam.FlatMap(deal.pieces)
            | "ranges" >> beam.GroupByKey()
            | "write" >> beam.FlatMap(write.range, counted=beam.pvalue.AsDict(counted))
        )
        _ = found | "blocks" >> beam.GroupByKey() | "slices" >> beam.Map(write.slices)

    run_pipeline(beam, build)


def _blocks(rows: int) -> list[tuple[int, int]]:
    return [(low, min(low + BLOCK, rows)) for low in range(0, rows, BLOCK)]


def _make_files(
    folder: Path, asked: Asked, told: Mapping[str, Column], blocks: list[tuple[int, int]]
) -> None:
    """Of their final size, so that every worker may write its rows."""
    kept, rows = asked.kept, len(asked)
    if kept is None:
        entries = rows
    else:
        entries = sum(int(np.count_nonzero(kept[slice(*block)])) for block in blocks)
    folder.mkdir()
    files = {name: ((entries, *c.shape[1:]), c.dtype) for name, c in told.items()}
    files |= {"row": ((entries,), np.int32), "end": ((rows,), np.int64)}
    files |= {"length": ((rows,), np.int32)}
    for name, (shape, dtype) in files.items():
        RowFile(folder / f"{name}.npy", shape=shape, dtype=dtype).close()


class _Deal(NamedTuple):
    """Blocks of the log -> what they have for every range."""

    log: Asked
    told: Mapping[str, Column]
    ranges: Ranges
    config: SliceConfig

    def look(self, block: tuple[int, int]) -> Iterator[tuple[int, Before]]:
        part = slice(*block)
        number = entry_ranges(self.log, self.ranges, part)
        key, time = self.log.key[part], self.log.logged_time[part]
        for mine, rows in _groups(number, below=len(self.ranges)):
            entries = Part(rows, key[rows], time[rows])
            last = tail(self.ranges, mine, entries, self.config.length)
            yield mine, Before(len(rows), last)

    def pieces(self, block: tuple[int, int]) -> Iterator[tuple[int, Piece]]:
        part, log = slice(*block), self.log
        key, time, logged = log.key[part], log.time[part], log.logged_time[part]
        told = {name: column[part] for name, column in self.told.items()}
        entries = dict(_groups(entry_ranges(log, self.ranges, part), below=len(self.ranges)))
        asked = dict(_groups(asked_ranges(log, self.ranges, part, self.config)))
        none = np.zeros(0, np.int64)
        for mine in entries.keys() | asked.keys():
            e, a = entries.get(mine, none), asked.get(mine, none)
            yield (
                mine,
                Piece(
                    part.start,
                    Part(e + part.start, key[e], logged[e]),
                    {name: values[e] for name, values in told.items()},
                    Part(a + part.start, key[a], time[a]),
                ),
            )


class _Write(NamedTuple):
    """Ranges, and blocks of slices -> rows of the store's files."""

    folder: Path
    ranges: Ranges
    config: SliceConfig

    def range(
        self, dealt: tuple[int, Iterable[Piece]], *, counted: Mapping[int, Before]
    ) -> Iterator[tuple[int, Found]]:
        number, pieces = dealt[0], sorted(dealt[1], key=lambda piece: piece.first)
        entries, asked = _joined([p.entries for p in pieces]), _joined([p.asked for p in pieces])
        tails = {n: one.tail for n, one in counted.items()}
        order, end, length = slices_within(
            earlier(self.ranges, number, tails, self.config.length),
            entries,
            asked,
            key=self.ranges.begins_within(number),
            config=self.config,
        )
        start = sum(one.entries for n, one in counted.items() if n < number)
        write_at(self.folder / "row.npy", start, entries.row[order])
        for name in pieces[0].told:
            values = np.concatenate([piece.told[name] for piece in pieces])
            write_at(self.folder / f"{name}.npy", start, values.take(order, axis=0))
        for block, rows in _groups(asked.row // BLOCK):
            yield block, (asked.row[rows], end[rows] + start, length[rows])

    def slices(self, found: tuple[int, Iterable[Found]]) -> None:
        block, parts = found
        row, end, length = (np.concatenate(column) for column in zip(*parts, strict=True))
        order = np.argsort(row)
        write_at(self.folder / "end.npy", block * BLOCK, end[order])
        write_at(self.folder / "length.npy", block * BLOCK, length[order])


def _together(length: int) -> Callable[[Iterable[Before]], Before]:
    def join(parts: Iterable[Before]) -> Before:
        parts = [Before(0, np.zeros(0, np.int64)), *parts]
        last = latest(np.concatenate([part.tail for part in parts]), length)
        return Before(sum(part.entries for part in parts), last)

    return join


def _groups(number: np.ndarray, *, below: int | None = None) -> Iterator[tuple[int, np.ndarray]]:
    """Numbers that occur, and where; of those below a limit."""
    order = np.argsort(number, kind="stable")
    found, starts = np.unique(number[order], return_index=True)
    stops = [*starts[1:].tolist(), len(order)][: len(found)]
    for mine, start, stop in zip(found.tolist(), starts.tolist(), stops, strict=True):
        if below is None or mine < below:
            yield mine, order[start:stop]


def _joined(parts: list[Part]) -> Part:
    return Part(*(np.concatenate(column) for column in zip(*parts, strict=True)))
