"""Structuring an export into histories: rows in (key, time) order, two integers per example.

Files (npy, no pickle; the stage manifest holds their sha256):
  codes [S, columns], seconds [S] int32 since the first entry, outcome [S] uint8, soft [S] float32:
    the store, by (key, logged time);
  end, length [examples]: every exported row's history; teacher [examples]: its soft label.
Examples are the exported rows in time order.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from loopfm_jax.errors import UserError
from loopfm_jax.history.slices import SliceConfig, slices

Side = Literal["outcome", "age"]


@dataclass(frozen=True)
class HistoryConfig(SliceConfig):
    """Histories: who may be seen, and what is told of an entry besides its code."""

    side: tuple[Side, ...] = ()
    """Told to the encoders of every method; the paper tells nothing."""


@dataclass(frozen=True)
class Store:
    """Everything a vertical model reads of the teacher. Arrays are memory maps."""

    codes: np.ndarray
    seconds: np.ndarray
    outcome: np.ndarray
    soft: np.ndarray
    end: np.ndarray
    length: np.ndarray
    teacher: np.ndarray
    start_ms: int
    """Time of second 0."""


def structure(
    *,
    codes: np.ndarray,
    soft: np.ndarray,
    key: np.ndarray,
    time: np.ndarray,
    logged_time: np.ndarray,
    outcome: np.ndarray,
    config: SliceConfig,
    directory: Path,
) -> dict[str, Any]:
    """Writes the store and every example's slice; returns facts about the histories.

    Args:
      codes: [examples, columns]; soft: [examples] float32; both in time order.
      key, time, logged_time, outcome: of the same rows.
    """
    order, end, length = slices(
        entry_key=key, entry_time=logged_time, query_key=key, query_time=time, config=config
    )
    start_ms = int(logged_time.min())
    arrays = {
        "codes": codes[order],
        "seconds": ((logged_time[order] - start_ms) // 1000).astype(np.int32),
        "outcome": outcome[order].astype(np.uint8),
        "soft": soft[order].astype(np.float32),
        "end": end,
        "length": length,
        "teacher": soft.astype(np.float32),
    }
    for name, values in arrays.items():
        np.save(directory / f"{name}.npy", values, allow_pickle=False)
    return {
        "start_ms": start_ms,
        "entries": len(order),
        "mean_length": float(length.mean()),
        "empty_share": float((length == 0).mean()),
        "store_bytes": int(arrays["codes"].nbytes),
        "bytes_per_row": int(codes.shape[1] * codes.itemsize),
    }


def open_store(directory: Path, facts: dict[str, Any]) -> Store:
    """The store of a `structure` stage folder; `facts` are its manifest's."""
    names = ("codes", "seconds", "outcome", "soft", "end", "length", "teacher")
    arrays = {n: np.load(directory / f"{n}.npy", mmap_mode="r", allow_pickle=False) for n in names}
    return Store(**arrays, start_ms=facts["start_ms"])


def swapped(store: Store, key: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A control: every example gets the history of another key, of the same length where one is.

    Examples of equal history length are ordered by key and the slices are rotated by the size of
    the largest key among them, so nobody keeps a slice of his own. Where one key holds more than
    half of such a group, those examples borrow the tail of the longest other history instead.

    Returns:
      (end, length) in the order of the examples; a length shrinks only where nothing longer exists.

    Raises:
      UserError: one key owns every example.
    """
    if (key == key[0]).all():
        raise UserError(
            "the swapped-histories control needs at least 2 keys, but one owns every row of the VM "
            "and test windows: leave the control out"
        )
    end, length = np.array(store.end), np.array(store.length)
    donor = np.arange(len(end))
    order = np.lexsort((key, length))
    for group in np.split(order, np.flatnonzero(np.diff(length[order])) + 1):
        largest = np.bincount(np.unique(key[group], return_inverse=True)[1]).max()
        donor[group] = np.roll(group, largest)
    own = (key[donor] == key) & (length > 0)
    if own.any():
        donor[own] = _longest_of_another_key(key, length, own)
    return end[donor], np.minimum(length, length[donor])


def _longest_of_another_key(key: np.ndarray, length: np.ndarray, own: np.ndarray) -> np.ndarray:
    by_length = np.argsort(-length, kind="stable")
    first = by_length[0]
    second = by_length[np.argmax(key[by_length] != key[first])]
    return np.where(key[own] == key[first], second, first)
