"""What the data sets of BARS have in common: `train.csv`, `test.csv`, histories as joined text.

The files are read once, in batches. They have no usable times, so the given order stands for them
(PAPER section 2): the training file is cut into seven equal chunks, each a day long, and the test
file is the eighth. A history is a text like `17^4^23`; rows of one user repeat it over and over, so
every text is split once and rows carry the two integers of their slice.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import polars as pl

from loopfm_jax.data.coding import code
from loopfm_jax.data.files import find_table, reading, scan_csv
from loopfm_jax.data.raw import Column, Pretrained, RawLog, Sequences, Windows
from loopfm_jax.data.schema import Behaviour
from loopfm_jax.errors import UserError
from loopfm_jax.progress import say
from loopfm_jax.units import DAY_MS

PARTS = ("train", "test")
TRAIN_DAYS = 7
START_MS = 946_684_800_000  # 2000-01-01: a date that nobody takes for a real one
CHUNKS = Windows(
    fm_end="2000-01-05T00:00+00:00",
    validation_start="2000-01-07T00:00+00:00",
    vm_end="2000-01-08T00:00+00:00",
    test_end="2000-01-09T00:00+00:00",
)
"""FM on chunks 1-4, VMs on 5-7, test on 8 (the test file)."""
SEPARATOR = "^"
BATCH = 200_000


@dataclass(frozen=True)
class Layout:
    """Columns and roles of one data set's files."""

    label: str
    key: str
    categorical: tuple[str, ...]
    item: tuple[str, ...]
    histories: Mapping[str, str]
    """History column -> the candidate's column whose values it lists."""
    given: tuple[Behaviour, ...]
    md5: Mapping[str, str]
    """By part, as published."""
    entity: tuple[str, ...] = ()
    numeric: tuple[str, ...] = ()
    moment: pl.Expr | None = None
    """Rows of one key with the same value were shown together. Over the file's columns, `row` (its
    number in the file) and `in_test`."""
    moment_columns: tuple[str, ...] = ()
    """Columns that `moment` reads and nothing else does."""
    copies: Mapping[str, str] = field(default_factory=dict)
    """Further column (or history) -> the file's column it repeats, with another vocabulary."""

    @property
    def stored(self) -> tuple[str, ...]:
        """Histories that the file has."""
        return tuple(name for name in self.histories if name not in self.copies)

    @property
    def further(self) -> dict[str, str]:
        """Columns that are not histories and not in the file."""
        return {name: c for name, c in self.copies.items() if name not in self.histories}


def read_bars(
    layout: Layout,
    folder: Path | None,
    *,
    length: int,
    min_count: int,
    check: bool,
    pretrained: Mapping[str, Pretrained] | None = None,
) -> RawLog:
    """Both files as one log.

    Raises:
      UserError: a file or column is missing or damaged, or is not the published one.
    """
    paths = {part: find_table(folder, part) for part in PARTS}
    md5 = {part: _md5(path) for part, path in paths.items() if path} if check else {}
    for part, found in md5.items():
        _compare(paths[part], found, layout.md5[part])
    if not check:
        say("prepare: the files are not compared with the published md5 (--data.no-check)")
    lists = {name: _Lists(name, length) for name in layout.stored}
    parts = [_read_part(paths[part], layout, lists, part) for part in PARTS]
    columns = (*layout.categorical, *layout.further)
    return RawLog(
        frame=pl.concat(parts).rechunk(),
        columns=(
            *(Column(name, min_count=min_count) for name in columns),
            *(Column(name, kind="numeric") for name in layout.numeric),
        ),
        item=layout.item,
        entity=layout.entity,
        keys=tuple(name for name in layout.item if name not in layout.copies),
        sequences=tuple(_sequences(layout, name, lists[name], length) for name in lists),
        given=layout.given,
        pretrained=pretrained or {},
        notes={f"md5_{part}": found for part, found in md5.items()},
    )


