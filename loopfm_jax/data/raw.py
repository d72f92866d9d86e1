"""A raw log as every source delivers it: one polars frame and a description of its columns."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
import polars as pl

from loopfm_jax.data.coding import Coded
from loopfm_jax.data.schema import Behaviour

Holdout = Literal["test", "validation"]
SPLITS = ("fm", "vm", "validation", "test")
"""The windows of a log, in time order."""


@dataclass(frozen=True)
class Column:
    """One feature column. Ids, normalisers and buckets are fitted on the FM window only."""

    name: str
    kind: Literal["categorical", "numeric", "sequence"] = "categorical"
    min_count: int = 1
    """Values seen less often in the FM window become the unknown id."""
    fm_only: bool = False
    """Only the foundation model sees it (the feature gap)."""
    shares: str | None = None
    """Reads the vocabulary and table of this column (a history of items reads the item's)."""
    length: int = 50
    """Sequences: how many values are kept, the last ones."""
    log: bool = False
    """Numeric: log1p before standardising."""
    hashed: int = 0
    """Ids by hashing into this many rows: nothing is fitted, so that values which come later have
    rows of their own (or share one by chance)."""
    buckets: int = 0
    """Numeric: cut into this many quantile buckets and treat as categorical."""


@dataclass(frozen=True)
class Sequences:
    """Sequence columns that are slices of side arrays: a row carries two integers.

    Row i of the frame has `values[end_i - length_i : end_i]`, the last one most recent; the frame's
    columns `<name>/end` and `<name>/length` hold them. Rows with the same past share its storage.
    """

    name: str
    columns: tuple[Column, ...]
    values: Mapping[str, Coded]
    """By column, [S]."""


@dataclass(frozen=True)
class Events:
    """A log of its own of what the keys did, which may be far larger than memory.

    An example sees the last `length` events of its key that happened strictly before it.
    """

    name: str
    columns: tuple[Column, ...]
    scan: pl.LazyFrame
    """`key` (of the frame's type), `time` (int64, ms) and the columns: integers or pl.Enum, no
    nulls."""
    length: int = 50


@dataclass(frozen=True)
class Pretrained:
    """A table that is never trained: what its rows stand for, and [rows, width] float32."""

    ids: pl.Series
    values: np.ndarray


@dataclass(frozen=True)
class RawLog:
    """`frame` has `key` (any type), `time` (int64, ms), `label` (0/1), the feature columns and,
    where rows were shown together, `group`: all rows of one (key, group) count as one moment."""

    frame: pl.DataFrame
    columns: tuple[Column, ...]
    item: tuple[str, ...]
    """Columns that describe the candidate (the query of target attention)."""
    entity: tuple[str, ...] = ()
    """Columns that describe the key alone (what an entity embedding is made of)."""
    keys: tuple[str, ...] | None = None
    """Columns that may key histories besides `key`; None: those of `item`."""
    behaviour: tuple[str, ...] = ()
    """Columns whose values at the key's earlier positive rows form behaviour sequences."""
    behaviour_length: int = 50
    sequences: tuple[Sequences, ...] = ()
    events: Events | None = None
    given: tuple[Behaviour, ...] = ()
    """Sequence columns that list earlier events, and the candidate's columns they answer to."""
    pretrained: Mapping[str, Pretrained] = field(default_factory=dict)
    """By the categorical column that reads it."""
    duplicates: int = 0
    """Exact duplicate rows of the files, dropped."""
    truth: tuple[str, ...] = ()
    """Columns with known click probabilities (simulators); never features."""
    notes: Mapping[str, Any] = field(default_factory=dict)
    """Facts for the manifest: sha256 of downloads, counts."""


@dataclass(frozen=True)
class Windows:
    """Where the log is cut, each an ISO time with zone or a percentage of the time span.

    FM window: before `fm_end`. From there on the frozen FM logs embeddings. VM window:
    `fm_end .. vm_end`, whose last part, from `validation_start`, is the validation window: a run
    with `holdout = validation` trains VMs before it and judges them on it, so that choices are
    made without the test window, `vm_end .. test_end`.
    """

    fm_end: str = "50%"
    vm_end: str = "85%"
    test_end: str = "100%"
    validation_start: str | None = None
    """Default: where the last quarter of the VM window's time begins."""


def vm_windows(holdout: Holdout) -> tuple[str, ...]:
    """The windows that VMs are trained on when they are judged on `holdout`."""
    return SPLITS[1 : SPLITS.index(holdout)]


@dataclass(frozen=True)
class Card:
    """What the stored data set says about its origin."""

    description: str
    homepage: str = ""
    citation: str = ""
    license: str = ""


class Source(Protocol):
    """A data set's configuration: knows how to read itself."""

    @property
    def name(self) -> str: ...
    @property
    def windows(self) -> Windows: ...
    @property
    def card(self) -> Card: ...
    def read(self) -> RawLog: ...
    def fingerprint(self) -> dict[str, str]:
        """What the log is made from: file -> sha256. A stage is redone when it changes."""
        ...
