"""The order of a log's rows: one for every set of rows, whatever order the files had.

Rows of one key and time stand as lots say: sorted by their label they would tell it to every
history, which keeps their order.

Numbers are sorted, not rows: a sorted copy of a wide log would cost as much memory as the log, and
comparing all columns of all rows most of the time. Only rows that still tie look at one more
column.
"""

from collections.abc import Collection, Iterable

import numpy as np
import polars as pl


def collapse_groups(frame: pl.DataFrame) -> pl.DataFrame:
    """Makes all rows of one impression group one moment.

    `time` becomes the moment when an example must be answered, `logged_time` the moment when its
    row may enter histories: the first and the last time of its impression group.
    """
    if "group" not in frame.columns:
        return frame.with_columns(pl.col("time").alias("logged_time"))
    moment = ["key", "group"]
    return frame.with_columns(
        pl.col("time").max().over(moment).alias("logged_time"),
        pl.col("time").min().over(moment).alias("time"),
    )


def order_log(frame: pl.DataFrame, *, truth: Collection[str] = ()) -> pl.Series:
    """Row numbers by time and key, then by lots.

    truth: columns that, as the label, have no say in which row gets which lot, unless nothing else
      tells two rows apart.
    """
    by, told_last = ("time", "key"), ("label", *truth)
    names = sorted(frame.columns, key=lambda name: name in told_last)
    order = order_rows(frame.select(names), by=by).to_numpy().copy()
    time, key = (frame[name].gather(order) for name in by)
    run, times = _runs([time, key]), time.to_numpy()
    tied = np.flatnonzero(_repeated(run))
    key_at_time = run[tied] - run[np.searchsorted(times, times[tied])]
    place = tied - tied[np.searchsorted(run[tied], run[tied])]
    lot = _lots(times[tied], key_at_time, place)
    order[tied] = order[tied][np.lexsort((lot, run[tied]))]
    return pl.Series(order)


def _lots(time: np.ndarray, key_at_time: np.ndarray, place: np.ndarray) -> np.ndarray:
    """What SplitMix64, seeded with the time, draws for a place of one of the keys there."""
    number = (key_at_time.astype(np.uint64) << np.uint64(32)) + (place + 1).astype(np.uint64)
    x = time.astype(np.uint64) + number * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def order_rows(frame: pl.DataFrame, *, by: tuple[str, str]) -> pl.Series:
    """Row numbers sorted by two columns and then by every other one, in the frame's order."""
    first = frame.select(pl.arg_sort_by(*by)).to_series()
    run = _runs([frame[name].gather(first) for name in by])
    order, tied = first.to_numpy().copy(), np.arange(len(frame))
    for name in (n for n in frame.columns if n not in by):
        again = _repeated(run)
        tied, run = tied[again], run[again]
        if not len(tied):
            break
        rows = pl.DataFrame({"run": run, "value": frame[name].gather(order[tied])})
        finer = rows.select(pl.arg_sort_by("run", "value")).to_series().to_numpy()
        order[tied] = order[tied][finer]
        rows = rows[finer]
        run = _runs([rows["run"], rows["value"]])
    return pl.Series(order)


def _runs(columns: Iterable[pl.Series]) -> np.ndarray:
    """Numbers of the runs of equal values in sorted columns."""
    changes = [c.ne_missing(c.shift(1)).to_numpy() for c in columns]
    return np.cumsum(np.logical_or.reduce(changes), dtype=np.int32)


def _repeated(run: np.ndarray) -> np.ndarray:
    """Where a run has more than one row."""
    same = run[1:] == run[:-1]
    return np.concatenate([same, [False]]) | np.concatenate([[False], same])
