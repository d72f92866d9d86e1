"""Your own log: any CSV or Parquet files, described in a configuration."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import polars as pl

from loopfm_jax.data.files import drop_duplicates, read_table
from loopfm_jax.data.raw import Card, Column, RawLog, Windows
from loopfm_jax.errors import UserError
from loopfm_jax.stages import sha256

MS_PER = {"s": 1000.0, "ms": 1.0, "us": 1e-3, "ns": 1e-6}


@dataclass(frozen=True)
class TabularLog:
    """A click log in files of one table each: one row per impression."""

    files: tuple[str, ...] = ()
    """Paths or glob patterns, .csv, .csv.gz or .parquet."""
    key: str = "user_id"
    """Column whose past events form histories."""
    time: str = "time"
    time_unit: Literal["s", "ms", "us", "ns", "iso"] = "s"
    """Unit since 1970, or `iso` for dates and times (no zone: UTC)."""
    label: str = "label"
    """0/1 column."""
    group: str | None = None
    """Impression list: all rows of one (key, group) count as one moment."""
    item: tuple[str, ...] = ()
    """Columns that describe the candidate; default: every categorical column but the key."""
    categorical: tuple[str, ...] = ()
    numeric: tuple[str, ...] = ()
    sequence: tuple[str, ...] = ()
    """Multi-valued columns: Parquet lists, or text split by `separator`."""
    separator: str = ","
    length: int = 50
    """Values kept of a sequence column, the last ones."""
    fm_only: tuple[str, ...] = ()
    """Columns that only the foundation model sees."""
    behaviour: tuple[str, ...] = ()
    """Columns whose past positive values a sequence backbone reads; default: `item`."""
    behaviour_length: int = 50
    min_count: int = 2
    """Values seen less often in the FM window share the unknown id."""
    windows: Windows = field(default_factory=Windows)

    @property
    def name(self) -> str:
        return "tabular_log"

    @property
    def card(self) -> Card:
        return Card(description=f"A log read from {', '.join(Path(f).name for f in self.files)}.")

    def fingerprint(self) -> dict[str, str]:
        return {str(path): sha256(path) for path in self._paths()}

    def read(self) -> RawLog:
        columns = self._columns()
        names = [c.name for c in columns]
        roles = {"key": self.key, "time": self.time, "label": self.label}
        if self.group:
            roles["group"] = self.group
        needed = list(dict.fromkeys([*names, *roles.values()]))
        tables = [read_table(path, needed) for path in self._paths()]
        frame, duplicates = drop_duplicates(pl.concat(tables, how="diagonal_relaxed"))
        numbers = [pl.col(n).cast(pl.Float64, strict=False) for n in self.numeric]
        lists = [pl.col(n).str.split(self.separator) for n in self.sequence if _is_text(frame, n)]
        times = self._times(frame[self.time])
        others = [pl.col(source).alias(role) for role, source in roles.items() if role != "time"]
        frame = frame.with_columns(*numbers, *lists).with_columns(*others, times.alias("time"))
        item = self.item or tuple(n for n in self.categorical if n != self.key)
        return RawLog(
            frame=frame.select(list(dict.fromkeys([*roles, *names]))),
            columns=columns,
            item=item,
            behaviour=self.behaviour or item,
            behaviour_length=self.behaviour_length,
            duplicates=duplicates,
            notes={"files": [path.name for path in self._paths()]},
        )

    def _columns(self) -> tuple[Column, ...]:
        kinds = {
            **{n: Column(n, min_count=self.min_count) for n in self.categorical},
            **{n: Column(n, kind="numeric") for n in self.numeric},
            **{
                n: Column(n, kind="sequence", min_count=self.min_count, length=self.length)
                for n in self.sequence
            },
        }
        if self.label in kinds:
            raise UserError(f"data.label {self.label!r} is also a feature: it would leak the answer")
        for option in ("item", "fm_only", "behaviour"):
            for name in getattr(self, option):
                if name not in kinds:
                    raise UserError(
                        f"data.{option} names {name!r}, which is not among the categorical, numeric "
                        f"and sequence columns ({', '.join(kinds) or 'none'})"
                    )
        return tuple(replace(c, fm_only=n in self.fm_only) for n, c in kinds.items())

    def _paths(self) -> list[Path]:
        if not self.files:
            raise UserError("data.files is empty; name at least one .csv or .parquet file")
        found = []
        for pattern in self.files:
            path = Path(pattern).expanduser()
            matches = sorted(path.parent.glob(path.name))
            if not matches:
                raise UserError(f"no file matches {pattern!r}; check data.files")
            found.extend(matches)
        return found

    def _times(self, raw: pl.Series) -> pl.Series:
        """Milliseconds since 1970; null where the value is not a time."""
        if raw.dtype.is_temporal():
            return raw.cast(pl.Datetime("ms")).cast(pl.Int64)
        if self.time_unit == "iso":
            return raw.str.to_datetime(strict=False, time_zone="UTC").dt.epoch("ms")
        scaled = raw.cast(pl.Float64, strict=False) * MS_PER[self.time_unit]
        return scaled.floor().cast(pl.Int64, strict=False)


def _is_text(frame: pl.DataFrame, name: str) -> bool:
    return frame[name].dtype == pl.String
