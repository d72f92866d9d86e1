"""What histories may be grouped by: the log's own key, a stored column, or several together."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from loopfm_jax.data.log import KEY, Log
from loopfm_jax.errors import UserError
from loopfm_jax.history.rowfile import Column
from loopfm_jax.history.slices import parts_of
from loopfm_jax.history.store import OWN


@dataclass(frozen=True)
class Together:
    """A `Column` of integer keys, int64: equal where all its parts are."""

    parts: tuple[Column, ...]
    sizes: tuple[int, ...]
    """Of every part: above all its values."""

    dtype = np.dtype(np.int64)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.parts[0].shape

    def __len__(self) -> int:
        return len(self.parts[0])

    def __getitem__(self, rows: slice, /) -> np.ndarray:
        key = self.parts[0][rows].astype(np.int64, copy=False)
        for part, size in zip(self.parts[1:], self.sizes[1:], strict=True):
            key = key * size + part[rows]
        return key


def key_values(log: Log, names: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Kind of key -> integer keys of all rows.

    Args:
      names: `key`, a column of the data's `keys`, or several of these joined by `+`.

    Raises:
      UserError: no such column, or a kind is named twice.
    """
    needed = key_columns(names, log.columns)
    return {n: k[:] for n, k in joined(names, {n: log[n] for n in needed}).items()}


def key_columns(names: tuple[str, ...], stored: Iterable[str]) -> tuple[str, ...]:
    """The columns of a log that kinds of key are made of; the errors of `key_values`.

    Args:
      stored: all columns of the log.
    """
    if not names or len(set(names)) != len(names):
        raise UserError(f"history.keys is {list(names)}: name each kind of key once, at least one")
    known = [OWN, *(c.removeprefix(KEY) for c in stored if c.startswith(KEY))]
    for part in (part for name in names for part in name.split("+")):
        if part not in known:
            raise UserError(
                f"history.keys names {part!r}; the prepared log can group by {', '.join(known)} "
                "and by several of these joined by `+`; name more columns in the data's `keys`"
            )
    return tuple(dict.fromkeys(_column(part) for name in names for part in name.split("+")))


def joined(names: tuple[str, ...], columns: Mapping[str, Column]) -> dict[str, Together]:
    """Kind of key -> its keys, of the columns that `key_columns` names.

    Raises:
      UserError: the numbers of a kind would not fit int64.
    """
    kinds = {name: [columns[_column(part)] for part in name.split("+")] for name in names}
    return {name: _together(name, tuple(parts)) for name, parts in kinds.items()}


def _together(name: str, parts: tuple[Column, ...]) -> Together:
    sizes = tuple(_above(part) if len(parts) > 1 else 0 for part in parts)
    if math.prod(sizes) > 1 << 63:  # or keys that differ would be one number
        values = " x ".join(f"{size:,}" for size in sizes)
        raise UserError(
            f"history.keys joins {name!r}, of {values} values: more than 2**63 keys; join fewer "
            "columns"
        )
    return Together(parts, sizes)


def _column(name: str) -> str:
    return OWN if name == OWN else KEY + name


def _above(values: Column) -> int:
    return 1 + max(int(values[part].max()) for part in parts_of(len(values)))
