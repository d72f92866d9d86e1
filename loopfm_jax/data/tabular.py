"""Your own log: any CSV or Parquet files, described in a configuration."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from glob import glob
from pathlib import Path
from typing import Literal

import polars as pl

from loopfm_jax.data.files import CSV, PARQUET, concat, drop_duplicates, read_table
from loopfm_jax.data.raw import Card, Column, RawLog, Windows
from loopfm_jax.errors import UserError
from loopfm_jax.identity import sha256

MS_PER = {"s": 1000.0, "ms": 1.0}
PER_MS = {"us": 1000, "ns": 1_000_000}
YEAR_FIRST = r"^\s*\d{4}([-/.]\d|\d{4})"
"""Of other dates nobody knows which number is the month."""
ROLES = ("key", "time", "label", "group", "logged_time")
"""Names of the columns that steer everything; a feature of such a name would be overwritten."""


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
    entity: tuple[str, ...] | None = None
    """Columns that describe the key alone; default: the key's own, if it is a feature."""
    keys: tuple[str, ...] | None = None
    """Columns besides the key that histories may be grouped by; default: `item`."""
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

    def __post_init__(self) -> None:
        for name in ("length", "behaviour_length"):
            if getattr(self, name) < 1:
                raise UserError(f"data.{name} is {getattr(self, name)}; at least 1 is needed")

    @property
    def name(self) -> str:
        return "tabular_log"

    @property
    def card(self) -> Card:
        return Card(description=f"A log read from {', '.join(Path(f).name for f in self.files)}.")

    def fingerprint(self) -> dict[str, str]:
        return {str(path): sha256(path) for path in self.paths()}

    def read(self) -> RawLog:
        tables = [read_table(path, self.needed) for path in self.paths()]
        frame, duplicates = drop_duplicates(concat(tables))
        return self.shape(frame, duplicates=duplicates)

    @property
    def needed(self) -> list[str]:
        """Columns of the files that are read."""
        return list(dict.fromkeys([*(c.name for c in self._columns), *self._roles.values()]))

    @property
    def moment(self) -> list[str]:
        """Columns of the files in which rows agree that are seen together."""
        return [self.key, self.group or self.time]

    def shape(self, frame: pl.DataFrame, *, duplicates: int = 0) -> RawLog:
        """What (some) rows of the files hold, under the names that everything later uses."""
        self._check_types(frame.select(self.needed))
        numbers = [pl.col(n).cast(pl.Float64, strict=False) for n in self.numeric]
        lists = [pl.col(n).str.split(self.separator) for n in self.sequence if _is_text(frame, n)]
        times, roles = self._times(frame[self.time]), self._roles
        others = [pl.col(source).alias(role) for role, source in roles.items() if role != "time"]
        frame = frame.with_columns(*numbers, *lists).with_columns(*others, times.alias("time"))
        item, columns = self._item, self._columns
        return RawLog(
            frame=frame.select(list(dict.fromkeys([*roles, *(c.name for c in columns)]))),
            columns=columns,
            item=item,
            entity=self._entity,
            keys=self.keys,
            behaviour=self.behaviour or item,
            behaviour_length=self.behaviour_length,
            duplicates=duplicates,
            notes={"files": [path.name for path in self.paths()]},
        )

    @property
    def _roles(self) -> dict[str, str]:
        group = {"group": self.group} if self.group else {}
        return {"key": self.key, "time": self.time, "label": self.label, **group}

    @property
    def _item(self) -> tuple[str, ...]:
        return self.item or tuple(n for n in self.categorical if n != self.key)

    @property
    def _entity(self) -> tuple[str, ...]:
        own = (self.key,) if self.key in self.categorical else ()
        return own if self.entity is None else self.entity

    @property
    def _columns(self) -> tuple[Column, ...]:
        self._check_names(self._roles)
        kinds = {
            **{n: Column(n, min_count=self.min_count) for n in self.categorical},
            **{n: Column(n, kind="numeric") for n in self.numeric},
            **{
                n: Column(n, kind="sequence", min_count=self.min_count, length=self.length)
                for n in self.sequence
            },
        }
        return tuple(replace(c, fm_only=n in self.fm_only) for n, c in kinds.items())

    def _check_names(self, roles: Mapping[str, str]) -> None:
        features = (*self.categorical, *self.numeric, *self.sequence)
        if self.label in features:
            raise UserError(
                f"data.label {self.label!r} is also a feature: it would leak the answer; take it "
                "out of the features"
            )
        for name in features:
            if features.count(name) > 1:
                raise UserError(f"the features name {name!r} more than once; keep one kind of it")
            if name in self.sequence and name in roles.values():
                raise UserError(
                    f"column {name!r} has several values a row: it cannot be a role too"
                )
            if name in ROLES and roles.get(name) != name:
                raise UserError(
                    f"the feature {name!r} has a name that is reserved ({', '.join(ROLES)}); "
                    "rename the column"
                )
        for option, allowed in (
            ("item", self.categorical),
            ("entity", self.categorical),
            ("keys", self.categorical),
            ("behaviour", self.categorical),
            ("fm_only", features),
        ):
            for name in getattr(self, option) or ():
                if name not in allowed:
                    kinds = "features" if allowed is features else "categorical columns"
                    raise UserError(
                        f"data.{option} names {name!r}, which is not among the {kinds} "
                        f"({', '.join(allowed) or 'none'})"
                    )
        for name in self._item if self.keys is None else self.keys:
            if "/" in name:
                raise UserError(
                    f"histories may be grouped by {name!r}, but no file can have that name: rename "
                    "the column, or name others under data.keys"
                )
        if not set(self._item) - set(self.fm_only):
            raise UserError(
                "no categorical column that vertical models see describes the candidate; name at "
                "least one besides the key under data.categorical (data.item)"
            )

    def _check_types(self, frame: pl.DataFrame) -> None:
        for name, kind in frame.schema.items():
            many = kind == pl.List if name in self.sequence else False
            if not many and (kind.is_nested() or kind in (pl.Binary, pl.Object, pl.Duration)):
                raise UserError(
                    f"column {name!r} holds {kind}, not one plain value a row; a column of lists "
                    "belongs under data.sequence, anything else must be converted first"
                )
            if name in self.sequence and not many and kind not in (pl.String, pl.Null):
                raise UserError(
                    f"column {name!r} holds {kind}, but data.sequence needs lists, or text split "
                    "at data.separator; name it under data.categorical"
                )

    def paths(self) -> list[Path]:
        if not self.files:
            raise UserError("data.files is empty; name at least one .csv or .parquet file")
        found = []
        for pattern in self.files:
            path = Path(pattern).expanduser()
            matches = [path] if path.is_file() else sorted(map(Path, glob(str(path))))
            if not matches:
                raise UserError(f"no file matches {pattern!r}; check data.files")
            for match in matches:
                if not match.is_file():
                    raise UserError(f"{match} is a folder; data.files takes files, or {match}/*")
                if not match.name.lower().endswith((*CSV, *PARQUET)):
                    raise UserError(
                        f"{match} is not a table that can be read; data.files takes .csv, .csv.gz "
                        "and .parquet files: rename or convert it"
                    )
            found.extend(matches)
        return list(dict.fromkeys(found))

    def _times(self, raw: pl.Series) -> pl.Series:
        """Milliseconds since 1970."""
        try:
            times = _to_ms(raw, self.time_unit)
        except pl.exceptions.PolarsError:
            times = pl.Series([None] * len(raw), dtype=pl.Int64)
        bad = times.is_null() & raw.is_not_null()
        if bad.any():
            raise UserError(
                f"column {self.time!r} holds {raw.filter(bad)[0]!r} (and {bad.sum() - 1:,} more "
                f"values that are not times in unit {self.time_unit!r}); clean them, or set "
                "data.time_unit to s, ms, us, ns or iso"
            )
        return times


def _to_ms(raw: pl.Series, unit: str) -> pl.Series:
    """Whole milliseconds, null where a value is not a time."""
    if raw.dtype.is_temporal():
        return raw.cast(pl.Datetime("ms")).cast(pl.Int64)
    if unit == "iso":
        iso = pl.select(pl.when(raw.str.contains(YEAR_FIRST)).then(raw)).to_series()
        return iso.str.to_datetime(strict=False, time_zone="UTC").dt.epoch("ms")
    if unit in PER_MS:  # beyond what a float64 holds exactly
        return raw.cast(pl.Int64, strict=False) // PER_MS[unit]
    scaled = raw.cast(pl.Float64, strict=False) * MS_PER[unit]
    return scaled.round().cast(pl.Int64, strict=False)


def _is_text(frame: pl.DataFrame, name: str) -> bool:
    return frame[name].dtype == pl.String
