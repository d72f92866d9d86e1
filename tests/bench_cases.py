"""Benchmark cases next to nothing: the real code paths over a schema of a few ids."""

from loopfm_jax.backbones import BackboneConfig
from loopfm_jax.bench import rows
from loopfm_jax.bench.data import HistorySpec
from loopfm_jax.bench.input_rows import PreparedSpec, input_rows
from loopfm_jax.bench.rows import LogSpec
from loopfm_jax.data.schema import Behaviour, Field, Numeric, Schema
from loopfm_jax.tables import TableConfig

SCHEMA = Schema(
    fields=(
        Field("user", 40),
        Field("item", 30),
        Field("cate", 9),
        Field("item_his", 30, kind="sequence", length=6, shares="item"),
        Field("cate_his", 9, kind="sequence", length=6, shares="cate"),
    ),
    numeric=(Numeric("price"),),
    behaviours=(Behaviour(("item", "cate"), ("item_his", "cate_his")),),
    item=("item", "cate"),
)
LOG = LogSpec(SCHEMA, rows=320)
LIMITS = {
    "job": "limits",
    "gemm": [64],
    "stream": 1000,
    "rows": 50,
    "ids": 100,
    "repeats": 1,
}


def backbone(name, **options) -> BackboneConfig:
    tables = TableConfig(width=4, row_multiple=1)
    sizes = {"hidden": (12, 8), "attention_hidden": (10, 6), "tables": tables, **options}
    return BackboneConfig(name, **sizes)


DIN = backbone("din", attention_dropout=0.0)
DMIN = backbone("dmin", attention_dropout=0.0)
TRAIN = rows.fm_train("tiny", DIN, batch=64, prepare=LOG)
TRAINED = (
    TRAIN,
    rows.fm_train("tiny-dmin", DMIN, batch=64, prepare=LOG),
    rows.fm_train("tiny-dien", backbone("dien", attention_dropout=0.0), batch=64, prepare=LOG),
)
LATENCY = rows.vm_answer("tiny", DIN, batches=(1, 8), prepare=LOG)
INFER = rows.vm_infer("tiny-batches", DIN, batch=2048, prepare=LogSpec(SCHEMA, rows=4096))
HISTORIES = rows.vm_train(
    "tiny",
    rows.EncoderConfig("sum", width=4),
    backbone=backbone("deepfm", behaviours=True),
    batch=64,
    histories=HistorySpec(length=6, mean=3, width=4, entries=100),
    prepare=LOG,
)
ENCODER = rows.encoder(0.3, batch=32, width=8, length=6, entries=200)
TABLES = rows.tables(5_000, few=500, batch=64, log=LOG)
PREPARED = PreparedSpec(SCHEMA, rows=4396)
INPUT = input_rows(PREPARED, batch=64)
