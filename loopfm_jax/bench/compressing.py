"""The row `compress`: activations become stored codes, stored codes become numbers again."""

from typing import Any

import jax
import numpy as np
from flax import nnx

from loopfm_jax import memory
from loopfm_jax.bench.protocol import Measured, Spec, timed
from loopfm_jax.fm.compressor import Autoencoder, CompressorConfig
from loopfm_jax.history.codes import Codec, dequantise, quantise
from loopfm_jax.rngs import Rngs

BATCHES = 8
"""Different ones, in turn."""


class Compress:
    """Activations [B,D] on the device -> stored codes, in one program."""

    def __init__(self, spec: Spec):
        memory.keep_freed()
        size, inputs = spec["batch"], spec["inputs"]
        codec = Codec(spec["code"], spec["width"])
        model = Autoencoder(inputs, CompressorConfig(width=codec.width, prefixes=()), rngs=Rngs(0))
        graphdef, state = nnx.split(model)
        rng = np.random.default_rng(0)
        given = [rng.normal(size=(size, inputs)).astype(np.float32) for _ in range(BATCHES)]

        @jax.jit
        def run(state: Any, e_BD: jax.Array) -> jax.Array:
            compressor = nnx.merge(graphdef, state)
            return quantise(compressor.encode(compressor.standardise(e_BD, train=False)), codec)

        self.facts: dict[str, Any] = {
            "batch": size,
            "code_bytes_per_row": codec.columns * np.dtype(codec.dtype).itemsize,
        }
        self._calls = Calls(run, [(state, batch) for batch in jax.device_put(given)], size)
        self.run = self._calls.run


class Read:
    """Stored codes of random rows, gathered and made numbers, in one program."""

    def __init__(self, spec: Spec):
        memory.keep_freed()
        size, codec = spec["batch"], Codec(spec["code"], spec["width"])
        rng = np.random.default_rng(0)
        z_SZ = rng.uniform(-1, 1, (spec["entries"], codec.width)).astype(np.float32)
        store = jax.jit(lambda z_SZ: quantise(z_SZ, codec))(z_SZ)
        rows = [rng.integers(0, len(store), size).astype(np.int32) for _ in range(BATCHES)]

        @jax.jit
        def run(store: jax.Array, row_T: jax.Array) -> jax.Array:
            return dequantise(store.at[row_T].get(mode="promise_in_bounds"), codec)

        self.facts: dict[str, Any] = {"batch": size, "store_bytes": store.nbytes}
        self._calls = Calls(run, [(store, batch) for batch in jax.device_put(rows)], size)
        self.run = self._calls.run


class Calls:
    """A program over batches in turn, two of them in flight at most."""

    def __init__(self, program: Any, batches: list[tuple[Any, ...]], size: int):
        self._program, self._batches, self._size = program, batches, size
        self._asked, self._waiting = 0, []

    def run(self, *, seconds: float, steps: int) -> Measured:
        return timed(self._one, self._wait, seconds=seconds, steps=steps, examples=self._size)

    def _one(self) -> None:
        batch = self._batches[self._asked % len(self._batches)]
        self._asked += 1
        self._waiting.append(self._program(*batch))
        if len(self._waiting) > 2:
            jax.block_until_ready(self._waiting.pop(0))

    def _wait(self) -> None:
        jax.block_until_ready(self._waiting)
        self._waiting.clear()
