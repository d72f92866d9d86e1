"""Histories as they are stored: rows in (key, time) order, two integers per example.

Files (npy, no pickle; the stage manifest holds their sha256). Examples are the exported rows in
time order.
  book_<tap>: what a learned code was fitted to;
  <key>/: one store per kind of key, entries sorted by (key, logged time):
    row [S] int32: the example an entry was, codes_<tap> [S, columns], seconds [S] int32 since the
    first entry, outcome [S] uint8, soft [S] float32;
    end, length [examples]: every example's history, the slice `end - length : end`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from loopfm_jax.errors import UserError
from loopfm_jax.history.codes import Codec
from loopfm_jax.history.slices import SliceConfig

Side = Literal["outcome", "age"]
Residency = Literal["auto", "device", "host"]
OWN = "key"
"""The key of the log itself (a user)."""


@dataclass(frozen=True)
class HistoryConfig(SliceConfig):
    """Histories: who may be seen, and what is told of an entry besides its code."""

    keys: tuple[str, ...] = (OWN,)
    """What histories are grouped by: `key`, a column of the data's `keys`, or several joined by
    `+` (`key+author_id`). The summaries of several are concatenated."""
    keep: Literal["all", "positive"] = "all"
    """`positive`: only entries whose outcome was 1 (watched-only histories)."""
    tap: str | None = None
    """The exported tap that LoopFM reads; default: the first of fm.taps. A choice of the VM."""
    raw: tuple[str, ...] = ()
    """Categorical fields whose ids a `raw` history holds; empty: those of the candidate that have
    trained tables. A choice of the VM."""
    side: tuple[Side, ...] = ()
    """Told to the encoders of every method; the paper tells nothing."""
    residency: Residency = "auto"
    """Where stores wait for training and inference: on the `device`s, so that a batch brings two
    integers per example (one store is split over mesh.data, several are whole on every one), or in
    their files on the `host`, so that it brings its own tokens' codes. `auto`: on the device while
    they take a quarter of its memory. Results are the same."""


@dataclass(frozen=True)
class Exported:
    """What the FM left behind for rows of the log, in time order."""

    codes: Mapping[str, np.ndarray]
    """tap -> stored codes [examples, columns]."""
    soft: np.ndarray
    """[examples] float32."""
    facts: Mapping[str, Any]
    """code, width, taps, first (row of the log that is example 0), cutoffs: pairs (first ms of
    rows, last ms that their FM was trained on)."""
    books: Mapping[str, np.ndarray]

    @property
    def codecs(self) -> dict[str, Codec]:
        """By tap."""
        return _codecs(self.facts, self.books)


@dataclass(frozen=True)
class Store:
    """Histories by one kind of key. Arrays are memory maps."""

    codes: Mapping[str, np.ndarray]
    row: np.ndarray
    seconds: np.ndarray
    outcome: np.ndarray
    soft: np.ndarray
    end: np.ndarray
    length: np.ndarray


@dataclass(frozen=True)
class Histories:
    """Everything a model reads of the teacher's past."""

    stores: Mapping[str, Store]
    """By kind of key."""
    codecs: Mapping[str, Codec]
    """By tap."""
    longest: int
    start_ms: int
    """Time of second 0."""


def map_array(path: Path) -> np.ndarray:
    return np.load(path, mmap_mode="r", allow_pickle=False)


def open_export(
    directory: Path, facts: Mapping[str, Any], *, load: Callable[[Path], Any] = map_array
) -> Exported:
    """The arrays of an `export` stage folder; `facts` are its manifest's.

    Args:
      load: how a file is opened; by default as a memory map.
    """
    return Exported(
        codes={tap: load(directory / f"codes_{tap}.npy") for tap in facts["taps"]},
        soft=load(directory / "soft.npy"),
        facts=facts,
        books=_books(directory, facts["taps"]),
    )


def open_histories(directory: Path, facts: Mapping[str, Any]) -> Histories:
    """The stores of a `structure` stage folder; `facts` are its manifest's."""
    names = ("row", "seconds", "outcome", "soft", "end", "length")
    stores = {
        key: Store(
            codes={tap: map_array(directory / key / f"codes_{tap}.npy") for tap in facts["taps"]},
            **{name: map_array(directory / key / f"{name}.npy") for name in names},
        )
        for key in facts["keys"]
    }
    return Histories(
        stores=stores,
        codecs=_codecs(facts, _books(directory, facts["taps"])),
        longest=facts["longest"],
        start_ms=facts["start_ms"],
    )


def _codecs(facts: Mapping[str, Any], books: Mapping[str, np.ndarray]) -> dict[str, Codec]:
    return {tap: Codec(facts["code"], facts["width"], books.get(tap)) for tap in facts["taps"]}


def _books(directory: Path, taps: list[str]) -> dict[str, np.ndarray]:
    paths = {tap: directory / f"book_{tap}.npy" for tap in taps}
    return {tap: np.array(map_array(path)) for tap, path in paths.items() if path.exists()}


def swapped(histories: Histories, keys: Mapping[str, np.ndarray]) -> Histories:
    """A control: every example gets the history of another key, of the same length where one is.

    Args:
      keys: kind of key -> keys of the examples.

    Raises:
      UserError: one key owns every example.
    """
    stores = {}
    for name, store in histories.stores.items():
        end, length = swap(store, keys[name])
        stores[name] = replace(store, end=end, length=length)
    return replace(histories, stores=stores)


def swap(store: Store, key: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(end, length) of every example's history, borrowed from an earlier example of another key:
    what that one saw was logged before the borrower, too.

    It is the latest with a history of the same length. Where there is none, the tail of the longest
    history that another key had by then: a length shrinks only where nothing longer was there.

    Args:
      key: of the examples, in time order.
    """
    if (key == key[0]).all():
        raise UserError(
            "the swapped-histories control needs at least 2 keys, but one owns every row of the VM "
            "and test windows: leave the control out"
        )
    end, length = np.array(store.end), np.array(store.length)
    donor = _latest_of_another_key(key, length)
    alone = (donor < 0) & (length > 0)
    for name in np.unique(key[alone]):  # at most one key per length
        mine = alone & (key == name)
        donor[mine] = _longest_of_another_key(key, length, name)[mine]
    return end[donor], np.where(donor < 0, 0, np.minimum(length, length[donor]))


def _latest_of_another_key(key: np.ndarray, length: np.ndarray) -> np.ndarray:
    """The last example of the same length before every one; -1: all of these are of its key."""
    order = np.argsort(length, kind="stable")
    key, length = key[order], length[order]
    longer = np.r_[True, length[1:] != length[:-1]]
    other = longer | np.r_[True, key[1:] != key[:-1]]
    start = np.maximum.accumulate(np.where(other, np.arange(len(key)), 0))
    found = np.empty_like(order)
    found[order] = np.where(longer[start], -1, order[start - 1])
    return found


def _longest_of_another_key(key: np.ndarray, length: np.ndarray, own: int) -> np.ndarray:
    """The example with the longest history up to every one, the latest of these; -1: none."""
    ranked = length.astype(np.int64) * len(key) + np.arange(len(key))
    longest = np.maximum.accumulate(np.where(key == own, -1, ranked))
    return np.where(longest < 0, -1, longest % len(key))