def _md5(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest()


def _compare(path: Path | None, found: str, published: str) -> None:
    if found != published:
        raise UserError(
            f"{path} has md5 {found}, the published file has {published}: fetch it again, or read "
            "another version with --data.no-check"
        )


def _read_part(
    path: Path | None, layout: Layout, lists: Mapping[str, "_Lists"], part: str
) -> pl.DataFrame:
    """A file's rows with key, time and label; histories as slices."""
    assert path is not None
    ids = dict.fromkeys((layout.key, *layout.categorical), pl.Float64)  # some were saved as `17.0`
    others = dict.fromkeys((layout.label, *layout.numeric, *layout.moment_columns), pl.Float64)
    texts = dict.fromkeys(lists, pl.String)
    scan = scan_csv(path, ids | others | texts).with_columns(pl.col(n).cast(pl.Int32) for n in ids)
    batches = []
    with reading(path):
        for batch in scan.collect_batches(chunk_size=BATCH, maintain_order=True):
            slices = [lists[name].add(batch[name]) for name in lists]
            batches.append(pl.concat([batch.drop(list(lists)), *slices], how="horizontal"))
    if not batches:
        raise UserError(f"{path} has no rows")
    return _with_roles(pl.concat(batches), layout, in_test=part == "test")


def _with_roles(frame: pl.DataFrame, layout: Layout, *, in_test: bool) -> pl.DataFrame:
    """`key`, `time`, `label` and, where rows were shown together, `group`."""
    days, first = (1, TRAIN_DAYS) if in_test else (TRAIN_DAYS, 0)
    frame = frame.with_row_index("row").with_columns(pl.lit(in_test).alias("in_test"))
    time = START_MS + first * DAY_MS + pl.col("row").cast(pl.Int64) * days * DAY_MS // len(frame)
    roles = [
        pl.col(layout.key).alias("key"),
        time.alias("time"),
        pl.col(layout.label).cast(pl.Float32).alias("label"),
        *(pl.col(source).alias(name) for name, source in layout.further.items()),
    ]
    if layout.moment is not None:  # no moment is in both files
        roles.append((2 * layout.moment + pl.col("in_test")).alias("group"))
    used = {"key", "time", "label", "group", *layout.categorical, *layout.numeric, *layout.further}
    frame = frame.with_columns(roles)
    return frame.select(n for n in frame.columns if n in used or "/" in n)


def _sequences(layout: Layout, name: str, lists: "_Lists", length: int) -> Sequences:
    """A history of the file, with the further ones that repeat it."""
    same = [h for h in layout.histories if layout.copies.get(h, h) == name]
    columns = tuple(
        Column(h, kind="sequence", shares=layout.histories[h], length=length) for h in same
    )
    return Sequences(name, columns, dict.fromkeys(same, code(lists.values())))


class _Lists:
    """Texts of joined ids -> slices of one array. A text is known by its 64-bit hash."""

    def __init__(self, name: str, length: int):
        self._name, self._length = name, length
        self._known = pl.DataFrame(
            schema={"hash": pl.UInt64, f"{name}/end": pl.Int64, f"{name}/length": pl.Int32}
        )
        self._values: list[pl.Series] = []
        self._size = 0

    def add(self, texts: pl.Series) -> pl.DataFrame:
        """`<name>/end` and `<name>/length` of every text."""
        rows = pl.DataFrame({"hash": texts.hash(), "text": texts})
        fresh = rows.unique("hash", keep="first", maintain_order=True)
        fresh = fresh.join(self._known, on="hash", how="anti", maintain_order="left")
        ids = fresh["text"].fill_null("").str.split(SEPARATOR)
        ids = ids.list.eval(pl.element().filter(pl.element() != "")).list.tail(self._length)
        lengths = ids.list.len().cast(pl.Int32)
        self._values.append(self._numbers(ids.filter(lengths > 0).explode()))
        ends = self._size + lengths.cast(pl.Int64).cum_sum()
        self._size += int(lengths.sum())
        known = [fresh["hash"], ends.alias(f"{self._name}/end")]
        known = pl.DataFrame([*known, lengths.alias(f"{self._name}/length")])
        self._known = pl.concat([self._known, known])
        return rows.join(self._known, on="hash", how="left", maintain_order="left").drop(
            "hash", "text"
        )

    def _numbers(self, ids: pl.Series) -> pl.Series:
        numbers = ids.cast(pl.Float64, strict=False)
        if numbers.null_count():
            first = ids.filter(numbers.is_null())[0]
            raise UserError(
                f"column {self._name!r} holds {first!r}, which is not an id: its values are "
                f"numbers joined by {SEPARATOR!r}"
            )
        return numbers.cast(pl.Int32)

    def values(self) -> pl.Series:
        return pl.concat(self._values).rechunk()
