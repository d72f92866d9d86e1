"""What a raw log must satisfy; a failure is one message with the value, the limit and the fix."""

import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import polars as pl

from loopfm_jax.data.raw import RawLog
from loopfm_jax.errors import UserError

EARLIEST_MS = 631_152_000_000  # 1990-01-01
LATEST_MS = 4_102_444_800_000  # 2100-01-01


def require_columns(present: Iterable[str], needed: Iterable[str], *, where: Path | str) -> None:
    """Raises UserError for the first needed column that is absent, with the closest name."""
    present = list(present)
    for name in needed:
        if name not in present:
            close = difflib.get_close_matches(name, present, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else f"; it has {', '.join(present)}"
            raise UserError(f"{where}: no column {name!r}{hint}")


def check(raw: RawLog) -> None:
    """Raises UserError on anything a model would silently choke on."""
    if not len(raw.frame):
        raise UserError("the log has 0 rows; at least one row per window is needed")
    frame = raw.frame
    _no_nulls(frame, [n for n in ("key", "time", "label", "group") if n in frame.columns])
    _binary_label(frame["label"])
    _sane_times(frame["time"])
    for column in raw.columns:
        if column.kind == "numeric":
            _finite(frame, column.name, log=column.log)


def _no_nulls(frame: pl.DataFrame, names: Iterable[str]) -> None:
    for name in names:
        nulls = frame[name].is_null()
        if frame[name].dtype == pl.String:
            nulls = nulls | (frame[name].str.strip_chars() == "")
        elif frame[name].dtype.is_float():
            nulls = nulls | frame[name].is_nan()
        if nulls.any():
            raise UserError(
                f"the {name} column is empty in {nulls.sum():,} rows (first: "
                f"{_row(frame, int(nulls.arg_max() or 0))}); every row needs a {name}: fill or "
                "drop those rows"
            )


def _binary_label(label: pl.Series) -> None:
    bad = ~label.cast(pl.Float64, strict=False).is_in([0.0, 1.0]).fill_null(False)
    if bad.any():
        first = label.filter(bad)[0]
        raise UserError(
            f"the label holds {first!r} (and {bad.sum() - 1:,} more values that are not 0 or 1); "
            "make it binary first"
        )


def _sane_times(time: pl.Series) -> None:
    low, high = int(time.min()), int(time.max())  # pyright: ignore[reportArgumentType]
    if low < EARLIEST_MS or high > LATEST_MS:
        raise UserError(
            f"times run from {low:,} to {high:,} ms since 1970; they must lie between 1990 and "
            "2100: is the time unit right (s, ms, us, ns)?"
        )


def _finite(frame: pl.DataFrame, name: str, *, log: bool) -> None:
    values = frame[name].cast(pl.Float64, strict=False).to_numpy()
    bad = ~np.isfinite(values)
    if bad.any():
        raise UserError(
            f"column {name!r} holds {bad.sum():,} values that are missing, NaN, infinite or not "
            f"numbers (first: {_row(frame, int(bad.argmax()))}); fill them or drop the column"
        )
    if log and (values <= -1).any():
        raise UserError(
            f"column {name!r} is to be log-scaled but holds {values.min():g}; the limit "
            "is > -1: drop `log` for it"
        )


def _row(frame: pl.DataFrame, at: int) -> str:
    """How to find a row again: no file has its number once several are read, duplicates dropped and
    rows dealt to workers, so key and time are told too."""
    key, time = frame["key"][at], frame["time"][at]
    return f"row {at + 1:,} of those read, counted from 1, of key {key!r} at {time} ms"


def check_windows(rows: Mapping[str, int], positives: Mapping[str, float], bounds: str) -> None:
    """Raises UserError for an empty window, or one with a single class.

    Args:
      rows, positives: of every window, how many there are and the share with a label of 1.
    """
    for name, count in rows.items():
        if count == 0:
            raise UserError(f"the {name} window is empty ({bounds}); move data.windows")
        mean = positives[name]
        if mean in (0.0, 1.0):
            raise UserError(
                f"all {count:,} labels of the {name} window are {mean:.0f}; AUC and NE need both "
                f"classes ({bounds}): move data.windows or choose another label"
            )
