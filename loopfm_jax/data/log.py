"""A prepared log in memory: columns by name, and feature batches for any part of its schema."""

import json
from collections.abc import Mapping
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

    def padded(self, name: str, rows: np.ndarray, *, length: int) -> np.ndarray:
        """Fused ids of a sequence field at `rows` as [B, length], padded with 0 in front."""
        return self.fill(name, self.slots(name, rows, length=length))

    def slots(self, name: str, rows: np.ndarray, *, length: int) -> "Slots":
        """Where the last `length` values of a sequence field stand; equal for fields of one
        `slices`."""
        f = self.schema[name]
        if f.slices:
            end, count = self[f"{f.slices}/end"][rows], self[f"{f.slices}/length"][rows]
        else:
            count = self.ragged[name].lengths[rows]
            end = self.starts[name][rows] + count
        return find_slots(end, count, length=length)

    def fill(self, name: str, slots: "Slots") -> np.ndarray:
        """The fused ids at `slots`, int32 [B, length]."""
        f = self.schema[name]
        values = self.sequences[name] if f.slices else self.ragged[name].values
        return fill_slots(values, slots, offset=self.schema.offsets[name] if f.slices else 0)


class Slots(NamedTuple):
    """Padded sequences: the position of every value, and whether there is one."""

    index_BL: np.ndarray
    real_BL: np.ndarray


def find_slots(end: np.ndarray, count: np.ndarray, *, length: int) -> Slots:
    """The last `length` positions of every slice `end - count : end`, padded in front."""
    back_L = np.arange(length, 0, -1)
    return Slots(end[:, None] - back_L, back_L <= count[:, None])


def fill_slots(values: np.ndarray, slots: Slots, *, offset: int = 0) -> np.ndarray:
    """`values + offset` at the slots, 0 where there is none; int32 [B, length]."""
    if not len(values):
        return np.zeros(slots.real_BL.shape, np.int32)
    filled_BL = values.take(slots.index_BL, mode="clip").astype(np.int32, copy=False)
    filled_BL += offset
    filled_BL *= slots.real_BL
    return filled_BL


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
