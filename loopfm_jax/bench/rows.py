"""The rows of `loopfm bench`: what is built, on what data, beside whom.

To add a row: a job for our side in `worker.JOBS` (and for a peer in `benchmarks/peers/worker.py`),
a `Case` here. All that a side is told is JSON: the case's `spec`, what `prepare` wrote, its own.
"""

from dataclasses import asdict, replace
from typing import Any

from loopfm_jax.backbones import BackboneConfig
from loopfm_jax.bench import flops
from loopfm_jax.bench.data import HistorySpec
from loopfm_jax.bench.history_rows import compress, encoder, read_codes, structure
from loopfm_jax.bench.input_rows import PreparedSpec, input_rows
from loopfm_jax.bench.public import PUBLIC
from loopfm_jax.bench.terms import (
    BF16,
    EXACT,
    FUXICTR,
    Case,
    Check,
    Facts,
    LogSpec,
    Side,
    nothing,
)
from loopfm_jax.data.schema import Schema
from loopfm_jax.history.encoders import EncoderConfig
from loopfm_jax.optim import OptimConfig

TAOBAO = PUBLIC["TaobaoAd_x1"]
LOG, PREPARED = LogSpec(TAOBAO.schema), PreparedSpec(TAOBAO.schema)
HISTORIES = HistorySpec()
OPTIM = OptimConfig(embedding_l2=5e-6)
FAST = Side("loopfm", "fast", spec={"optim": {**asdict(OPTIM), "tables": "rowwise_rms"}})
EXACT_BF16, FAST_BF16 = (
    replace(side, dtype="bfloat16", spec={**side.spec, "dtype": "bfloat16"}, where="bfloat16")
    for side in (EXACT, FAST)
)
ON_ACCELERATORS = tuple(replace(side, where="accelerator") for side in (EXACT_BF16, FAST_BF16))
ON_CPU_TOO = (ON_ACCELERATORS[0], FAST_BF16)
"""The fast one, if it multiplies bfloat16 faster."""
BARS_DIN, BARS_DMIN, BARS_DIEN = (TAOBAO.config(name) for name in ("din", "dmin", "dien"))
BARS_DEEPFM = replace(TAOBAO.config("deepfm"), behaviours=True)
DIN = replace(BARS_DIN, dropout=0.0, attention_dropout=0.0)
DICE = replace(
    DIN,
    attention_hidden=(64, 32),
    attention_activation="dice",
    tables=replace(DIN.tables, width=16),
)


def scaled(config: BackboneConfig, by: float) -> BackboneConfig:
    """All hidden widths times `by`."""
    hidden, attention = (
        tuple(round(by * width) for width in widths)
        for widths in (config.hidden, config.attention_hidden)
    )
    return replace(config, hidden=hidden, attention_hidden=attention)


def fm_train(
    name: str,
    backbone: BackboneConfig,
    *,
    batch: int = 4096,
    in_bf16: tuple[Side, ...] = ON_ACCELERATORS,
    peers: tuple[Side, ...] = (FUXICTR,),
    prepare: LogSpec = LOG,
    same_steps: bool = True,
) -> Case:
    """Training steps of a backbone, exact and fast, and in bfloat16.

    same_steps: nothing random or different on purpose in them, so that losses stay together.
    """
    steps = Check().steps if same_steps else 1

    def count(facts: Facts) -> float:
        return flops.train(prepare.schema, backbone, tokens=facts["tokens"], pairs=facts["pairs"])

    return Case(
        name=f"fm-train/{name}",
        unit="examples/s",
        ours=(EXACT, FAST, *in_bf16),
        peers=peers,
        spec={"job": "train", **describe(prepare.schema, backbone, batch)},
        prepare=prepare,
        flops=count,
        check=Check(steps),
    )


def vm_train(
    name: str,
    encoder: EncoderConfig,
    *,
    backbone: BackboneConfig = BARS_DEEPFM,
    batch: int = 4096,
    histories: HistorySpec = HISTORIES,
    prepare: LogSpec = LOG,
) -> Case:
    """What LoopFM costs: steps of a VM with histories beside those of the same VM without."""
    return Case(
        name=f"vm-train/{name}",
        unit="examples/s",
        ours=(Side("loopfm", spec={"histories": asdict(histories), "encoder": asdict(encoder)}),),
        peers=(Side("base"),),
        spec={"job": "train", **describe(prepare.schema, backbone, batch)},
        prepare=prepare,
    )


def vm_infer(
    name: str, backbone: BackboneConfig, *, batch: int = 4096, prepare: LogSpec = LOG
) -> Case:
    """Inference in batches."""
    backbone = spread_out(backbone)

    def count(facts: Facts) -> float:
        return flops.forward(prepare.schema, backbone, tokens=facts["tokens"], pairs=facts["pairs"])

    return Case(
        name=f"vm-infer/{name}",
        unit="examples/s",
        ours=(EXACT, EXACT_BF16),
        peers=(FUXICTR, BF16),
        spec={"job": "infer", **describe(prepare.schema, backbone, batch)},
        prepare=prepare,
        flops=count,
        check=Check(),
    )


def vm_answer(
    name: str,
    backbone: BackboneConfig,
    *,
    batches: tuple[int, ...] = (1, 32, 256),
    prepare: LogSpec = LOG,
) -> Case:
    """Requests of so many examples, one after the other: the p50."""
    described = describe(prepare.schema, spread_out(backbone), max(batches))
    return Case(
        name=f"vm-infer/{name}-p50",
        unit="ms",
        ours=(EXACT,),
        peers=(FUXICTR,),
        spec={"job": "latency", "batches": batches, **described},
        prepare=prepare,
        check=Check(),
        more_is_better=False,
        batches=batches,
    )


