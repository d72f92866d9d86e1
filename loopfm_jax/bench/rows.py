"""The rows of `loopfm bench`: what is built, on what data, beside whom.

To add a row: a job for our side in `worker.JOBS` (and for a peer in `benchmarks/peers/worker.py`),
a `Case` here. All that a side is told is JSON: the case's `spec`, what `prepare` wrote, its own.
"""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from loopfm_jax.backbones import BackboneConfig
from loopfm_jax.bench import flops
from loopfm_jax.bench.data import HistorySpec
from loopfm_jax.bench.input_rows import PreparedSpec, input_rows
from loopfm_jax.bench.public import PUBLIC
from loopfm_jax.bench.terms import (
    BF16,
    EXACT,
    FUXICTR,
    SHIPPED,
    Case,
    Check,
    Facts,
    LogSpec,
    Side,
)
from loopfm_jax.data.schema import Schema
from loopfm_jax.history.encoders import EncoderConfig
from loopfm_jax.optim import OptimConfig

REMAT = True
"""Whether the backbones' attention is computed again in the backward pass."""
TAOBAO = PUBLIC["TaobaoAd_x1"]
LOG, PREPARED = LogSpec(TAOBAO.schema), PreparedSpec(TAOBAO.schema)
HISTORIES = HistorySpec()
OPTIM = OptimConfig(embedding_l2=5e-6)
FAST = Side("loopfm", "fast", spec={"optim": {**asdict(OPTIM), "tables": "rowwise_adagrad"}})
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
    peers: tuple[Side, ...] = (FUXICTR,),
    prepare: LogSpec = LOG,
    same_steps: bool = True,
) -> Case:
    """Training steps of a backbone, exact and fast.

    same_steps: nothing random or different on purpose in them, so that losses stay together.
    """
    steps = Check().steps if same_steps else 1

    def count(facts: Facts) -> float:
        tokens, pairs = facts["tokens"], facts["pairs"]
        return flops.train(prepare.schema, backbone, tokens=tokens, pairs=pairs, remat=REMAT)

    return Case(
        name=f"fm-train/{name}",
        unit="examples/s",
        ours=(EXACT, FAST),
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


def vm_infer(name: str, backbone: BackboneConfig, *, batch: int, prepare: LogSpec = LOG) -> Case:
    """Inference in batches: its rate at 4,096, its p50 below. Rows start larger than in training,
    or every logit would be about 0 and nothing compared."""
    backbone = replace(backbone, tables=replace(backbone.tables, init_std=0.1))

    def count(facts: Facts) -> float:
        return flops.forward(prepare.schema, backbone, tokens=facts["tokens"], pairs=facts["pairs"])

    large = batch > 1024
    return Case(
        name=f"vm-infer/{name}" + ("" if large else f"-p50-batch-{batch}"),
        unit="examples/s" if large else "ms",
        ours=(EXACT,),
        peers=(FUXICTR, BF16) if large else (FUXICTR,),
        spec={"job": "infer" if large else "latency", **describe(prepare.schema, backbone, batch)},
        prepare=prepare,
        flops=count if large else None,
        check=Check(),
        more_is_better=large,
        seconds=None if large else 1.0,
    )


def structure(events: int, mean_history: int) -> Case:
    """Histories of a whole log, files written, beside a loop over events in plain Python."""
    few = 2_000_000 // mean_history  # the loop takes as long as its events times their histories
    spec = {"events": events, "mean_history": mean_history, "loop_events": few}
    return Case(
        name=f"structure/history-{mean_history}" + ("" if events < 10**7 else "-10m"),
        unit="events/s",
        ours=(EXACT,),
        peers=(Side("python-loop", spec={"job": "structure-loop"}),),
        spec={"job": "structure", **spec},
        prepare=nothing,
    )


def nothing(folder: Path) -> Facts:
    """Sides generate what they read."""
    return {}


def export(backbone: BackboneConfig, *, batch: int = 4096, prepare: LogSpec = LOG) -> Case:
    """Logging codes and soft labels, beside predicting alone and the same program at rest."""
    return Case(
        name=f"export/{backbone.name}",
        unit="examples/s",
        ours=(EXACT,),
        peers=(
            Side("forward", spec={"job": "forward"}),
            Side("forward-and-codes", spec={"job": "forward", "codes": True}),
        ),
        spec={"job": "export", "width": 64, **describe(prepare.schema, backbone, batch)},
        prepare=prepare,
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
    structure(1_000_000, 22),
    structure(1_000_000, 300),
    structure(10_000_000, 22),
    export(BARS_DIN),
    *input_rows(PREPARED),
    fm_train("din-bars", BARS_DIN, peers=(FUXICTR, BF16), same_steps=False),
    fm_train("din-bars-no-dropout", DIN, peers=(FUXICTR, SHIPPED, BF16)),
    fm_train("din-dice-small", DICE, peers=(FUXICTR, BF16), same_steps=False),
    fm_train("dmin-bars", BARS_DMIN, batch=2048, peers=(FUXICTR, BF16), same_steps=False),
    fm_train("dien-bars", BARS_DIEN, batch=2048, same_steps=False),
    *(fm_train(f"din-width-{by:g}", scaled(DIN, by)) for by in (0.25, 0.5, 2)),
    vm_train("loopfm-sum", EncoderConfig("sum")),
    vm_train("loopfm-dmin", EncoderConfig("dmin", heads=4)),
    *(
        vm_infer(name, config, batch=batch)
        for name, config in (("din", DIN), ("dmin", BARS_DMIN))
        for batch in (4096, 256, 32, 1)
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
