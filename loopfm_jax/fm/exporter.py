"""What logs: a teacher, and how its codes are stored. One jitted step, batch -> stored bytes.

Extraction, compression, quantisation and packing are one program; only stored bytes leave the
device. Learned codes are fitted on the FM window (fm/codebook.py).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from loopfm_jax import infer, processes
from loopfm_jax.errors import UserError, check_limits
from loopfm_jax.fm import codebook
from loopfm_jax.fm.teacher import FMConfig, Teacher
from loopfm_jax.fm.train import Lessons, sample
from loopfm_jax.history.codes import Code, Codec, dequantise, quantise
from loopfm_jax.history.rowfile import RowFile

Refresh = Literal["fixed", "fresh", "linear", "ema", "anchored"]


@dataclass(frozen=True)
class ExportConfig:
    """What is stored per logged event."""

    code: Code = "int4"
    """kmeans4 and rq are fitted on the FM window."""
    books: int = 4
    """Bytes per code of `rq`: residual codebooks of 256 vectors each."""
    prefix: int = 0
    """Numbers kept of every code (Matryoshka); 0 = all."""
    batch: int = 4096
    refresh: Refresh = "fixed"
    """`fixed` freezes the FM; otherwise it goes on learning, and its codes are taken as they come
    (`fresh`), mapped back (`linear`), averaged (`ema`) or held (`anchored`); see fm/refresh.py."""
    refresh_hours: float = 24.0
    """Between two checkpoints."""
    ema: float = 0.5
    """Share of the average so far that every checkpoint leaves standing."""
    anchor: float = 1.0
    """Weight of the distance to the first checkpoint's codes."""

    def __post_init__(self) -> None:
        check_limits("export", {"prefix": self.prefix, "anchor": self.anchor}, low=0)
        check_limits("export", {"ema": self.ema}, low=0, high=1)
        check_limits("export", {"refresh_hours": self.refresh_hours}, low=0.01)
        check_limits("export", {"batch": self.batch, "books": self.books}, low=1)


@dataclass(frozen=True)
class Exporter:
    """A teacher and how its codes are stored."""

    lessons: Lessons
    model: Teacher
    codecs: Mapping[str, Codec]
    """By tap."""
    mesh: Mesh
    batch: int
    past: Any
    learner: Any = None
    """The model that goes on learning, where that is not the one that logs (`fm.refresh`)."""
    align: Mapping[str, np.ndarray] = field(default_factory=dict)
    """Tap -> affine map [Z+1,Z] of its codes into an older checkpoint's space."""
    programs: dict[infer.Written, Any] = field(default_factory=dict)
    """Made so far, for all exporters that `replace` made of one: every day's pass runs the same."""

    def run(
        self,
        rows: np.ndarray,
        writers: Mapping[str, infer.Writer],
        *,
        title: str,
        written: infer.Written = "once",
    ) -> float:
        """Fills `codes_<tap>` and `soft` of `writers` for these rows; returns examples/s."""
        if written not in self.programs:
            made = infer.make_step(log_batch, self.model, self.mesh, written=written)
            self.programs[written] = made
        return infer.run(
            self.model,
            self.programs[written],
            rows,
            self.lessons.batch,
            writers,
            batch=self.batch,
            mesh=self.mesh,
            constants=self.constants,
            title=title,
        )

    @property
    def constants(self) -> tuple[Any, Any, Any]:
        """What `log_batch` reads besides the batch."""
        return dict(self.codecs), dict(self.align), self.past


def log_batch(
    model: Teacher, batch: dict[str, Any], constants: tuple[Any, Any, Any]
) -> dict[str, jax.Array]:
    """What is stored of a batch: `soft` and `codes_<tap>`, as bytes."""
    codecs, align, past = constants
    taught = model(batch, past)
    stored = {"soft": nnx.sigmoid(taught.logits_B)}
    for tap, code_BZ in taught.codes.items():
        code_BZ = code_BZ[:, : codecs[tap].width]
        if tap in align:
            code_BZ = jnp.clip(code_BZ @ align[tap][:-1] + align[tap][-1:], -1, 1)
        stored[f"codes_{tap}"] = quantise(code_BZ, codecs[tap])
    return stored


