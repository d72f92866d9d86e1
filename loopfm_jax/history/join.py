"""Rows of a log joined with their histories: what a batch brings, and what waits on the device.

A store that fits waits on the devices, split over the shards of a batch (`partition`), and a batch
brings two integers per example; stores of several kinds of key wait on every device, as an example
can stand beside one history only. Otherwise they stay in their memory maps, and a batch brings what
its own tokens read, codes still packed, gathered by the thread that prepares batches. The step
computes the same numbers from each.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from loopfm_jax import memory, processes, sharding
from loopfm_jax.data.batches import Seating
from loopfm_jax.history.partition import Partition, cut
from loopfm_jax.history.reader import Entries, Past, Reading
from loopfm_jax.history.store import Histories, Residency, Store
from loopfm_jax.inputs import Inputs
from loopfm_jax.packing import WHOLE, Parts, budget

SHARE = 0.25
"""Of a device's memory, for the stores that wait there."""


@dataclass(frozen=True)
class Join:
    """Histories of the rows of `inputs`; rows before the first exported one have none."""

    inputs: Inputs
    histories: Histories
    reading: Reading
    first: int
    """Row of the log that is example 0."""
    timed: bool = False
    """Whether the encoder looks at the age of entries."""
    residency: Residency = "auto"
    shards: int = 1
    """Over which a store on the devices is split."""

    def on(self, mesh: Mesh) -> "Join":
        """The same for steps on a mesh."""
        return replace(self, shards=mesh.shape["data"] if len(self.reading.keys) == 1 else 1)

    @cached_property
    def partition(self) -> Partition | None:
        """Where the store is cut; None: it is whole."""
        if self.shards == 1 or not self.on_device:
            return None
        (key,) = self.reading.keys
        return cut(self.histories.stores[key], self.shards)

    @property
    def seating(self) -> Seating | None:
        """Who stands where in a batch."""
        return None if self.partition is None else self._seat

    def _seat(self, rows: np.ndarray) -> np.ndarray:
        assert self.partition is not None
        (key,) = self.reading.keys
        return self.partition.seat(*self._ends(self.histories.stores[key], rows))

    def _ends(self, store: Store, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """End and length of every row's history."""
        known = rows >= self.first
        example = np.where(known, rows - self.first, 0)
        return store.end[example], np.where(known, store.length[example], 0)

    def lengths(self, key: str, rows: np.ndarray) -> np.ndarray:
        """Of the histories of any rows, without reading them."""
        return self._ends(self.histories.stores[key], rows)[1]

    def batch(self, rows: np.ndarray, parts: Parts = WHOLE) -> dict[str, Any]:
        """`slices` by key: `end_B`, `length_B` int32 and `slot_PS`, whose size is the token
        budget of this batch, and `entries` [P, S, ...] of stores that stay on the host;
        `seconds_B` int32.

        Args:
          rows: of the whole batch.
          parts: how it is laid out, and what of it is wanted.
        """
        time_B = self.inputs.log["time"][parts.mine(rows)]
        seconds = (time_B - self.histories.start_ms) // 1000
        return {
            "slices": {
                key: self._slices(self.histories.stores[key], rows, parts)
                for key in self.reading.keys
            },
            "seconds_B": seconds.astype(np.int32),
        }

    def _slices(self, store: Store, rows: np.ndarray, parts: Parts) -> dict[str, Any]:
        end_B, length_B = (x.astype(np.int32) for x in self._ends(store, rows))
        slots = budget(length_B, longest=self.histories.longest, parts=parts.count)
        length_B, end_B = parts.mine(length_B), parts.mine(end_B)
        if self.partition is not None:
            end_B = self.partition.within(end_B).astype(np.int32)
        slot_PS = np.zeros((len(parts.own), slots // parts.count), np.uint8)
        found = {"end_B": end_B, "length_B": length_B, "slot_PS": slot_PS}
        if self.on_device:
            return found
        row_T = token_rows(end_B, length_B)

        def gather(values: np.ndarray) -> np.ndarray:
            return parts.deal(
                lambda tokens, out: values.take(row_T[tokens], axis=0, out=out, mode="clip"),
                length_B,
                slots=slots,
                shape=values.shape[1:],
                dtype=values.dtype,
            )  # mode: `raise` takes a copy

        return found | {"entries": replace(self._entries(store, gather), gathered=True)}

    @cached_property
    def on_device(self) -> bool:
        """Where the stores wait: in every process alike, as the step depends on it."""
        if self.residency != "auto":
            return self.residency == "device"
        size = 0
        for key in self.reading.keys:
            store = self.histories.stores[key]
            one = self._entries(store, lambda x: x[:1])
            size += len(store.row) * sum(x.nbytes for x in jax.tree.leaves(one))
        return processes.first(lambda: size <= SHARE * self.shards * device_bytes())

    def past(self, mesh: Mesh) -> Past:
        """What the step reads besides batches: the stores that wait on the devices."""
        stores = {key: self.histories.stores[key] for key in self.reading.keys}
        codecs = dict(self.reading.codecs)
        if self.partition is None:
            entries = {k: self._entries(s, np.asarray) for k, s in stores.items() if self.on_device}
            return sharding.everywhere(mesh, Past(entries, codecs))
        spread, where = self.partition.spread, sharding.split(mesh, "entries")
        entries = {k: replace(self._entries(s, spread), split=True) for k, s in stores.items()}
        entries = jax.tree.map(partial(sharding.place, where=where), entries)
        return Past(entries, sharding.everywhere(mesh, codecs))

    def _entries(self, store: Store, pick: Callable[[np.ndarray], np.ndarray]) -> Entries:
        """`pick` of every column that is read."""
        reading = self.reading
        taps = {tap for content in reading.contents if (tap := reading.tap_of(content))}
        return Entries(
            codes={tap: pick(store.codes[tap]) for tap in sorted(taps)},
            ids_SF=self._ids(pick(store.row)) if "raw" in reading.contents else None,
            seconds=pick(store.seconds) if self.timed or "age" in reading.side else None,
            outcome=pick(store.outcome) if "outcome" in reading.side else None,
            soft=pick(store.soft) if "soft" in reading.contents else None,
            longest=self.histories.longest,
        )

    def _ids(self, row: np.ndarray) -> np.ndarray:
        names = [f.name for f in self.inputs.schema.categorical]
        columns = [names.index(name) for name in self.reading.raw]
        return self.inputs.log["ids"][self.first + row][..., columns]


def token_rows(end_B: np.ndarray, length_B: np.ndarray) -> np.ndarray:
    """The store's rows in the order of packed tokens: of every example, the newest first."""
    stop_B = np.cumsum(length_B, dtype=np.int64)
    newest_B = end_B - 1 + stop_B - length_B
    return np.repeat(newest_B, length_B) - np.arange(stop_B[-1] if len(stop_B) else 0)


def device_bytes() -> int:
    """Memory of one device; where devices do not tell (CPU), that of the machine."""
    told = jax.local_devices()[0].memory_stats() or {}
    return told.get("bytes_limit", memory.host_bytes())
