"""Running a model once over rows, in order, results written as they come."""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any, Literal, Protocol

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from loopfm_jax import compiler, memory, sharding
from loopfm_jax.data.batches import (
    Assemble,
    Batch,
    GlobalBatches,
    OrderConfig,
    Seating,
    iterate,
)
from loopfm_jax.loop import put
from loopfm_jax.progress import track

Step = Callable[[Any, dict[str, jax.Array], Any], dict[str, jax.Array]]
"""(model, batch, constants) -> results by name, each with a row per example."""
Written = Literal["everywhere", "once"]
HALVED = 4096
"""Examples from which on one CPU device answers a batch as two halves."""


class Writer(Protocol):
    """Takes rows of a result: an array, or a file of rows."""

    def __setitem__(self, rows: Any, values: np.ndarray, /) -> None: ...


def make_step(step: Step, model: Any, mesh: Mesh, *, written: Written = "everywhere") -> Any:
    """The jitted (state, batch, constants) -> results.

    Args:
      model: whose form is run, in the arithmetic of its `dtype`; every call brings a state.
      written: by every process, whose arrays are its own; or every row by that one process that
        has it, into files that all share.
    """
    graphdef = nnx.graphdef(model)

    def on_mesh(state: Any, batch: dict[str, jax.Array], constants: Any) -> dict[str, jax.Array]:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return step(nnx.merge(graphdef, state), batch, constants)

    where = sharding.split(mesh, "examples" if written == "once" else None)
    asked = compiler.options(mesh, dtype=model.dtype)
    return jax.jit(on_mesh, out_shardings=where, compiler_options=asked)


def programs_of(batch: int, mesh: Mesh) -> int:
    """How many programs, side by side, answer a batch.

    On CPU parts of a program run on one core, products of small matrices for one: halves of a large
    batch side by side are faster, in the memory of one whole (benchmarks/LOG.md). Several CPU
    devices wait for each other within a program, and two programs might do so crosswise.
    """
    alone = mesh.size == 1 and mesh.devices.flat[0].platform == "cpu"
    return 2 if alone and batch >= HALVED else 1


def in_flight(
    answer: Callable[[Batch], Any], batches: Iterable[Batch], *, threads: int = 1
) -> Iterator:
    """`answer` of every batch, in order, by threads that go on to the next ones meanwhile: an
    accelerator, or a CPU's other cores, work while the caller reads a result."""
    asked, compiled = deque(), set()
    with ThreadPoolExecutor(threads) as pool:
        for batch in batches:
            asked.append(pool.submit(answer, batch))
            shapes = str(jax.tree.map(np.shape, batch))
            if shapes not in compiled:
                wait([asked[-1]])  # or the next batch would compile the same
                compiled.add(shapes)
                memory.set_aside()  # compiling would have used it up
            if len(asked) > threads:
                yield asked.popleft().result()
        while asked:
            yield asked.popleft().result()


def run(
    model: nnx.Module,
    program: Any,
    rows: np.ndarray,
    assemble: Assemble,
    writers: Mapping[str, Writer],
    *,
    batch: int,
    mesh: Mesh,
    constants: Any = (),
    title: str,
    seating: Seating | None = None,
) -> float:
    """Fills `writers[name][i]` with `program(...)[name]` for every row; returns examples/s.

    Others are in flight while the host writes one. The rate leaves out the first, which compiles.

    Args:
      program: of `make_step`; the next pass over the same model's form may use it again.
      batch: examples at a time, of `programs_of` programs together.
      seating: of `GlobalBatches`.
    """
    memory.keep_freed()
    state = nnx.state(model)
    per_device, threads = mesh.shape["data"], programs_of(batch, mesh)
    config = OrderConfig(batch=max(per_device, batch // threads // per_device * per_device))
    parts = sharding.parts(mesh)
    source = GlobalBatches(rows, assemble, config=config, parts=parts, seating=seating)
    started, first = time.monotonic(), min(config.batch, len(rows))

    def answer(batch: Batch) -> dict[str, dict[int, jax.Array]]:
        values = program(state, put(batch, mesh), constants)
        return {name: _own(value) for name, value in values.items()}

    def write(step: int, values: Any) -> None:
        place_B = source.places(step)
        for name, shards in jax.device_get(values).items():
            for offset, own in shards.items():
                for at, low, high in runs(place_B[offset : offset + len(own)]):
                    writers[name][at : at + high - low] = own[low:high]

    with track(title, total=len(rows), unit="examples") as advance:
        for n, values in enumerate(in_flight(answer, iterate(source), threads=threads)):
            write(n, values)
            advance(min(config.batch, len(rows) - n * config.batch))
            started = started if n else time.monotonic()
    return (len(rows) - first) / (time.monotonic() - started) if len(source) > 1 else float("nan")


def runs(place_B: np.ndarray) -> list[tuple[int, int, int]]:
    """(first row, its place, one past the last place) of places whose rows follow one another;
    -1 is no row."""
    taken = np.flatnonzero(place_B >= 0)
    row = place_B[taken]
    follows = (np.diff(taken) == 1) & (np.diff(row) == 1)
    starts = np.flatnonzero(np.append(True, ~follows)[: len(row)])
    stops = np.append(starts[1:], len(row))[: len(starts)]
    return [
        (int(row[i]), int(taken[i]), int(taken[j - 1]) + 1)
        for i, j in zip(starts, stops, strict=True)
    ]


def _own(value: jax.Array) -> dict[int, jax.Array]:
    """What this process has of a result: first row -> those rows, each once."""
    return {shard.index[0].start or 0: shard.data for shard in value.addressable_shards}
