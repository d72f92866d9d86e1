"""The row `export`: codes computed, stored and written, beside the forward pass alone."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import jax
import numpy as np
from flax import nnx

from loopfm_jax import compiler, memory, sharding
from loopfm_jax.backbones import BackboneConfig
from loopfm_jax.bench import data
from loopfm_jax.bench.model import from_json
from loopfm_jax.bench.protocol import Measured, Spec, timed
from loopfm_jax.data.schema import Schema
from loopfm_jax.fm.compressor import CompressorConfig
from loopfm_jax.fm.exporter import ExportConfig, Exporter, code_width, log_batch, open_writers
from loopfm_jax.fm.teacher import FMConfig
from loopfm_jax.fm.train import Lessons
from loopfm_jax.history.codes import Codec
from loopfm_jax.infer import in_flight, programs_of
from loopfm_jax.loop import put
from loopfm_jax.rngs import Rngs
from loopfm_jax.sharding import MeshConfig, make_mesh
from loopfm_jax.tables import TableConfig

BATCHES = 4
"""Of a pass."""


def make_exporter(spec: Spec) -> tuple[Exporter, np.ndarray]:
    """An FM that was never trained over a generated log, and the rows of a pass."""
    inputs = data.read_log(Path(spec["log"]), Schema.from_json(spec["schema"]))
    lessons, mesh = Lessons(inputs, None), make_mesh(MeshConfig())
    fm = FMConfig(
        backbone=from_json(BackboneConfig, spec["backbone"], tables=TableConfig),
        compressor=CompressorConfig(width=spec["width"], prefixes=()),
    )
    config = ExportConfig(batch=spec["batch"])
    model = lessons.builder(fm)(Rngs(0))
    codecs = {tap: Codec(config.code, code_width(config, fm)) for tap in fm.taps}
    rows = np.arange(min(len(inputs.log) // config.batch, BATCHES) * config.batch)
    return Exporter(lessons, model, codecs, mesh, config.batch, None), rows


class Export:
    """Batches made from the log, codes and soft labels in their files; a step is a pass."""

    def __init__(self, spec: Spec):
        memory.keep_freed()
        self._exporter, self._rows = make_exporter(spec)
        stored = self._exporter.codecs.values()
        sizes = [c.columns * np.dtype(c.dtype).itemsize for c in stored]
        self.facts: dict[str, Any] = {"code_bytes_per_row": sum(sizes)}

    def run(self, *, seconds: float, steps: int) -> Measured:
        exporter, rows = self._exporter, self._rows

        def step() -> None:
            with TemporaryDirectory() as folder:
                writers = open_writers(Path(folder), len(rows), exporter.codecs)
                exporter.run(rows, writers, title="export")
                for writer in writers.values():
                    writer.close()

        return timed(step, lambda: None, seconds=seconds, steps=steps, examples=len(rows))


class Forward:
    """The same FM's predictions over the same batches, which wait on the device; as many in flight
    as there."""

    def __init__(self, spec: Spec):
        memory.keep_freed()
        exporter, rows = make_exporter(spec)
        graphdef, self._state = nnx.split(exporter.model)
        self._constants = exporter.constants
        self.facts: dict[str, Any] = {"batch": exporter.batch}
        self._programs = programs_of(exporter.batch, exporter.mesh)
        size = exporter.batch // self._programs
        parts = sharding.parts(exporter.mesh)
        self._batches = [
            put(exporter.lessons.batch(rows[low : low + size], parts), exporter.mesh)
            for low in range(0, len(rows), size)
        ]
        self._rows = len(rows)

        def step(state: Any, batch: Any, constants: Any) -> Any:
            return log_batch(nnx.merge(graphdef, state), batch, constants)["soft"]

        asked = compiler.options(exporter.mesh, dtype=exporter.model.dtype)
        self._step = jax.jit(step, compiler_options=asked)

    def run(self, *, seconds: float, steps: int) -> Measured:
        def answer(batch: Any) -> Any:
            return self._step(self._state, batch, self._constants)

        def over_all() -> None:
            for soft_B in in_flight(answer, self._batches, threads=self._programs):
                jax.block_until_ready(soft_B)

        return timed(over_all, lambda: None, seconds=seconds, steps=steps, examples=self._rows)
