"""A prepared log in memory: columns by name, and feature batches for any part of its schema."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np

from loopfm_jax.data.encode import Ragged
from loopfm_jax.data.raw import SPLITS
from loopfm_jax.data.schema import Schema

KEY = "key_"
"""Prefix of the columns that may key histories besides `key`."""
SEQUENCES, PRETRAINED = "sequences", "pretrained"
"""Folders of a prepared log: side arrays that rows hold slices of, and fixed tables."""
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

    def __len__(self) -> int:
        return len(self.columns["label"])

    def __getitem__(self, name: str) -> np.ndarray:
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
        ragged = {
            f.name: replace(
                self.ragged[f.name],
                values=self.ragged[f.name].values + np.int32(new[f.name] - old[f.name]),
            )
            for f in schema.sequences
            if not f.slices
        }
        return replace(self, schema=schema, columns=columns, ragged=ragged)

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
        return Events(ids_TG, length_B.astype(np.int32))

    def padded(self, name: str, rows: np.ndarray) -> np.ndarray:
        """Fused ids of a sequence field at `rows` as people read them: [B, length], oldest first,
        0 in front where there are fewer."""
        ids_TG, length_B = self.events((name,), rows)
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


def read_schema(directory: Path) -> Schema:
    """What a prepared log holds, without its columns."""
    return Schema.from_json(json.loads((directory / "schema.json").read_text())["schema"])


def load(directory: Path) -> tuple[Log, dict[str, slice]]:
    """The whole prepared log of a folder and the rows of each window."""
    from loopfm_jax.data import builder  # TFDS takes a second to import: only where it is used

    facts = json.loads((directory / "schema.json").read_text())
    schema = read_schema(directory)
    columns = builder.read(directory / facts["folder"], facts["rows"])
    ragged = {
        n.removesuffix("/values"): Ragged(columns[n], columns[n.removesuffix("values") + "lengths"])
        for n in columns
        if n.endswith("/values")
    }
    slices = {f"{f.slices}/{part}" for f in schema.sequences for part in ("end", "length")}
    kept = {n: v for n, v in columns.items() if n in (*FIXED, *slices) or n.startswith(KEY)}
    stops = np.cumsum(list(facts["rows"].values())).tolist()
    log = Log(
        schema=schema,
        columns=kept,
        ragged=ragged,
        truth=tuple(facts["truth"]),
        sequences=_tables(directory / SEQUENCES),
        pretrained=_tables(directory / PRETRAINED),
    )
    return log, dict(zip(SPLITS, map(slice, [0, *stops[:-1]], stops), strict=True))


def _tables(folder: Path) -> dict[str, np.ndarray]:
    return {p.stem: np.load(p, mmap_mode="r", allow_pickle=False) for p in folder.glob("*.npy")}
