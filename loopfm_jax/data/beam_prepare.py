"""A log in files, prepared by the workers of Beam pipelines: the folder that `prepare` writes.

    sort   files -> stretches of time, in order (`beam_sort`)
    fit    stretches -> counts of the FM window's values, first rows of keys
    write  shards of the data set, encoded: ArrayRecord files as TFDS reads them

What pipelines hand on lies in a scratch folder beside the result. In one machine's memory are only
what is fitted (vocabularies, keys) and, one at a time, the FM window's numeric columns: their means
are the same to the last bit.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import lru_cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import polars as pl

from loopfm_jax.data import builder
from loopfm_jax.data.beam_sort import empty_table, sort, write_frame
from loopfm_jax.data.blocks import BLOCK_ROWS
from loopfm_jax.data.checks import check_windows
from loopfm_jax.data.encode import Encoded, encode
from loopfm_jax.data.fit import (
    Fitted,
    continuous,
    count_values,
    discrete,
    fit_counts,
    fit_numbers,
)
from loopfm_jax.data.log import KEY
from loopfm_jax.data.order import collapse_groups
from loopfm_jax.data.prepare import columns_of, cut_times, labels, row_ranges, span, write_schema
from loopfm_jax.data.raw import SPLITS, RawLog, Source
from loopfm_jax.data.schema import Numeric
from loopfm_jax.data.tabular import TabularLog
from loopfm_jax.engine import BeamConfig, import_beam, run_pipeline
from loopfm_jax.errors import UserError


class Stretch(NamedTuple):
    """Rows of the log in time order, in a file."""

    path: Path
    start: int
    stop: int


def prepare_by_beam(source: Source, *, directory: Path, beam: BeamConfig) -> dict[str, Any]:
    """As `prepare.prepare` of what a source reads.

    Raises:
      UserError: besides, on a source that is not in files of one table each.
    """
    if not isinstance(source, TabularLog):
        raise UserError(
            f"--engine beam prepares logs in CSV or Parquet files (data: TabularLog), not "
            f"{source.name}: prepare it with --engine polars; structure takes either engine"
        )
    with TemporaryDirectory(dir=directory) as folder:
        scratch = Path(folder)
        paths, duplicates = sort(source, scratch, beam)
        stretches, raw = _stretches(paths), source.shape(empty_table(source))
        raw = replace(raw, frame=collapse_groups(raw.frame))
        times, text = cut_times(*_ends(stretches), source.windows)
        stops, positives = _count(stretches, times)
        cuts = row_ranges(stops)
        rows = {split: stop - start for split, (start, stop) in cuts.items()}
        check_windows(rows, positives, f"{text}; {span(*_ends(stretches))}")
        log = _Log(raw, stretches, cuts["fm"][1], stops[-1], scratch, directory)
        log.fit(beam)
        written = log.write(source, cuts, beam)
        encoded, keys = log.encode(raw.frame), len(log.numbers[0])
    encoded.vocabulary.write_parquet(directory / "vocabulary.parquet")
    write_schema(directory, written, schema=encoded.schema, rows=rows)
    return {
        "rows": {**rows, "duplicates_dropped": duplicates},
        "keys": keys,
        "positives": positives,
        "windows": text,
        "notes": dict(raw.notes),
    }


def _stretches(paths: Sequence[Path]) -> list[Stretch]:
    if not paths:
        raise UserError("the log has 0 rows; at least one row per window is needed")
    stops = np.cumsum([pl.scan_parquet(p).select(pl.len()).collect().item() for p in paths])
    starts = [0, *stops.tolist()[:-1]]
    return [Stretch(*one) for one in zip(paths, starts, stops.tolist(), strict=True)]


def _ends(stretches: Sequence[Stretch]) -> tuple[int, int]:
    """First and last time."""
    first, last = (pl.read_parquet(stretches[i].path, columns=["time"])["time"] for i in (0, -1))
    return first[0], last[-1]


def _count(
    stretches: Sequence[Stretch], times: Sequence[int]
) -> tuple[list[int], dict[str, float]]:
    """Rows before each time, and the share of positives in the windows between."""
    stops, liked = np.zeros(len(SPLITS), np.int64), np.zeros(len(SPLITS), np.int64)
    for stretch in stretches:
        frame = pl.read_parquet(stretch.path, columns=["time", "label"])
        before = np.searchsorted(frame["time"].to_numpy(), times)
        stops += before
        liked += np.concatenate([[0], np.cumsum(labels(frame["label"]), dtype=np.int64)])[before]
    rows, positive = np.diff(stops, prepend=0), np.diff(liked, prepend=0)
    shares = (positive / np.maximum(rows, 1)).tolist()
    return stops.tolist(), dict(zip(SPLITS, shares, strict=True))


class _Log(NamedTuple):
    """A sorted log, and what it is to become."""

    raw: RawLog
    """Its description; no rows."""
    stretches: list[Stretch]
    fm_rows: int
    rows: int
    """Until the end of the test window."""
    scratch: Path
    directory: Path

    @property
    def numbered(self) -> list[str]:
        """Columns whose values get numbers: the key, and what else may key histories."""
        return ["key", *(self.raw.item if self.raw.keys is None else self.raw.keys)]

    @property
    def numbers(self) -> list[pl.DataFrame]:
        """Of each of `numbered`: value, number."""
        return _tables(self.scratch, "numbers", len(self.numbered))

    def fit(self, beam: BeamConfig) -> None:
        """Writes what `numbers` and `encode` read."""

        def build(pipeline: Any) -> None:
            beam = import_beam()
            _ = (
                pipeline
                | beam.Create([s for s in self.stretches if s.start < self.rows])
                | beam.Reshuffle()
                | "learn" >> beam.FlatMap(self.learn)
                | "together" >> beam.CombinePerKey(_together)
                | "keep" >> beam.MapTuple(lambda name, seen: self._keep(seen, name))
            )

        run_pipeline(beam, build)
        for i in range(len(self.numbered)):
            seen = pl.read_parquet(self.scratch / f"rows-{i}.parquet")
            values = seen.sort("row" if i else "value").select("value")
            self._keep(values.with_row_index("number"), f"numbers-{i}")
        names = [column.name for column in discrete(self.raw)]
        counts = dict(zip(names, _tables(self.scratch, "counts", len(names)), strict=True))
        for i, vocabulary in enumerate(fit_counts(self.raw, counts).values()):
            self._keep(vocabulary, f"vocabulary-{i}")
        numeric = [asdict(self._scale(column.name)) for column in continuous(self.raw)]
        (self.scratch / "numeric.json").write_text(json.dumps(numeric))

    def learn(self, stretch: Stretch) -> Iterator[tuple[str, pl.DataFrame]]:
        """What a stretch knows of values: counts in the FM window, and where they are first."""
        frame = pl.read_parquet(stretch.path).head(self.rows - stretch.start)
        early = frame.head(max(0, self.fm_rows - stretch.start))
        for i, seen in enumerate(count_values(self.raw, early).values()):
            yield f"counts-{i}", seen
        row = pl.int_range(stretch.start, stretch.start + len(frame), eager=True)
        for i, name in enumerate(self.numbered):
            yield f"rows-{i}", _together([pl.DataFrame({"value": _known(frame[name]), "row": row})])

    def _keep(self, frame: pl.DataFrame, name: str) -> None:
        write_frame(frame, self.scratch / f"{name}.parquet")

    def _scale(self, name: str) -> Numeric:
        early = [s for s in self.stretches if s.start < self.fm_rows]
        parts = [pl.read_parquet(s.path, columns=[name])[name] for s in early]
        values = pl.concat(parts).head(self.fm_rows).cast(pl.Float64)
        return fit_numbers(self.raw, name, values.rechunk().to_numpy())

    def encode(self, frame: pl.DataFrame) -> Encoded:
        """Rows by what was fitted."""
        names = [column.name for column in discrete(self.raw)]
        tables = _tables(self.scratch, "vocabulary", len(names))
        numeric = json.loads((self.scratch / "numeric.json").read_text())
        fitted = Fitted(
            dict(zip(names, tables, strict=True)), tuple(Numeric(**one) for one in numeric)
        )
        return encode(self.raw, frame, fm_rows=0, fitted=fitted)

    def write(
        self, source: TabularLog, cuts: Mapping[str, tuple[int, int]], beam: BeamConfig
    ) -> Path:
        """The data set; returns its folder."""
        size = builder.SHARD_BLOCKS * BLOCK_ROWS
        shards = [
            (split, number, low, min(low + size, stop))
            for split, (start, stop) in cuts.items()
            for number, low in enumerate(range(start, stop, size))
        ]

        def build(pipeline: Any) -> None:
            beam = import_beam()
            todo = pipeline | beam.Create(shards) | beam.Reshuffle()
            _ = todo | "write" >> beam.MapTuple(partial(self.write_shard, source))

        run_pipeline(beam, build)
        written: dict[str, list[builder.Shard]] = {split: [] for split in cuts}
        for split, number, *_ in shards:
            told = json.loads((self.scratch / f"{split}-{number}.json").read_text())
            written[split].append(builder.Shard(*told))
        return builder.finish(self._describe(source, *self._columns(self.raw.frame, 0)), written)

    def write_shard(self, source: TabularLog, split: str, number: int, low: int, high: int) -> None:
        """One file of the data set."""
        columns, ragged = self._columns(self._rows(low, high), low)
        info = self._describe(source, columns, ragged)
        blocks = builder.row_blocks(columns, ragged, 0, high - low)
        shard = builder.write_shard(info, split, number, blocks)
        (self.scratch / f"{split}-{number}.json").write_text(json.dumps(shard))

    def _describe(self, source: TabularLog, columns: Any, ragged: Any) -> Any:
        return builder.describe(
            source.name, self.directory, columns=columns, ragged=ragged, card=source.card
        )

    def _rows(self, low: int, high: int) -> pl.DataFrame:
        parts = [
            pl.scan_parquet(s.path)
            .slice(max(low - s.start, 0), min(high, s.stop) - max(low, s.start))
            .collect()
            for s in self.stretches
            if s.start < high and low < s.stop
        ]
        return pl.concat(parts, rechunk=True)

    def _columns(
        self, frame: pl.DataFrame, first: int
    ) -> tuple[dict[str, builder.Columns], dict[str, builder.Ragged]]:
        """What is stored of rows, of which `first` is the first one's number."""
        encoded = self.encode(frame)
        columns = columns_of(
            replace(self.raw, frame=frame),
            encoded,
            pl.int_range(len(frame), eager=True),
            time=frame["time"].to_numpy(),
            label=labels(frame["label"]),
        )
        columns["example_id"] = np.arange(first, first + len(frame), dtype=np.int64)
        for i, (name, known) in enumerate(zip(self.numbered, self.numbers, strict=True)):
            number = _known(frame[name]).replace_strict(known["value"], known["number"])
            kind = pl.Int32 if i else pl.Int64
            columns[KEY + name if i else name] = number.cast(kind).to_numpy()
        return columns, {n: (r.values, r.lengths) for n, r in encoded.ragged.items()}


@lru_cache(maxsize=8)
def _tables(scratch: Path, name: str, count: int) -> list[pl.DataFrame]:
    return [pl.read_parquet(scratch / f"{name}-{i}.parquet") for i in range(count)]


def _known(values: pl.Series) -> pl.Series:
    """Values that are the same column of `coding.Coded` are alike: missing text is empty."""
    return values.fill_null("") if values.dtype == pl.String else values


def _together(frames: Iterable[pl.DataFrame]) -> pl.DataFrame:
    whole = pl.concat(frames)
    found = [pl.col(n).sum() if n == "count" else pl.col(n).min() for n in whole.columns[1:]]
    return whole.group_by("value").agg(found)