def code_width(config: ExportConfig, fm_config: FMConfig) -> int:
    """Numbers per stored code."""
    width = config.prefix or fm_config.compressor.width
    if width > fm_config.compressor.width:
        raise UserError(
            f"export.prefix is {width}, but a code has only fm.compressor.width = "
            f"{fm_config.compressor.width} numbers; lower the prefix"
        )
    return width


def fit(
    lessons: Lessons,
    model: Any,
    config: ExportConfig,
    fm_config: FMConfig,
    *,
    mesh: Mesh,
    seed: int,
    before: int,
    directory: Path,
) -> tuple[Exporter, dict[str, dict[str, float | None]]]:
    """The codes of every tap, fitted on rows before `before`, and what they lose there.

    Returns:
      the exporter, and per tap `code`: the share of the standardised activation's squares (around
      its running mean: its variance) that the exported numbers lose at full precision, None where
      that prefix has no decoder; and `quantised`: the share of these numbers' variance that storing
      them loses.
    """
    width = code_width(config, fm_config)
    rows = sample(lessons.inputs.known(np.arange(before), before=before))
    past = lessons.past(mesh)
    found = _survey(lessons, model, rows, past, width=width, batch=config.batch, mesh=mesh)
    codecs, losses = {}, {}
    for tap in fm_config.taps:
        z = found[f"codes_{tap}"]
        book = codebook.fit(z, config.code, books=config.books, seed=seed)
        if book is not None and processes.leads():
            np.save(directory / f"book_{tap}.npy", book, allow_pickle=False)
        codecs[tap] = Codec(config.code, width, book)
        lost, whole = found[f"square_{tap}"].sum(axis=0, dtype=np.float64)
        losses[tap] = {
            "code": None if np.isnan(lost) else float(lost / whole),
            "quantised": _loss(z, codecs[tap]),
        }
    return Exporter(lessons, model, codecs, mesh, config.batch, past), losses


def _survey(
    lessons: Lessons,
    model: Any,
    rows: np.ndarray,
    past: Any,
    *,
    width: int,
    batch: int,
    mesh: Mesh,
) -> dict[str, np.ndarray]:
    """Per tap of these rows: `codes_<tap>` [rows,width], and `square_<tap>` [rows,2], the squared
    norms of what the code loses of the standardised activation (NaN: no decoder) and of that."""

    def step(model: Teacher, batch: dict[str, Any], past: Any) -> dict[str, jax.Array]:
        taught, found = model(batch, past), {}
        for tap, compressor in zip(model.taps, model.compressors, strict=True):
            e_BD, z_BZ = taught.activations[tap], taught.codes[tap]
            lost_BD = jnp.full_like(e_BD, jnp.nan)
            if width in compressor.prefixes:
                lost_BD = e_BD - compressor.decode(z_BZ, compressor.prefixes.index(width))
            squares = [jnp.square(x).sum(axis=1) for x in (lost_BD, e_BD)]
            found[f"codes_{tap}"] = z_BZ[:, :width]
            found[f"square_{tap}"] = jnp.stack(squares, axis=1)
        return found

    columns = {"codes": width, "square": 2}
    found = {
        f"{name}_{tap}": np.zeros((len(rows), n), np.float32)
        for name, n in columns.items()
        for tap in model.taps
    }
    title = "codes of the FM window"
    infer.run(
        model,
        infer.make_step(step, model, mesh),
        rows,
        lessons.batch,
        found,
        batch=batch,
        mesh=mesh,
        constants=past,
        title=title,
    )
    return found


def _loss(z: np.ndarray, codec: Codec) -> float:
    """The share of the codes' variance that storing them loses."""
    back = np.asarray(dequantise(quantise(jnp.asarray(z), codec), codec))
    return float(np.square(z - back).sum() / np.square(z - z.mean(axis=0)).sum())


def open_writers(directory: Path, rows: int, codecs: Mapping[str, Codec]) -> dict[str, RowFile]:
    """Files to be filled: `codes_<tap>` and `soft`."""
    shapes = {f"codes_{tap}": (c.dtype, (rows, c.columns)) for tap, c in codecs.items()}
    return {
        name: RowFile(directory / f"{name}.npy", shape=shape, dtype=dtype)
        for name, (dtype, shape) in (shapes | {"soft": ("float32", (rows,))}).items()
    }
