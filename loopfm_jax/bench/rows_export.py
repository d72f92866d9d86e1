"""Export against the forward pass alone: codes computed, stored and written, per row of the log."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import jax
import numpy as np
from flax import nnx

from loopfm_jax.fm.exporter import ExportConfig, Exporter, code_width, log_batch, open_writers
from loopfm_jax.fm.teacher import FMConfig
from loopfm_jax.fm.train import open_lessons
from loopfm_jax.history.codes import Codec
from loopfm_jax.loop import put
from loopfm_jax.sharding import MeshConfig, make_mesh


@dataclass(frozen=True)
class ExportRow:
    """Medians over rounds in which both take turns."""

    rows: int
    export_rows_per_s: float
    """Batches made from the log, codes and soft labels in their files."""
    code_rows_per_s: float
    """The same program over batches that wait on the device; nothing is read back."""
    forward_rows_per_s: float
    """The same without compressor and codes: logits alone."""
    ratio: float
    """Of export to the program that it runs, median of the rounds' own ratios."""
    forward_ratio: float
    """Of export to the forward pass."""
    code_bytes_per_row: int


def open_exporter(data: Path, fm: FMConfig, config: ExportConfig) -> Exporter:
    """An FM that was never trained, over the prepared log `data`; a uniform code."""
    lessons, mesh = open_lessons(data, fm), make_mesh(MeshConfig())
    model = lessons.builder(fm)(nnx.Rngs(0))
    codecs = {tap: Codec(config.code, code_width(config, fm)) for tap in fm.taps}
    return Exporter(lessons, model, codecs, mesh, config.batch, lessons.past(mesh))


def measure(exporter: Exporter, rows: np.ndarray, *, rounds: int = 5) -> ExportRow:
    """Rates over `rows`, which are whole batches."""
    codes, found = _Resident(exporter, rows, log_batch), []
    forward = _Resident(exporter, rows, lambda *given: log_batch(*given)["soft"])
    for _ in range(rounds + 1):  # the first one compiles
        with TemporaryDirectory() as folder:
            writers = open_writers(Path(folder), len(rows), exporter.codecs)
            exported = exporter.run(rows, writers, title="export")
        found.append((exported, codes(), forward()))
    rates = np.array(found[1:])
    exported, coded, forwarded = np.median(rates, axis=0).tolist()
    ratio, forward_ratio = np.median(rates[:, :1] / rates[:, 1:], axis=0).tolist()
    return ExportRow(
        rows=len(rows),
        export_rows_per_s=exported,
        code_rows_per_s=coded,
        forward_rows_per_s=forwarded,
        ratio=ratio,
        forward_ratio=forward_ratio,
        code_bytes_per_row=sum(
            c.columns * np.dtype(c.dtype).itemsize for c in exporter.codecs.values()
        ),
    )


class _Resident:
    """A step over the same batches, put on the device beforehand."""

    def __init__(self, exporter: Exporter, rows: np.ndarray, step: Callable[..., Any]):
        graphdef, self._state = nnx.split(exporter.model)
        self._step = jax.jit(lambda s, b, c: step(nnx.merge(graphdef, s), b, c))
        self._constants, size = exporter.constants, exporter.batch
        parts = [rows[low : low + size] for low in range(0, len(rows) - size + 1, size)]
        batches = [exporter.lessons.batch(part) for part in parts]
        self._batches = [put(batch, exporter.mesh) for batch in batches]
        self._rows = size * len(parts)

    def __call__(self) -> float:
        """Rows/s, two steps in flight."""
        started, waiting = time.monotonic(), []
        for batch in self._batches:
            waiting.append(self._step(self._state, batch, self._constants))
            if len(waiting) > 2:
                jax.block_until_ready(waiting.pop(0))
        jax.block_until_ready(waiting)
        return self._rows / (time.monotonic() - started)
