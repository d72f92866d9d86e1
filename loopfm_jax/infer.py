"""Running a model once over rows, in order, results written as they come."""

import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from loopfm_jax import sharding
from loopfm_jax.data.batches import Assemble, GlobalBatches, OrderConfig, iterate
from loopfm_jax.loop import put
from loopfm_jax.progress import track


def run(
    model: nnx.Module,
    step: Callable[[Any, dict[str, jax.Array], Any], dict[str, jax.Array]],
    rows: np.ndarray,
    assemble: Assemble,
    writers: Mapping[str, np.ndarray],
    *,
    batch: int,
    mesh: Mesh,
    constants: Any = (),
    title: str,
) -> float:
    """Fills `writers[name][i]` with `step(...)[name]` for every row; returns examples/s.

    One step is always in flight while the host writes the one before. The rate leaves out the
    first batch, which compiles.
    """
    graphdef, state = nnx.split(model)
    jitted = jax.jit(lambda s, b, c: step(nnx.merge(graphdef, s), b, c))
    per_device = mesh.shape["data"]
    config = OrderConfig(batch=max(per_device, batch // per_device * per_device))
    source = GlobalBatches(rows, assemble, config=config, parts=sharding.parts(mesh))
    waiting: list[tuple[int, dict[str, jax.Array]]] = []
    started, done = time.monotonic(), 0

    def write() -> int:
        start, values = waiting.pop(0)
        stop = min(start + config.batch, len(rows))
        for name, value in jax.device_get(values).items():
            writers[name][start:stop] = value[: stop - start]
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
