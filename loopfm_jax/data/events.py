"""A log of events -> what examples can see of it, and each example's slice of that.

The event log (TaobaoAd: 723 million rows) is read once, in batches, and split by key into files;
each of them then fits in memory, is sorted by (key, time) and keeps the events that some example
sees. An example sees the last `length` events of its key strictly before its own time. What is kept
stands file by file: a key's events are together, and that is all that slices need.
"""

import contextlib
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl

from loopfm_jax.data.coding import Coded, code, dense
from loopfm_jax.data.order import order_rows
from loopfm_jax.data.raw import Events, RawLog, Sequences
from loopfm_jax.errors import UserError

BUCKETS = 64
"""Files the events are split into, by a hash of the key: active keys often have similar numbers."""
BATCH = 1 << 20


def place(raw: RawLog, order: pl.Series, *, scratch: Path) -> RawLog:
    """The log with `sequences` in place of its `events`.

    Args:
      order: rows of the frame in time order, those that are kept.
      scratch: a folder with room for the events, about 25 bytes each; left as it was.

    Raises:
      UserError: the event log cannot be read, or an event lacks a value.
    """
    events = raw.events
    assert events is not None
    key, time = raw.frame["key"].gather(order), raw.frame["time"].gather(order)
    number = dense(key).astype(np.int32)
    keys = (
        pl.DataFrame({"key": key, "number": number, "time": time})
        .group_by("key")
        .agg(pl.first("number"), pl.max("time").alias("last"))
    )
    bucket = _bucket(number)
    names = [c.name for c in events.columns]
    record = np.dtype([("number", "i4"), ("time", "i8"), *((name, "i4") for name in names)])
    kept, end, length = [], np.zeros(len(order), np.int64), np.zeros(len(order), np.int32)
    placed = 0
    with tempfile.TemporaryDirectory(dir=scratch, prefix=".events") as folder:
        paths = _split(events, keys, record, Path(folder))
        for i, path in enumerate(paths):
            rows = np.flatnonzero(bucket == i)
            seen, stop, count = _visible(
                np.fromfile(path, record),
                number[rows],
                time.gather(rows).to_numpy(),
                length=events.length,
            )
            end[rows], length[rows] = stop + placed, count
            kept.append({name: _small(seen[name].to_numpy()) for name in names})
            placed += len(seen)
            path.unlink()
    values = {name: np.concatenate([part.pop(name) for part in kept]) for name in names}
    return _with_slices(raw, events, values, order, end, length)


def _split(events: Events, keys: pl.DataFrame, record: np.dtype, folder: Path) -> list[Path]:
    """One file of records per bucket of keys; events that no example can see are left out."""
    scan = (
        events.scan.join(keys.lazy(), on="key")
        .filter(pl.col("time") < pl.col("last"))
        .select("number", "time", *(pl.col(c.name).to_physical() for c in events.columns))
    )
    paths = [folder / str(bucket) for bucket in range(BUCKETS)]
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(path.open("wb")) for path in paths]
        try:
            for batch in scan.collect_batches(chunk_size=BATCH, maintain_order=False):
                _check_whole(batch, events)
                rows = np.empty(len(batch), record)
                for name in batch.columns:
                    rows[name] = batch[name].to_numpy()
                bucket = _bucket(rows["number"])
                by_bucket = np.argsort(bucket, kind="stable")
                rows = rows[by_bucket]
                stops = np.searchsorted(bucket[by_bucket], np.arange(BUCKETS + 1))
                for file, low, high in zip(files, stops[:-1], stops[1:], strict=True):
                    rows[low:high].tofile(file)
        except pl.exceptions.PolarsError as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(f"the {events.name} log cannot be read: {reason}") from None
    return paths


def _check_whole(batch: pl.DataFrame, events: Events) -> None:
    for column in events.columns:
        if empty := batch[column.name].null_count():
            name = column.shares or column.name
            raise UserError(
                f"the {events.name} log holds events without a {name} ({empty:,} among "
                f"{len(batch):,}); every event needs one: fill or drop those rows"
            )


def _bucket(number: np.ndarray) -> np.ndarray:
    """Multiplicative hashing: the upper bits of the product with the golden ratio."""
    mixed = number.astype(np.uint32) * np.uint32(0x9E3779B1)
    return ((mixed >> np.uint32(16)) % BUCKETS).astype(np.uint8)


def _visible(
    rows: np.ndarray, number: np.ndarray, time: np.ndarray, *, length: int
) -> tuple[pl.DataFrame, np.ndarray, np.ndarray]:
    """The events that some example sees, sorted, and every example's (end, length) among them."""
    frame = pl.DataFrame({name: rows[name] for name in rows.dtype.names or ()})
    if not len(rows):
        return frame, np.zeros(len(time), np.int64), np.zeros(len(time), np.int32)
    order = order_rows(frame, by=("number", "time"))
    keys, times = (frame[name].gather(order).to_numpy() for name in ("number", "time"))
    known = keys[np.r_[True, keys[1:] != keys[:-1]]]
    low, high = int(times.min()), int(times.max())
    span = high - low + 1

    def pack(number: np.ndarray, since: np.ndarray | int) -> np.ndarray:
        return np.searchsorted(known, number) * span + since

    packed = pack(keys, times - low)
    end = _search(packed, pack(number, np.clip(time - low, 0, span)))
    start = _search(packed, pack(number, 0))
    count = np.minimum(end - start, length).astype(np.int32)
    count[~np.isin(number, known)] = 0
    cover = np.zeros(len(rows) + 1, np.int32)
    np.add.at(cover, end - count, 1)
    np.add.at(cover, end, -1)
    seen = np.cumsum(cover)[:-1] > 0
    before = np.concatenate([[0], np.cumsum(seen)])
    return frame[order.filter(pl.Series(seen))], before[end], count


def _search(values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """`np.searchsorted`, in the order of what is wanted: five times faster on large arrays."""
    order = np.argsort(wanted)
    found = np.empty(len(wanted), np.int64)
    found[order] = np.searchsorted(values, wanted[order])
    return found


def _small(values: np.ndarray) -> np.ndarray:
    """In the smallest type that holds them."""
    if not len(values):
        return values.astype(np.uint8)
    kinds = np.min_scalar_type(values.min()), np.min_scalar_type(values.max())
    return values.astype(np.result_type(*kinds))


def _with_slices(
    raw: RawLog,
    events: Events,
    values: Mapping[str, np.ndarray],
    order: pl.Series,
    end: np.ndarray,
    length: np.ndarray,
) -> RawLog:
    kinds = events.scan.collect_schema()
    coded = {name: _coded(kinds[name], v) for name, v in values.items()}
    slices = {"end": np.zeros(len(raw.frame), np.int64), "length": np.zeros(len(raw.frame), "i4")}
    rows = order.to_numpy()
    slices["end"][rows], slices["length"][rows] = end, length
    columns = [pl.Series(f"{events.name}/{part}", v) for part, v in slices.items()]
    return replace(
        raw,
        frame=raw.frame.with_columns(columns),
        sequences=(*raw.sequences, Sequences(events.name, events.columns, coded)),
        events=None,
    )


def _coded(kind: pl.DataType, values: np.ndarray) -> Coded:
    if isinstance(kind, pl.Enum):
        return Coded(values, pl.Series(kind.categories, dtype=pl.String))
    coded = code(pl.Series(values))
    return Coded(_small(coded.codes), coded.texts)
