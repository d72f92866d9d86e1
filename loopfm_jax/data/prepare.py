"""Raw log -> prepared log: checked, in time order, cut into windows, encoded.

Layout of the folder: the TFDS data set, `schema.json`, `vocabulary.parquet`.
"""

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from loopfm_jax.data import builder
from loopfm_jax.data.checks import check, check_windows
from loopfm_jax.data.encode import encode
from loopfm_jax.data.log import KEY
from loopfm_jax.data.raw import SPLITS, Card, RawLog, Windows
from loopfm_jax.errors import UserError


def prepare(
    raw: RawLog,
    windows: Windows,
    *,
    name: str,
    card: Card,
    directory: Path,
) -> dict[str, Any]:
    """Writes the prepared log into `directory` and returns its facts.

    Raises:
      UserError: on a log that `checks` refuses, or an empty or one-class window.
    """
    check(raw)
    frame = in_time_order(raw.frame)
    cuts, bounds_text = cut(frame["time"].to_numpy(), windows)
    span = _span(frame["time"].to_numpy())
    frame = frame.head(cuts["test"][1])
    label = frame["label"].cast(pl.Float64).cast(pl.UInt8).to_numpy()
    rows = {split: stop - start for split, (start, stop) in cuts.items()}
    check_windows(rows, {s: label[slice(*cuts[s])] for s in SPLITS}, f"{bounds_text}; {span}")
    encoded = encode(raw, frame, fm_rows=cuts["fm"][1])
    columns = {
        "ids": encoded.ids,
        "label": label,
        "time": frame["time"].to_numpy(),
        "logged_time": frame["logged_time"].to_numpy(),
        "key": dense_key(frame["key"]),
        "example_id": np.arange(len(frame), dtype=np.int64),
    }
    for column in raw.item if raw.keys is None else raw.keys:
        columns[KEY + column] = number(frame[column])
    if encoded.floats.shape[1]:
        columns["floats"] = encoded.floats
    if raw.truth:
        columns["truth"] = frame.select(raw.truth).to_numpy().astype(np.float32)
    folder = builder.write(
        name,
        directory,
        columns=columns,
        ragged={n: (r.values, r.lengths) for n, r in encoded.ragged.items()},
        bounds=cuts,
        card=card,
    )
    schema = {
        "folder": str(folder.relative_to(directory)),
        "schema": encoded.schema.to_json(),
        "truth": list(raw.truth),
    }
    (directory / "schema.json").write_text(json.dumps(schema, indent=1))
    encoded.vocabulary.write_parquet(directory / "vocabulary.parquet")
    return {
        "rows": {**rows, "duplicates_dropped": raw.duplicates},
        "keys": int(columns["key"].max()) + 1,
        "positives": {s: float(label[slice(*cuts[s])].mean()) for s in SPLITS},
        "windows": bounds_text,
        "notes": dict(raw.notes),
    }


def in_time_order(frame: pl.DataFrame) -> pl.DataFrame:
    """Collapses impression groups and sorts by time.

    `time` becomes the moment when an example must be answered, `logged_time` the moment when its
    row may enter histories: the first and the last time of its impression group. Ties are ordered
    by key and then by every other column, so that the order of the input does not matter.
    """
    if "group" in frame.columns:
        moment = ["key", "group"]
        frame = frame.with_columns(
            pl.col("time").max().over(moment).alias("logged_time"),
            pl.col("time").min().over(moment).alias("time"),
        )
    else:
        frame = frame.with_columns(pl.col("time").alias("logged_time"))
    return frame.sort(["time", "key", *(n for n in frame.columns if n not in ("time", "key"))])


def cut(time: np.ndarray, windows: Windows) -> tuple[dict[str, tuple[int, int]], str]:
    """Row ranges of the windows over sorted times, and the same for people."""
    fm_end, vm_end = _to_ms(windows.fm_end, time), _to_ms(windows.vm_end, time)
    middle, mark = vm_end - (vm_end - fm_end) // 4, "its last quarter"
    if windows.validation_start is not None:
        middle, mark = _to_ms(windows.validation_start, time), windows.validation_start
    times = [fm_end, middle, vm_end, _to_ms(windows.test_end, time)]
    marks = [windows.fm_end, mark, windows.vm_end, windows.test_end]
    if sorted(set(times)) != times:
        raise UserError(
            f"window ends must rise, but are {', '.join(marks)}, and {_span(time)}; change "
            "data.windows"
        )
    stops = [int(s) for s in np.searchsorted(time, times)]
    starts = [0, *stops[:-1]]
    text = ", ".join(f"{s} until {m}" for s, m in zip(SPLITS, marks, strict=True))
    return dict(zip(SPLITS, zip(starts, stops, strict=True), strict=True)), text


def _to_ms(mark: str, time: np.ndarray) -> int:
    try:
        if mark.endswith("%"):
            first, last = int(time[0]), int(time[-1]) + 1
            return first + round((last - first) * float(mark[:-1]) / 100)
        moment = datetime.fromisoformat(mark)
    except (ValueError, OverflowError):
        raise UserError(
            f"window end {mark!r} is neither a percentage (50%) nor an ISO time with zone "
            "(2022-05-01T00:00+08:00); change data.windows"
        ) from None
    if moment.tzinfo is None:
        zoned = moment.replace(tzinfo=UTC).isoformat(timespec="minutes")
        raise UserError(f"window end {mark!r} has no time zone; write {zoned}, say")
    return round(moment.timestamp() * 1000)


def _span(time: np.ndarray) -> str:
    ends = [datetime.fromtimestamp(int(ms) / 1000, UTC) for ms in (time[0], time[-1])]
    first, last = (moment.isoformat(timespec="seconds") for moment in ends)
    return f"the log runs from {first} to {last}"


def dense_key(key: pl.Series) -> np.ndarray:
    """Keys of any type -> int64 0..K-1 in the order of their values."""
    return (key.rank("dense") - 1).cast(pl.Int64).to_numpy()


def number(values: pl.Series) -> np.ndarray:
    """Values of any type -> int32 0..K-1 by first appearance: later values renumber nothing."""
    values = values.cast(pl.String).fill_null("")
    known = values.unique(maintain_order=True)
    numbers = pl.int_range(len(known), dtype=pl.Int32, eager=True)
    return values.replace_strict(known, numbers).to_numpy()
