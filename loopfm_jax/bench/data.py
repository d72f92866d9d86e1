"""Generated examples that both sides of a row read: fields, ragged histories, labels, in one npz.

Ids are log-uniform (Zipf of exponent 1, frequent ids low, as vocabularies sorted by count have
them), lengths uniform up to a point and cut there; every example has an event, as public DMIN and
ours differ on purpose where there is none (`benchmarks.peers.attention`). Labels depend on the ids,
so that a loss that agrees over some steps says that the gradients do.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from loopfm_jax.data.encode import Ragged
from loopfm_jax.data.log import Log
from loopfm_jax.data.schema import Field, Schema
from loopfm_jax.history.codes import Codec
from loopfm_jax.history.join import Join
from loopfm_jax.history.reader import Reading
from loopfm_jax.history.store import Histories, Store
from loopfm_jax.inputs import Inputs


@dataclass(frozen=True)
class HistorySpec:
    """LoopFM histories of generated codes, one int4 store of one key."""

    length: int = 50
    """L, longest history."""
    mean: int = 17
    """Mean length."""
    width: int = 32
    """Z."""
    entries: int = 1_000_000
    """S, rows of the store."""


def write_log(path: Path, schema: Schema, *, rows: int, fill: float, seed: int = 0) -> dict:
    """Writes `rows` examples whose sequences are full by `fill`.

    Returns:
      `tokens`: mean events of an example and behaviour; `pairs`: mean causal pairs of events.
    """
    rng = np.random.default_rng(seed)
    columns = [_ids(rng, f, rows) + schema.offsets[f.name] for f in schema.categorical]
    arrays: dict[str, np.ndarray] = {
        "ids": np.stack(columns, axis=1).astype(np.int32),
        "floats": rng.normal(size=(rows, len(schema.numeric))).astype(np.float32),
    }
    lengths = {}
    for f in schema.sequences:
        group = next(i for i, b in enumerate(schema.behaviours) if f.name in b.history)
        if group not in lengths:
            drawn = draw_lengths(rng, rows, longest=f.length, fill=fill)
            lengths[group] = np.maximum(drawn, 1)
        values = _ids(rng, f, int(lengths[group].sum())) + schema.offsets[f.name]
        arrays[f"values/{f.name}"] = values.astype(np.int32)
        arrays[f"lengths/{f.name}"] = lengths[group]
    effect = np.sin(arrays["ids"].astype(np.float64)).sum(axis=1) / np.sqrt(len(columns))
    chance = 1 / (1 + np.exp(1.5 - effect))
    arrays["label"] = (rng.uniform(size=rows) < chance).astype(np.uint8)
    np.savez(path, **arrays)  # pyright: ignore[reportArgumentType]
    each = [x.astype(np.float64) for x in lengths.values()]
    return {
        "tokens": float(np.mean([x.mean() for x in each])) if each else 0.0,
        "pairs": float(np.mean([(x * (x + 1) / 2).mean() for x in each])) if each else 0.0,
    }


def _ids(rng: np.random.Generator, f: Field, count: int) -> np.ndarray:
    """Local ids from 1 on."""
    return (
        np.exp(rng.uniform(0, np.log(max(f.rows, 2)), count)).astype(np.int64).clip(1, f.rows - 1)
    )


def draw_lengths(rng: np.random.Generator, rows: int, *, longest: int, fill: float) -> np.ndarray:
    """Lengths whose mean is about `fill * longest`, uniform from 0 to where that needs."""
    top = 2 * fill if fill < 0.5 else np.inf if fill == 1 else 1 / (2 * (1 - fill))
    if np.isinf(top):
        return np.full(rows, longest, np.int32)
    return np.minimum(rng.uniform(0, top, rows) * longest + 0.5, longest).astype(np.int32)


def read_log(path: Path, schema: Schema) -> Inputs:
    """The examples as a prepared log in memory, all in the VM's window."""
    with np.load(path, allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    rows = np.arange(len(arrays["label"]), dtype=np.int64)
    columns = {name: arrays[name] for name in ("ids", "label")}
    columns |= {"time": 1000 * rows, "logged_time": 1000 * rows, "key": rows, "example_id": rows}
    if schema.numeric:
        columns["floats"] = arrays["floats"]
    ragged = {
        f.name: Ragged(arrays[f"values/{f.name}"], arrays[f"lengths/{f.name}"])
        for f in schema.sequences
    }
    return Inputs(Log(schema, columns, ragged), {"vm": slice(0, len(rows))})


def no_reading() -> Reading:
    """Of a model without histories."""
    return Reading(contents=(), keys=(), side=(), codecs={}, tap="")


def read_codes(codec: Codec) -> Reading:
    """Of a model that reads one store of these."""
    return Reading(("loopfm",), ("key",), (), {"hidden_0": codec}, "hidden_0")


def join_histories(
    inputs: Inputs, spec: HistorySpec, *, timed: bool = False, seed: int = 0
) -> tuple[Reading, Join]:
    """Every example with a slice of a store of random codes.

    timed: the encoder looks at the age of entries.
    """
    rng, rows = np.random.default_rng(seed), len(inputs.log)
    codec = Codec("int4", spec.width)
    shape = (spec.entries, codec.columns)
    length = draw_lengths(rng, rows, longest=spec.length, fill=spec.mean / spec.length)
    seconds = np.arange(spec.entries, dtype=np.int32)
    store = Store(
        codes={"hidden_0": rng.integers(0, 256, shape, np.uint8)},
        row=seconds,
        seconds=seconds,
        outcome=np.zeros(spec.entries, np.uint8),
        soft=np.zeros(spec.entries, np.float32),
        end=rng.integers(spec.length, spec.entries, rows).astype(np.int64),
        length=length,
    )
    codecs: dict[str, Any] = {"hidden_0": codec}
    reading = read_codes(codec)
    histories = Histories({"key": store}, codecs, longest=spec.length, start_ms=0)
    return reading, Join(inputs, histories, reading, 0, timed, residency="device")
