"""Structuring an export into histories: the stage that writes what `store` describes.

Nothing of the log is in memory but what `ranges` works on: its columns are read from files.
"""

import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from loopfm_jax.data.narrow import stored_columns, write_columns
from loopfm_jax.engine import BeamConfig
from loopfm_jax.history import beam_store
from loopfm_jax.history.files import write_rows
from loopfm_jax.history.keys import joined, key_columns
from loopfm_jax.history.ranges import Asked, slices_of
from loopfm_jax.history.rowfile import Column, open_rows
from loopfm_jax.history.slices import SliceConfig, parts_of
from loopfm_jax.history.store import Exported, HistoryConfig, map_array, open_export


def structure_log(
    data: Path,
    export: Path,
    facts: Mapping[str, Any],
    *,
    config: HistoryConfig,
    directory: Path,
    beam: BeamConfig | None = None,
) -> dict[str, Any]:
    """`structure` of a prepared log and an `export` stage folder with the facts of its manifest.

    Args:
      beam: the pipeline that does the work; None: this machine does.
    """
    needed = key_columns(config.keys, stored_columns(data))
    with TemporaryDirectory(dir=directory) as folder:
        names = dict.fromkeys([*needed, "time", "logged_time", "label"])
        paths = write_columns(data, [*names], first=facts["first"], folder=Path(folder))
        columns = {name: open_rows(path) for name, path in paths.items()}
        return structure(
            open_export(export, facts, load=open_rows),
            joined(config.keys, columns),
            time=columns["time"],
            logged_time=columns["logged_time"],
            outcome=columns["label"],
            config=config,
            directory=directory,
            write=partial(beam_store.write_store, beam=beam) if beam else write_store,
        )


@dataclass(frozen=True)
class Seconds:
    """A `Column` of times, ms, as whole seconds since `start_ms`."""

    time: Column
    start_ms: int

    dtype = np.dtype(np.int32)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.time.shape

    def __len__(self) -> int:
        return len(self.time)

    def __getitem__(self, part: slice, /) -> np.ndarray:
        return ((self.time[part] - self.start_ms) // 1000).astype(self.dtype)


def write_store(
    folder: Path, asked: Asked, told: Mapping[str, Column], *, config: SliceConfig
) -> None:
    """Writes the store of one kind of key on this machine.

    Args:
      told: file -> what is told of an example once it is an entry.
    """
    row, end, length = slices_of(asked, config)
    folder.mkdir()
    _save(folder, {"row": row, "end": end, "length": length})
    del end, length
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        columns = {folder / f"{name}.npy": values for name, values in told.items()}
        written = [pool.submit(write_rows, path, values, row) for path, values in columns.items()]
        for one in written:
            one.result()


def structure(
    exported: Exported,
    keys: Mapping[str, Column],
    *,
    time: Column,
    logged_time: Column,
    outcome: Column,
    config: HistoryConfig,
    directory: Path,
    write: Callable[..., None] = write_store,
) -> dict[str, Any]:
    """Writes the stores and every example's slices; returns facts about the histories.

    Args:
      keys: kind of key -> integer keys of the examples.
      time, logged_time, outcome: of the examples, int64, int64 and uint8.
      write: `write_store`, or what does the same elsewhere.

    Returns:
      Among others `store_bytes`, of the codes of all stores and taps, and `bytes_per_row`, of one
      code of the first tap.
    """
    start_ms = min(int(logged_time[part].min()) for part in parts_of(len(time)))
    told = {f"codes_{tap}": codes for tap, codes in exported.codes.items()} | {
        "seconds": Seconds(logged_time, start_ms),
        "outcome": outcome,
        "soft": exported.soft,
    }
    kept = None if config.keep == "all" else outcome
    found = {}
    for name, key in keys.items():
        asked = Asked(key, time=time, logged_time=logged_time, kept=kept)
        write(directory / name, asked, told, config=config)
        found[name] = _facts(map_array(directory / name / "length.npy"))
    _save(directory, {f"book_{tap}": book for tap, book in exported.books.items()})
    entries = len(map_array(directory / next(iter(keys)) / "row.npy"))
    bytes_per_row = {
        tap: int(codes.shape[1] * codes.dtype.itemsize) for tap, codes in exported.codes.items()
    }
    return {
        **{name: exported.facts[name] for name in ("code", "width", "taps", "first", "cutoffs")},
        "longest": config.length,
        "start_ms": start_ms,
        "entries": entries,
        "keys": found,
        "store_bytes": len(keys) * entries * sum(bytes_per_row.values()),
        "bytes_per_row": bytes_per_row[exported.facts["taps"][0]],
    }


def _facts(length: np.ndarray) -> dict[str, float]:
    return {"mean_length": float(length.mean()), "empty_share": float((length == 0).mean())}


def _save(directory: Path, arrays: Mapping[str, np.ndarray]) -> None:
    for name, values in arrays.items():
        np.save(directory / f"{name}.npy", values, allow_pickle=False)
