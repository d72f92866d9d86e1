"""A trained VM that answers rows of a log: programs compiled ahead, histories from memory maps.

Requests are filled up to a bucket of examples, their histories to a share of the slots that those
could fill; every pair is compiled when the predictor is opened, so that no request waits for a
compiler. Nothing of the FM is called: what it left behind is read where it lies (PAPER section 1).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
from flax import nnx

from loopfm_jax import compiler, memory
from loopfm_jax.backbones.blockwise import LEAST
from loopfm_jax.errors import UserError
from loopfm_jax.history.reader import Past
from loopfm_jax.packing import BLOCK, SMALL
from loopfm_jax.sharding import MeshConfig, make_mesh, split
from loopfm_jax.vm.student import Student
from loopfm_jax.vm.train import Examples

BUCKETS = (1, 32, 256, 4096)
"""Examples of a request: rounded up to one of these."""
SHARES = (0.25, 0.375, 0.5, 0.625, 0.75, 1.0)
"""Of the places for tokens, examples times the longest sequence: rounded up to one of these, or to
that of a typical request (`shares_of`)."""
SAMPLE = 4096
"""Rows of the log that show how full it is."""


@dataclass(frozen=True)
class Predictor:
    """Call it with row numbers of the prepared log; see `open_predictor`."""

    examples: Examples
    buckets: tuple[int, ...]
    state: list[jax.Array]
    past: Past
    shares: Mapping[int, tuple[float, ...]]
    """Bucket -> what is rounded up to."""
    programs: Mapping[tuple[int, float], Any]
    """(examples, share) -> compiled (state, batch, past) -> probabilities [B]."""

    def __call__(self, rows: np.ndarray) -> np.ndarray:
        """Probabilities of these rows, float32 [rows]; more than the largest bucket in turn.

        Raises:
          UserError: a row is no whole number, or not of the VM's or a later window.
        """
        rows, largest = np.asarray(rows), self.buckets[-1]
        if rows.shape == (0,):
            return np.zeros(0, np.float32)
        if rows.ndim != 1 or not np.issubdtype(rows.dtype, np.integer):
            raise UserError(
                f"asked for {rows.dtype} of shape {rows.shape}: give row numbers of the prepared "
                "log, whole ones, in one dimension"
            )
        first, stop = self.examples.inputs.splits["vm"].start, len(self.examples.inputs.log)
        if rows.min() < first or rows.max() >= stop:
            raise UserError(
                f"asked for rows {rows.min()} to {rows.max()}, but those that a vertical model can "
                f"answer are {first} to {stop - 1}"
            )
        parts = [rows[at : at + largest] for at in range(0, len(rows), largest)]
        found = [self.answer(self.examples.batch(part)) for part in parts]
        return np.concatenate(
            [np.asarray(p_B)[: len(part)] for p_B, part in zip(found, parts, strict=True)]
        )

    def answer(self, batch: Mapping[str, Any]) -> jax.Array:
        """A batch as `examples.batch` makes it, of at most the largest bucket -> its bucket's
        probabilities, the batch's own first. An accelerator's may still be on their way."""
        count = len(batch["label_B"])
        examples = next(size for size in self.buckets if size >= count)
        share = smallest_share(self.examples, batch, examples, self.shares[examples])
        filled = fill(self.examples, batch, examples=examples, share=share)
        return self.programs[examples, share](self.state, filled, self.past)


def open_predictor(
    model: Student, examples: Examples, *, buckets: Sequence[int] = BUCKETS
) -> Predictor:
    """Compiles every program of `model` on one device.

    Args:
      model: as `vm.train.load_vm` reads it, with a configuration whose `train.dtype` may be another
        than it was trained with: bfloat16 is faster where the processor multiplies it.
      examples: what it was trained on: the prepared log and, for methods that read them,
        histories, which stay in their memory maps.

    Raises:
      UserError: a bucket is below 1.
    """
    buckets = tuple(sorted(set(buckets)))
    if not buckets or buckets[0] < 1:
        raise UserError(f"buckets are {list(buckets)}: name at least one, each at least 1")
    if examples.join is not None:
        examples = replace(examples, join=replace(examples.join, residency="host"))
    memory.keep_freed()
    mesh = make_mesh(MeshConfig())
    graphdef, state = nnx.split(model)
    leaves, tree = jax.tree.flatten(state)  # plain arrays: a call need not walk through the model
    leaves, past = jax.device_put(leaves, split(mesh)), examples.past(mesh)

    def predict(leaves: list[jax.Array], batch: dict[str, Any], past: Past) -> jax.Array:
        student = nnx.merge(graphdef, jax.tree.unflatten(tree, leaves))
        return nnx.sigmoid(student(batch, past).logits_B)

    step, one = jax.jit(predict), examples.batch(np.array([examples.inputs.splits["vm"].start]))
    longest = max((longest for *_, longest in packed(examples)), default=1)

    def compiled(size: int, share: float) -> Any:
        few = room(size, longest, share) <= LEAST  # of which YNNPACK's products are the faster
        filled = fill(examples, one, examples=size, share=share)
        asked = {} if few else compiler.options(mesh, dtype=model.dtype)
        return step.lower(leaves, filled, past).compile(compiler_options=asked)

    shares = {size: shares_of(examples, size) for size in buckets}
    programs = {(size, share): compiled(size, share) for size in buckets for share in shares[size]}
    return Predictor(examples, buckets, leaves, past, shares, programs)


def packed(examples: Examples) -> list[tuple[str, str, int]]:
    """(kind, name, longest) of all that a batch holds by tokens: histories and behaviours."""
    join, schema = examples.join, examples.inputs.schema
    histories = (
        [("slices", key, join.histories.longest) for key in join.reading.keys] if join else []
    )
    return histories + [("events", name, schema[name].length) for name in schema.groups]


def shares_of(examples: Examples, size: int) -> tuple[float, ...]:
    """What requests of so many examples are rounded up to, no two with as many slots.

    Most requests are about as full as the log, and a coarse share would be mostly padding: a finer
    one has room for two in three of those whose rows are drawn from it.
    """
    first, stop = examples.inputs.splits["vm"].start, len(examples.inputs.log)
    rows = np.linspace(first, stop - 1, SAMPLE).astype(np.int64)
    parts, typical = packed(examples), 0.0
    for kind, name, longest in parts:
        length_N = _lengths(examples, kind, name, rows)
        each = length_N.mean() + length_N.std() / (2 * math.sqrt(size))
        typical = max(typical, float(each) / longest)
    rooms = {
        tuple(room(size, longest, share) for *_, longest in parts): share
        for share in sorted({*SHARES, min(typical, 1.0)})
    }
    return tuple(rooms.values())


def _lengths(examples: Examples, kind: str, name: str, rows: np.ndarray) -> np.ndarray:
    if kind == "slices" and examples.join is not None:
        return examples.join.lengths(name, rows)
    return examples.inputs.log.lengths(examples.inputs.schema.groups[name], rows)


def smallest_share(
    examples: Examples, batch: Mapping[str, Any], size: int, shares: Sequence[float]
) -> float:
    """The first that has room for all tokens of a batch of at most `size` examples."""
    wanted = [
        (int(batch[kind][name]["length_B"].sum()), longest)
        for kind, name, longest in packed(examples)
    ]

    def fits(share: float) -> bool:
        return all(tokens <= room(size, longest, share) for tokens, longest in wanted)

    return next(filter(fits, shares))


def room(examples: int, longest: int, share: float) -> int:
    """Token slots of a program; whole blocks of them where there are many (`packing.BLOCK`)."""
    slots = math.ceil(examples * longest * share)
    unit = BLOCK if slots > SMALL else 8
    return -(-slots // unit) * unit


def fill(
    examples_of: Examples, batch: Mapping[str, Any], *, examples: int, share: float
) -> dict[str, Any]:
    """A batch with so many examples, the last ones padding without any token, and room for that
    share of their tokens."""
    parts = packed(examples_of)
    apart = ("slices", "events", "weight_B")  # nobody weighs a request
    plain = {name: part for name, part in batch.items() if name not in apart}
    filled: dict[str, Any] = _grow(plain, examples)
    filled |= {kind: {} for kind in ("slices", "events") if kind in batch}
    for kind, name, longest in parts:
        slots = room(examples, longest, share)
        filled[kind][name] = {
            column: _grow(values, examples) if column.endswith("_B") else _grow(values, 1, slots)
            for column, values in batch[kind][name].items()
        }
    return filled


def _grow(part: Any, *sizes: int) -> Any:
    """Arrays cut or padded with zeros to these first sizes; what is cut are slots of no token."""

    def grow(values: np.ndarray) -> np.ndarray:
        if values.shape[: len(sizes)] == sizes:
            return values
        grown = np.zeros((*sizes, *values.shape[len(sizes) :]), values.dtype)
        both = tuple(slice(min(pair)) for pair in zip(sizes, values.shape, strict=False))
        grown[both] = values[both]
        return grown

    return jax.tree.map(grow, part)