def spread_out(backbone: BackboneConfig) -> BackboneConfig:
    """With rows that start larger than in training: else every logit would be about 0, and nothing
    compared."""
    return replace(backbone, tables=replace(backbone.tables, init_std=0.1))


def export(backbone: BackboneConfig, *, batch: int = 4096, prepare: LogSpec = LOG) -> Case:
    """Logging codes and soft labels, beside predicting alone."""
    return Case(
        name=f"export/{backbone.name}",
        unit="examples/s",
        ours=(EXACT,),
        peers=(Side("forward", spec={"job": "forward"}),),
        spec={"job": "export", "width": 64, **describe(prepare.schema, backbone, batch)},
        prepare=prepare,
    )


def tables(rows: int, *, few: int = 1_000_000, batch: int = 4096, log: LogSpec = LOG) -> Case:
    """Steps of DeepFM whose tables hold so many rows in all, beside the same with few. Rows start
    as zeros, as drawing them would take more memory than they do."""
    backbone = replace(BARS_DEEPFM, tables=replace(BARS_DEEPFM.tables, width=16, init_std=0.0))
    sides = {n: {"schema": grow(log.schema, n).to_json()} for n in (few, rows)}
    return Case(
        name=f"tables/{rows // 10**6}m-rows",
        unit="examples/s",
        ours=(replace(FAST, spec={**FAST.spec, **sides[rows]}),),
        peers=(Side(f"{few // 10**6}m-rows", "fast", spec={**FAST.spec, **sides[few]}),),
        spec={
            **describe(log.schema, backbone, batch),
            "job": "train-grown",
            "log_rows": log.rows,
            "fill": log.fill,
        },
        prepare=nothing,
    )


def grow(schema: Schema, rows: int) -> Schema:
    """Every field's vocabulary times the same, so that all tables together hold about `rows`."""
    by = rows / schema.table_rows
    return replace(
        schema, fields=tuple(replace(f, rows=max(2, round(by * f.rows))) for f in schema.fields)
    )


def devices(count: int, *, backbone: BackboneConfig = DIN, batch: int = 2048) -> Case:
    """One process with so many simulated devices on the same cores, tables split by rows over all,
    beside one device: what sharding costs, and nothing about how it scales. Devices that share
    cores need threads of their own, each one that may wait for the others and one more; one device
    given as many shows what those alone cost."""
    backbone = replace(backbone, tables=replace(backbone.tables, row_multiple=128))
    threads = {"NPROC": str(count + 1)}
    split = threads | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={count}"}
    return Case(
        name=f"tables/{count}-devices",
        unit="examples/s",
        ours=(Side("loopfm", env=split, spec={"mesh": {"data": count}}),),
        peers=(Side("one-device"), Side("one-device-as-many-threads", env=threads)),
        spec={"job": "train", "parts": (1, count), **describe(LOG.schema, backbone, batch)},
        prepare=LOG,
        check=Check(),
    )


def describe(schema: Schema, backbone: BackboneConfig, batch: int) -> dict[str, Any]:
    """What `bench.model` and the peer build from."""
    return {
        "schema": schema.to_json(),
        "backbone": asdict(backbone),
        "optim": asdict(OPTIM),
        "batch": batch,
    }


CASES = (
    structure(1_000_000, 300),
    structure(10_000_000, 22),
    export(BARS_DIN),
    *input_rows(PREPARED),
    fm_train("din-bars", BARS_DIN, in_bf16=ON_CPU_TOO, peers=(FUXICTR, BF16), same_steps=False),
    fm_train("din-bars-no-dropout", DIN, batch=2048),
    fm_train("din-dice-small", DICE, same_steps=False),
    fm_train(
        "dmin-bars",
        BARS_DMIN,
        batch=2048,
        in_bf16=ON_CPU_TOO,
        peers=(FUXICTR, replace(BF16, where="bfloat16")),
        same_steps=False,
    ),
    fm_train("dien-bars", BARS_DIEN, batch=512, same_steps=False),
    *(fm_train(f"din-width-{by:g}", scaled(DIN, by), batch=2048) for by in (0.25, 0.5, 2)),
    *(encoder(fill) for fill in (0.13, 0.3, 1.0)),
    tables(100_000_000),
    devices(8),
    compress(),
    read_codes(),
    vm_train("loopfm-sum", EncoderConfig("sum")),
    vm_train("loopfm-dmin", EncoderConfig("dmin", heads=4)),
    *(
        row(name, config)
        for name, config in (("din", DIN), ("dmin", BARS_DMIN))
        for row in (vm_infer, vm_answer)
    ),
)
"""The standard set, in the order in which it runs."""


def choose(cases: tuple[Case, ...], wanted: tuple[str, ...]) -> tuple[Case, ...]:
    """Those of which `wanted` names the row or the case; all for none.

    Raises:
      KeyError: of the name that is none.
    """
    for name in wanted:
        if not any(_named(case, name) for case in cases):
            raise KeyError(name)
    return tuple(c for c in cases if not wanted or any(_named(c, name) for name in wanted))


def _named(case: Case, name: str) -> bool:
    return name in (case.name, case.name.split("/")[0])
