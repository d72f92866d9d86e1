"""FuxiCTR's own loaders over the rows that ours read: batches as tensors, and bytes of a row.

`whole` is its loader of one npz, which is in memory; `blocks` that of a folder of them, for data
larger than memory. Each with no worker process or with one, whichever is faster here. Its loader of
Parquet, the default, hands rows to Ray, which wants aiohttp besides; where that was missing and its
import stubbed, it made no batch within minutes: left out. Rows are written as FuxiCTR writes them:
a column an id, sequences padded in front.
"""

import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fuxictr.features import FeatureMap
from fuxictr.pytorch.dataloaders.npz_block_dataloader import NpzBlockDataLoader
from fuxictr.pytorch.dataloaders.npz_dataloader import NpzDataLoader

from benchmarks.peers.features import feature_map
from benchmarks.peers.jobs import len_cores, padded
from loopfm_jax.bench.protocol import Measured, Spec, timed
from loopfm_jax.data.schema import Schema

LABEL = "label"
PART_ROWS = 32_768
COMPARED, WARM, TRIED_S = 4, 8, 1.0
"""Batches whose content is told; batches before a loader's speed counts; how long it is tried."""


def columns(spec: Spec) -> dict[str, np.ndarray]:
    """The rows of the FM's window by feature name, ids local int64."""
    schema, rows = Schema.from_json(spec["schema"]), spec["rows"]
    with np.load(spec["log"], allow_pickle=False) as file:
        log = {name: file[name] for name in file.files}
    ids = {f.name: log["ids"][:rows, i] for i, f in enumerate(schema.categorical)}
    for f in schema.sequences:
        values, lengths = log[f"values/{f.name}"], log[f"lengths/{f.name}"]
        ids[f.name] = padded(values, lengths, length=f.length, behind=False)[:rows]
    offsets = schema.offsets
    found = {n: np.where(x > 0, x.astype(np.int64) - offsets[n], 0) for n, x in ids.items()}
    found |= {n.name: log["floats"][:rows, i] for i, n in enumerate(schema.numeric)}
    return found | {LABEL: log["label"][:rows].astype(np.float32)}


def write(spec: Spec, kind: str) -> Path:
    """Writes the rows beside the log, once; returns the path that FuxiCTR's loader takes."""
    path = Path(spec["log"]).with_name(f"fuxictr-{kind}")
    path = path if kind == "blocks" else path.with_suffix(f".{kind}")
    if path.exists():
        return path
    found = columns(spec)
    if kind == "npz":
        np.savez(path, **found)  # pyright: ignore[reportArgumentType]
    elif kind == "parquet":
        import pandas as pd

        frame = {n: list(x) if x.ndim > 1 else x for n, x in found.items()}
        pd.DataFrame(frame).to_parquet(path)
    else:
        path.mkdir()
        for low in range(0, spec["rows"], PART_ROWS):
            part = {n: x[low : low + PART_ROWS] for n, x in found.items()}
            np.savez(path / f"part-{low:09d}.npz", **part)
    return path


def features(schema: Schema) -> FeatureMap:
    """With the label, columns numbered."""
    found = feature_map(schema, 1, pooled=())
    found.labels = [LABEL]
    found.set_column_index()
    return found


def content(batch: Mapping[str, torch.Tensor], schema: Schema) -> float:
    """What `loopfm_jax.bench.feeding.content` tells of the same rows."""
    names = [f.name for f in schema.categorical]
    total_B = sum((i + 1.0) * batch[n].double() for i, n in enumerate(names))
    total_B = total_B + batch[LABEL].double() + sum(batch[n.name].double() for n in schema.numeric)
    for f in schema.sequences:
        ids_BL = batch[f.name].double()
        total_B = total_B + ids_BL @ torch.arange(ids_BL.shape[1], 0, -1, dtype=torch.float64)
    size = len(batch[LABEL])
    weight_B = 1.0 + torch.arange(size, dtype=torch.float64)
    return float(weight_B @ torch.as_tensor(total_B) / size**2)


class Feed:
    """Batches of a loader, one after the other, pass after pass."""

    def __init__(self, spec: Spec):
        torch.set_num_threads(len_cores())
        self._schema, self._spec = Schema.from_json(spec["schema"]), spec
        whole = spec["loader"] == "whole"
        self._path = write(spec, "npz" if whole else "blocks")
        self._kind: Any = NpzDataLoader if whole else NpzBlockDataLoader
        rates = {workers: self._rate(workers) for workers in (0, 1)}
        self._workers = max(rates, key=lambda workers: rates[workers])
        self._batches, self._told = self._forever(self._workers), 0
        self._contents: list[float] = []
        self.facts: dict[str, Any] = {"batch": spec["batch"], "workers": self._workers}

    def run(self, *, seconds: float, steps: int) -> Measured:
        if self._told >= COMPARED:
            for _ in range(WARM):
                next(self._batches)
        return timed(
            self._one,
            lambda: None,
            seconds=seconds,
            steps=steps,
            examples=self._spec["batch"],
            losses=self._contents,
        )

    def _one(self) -> None:
        batch = next(self._batches)
        if self._told < COMPARED:
            self._contents.append(content(batch, self._schema))
            self._told += 1

    def _forever(self, workers: int) -> Iterator[dict[str, torch.Tensor]]:
        loader = self._kind(
            features(self._schema),
            str(self._path),
            batch_size=self._spec["batch"],
            shuffle=self._spec["order"] != "time",
            num_workers=workers,
        )
        while True:
            yield from loader

    def _rate(self, workers: int) -> float:
        """Batches/s."""
        batches = self._forever(workers)
        for _ in range(WARM):
            next(batches)
        started, done = time.perf_counter(), 0
        while time.perf_counter() - started < TRIED_S:
            next(batches)
            done += 1
        return done / (time.perf_counter() - started)


class Bytes:
    """Bytes of a row on disk, or of the float64 array that its npz loader keeps in memory."""

    def __init__(self, spec: Spec):
        path = write(spec, spec["format"])
        total = path.stat().st_size
        if spec["where"] == "memory":
            loader = NpzDataLoader(features(Schema.from_json(spec["schema"])), str(path))
            total = loader.dataset.darray.nbytes
        self._value = total / spec["rows"]
        self.facts: dict[str, Any] = {}

    def run(self, *, seconds: float, steps: int) -> Measured:
        del seconds
        return Measured(self._value, max(steps, 1), 1, 0.0, 0.0)
