"""Export: one jitted step, batch -> codes and soft labels, written as it goes.

The frozen FM runs once over everything after its own window (PAPER section 2). Extraction,
compression, quantisation and packing are one program; only stored bytes leave the device.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from loopfm_jax import checkpoint, infer, stages
from loopfm_jax.errors import UserError, check_limits
from loopfm_jax.fm.teacher import FMConfig, Teacher
from loopfm_jax.fm.train import builder
from loopfm_jax.history import codes
from loopfm_jax.inputs import open_inputs
from loopfm_jax.tables import Features


@dataclass(frozen=True)
class ExportConfig:
    """What is stored per logged event."""

    code: codes.Code = "int4"
    prefix: int = 0
    """Numbers kept of every code (Matryoshka); 0 = all."""
    batch: int = 4096

    def __post_init__(self) -> None:
        check_limits("export", {"prefix": self.prefix}, low=0)
        check_limits("export", {"batch": self.batch}, low=1)


def export(
    data: Path,
    fm: Path,
    config: ExportConfig,
    fm_config: FMConfig,
    *,
    mesh: Mesh,
    directory: Path,
) -> dict[str, Any]:
    """Runs the FM of stage folder `fm` over the VM and test windows of the prepared log `data`.

    Writes codes.npy [rows, columns] and soft.npy [rows] float32, rows in time order.
    """
    width = config.prefix or fm_config.compressor.width
    if width > fm_config.compressor.width:
        raise UserError(
            f"export.prefix is {width}, but a code has only fm.compressor.width = "
            f"{fm_config.compressor.width} numbers; lower the prefix"
        )
    cutoff_ms = stages.verify(fm)["facts"]["cutoff_ms"]
    inputs = open_inputs(data, reader="fm", behaviours=fm_config.backbone.reads_behaviours)
    model = checkpoint.load_model(builder(inputs.schema, fm_config), fm, mesh)
    rows = inputs.rows("vm", "validation", "test")
    writers = {
        "codes": np.lib.format.open_memmap(
            directory / "codes.npy",
            mode="w+",
            dtype=codes.NUMPY_TYPE[config.code],
            shape=(len(rows), codes.columns(width, config.code)),
        ),
        "soft": np.lib.format.open_memmap(
            directory / "soft.npy", mode="w+", dtype=np.float32, shape=(len(rows),)
        ),
    }

    def step(model: Teacher, batch: dict[str, jax.Array], _: Any) -> dict[str, jax.Array]:
        taught = model(Features(batch["ids_BC"], batch["floats_BN"]))
        stored = codes.quantise(taught.code_BZ[:, :width], config.code)
        return {"codes": stored, "soft": nnx.sigmoid(taught.logits_B)}

    rate = infer.run(
        model, step, rows, inputs.batch, writers, batch=config.batch, mesh=mesh, title="export"
    )
    for writer in writers.values():
        writer.flush()
    soft, label = np.asarray(writers["soft"]), inputs.log["label"][rows]
    return {
        "rows": len(rows),
        "width": width,
        "code": config.code,
        "cutoff_ms": cutoff_ms,
        "calibration": float(soft.mean() / label.mean()),
        "measured": {"examples_per_s": rate},
    }
