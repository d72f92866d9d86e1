"""The row `encoder`: histories of codes read forwards and backwards, packed and padded.

Both layouts run the same encoder over `packing.Tokens`, so what is told apart is the padding alone.
"""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from loopfm_jax import loop, memory
from loopfm_jax.bench.data import draw_lengths
from loopfm_jax.bench.model import from_json
from loopfm_jax.bench.protocol import Measured, Spec, timed
from loopfm_jax.history.codes import Codec, dequantise
from loopfm_jax.history.encoders import ENCODERS, EncoderConfig
from loopfm_jax.packing import Tokens, budget, pack, pad
from loopfm_jax.rngs import Rngs
from loopfm_jax.sharding import MeshConfig, make_mesh

BATCHES = 16
"""Different ones, in turn."""
RATE = 0.1
"""Of plain gradient descent: later losses say that the gradients agree."""


def lengths(spec: Spec) -> np.ndarray:
    """Of the histories of all batches, [batches, B]."""
    rng = np.random.default_rng(spec.get("seed", 0))
    drawn = draw_lengths(rng, BATCHES * spec["batch"], longest=spec["length"], fill=spec["fill"])
    return drawn.reshape(BATCHES, -1)


def lay_out(layout: str, longest: int) -> Callable[[jax.Array, jax.Array, jax.Array], Tokens]:
    """(end_B, length_B, slot_PS) -> tokens; of `slot_PS` only the number of slots is read."""
    if layout == "padded":
        return lambda end_B, length_B, _: pad(end_B, length_B, longest=longest)
    return lambda end_B, length_B, slot_PS: pack(
        end_B, length_B, slots=slot_PS.size, longest=longest
    )


class Encode:
    """Steps of an encoder over int4 codes that wait on the device."""

    def __init__(self, spec: Spec):
        memory.keep_freed()
        config, width = from_json(EncoderConfig, spec["encoder"]), spec["width"]
        codec, rng = Codec("int4", width), np.random.default_rng(1)
        model = ENCODERS[config.name](width, width, config, rngs=Rngs(0))
        graphdef, self._params = nnx.split(model)
        stored = rng.integers(0, 256, (spec["entries"], codec.columns), np.uint8)
        self._mesh, self._store = make_mesh(MeshConfig()), jax.device_put(stored)
        self._batches = self._draw(spec, rng)
        self._losses: list[float] = []
        self._waiting: list[jax.Array] = []
        self.facts: dict[str, Any] = {"batch": spec["batch"]}
        tokens_of = lay_out(spec["layout"], spec["length"])

        def loss(params: Any, store: jax.Array, batch: dict[str, jax.Array]) -> jax.Array:
            tokens = tokens_of(batch["end_B"], batch["length_B"], batch["slot_PS"])
            value_TZ = dequantise(store[tokens.row_T], codec)
            value_TZ = jnp.where(tokens.real_T[:, None], value_TZ, 0)
            summary_BX = nnx.merge(graphdef, params)(value_TZ, batch["query_BZ"], tokens)
            return jnp.mean(jnp.square(summary_BX - 1))

        def step(params: Any, store: jax.Array, batch: dict[str, jax.Array]) -> Any:
            value, gradient = jax.value_and_grad(loss)(params, store, batch)
            return jax.tree.map(lambda p, g: p - RATE * g, params, gradient), value

        self._step = jax.jit(step, donate_argnums=0)
        self._turn = self._forever()
        jax.block_until_ready((self._params, self._store))

    def _draw(self, spec: Spec, rng: np.random.Generator) -> list[dict[str, np.ndarray]]:
        size, longest = spec["batch"], spec["length"]
        return [
            {
                "end_B": rng.integers(longest, spec["entries"], size).astype(np.int32),
                "length_B": length_B,
                "slot_PS": np.zeros((1, budget(length_B, longest=longest)), np.int8),
                "query_BZ": rng.normal(size=(size, spec["width"])).astype(np.float32),
            }
            for length_B in lengths(spec)
        ]

    def _forever(self) -> Iterator[dict[str, np.ndarray]]:
        while True:
            yield from self._batches

    def run(self, *, seconds: float, steps: int) -> Measured:
        size = self.facts["batch"]
        return timed(
            self._one, self._read, seconds=seconds, steps=steps, examples=size, losses=self._losses
        )

    def _one(self) -> None:
        batch = loop.put(next(self._turn), self._mesh)
        self._params, value = self._step(self._params, self._store, batch)
        self._read()
        self._waiting.append(value)

    def _read(self) -> None:
        while self._waiting:
            self._losses.append(float(self._waiting.pop()))
