"""Running a model once over rows, in order, results written as they come."""

import time
from collections.abc import Callable, Mapping
from typing import Any, Literal, Protocol

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from loopfm_jax import compiler, memory, sharding
from loopfm_jax.data.batches import Assemble, GlobalBatches, OrderConfig, Seating, iterate
from loopfm_jax.loop import put
from loopfm_jax.progress import track

Step = Callable[[Any, dict[str, jax.Array], Any], dict[str, jax.Array]]
"""(model, batch, constants) -> results by name, each with a row per example."""
Written = Literal["everywhere", "once"]


class Writer(Protocol):
    """Takes rows of a result: an array, or a file of rows."""

    def __setitem__(self, rows: Any, values: np.ndarray, /) -> None: ...


def make_step(step: Step, graphdef: Any, mesh: Mesh, *, written: Written = "everywhere") -> Any:
    """The jitted (state, batch, constants) -> results.

    Args:
      graphdef: of the model.
      written: by every process, whose arrays are its own; or every row by that one process that
        has it, into files that all share.
    """

    def on_mesh(state: Any, batch: dict[str, jax.Array], constants: Any) -> dict[str, jax.Array]:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return step(nnx.merge(graphdef, state), batch, constants)

    where = sharding.split(mesh, "examples" if written == "once" else None)
    return jax.jit(on_mesh, out_shardings=where, compiler_options=compiler.options(mesh))


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

    One step is always in flight while the host writes the one before. The rate leaves out the
    first batch, which compiles.

    Args:
      program: of `make_step`; the next pass over the same model's form may use it again.
      seating: of `GlobalBatches`.
    """
    memory.keep_freed()
    state = nnx.state(model)
    per_device = mesh.shape["data"]
    config = OrderConfig(batch=max(per_device, batch // per_device * per_device))
    parts = sharding.parts(mesh)
    source = GlobalBatches(rows, assemble, config=config, parts=parts, seating=seating)
    waiting: list[tuple[int, dict[str, jax.Array]]] = []
    started, done = time.monotonic(), 0

    def write() -> int:
        step, values = waiting.pop(0)
        place_B = source.places(step)
        for name, shards in jax.device_get({n: _own(value) for n, value in values.items()}).items():
            for offset, own in shards.items():
                for at, low, high in runs(place_B[offset : offset + len(own)]):
                    writers[name][at : at + high - low] = own[low:high]
        return min(config.batch, len(rows) - step * config.batch)

    with track(title, total=len(rows), unit="examples") as advance:
        for n, host_batch in enumerate(iterate(source)):
            waiting.append((n, program(state, put(host_batch, mesh), constants)))
            if len(waiting) > 1:
                count = write()
                started, done = (time.monotonic(), 0) if n == 1 else (started, done + count)
            advance(min(config.batch, len(rows) - n * config.batch))
        while waiting:
            done += write()
    return done / (time.monotonic() - started) if len(source) > 1 else float("nan")


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
