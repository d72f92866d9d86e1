"""What this machine can do at most, measured in the run: the denominators of every share."""

import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from loopfm_jax import compiler, memory
from loopfm_jax.bench.protocol import Measured, Spec, timed

LARGE = 8192
"""A product that fills an accelerator."""


def best(call: Callable[[], Any], *, repeats: int) -> float:
    """Seconds of the fastest call after one to warm up."""
    call()
    took = []
    for _ in range(repeats):
        started = time.perf_counter()
        call()
        took.append(time.perf_counter() - started)
    return min(took)


def gemm_flops(sizes: list[int], *, repeats: int, dtype: str = "float32") -> float:
    """FLOP/s of the fastest square product with a float32 result, compiled as steps are or by
    default."""

    def rate(n: int, asked: dict[str, Any]) -> float:
        product = partial(jnp.matmul, preferred_element_type=jnp.float32)
        multiply = jax.jit(product, compiler_options=asked)
        a, b = (jax.random.normal(jax.random.key(i), (n, n), dtype) for i in range(2))
        return 2 * n**3 / best(lambda: multiply(a, b).block_until_ready(), repeats=repeats)

    return max(rate(n, asked) for n in sizes for asked in ({}, compiler.options(dtype=dtype)))


def stream_bytes(count: int, *, repeats: int) -> float:
    """Bytes/s of a = a + s b in place over arrays of `count` floats, three passes counted."""
    triad = jax.jit(lambda a, b: a + 3 * b, donate_argnums=0)
    a, b = jnp.ones(count), jnp.ones(count)

    def once() -> None:
        nonlocal a
        a = triad(a, b).block_until_ready()

    return 12 * count / best(once, repeats=repeats)


def gather_rows(rows: int, width: int, count: int, *, repeats: int) -> float:
    """Rows/s of random float32 rows: the faster of numpy on all cores and one compiled gather."""
    rng = np.random.default_rng(0)
    table, ids = np.ones((rows, width), np.float32), rng.integers(0, rows, count)
    cores = os.cpu_count() or 1
    parts, out = np.array_split(ids, cores), np.empty((count, width), np.float32)
    outs = np.array_split(out, cores)
    with ThreadPoolExecutor(cores) as pool:

        def on_host() -> None:
            list(pool.map(lambda i, o: table.take(i, axis=0, out=o, mode="clip"), parts, outs))

        host = best(on_host, repeats=repeats)
    gather = jax.jit(lambda table, ids: table.at[ids].get(mode="promise_in_bounds"))
    on_device = jnp.asarray(table), jnp.asarray(ids)
    device = best(lambda: gather(*on_device).block_until_ready(), repeats=repeats)
    return count / min(host, device)


class Limits:
    """The job: everything is measured in `setup`, and is its facts."""

    def __init__(self, spec: Spec):
        memory.keep_freed()  # or page faults are measured
        repeats, width, platform = spec["repeats"], 32, jax.devices()[0].platform
        sizes = spec["gemm"] if platform == "cpu" else [*spec["gemm"], LARGE]
        self.facts = {
            "device": jax.devices()[0].device_kind,
            "platform": platform,
            "flops": gemm_flops(sizes, repeats=repeats, dtype=spec.get("dtype", "float32")),
            "flops_bfloat16": gemm_flops(sizes, repeats=repeats, dtype="bfloat16"),
            "stream_bytes_s": stream_bytes(spec["stream"], repeats=repeats),
            "gather_rows_s": gather_rows(spec["rows"], width, spec["ids"], repeats=repeats),
            "gather_width": width,
        }

    def run(self, *, seconds: float, steps: int) -> Measured:
        return timed(lambda: None, lambda: None, seconds=0, steps=1, examples=0)
