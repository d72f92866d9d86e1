"""Running a model once over rows, in order, results written as they come."""

import time
from collections.abc import Callable, Mapping
from typing import Any, Literal, Protocol

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from loopfm_jax import sharding
from loopfm_jax.data.batches import Assemble, GlobalBatches, OrderConfig, iterate
from loopfm_jax.loop import put
from loopfm_jax.progress import track

Step = Callable[[Any, dict[str, jax.Array], Any], dict[str, jax.Array]]
"""(model, batch, constants) -> results by name, each with a row per example."""
Written = Literal["everywhere", "once"]


class Writer(Protocol):
    """Takes rows of a result: an array, or a file of rows."""

    def __setitem__(self, rows: Any, values: np.ndarray, /) -> None: ...


def make_step(step: Step, graphdef: Any, mesh: Mesh, *, written: Written = "once") -> Any:
    """The jitted (state, batch, constants) -> results."""

    def on_mesh(state: Any, batch: dict[str, jax.Array], constants: Any) -> dict[str, jax.Array]:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return step(nnx.merge(graphdef, state), batch, constants)

    where = sharding.split(mesh, "examples" if written == "once" else None)
    return jax.jit(on_mesh, out_shardings=where)


def run(
    model: nnx.Module,
    step: Step,
    rows: np.ndarray,
    assemble: Assemble,
    writers: Mapping[str, Writer],
    *,
    batch: int,
    mesh: Mesh,
    constants: Any = (),
    title: str,
    written: Written = "everywhere",
) -> float:
    """Fills `writers[name][i]` with `step(...)[name]` for every row; returns examples/s.

    One step is always in flight while the host writes the one before. The rate leaves out the
    first batch, which compiles.

    Args:
      written: by every process, whose arrays are its own; or every row by that one process that
        has it, into files that all share.
    """
    graphdef, state = nnx.split(model)
    jitted = make_step(step, graphdef, mesh, written=written)
    per_device = mesh.shape["data"]
    config = OrderConfig(batch=max(per_device, batch // per_device * per_device))
    source = GlobalBatches(rows, assemble, config=config, parts=sharding.parts(mesh))
    waiting: list[tuple[int, dict[str, jax.Array]]] = []
    started, done = time.monotonic(), 0

    def write() -> int:
        start, values = waiting.pop(0)
        stop = min(start + config.batch, len(rows))
        for name, shards in jax.device_get({n: _own(value) for n, value in values.items()}).items():
            for offset, own in shards.items():
                low = min(start + offset, stop)
                high = min(low + len(own), stop)
                writers[name][low:high] = own[: high - low]
        return stop - start

    with track(title, total=len(rows), unit="examples") as advance:
        for n, host_batch in enumerate(iterate(source)):
            waiting.append((n * config.batch, jitted(state, put(host_batch, mesh), constants)))
            if len(waiting) > 1:
                count = write()
                started, done = (time.monotonic(), 0) if n == 1 else (started, done + count)
            advance(min(config.batch, len(rows) - n * config.batch))
        while waiting:
            done += write()
    return done / (time.monotonic() - started) if len(source) > 1 else float("nan")


def _own(value: jax.Array) -> dict[int, jax.Array]:
    """What this process has of a result: first row -> those rows, each once."""
    return {shard.index[0].start or 0: shard.data for shard in value.addressable_shards}
