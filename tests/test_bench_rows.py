"""What the benchmark's rows measure, at a size at which the numbers mean nothing."""

import numpy as np

from loopfm_jax.backbones import BackboneConfig
from loopfm_jax.bench.rows_export import measure, open_exporter
from loopfm_jax.fm.compressor import CompressorConfig
from loopfm_jax.fm.exporter import ExportConfig
from loopfm_jax.fm.teacher import FMConfig
from loopfm_jax.tables import TableConfig


def test_export(prepared):
    fm = FMConfig(
        backbone=BackboneConfig(hidden=(8,), tables=TableConfig(width=4)),
        compressor=CompressorConfig(width=64, prefixes=(), hidden=(8,)),
    )
    exporter = open_exporter(prepared, fm, ExportConfig(batch=64))
    row = measure(exporter, np.arange(4 * 64), rounds=1)
    assert row.rows == 256 and row.code_bytes_per_row == 32
    assert row.ratio == row.export_rows_per_s / row.code_rows_per_s
    assert row.forward_ratio == row.export_rows_per_s / row.forward_rows_per_s
