"""Raw log -> prepared log: checked, in time order, cut into windows, encoded.

Layout of the folder: the TFDS data set, `schema.json`, `vocabulary.parquet`; where the log has
them, `sequences/<field>.npy` (what rows hold slices of) and `pretrained/<field>.npy`. Columns are
encoded one by one and written block by block: besides the raw frame there is one copy of the log,
as int32 ids.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from loopfm_jax.data import builder
from loopfm_jax.data.checks import check, check_windows
from loopfm_jax.data.coding import by_appearance, code, dense
from loopfm_jax.data.encode import Encoded, encode
from loopfm_jax.data.events import place
from loopfm_jax.data.log import KEY, PRETRAINED, SEQUENCES
from loopfm_jax.data.order import collapse_groups, order_log
from loopfm_jax.data.raw import SPLITS, Card, Pretrained, RawLog, Windows
from loopfm_jax.data.schema import Schema
from loopfm_jax.errors import UserError

PIECE = 1 << 20


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
    raw = replace(raw, frame=collapse_groups(raw.frame))
    order = order_log(raw.frame, truth=raw.truth)
    time = raw.frame["time"].gather(order).to_numpy()
    cuts, bounds_text = cut(time, windows)
    where = f"{bounds_text}; {span(int(time[0]), int(time[-1]))}"
    order, time = order.head(cuts["test"][1]), time[: cuts["test"][1]]
    label = labels(raw.frame["label"].gather(order))
    rows = {split: stop - start for split, (start, stop) in cuts.items()}
    positives = {s: float(label[slice(*cuts[s])].mean()) if rows[s] else 0.0 for s in SPLITS}
    check_windows(rows, positives, where)
    if raw.events is not None:
        raw = place(raw, order, scratch=directory)
    encoded = encode(raw, raw.frame, fm_rows=cuts["fm"][1], order=order)
    _write_side(directory, raw, encoded)
    raw, encoded = replace(raw, sequences=(), pretrained={}), replace(encoded, sequences={})
    write(
        directory,
        name,
        schema=encoded.schema,
        columns=columns_of(raw, encoded, order, time=time, label=label),
        ragged={n: (r.values, r.lengths) for n, r in encoded.ragged.items()},
        rows=rows,
        card=card,
        truth=raw.truth,
    )
    return {
        "rows": {**rows, "duplicates_dropped": raw.duplicates},
        "keys": raw.frame["key"].gather(order).n_unique(),
        "positives": positives,
        "windows": bounds_text,
        "notes": dict(raw.notes),
    }


def labels(values: pl.Series) -> np.ndarray:
    """0 and 1 of any type -> uint8."""
    return values.cast(pl.Float64).cast(pl.UInt8).to_numpy()


def write(
    directory: Path,
    name: str,
    *,
    schema: Schema,
    columns: Mapping[str, builder.Columns],
    ragged: Mapping[str, builder.Ragged],
    rows: Mapping[str, int],
    card: Card,
    truth: Sequence[str] = (),
) -> None:
    """The data set and what it holds: columns in time order, `rows` of them in each window."""
    stops = np.cumsum(list(rows.values())).tolist()
    bounds = zip([0, *stops[:-1]], stops, strict=True)
    folder = builder.write(
        name,
        directory,
        columns=columns,
        ragged=ragged,
        bounds=dict(zip(rows, bounds, strict=True)),
        card=card,
    )
    write_schema(directory, folder, schema=schema, rows=rows, truth=truth)


def write_schema(
    directory: Path,
    folder: Path,
    *,
    schema: Schema,
    rows: Mapping[str, int],
    truth: Sequence[str] = (),
) -> None:
    """What the data set in `folder` holds."""
    facts = {
        "folder": str(folder.relative_to(directory)),
        "schema": schema.to_json(),
        "rows": dict(rows),
        "truth": list(truth),
    }
    (directory / "schema.json").write_text(json.dumps(facts, indent=1))


def _write_side(directory: Path, raw: RawLog, encoded: Encoded) -> None:
    """What is not one value a row: vocabularies, side arrays, fixed tables."""
    encoded.vocabulary.write_parquet(directory / "vocabulary.parquet")
    for name, (codes, ids) in encoded.sequences.items():
        _write_gathered(directory / SEQUENCES / f"{name}.npy", ids, codes)
    for name, table in raw.pretrained.items():
        _write_gathered(directory / PRETRAINED / f"{name}.npy", *_with_padding(table))


def columns_of(
    raw: RawLog, encoded: Encoded, order: pl.Series, *, time: np.ndarray, label: np.ndarray
) -> dict[str, builder.Columns]:
    """Everything that has one value a row, in time order."""

    def take(name: str) -> pl.Series:
        return raw.frame[name].gather(order)

    columns: dict[str, builder.Columns] = {
        "ids": encoded.columns,
        "label": label,
        "time": time,
        "logged_time": take("logged_time").to_numpy() if "group" in raw.frame else time,
        "key": dense(take("key")),
        "example_id": np.arange(len(order), dtype=np.int64),
    }
    for name in raw.item if raw.keys is None else raw.keys:
        columns[KEY + name] = by_appearance(code(take(name)))
    stored = [f.slices for f in encoded.schema.sequences if f.slices and not f.from_log]
    for name in dict.fromkeys(stored):
        columns[f"{name}/end"] = take(f"{name}/end").cast(pl.Int64).to_numpy()
        columns[f"{name}/length"] = take(f"{name}/length").cast(pl.Int32).to_numpy()
    if encoded.floats.shape[1]:
        columns["floats"] = encoded.floats
    if raw.truth:
        columns["truth"] = raw.frame.select(raw.truth)[order].to_numpy().astype(np.float32)
    return columns


def _with_padding(table: Pretrained) -> tuple[np.ndarray, np.ndarray]:
    """The table with a row of zeros behind it, and its rows between those of padding and unknown
    ids: zeros."""
    rows = len(table.values)
    padded = np.pad(table.values, ((0, 1), (0, 0)))
    return padded, np.r_[rows, :rows, rows]


def _write_gathered(path: Path, values: np.ndarray, index: np.ndarray) -> None:
    """`values[index]` as an .npy file, piece by piece."""
    path.parent.mkdir(exist_ok=True)
    with path.open("wb") as file:
        kind = np.lib.format.dtype_to_descr(values.dtype)
        shape = (len(index), *values.shape[1:])
        header = {"descr": kind, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        for low in range(0, len(index), PIECE):
            values[index[low : low + PIECE]].tofile(file)


def cut(time: np.ndarray, windows: Windows) -> tuple[dict[str, tuple[int, int]], str]:
    """Row ranges of the windows over sorted times, and the same for people."""
    times, text = cut_times(int(time[0]), int(time[-1]), windows)
    return row_ranges([int(s) for s in np.searchsorted(time, times)]), text


def row_ranges(stops: Sequence[int]) -> dict[str, tuple[int, int]]:
    """First and last row (exclusive) of every window, by where they end."""
    return dict(zip(SPLITS, zip([0, *stops[:-1]], stops, strict=True), strict=True))


def cut_times(first: int, last: int, windows: Windows) -> tuple[list[int], str]:
    """When the windows of a log end that runs from `first` to `last`, and the same for people."""
    fm_end, vm_end = _to_ms(windows.fm_end, first, last), _to_ms(windows.vm_end, first, last)
    middle, mark = vm_end - (vm_end - fm_end) // 4, "its last quarter"
    if windows.validation_start is not None:
        middle, mark = _to_ms(windows.validation_start, first, last), windows.validation_start
    times = [fm_end, middle, vm_end, _to_ms(windows.test_end, first, last)]
    marks = [windows.fm_end, mark, windows.vm_end, windows.test_end]
    if sorted(set(times)) != times:
        raise UserError(
            f"window ends must rise, but are {', '.join(marks)}, and {span(first, last)}; change "
            "data.windows"
        )
    return times, ", ".join(f"{s} until {m}" for s, m in zip(SPLITS, marks, strict=True))


def _to_ms(mark: str, first: int, last: int) -> int:
    try:
        if mark.endswith("%"):
            return first + round((last + 1 - first) * float(mark[:-1]) / 100)
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


def span(first: int, last: int) -> str:
    """When a log runs, for people."""
    ends = [datetime.fromtimestamp(ms / 1000, UTC) for ms in (first, last)]
    start, end = (moment.isoformat(timespec="seconds") for moment in ends)
    return f"the log runs from {start} to {end}"
