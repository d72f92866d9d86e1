"""Rows of a log joined with their histories: what a batch brings, and what waits on the device."""

from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from loopfm_jax import sharding
from loopfm_jax.history.encoders import TIMED
from loopfm_jax.history.reader import Entries, Past, Reading
from loopfm_jax.history.store import Histories, Store
from loopfm_jax.inputs import Inputs
from loopfm_jax.packing import budget


@dataclass(frozen=True)
class Join:
    """Histories of the rows of `inputs`; rows before the first exported one have none."""

    inputs: Inputs
    histories: Histories
    reading: Reading
    first: int
    """Row of the log that is example 0."""

    def batch(self, rows: np.ndarray) -> dict[str, Any]:
        """`slices` by key: `end_B`, `length_B` int32 and `slot_T`, whose length is the token
        budget of this batch; `seconds_B` int32."""
        known = rows >= self.first
        example = np.where(known, rows - self.first, 0)
        seconds = (self.inputs.log["time"][rows] - self.histories.start_ms) // 1000
        return {
            "slices": {
                key: self._slices(self.histories.stores[key], example, known)
                for key in self.reading.keys
            },
            "seconds_B": seconds.astype(np.int32),
        }

    def _slices(self, store: Store, example: np.ndarray, known: np.ndarray) -> dict[str, Any]:
        length_B = np.where(known, store.length[example], 0).astype(np.int32)
        slots = budget(length_B, longest=self.histories.longest)
        return {
            "end_B": store.end[example].astype(np.int32),
            "length_B": length_B,
            "slot_T": np.zeros(slots, np.uint8),
        }

    def past(self, mesh: Mesh, *, encoder: str) -> Past:
        """The stores as the step reads them, resident on the devices."""
        entries = {
            key: self._entries(self.histories.stores[key], timed=encoder in TIMED)
            for key in self.reading.keys
        }
        return jax.device_put(Past(entries, dict(self.reading.codecs)), sharding.split(mesh))

    def _entries(self, store: Store, *, timed: bool) -> Entries:
        reading = self.reading
        taps = {tap for content in reading.contents if (tap := reading.tap_of(content))}
        told = {
            "seconds": store.seconds if timed or "age" in reading.side else None,
            "outcome": store.outcome if "outcome" in reading.side else None,
            "soft": store.soft if "soft" in reading.contents else None,
            "ids_SF": self._ids(store) if "raw" in reading.contents else None,
        }
        return Entries(
            codes={tap: np.asarray(store.codes[tap]) for tap in sorted(taps)},
            **{name: None if v is None else np.asarray(v) for name, v in told.items()},
            longest=self.histories.longest,
        )

    def _ids(self, store: Store) -> np.ndarray:
        names = [f.name for f in self.inputs.schema.categorical]
        columns = [names.index(name) for name in self.reading.raw]
        return self.inputs.log["ids"][self.first + store.row][:, columns]
