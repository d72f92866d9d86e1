"""Export: the frozen FM runs once over everything after its own window (PAPER section 2)."""

from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from loopfm_jax import checkpoint, processes, stages
from loopfm_jax.data.log import LogResidency
from loopfm_jax.fm import refresh
from loopfm_jax.fm.exporter import ExportConfig, code_width, fit, open_writers
from loopfm_jax.fm.teacher import FMConfig
from loopfm_jax.fm.train import open_lessons
from loopfm_jax.history.store import Residency


def export(
    data: Path,
    fm: Path,
    config: ExportConfig,
    fm_config: FMConfig,
    *,
    seed: int,
    mesh: Mesh,
    directory: Path,
    history: Path | None = None,
    residency: Residency = "auto",
    log_residency: LogResidency = "auto",
) -> dict[str, Any]:
    """Runs the FM of stage folder `fm` over all rows of the prepared log `data` that come after
    the ones it learned from.

    Writes codes_<tap>.npy [rows, columns], soft.npy [rows] float32 and, for learned codes,
    book_<tap>.npy; rows in time order.

    Args:
      history: what an FM of a second round reads.
      residency: where that waits.
      log_residency: where the log waits.
    """
    facts = stages.verify(fm)["facts"]
    order = "time" if config.refresh == "fixed" else refresh.ORDER
    lessons = open_lessons(data, fm_config, history, residency, log_residency, order)
    model = checkpoint.load_model(
        lessons.builder(fm_config), fm, mesh, pretrained=lessons.inputs.log.pretrained
    )
    first = facts["first"]
    run: dict[str, Any] = {"seed": seed, "directory": directory}
    exporter, losses = fit(lessons, model, config, fm_config, mesh=mesh, before=first, **run)
    rows = np.arange(first, len(lessons.inputs.log))
    writers = open_writers(directory, len(rows), exporter.codecs)
    time, cutoff_ms = lessons.inputs.log["time"], facts["cutoff_ms"]
    logged: dict[str, Any] = {"cutoffs": [[int(time[first]), cutoff_ms]]}
    if config.refresh == "fixed":
        logged["measured"] = {"examples_per_s": exporter.run(rows, writers, title="export")}
    else:
        logged = refresh.run(exporter, config, fm_config, rows, writers, cutoff_ms=cutoff_ms, **run)
    for writer in writers.values():
        writer.close()
    processes.wait()
    soft = np.load(directory / "soft.npy", mmap_mode="r", allow_pickle=False)
    label = lessons.inputs.log["label"][rows]
    return {
        "rows": len(rows),
        "first": first,
        "taps": list(exporter.codecs),
        "width": code_width(config, fm_config),
        "code": config.code,
        "losses": losses,
        "calibration": float(soft.mean() / label.mean()),
        **logged,
    }
