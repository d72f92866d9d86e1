"""A prepared log: columns by name, and the events of any rows, for any part of its schema.

It is in memory, or its wide columns wait in their blocks (`data.blocks`): then `near` gives a small
log in memory that holds the rows of a batch, and what makes batches does not know the difference.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from loopfm_jax import memory
from loopfm_jax.data.blocks import HELD_BLOCKS, Blocks, is_wide
from loopfm_jax.data.encode import Ragged
from loopfm_jax.data.raw import SPLITS
from loopfm_jax.data.schema import Schema
from loopfm_jax.errors import UserError

LogResidency = Literal["auto", "memory", "blocks"]
SHARE = 0.25
"""Of the machine's memory, up to which `auto` keeps a log there: reading it takes twice its size
for a moment."""
KEY = "key_"
"""Prefix of the columns that may key histories besides `key`."""
SEQUENCES, PRETRAINED = "sequences", "pretrained"
"""Folders of a prepared log: side arrays that rows hold slices of, and fixed tables."""
PIECE = 1 << 16
"""Rows that `ids_of` looks at together."""
FIXED = ("ids", "floats", "label", "time", "logged_time", "key", "example_id", "truth")


@dataclass(frozen=True)
class Log:
    """Rows in time order. `ids` [rows, F] fused int32, `ragged` by field, `label` uint8,
    `time`, `logged_time` int64 ms, `key` int64, `key_<column>` int32."""

    schema: Schema
    columns: Mapping[str, np.ndarray]
    ragged: Mapping[str, Ragged]
    truth: tuple[str, ...] = ()
    sequences: Mapping[str, np.ndarray] = field(default_factory=dict)
    """[S] local ids per field with `slices`, by memory map."""
    pretrained: Mapping[str, np.ndarray] = field(default_factory=dict)
    """[V, width] per field with a `frozen_width`, by memory map."""
    blocks: Blocks | None = None
    """Where `blocks.is_wide` columns are, if not in memory."""
    stored: Schema | None = None
    """Of the blocks, of which `schema` may be a part."""

    def __len__(self) -> int:
        return len(self.columns["label"])

    def __getitem__(self, name: str) -> np.ndarray:
        if self.blocks is not None and is_wide(name) and name not in self.columns:
            raise UserError(
                f"this reads {name!r} of any row at once, but the log waits in its blocks: use "
                "--log-residency memory"
            )
        return self.columns[name]

    @cached_property
    def starts(self) -> dict[str, np.ndarray]:
        """First value of every row, per ragged column."""
        return {
            name: np.concatenate([[0], np.cumsum(r.lengths[:-1], dtype=np.int64)])
            for name, r in self.ragged.items()
        }

    def select(self, schema: Schema) -> "Log":
        """The log as a model with a smaller schema sees it, ids in that schema's own space."""
        if self.blocks is not None:  # every block is seen so as it is read
            return replace(self, schema=schema)
        kept = [i for i, f in enumerate(self.schema.categorical) if f in schema.categorical]
        kept_floats = [i for i, n in enumerate(self.schema.numeric) if n in schema.numeric]
        old, new = self.schema.offsets, schema.offsets
        shift = np.array([new[f.name] - old[f.name] for f in schema.categorical], np.int32)
        columns = dict(self.columns)
        if len(kept) < len(self.schema.categorical) or shift.any():  # else: no copy of all ids
            columns["ids"] = self["ids"][:, kept]
            columns["ids"] += shift
        if schema.numeric != self.schema.numeric:
            columns["floats"] = self["floats"][:, kept_floats]
        if not schema.numeric:
            columns.pop("floats", None)
        ragged = {f.name: self.ragged[f.name] for f in schema.sequences if not f.slices}
        for name, column in ragged.items():
            if moved := new[name] - old[name]:
                ragged[name] = replace(column, values=column.values + np.int32(moved))
        return replace(self, schema=schema, columns=columns, ragged=ragged)

    def near(self, rows: np.ndarray) -> tuple["Log", np.ndarray]:
        """A log in memory that holds `rows`, and their numbers in it."""
        if self.blocks is None:
            return self, rows
        groups, place_B = self.blocks.groups(rows)
        if len(groups) == 1:  # as good as always in time order
            ((number, at),) = groups
            return self._block(number), at[place_B]
        return _joined([self._block(n)._take(at) for n, at in groups]), place_B

    def ids_of(self, rows: np.ndarray, names: Sequence[str]) -> np.ndarray:
        """Fused ids [len(rows), len(names)] of categorical fields at `rows`, which rise."""
        every = [f.name for f in self.schema.categorical]
        columns = [every.index(name) for name in names]
        found = np.empty((len(rows), len(names)), np.int32)
        for low in range(0, len(rows), PIECE):
            log, at = self.near(rows[low : low + PIECE])
            found[low : low + PIECE] = log["ids"][at][:, columns]
        return found

    @cached_property
    def _block(self) -> Callable[[int], "Log"]:
        """Number of a block -> its rows as a log in memory; the last ones stay."""
        assert self.blocks is not None and self.stored is not None
        blocks, stored = self.blocks, self.stored
        beside = [  # what batches read of them
            n for n in self.columns if n == "label" or is_wide(n) or n.endswith("/length")
        ]

        def open_block(number: int) -> Log:
            low, high = blocks.bounds[number : number + 2]
            columns, ragged = _split(stored, blocks.read(number))
            log = Log(stored, columns, ragged).select(self.schema)
            read = {n: v for n, v in log.columns.items() if is_wide(n) and n != "example_id"}
            own = {n: self.columns[n][low:high] for n in beside}
            return replace(log, columns=read | own, sequences=self.sequences)

        return lru_cache(maxsize=HELD_BLOCKS)(open_block)

    def _take(self, rows: np.ndarray) -> "Log":
        """A copy of these rows."""
        ragged = {}
        for name, column in self.ragged.items():
            count_B = column.lengths[rows]
            end_B = np.cumsum(count_B, dtype=np.int64)
            index = np.repeat(self.starts[name][rows] - end_B + count_B, count_B)
            index += np.arange(len(index))
            ragged[name] = Ragged(column.values.take(index), count_B)
        columns = {name: values[rows] for name, values in self.columns.items()}
        return replace(self, columns=columns, ragged=ragged)

    def lengths(self, names: Sequence[str], rows: np.ndarray) -> np.ndarray:
        """As `events` will tell, of any rows, without reading a block."""
        columns = {self.schema[name].slices or name: name for name in names}
        counts = [self._count(name, rows) for name in columns.values()]
        return np.minimum(np.maximum.reduce(counts), self.schema[names[0]].length)

    def events(self, names: Sequence[str], rows: np.ndarray) -> "Events":
        """Sequence fields that are read side by side (`Schema.groups`), at `rows`.

        A field that has fewer events than another of its group gets padding in the place of those
        that it lacks, the oldest.
        """
        columns = {self.schema[name].slices or name: name for name in names}
        places = {column: self._slices(name, rows) for column, name in columns.items()}
        counts = [count_B for _, count_B in places.values()]
        length_B = np.minimum(np.maximum.reduce(counts), self.schema[names[0]].length)
        rank_T = np.arange(length_B.sum()) - np.repeat(np.cumsum(length_B) - length_B, length_B)
        index = {c: np.repeat(end_B - 1, length_B) - rank_T for c, (end_B, _) in places.items()}
        ids_TG = np.empty((len(rank_T), len(names)), np.int32)
        for i, name in enumerate(names):
            column = self.schema[name].slices or name
            ids_TG[:, i] = self._values(name, index[column])
            count_B = places[column][1]
            if (count_B < length_B).any():
                ids_TG[rank_T >= np.repeat(count_B, length_B), i] = 0
        first = self.schema[names[0]].slices or names[0]
        return Events(ids_TG, length_B.astype(np.int32), index[first])

    def padded(self, name: str, rows: np.ndarray) -> np.ndarray:
        """Fused ids of a sequence field at `rows` as people read them: [B, length], oldest first,
        0 in front where there are fewer."""
        ids_TG, length_B, _ = self.events((name,), rows)
        longest = self.schema[name].length
        padded_BL = np.zeros((len(rows), longest), np.int32)
        padded_BL[np.arange(longest) < length_B[:, None]] = ids_TG[:, 0]
        return padded_BL[:, ::-1]

    def _slices(self, name: str, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(end, length) of a sequence field at `rows`, in `_values`."""
        at = self.schema[name].slices
        if at:
            return self[f"{at}/end"][rows].astype(np.int64), self[f"{at}/length"][rows]
        count = self.ragged[name].lengths[rows]
        return self.starts[name][rows] + count, count

    def _count(self, name: str, rows: np.ndarray) -> np.ndarray:
        """How many events there are at `rows`."""
        at = self.schema[name].slices
        if not at and name in self.ragged:
            return self.ragged[name].lengths[rows]
        return self.columns[f"{at}/length" if at else f"{name}/lengths"][rows]

    def _values(self, name: str, index: np.ndarray) -> np.ndarray:
        """Fused ids of a sequence field; what lies outside is garbage."""
        f = self.schema[name]
        values = self.sequences[name] if f.slices else self.ragged[name].values
        if not len(values):
            return np.zeros(len(index), np.int32)
        ids = values.take(index, mode="clip").astype(np.int32, copy=False)
        return ids + np.int32(self.schema.offsets[name]) if f.slices else ids


class Events(NamedTuple):
    """Events of B rows one after the other, newest first."""

    ids_TG: np.ndarray
    """Fused ids, int32."""
    length_B: np.ndarray
    """How many belong to each row, int32."""
    index_T: np.ndarray
    """Where they stand among the values of the first field."""


def read_schema(directory: Path) -> Schema:
    """What a prepared log holds, without its columns."""
    return Schema.from_json(json.loads((directory / "schema.json").read_text())["schema"])


def load(directory: Path, *, residency: LogResidency = "memory") -> tuple[Log, dict[str, slice]]:
    """The prepared log of a folder and the rows of each window.

    Args:
      residency: where its wide columns wait; `auto`: in memory, while they take a quarter of it.
    """
    from loopfm_jax.data import builder  # TFDS takes a second to import: only where it is used

    facts = json.loads((directory / "schema.json").read_text())
    schema, rows = read_schema(directory), facts["rows"]
    folder = directory / facts["folder"]
    if residency == "auto":
        fits = builder.size(folder, rows) <= SHARE * memory.host_bytes()
        residency = "memory" if fits else "blocks"
    whole = residency == "memory"
    columns, ragged = _split(schema, builder.read(folder, rows, wide=whole))
    stops = np.cumsum(list(rows.values())).tolist()
    log = Log(
        schema=schema,
        columns=columns,
        ragged=ragged,
        truth=tuple(facts["truth"]),
        sequences=_tables(directory / SEQUENCES),
        pretrained=_tables(directory / PRETRAINED),
        blocks=None if whole else builder.open_blocks(folder, rows),
        stored=None if whole else schema,
    )
    return log, dict(zip(SPLITS, map(slice, [0, *stops[:-1]], stops), strict=True))


def _split(
    schema: Schema, stored: Mapping[str, np.ndarray]
) -> tuple[dict[str, np.ndarray], dict[str, Ragged]]:
    """Columns of one value a row, and ragged ones."""
    ragged = {
        n.removesuffix("/values"): Ragged(stored[n], stored[n.removesuffix("values") + "lengths"])
        for n in stored
        if n.endswith("/values")
    }
    slices = {f"{f.slices}/{part}" for f in schema.sequences for part in ("end", "length")}
    kept = {n: v for n, v in stored.items() if n in (*FIXED, *slices) or n.startswith(KEY)}
    kept |= {
        n: v
        for n, v in stored.items()
        if n.endswith("/lengths") and n.removesuffix("/lengths") not in ragged
    }
    return kept, ragged


def _joined(logs: Sequence[Log]) -> Log:
    """Logs of one schema, one after the other."""
    first = logs[0]
    columns = {n: np.concatenate([log.columns[n] for log in logs]) for n in first.columns}
    ragged = {
        n: Ragged(
            np.concatenate([log.ragged[n].values for log in logs]),
            np.concatenate([log.ragged[n].lengths for log in logs]),
        )
        for n in first.ragged
    }
    return replace(first, columns=columns, ragged=ragged)


def _tables(folder: Path) -> dict[str, np.ndarray]:
    return {p.stem: np.load(p, mmap_mode="r", allow_pickle=False) for p in folder.glob("*.npy")}
