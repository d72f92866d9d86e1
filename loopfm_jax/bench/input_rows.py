"""The rows `input`: batches from a prepared log, and its bytes, beside FuxiCTR's loaders."""

from dataclasses import dataclass, replace
from pathlib import Path

from loopfm_jax.bench.terms import EXACT, FUXICTR, Case, Check, Facts
from loopfm_jax.data.schema import Schema


@dataclass(frozen=True)
class PreparedSpec:
    """Writes `terms.LogSpec`'s examples as a prepared log too; by default 64 blocks, 120 MB: more
    than caches hold."""

    schema: Schema
    rows: int = 262_144
    fill: float = 0.58

    def __call__(self, folder: Path) -> Facts:
        from loopfm_jax.bench.feeding import write_prepared  # TFDS takes a second to import

        return write_prepared(folder, self.schema, rows=self.rows, fill=self.fill)


def input_rows(prepare: PreparedSpec, *, batch: int = 4096) -> tuple[Case, ...]:
    return (
        feed("memory", prepare, batch=batch),
        feed("blocks", prepare, batch=batch),
        feed("blocks", prepare, batch=batch, order="mixed"),
        size("disk", prepare),
        size("memory", prepare),
    )


def feed(residency: str, prepare: PreparedSpec, *, batch: int, order: str = "time") -> Case:
    """Host batches from a prepared log, beside FuxiCTR's loader of a whole file or of blocks."""
    loader = {"loader": "whole" if residency == "memory" else "blocks"}
    return Case(
        name=f"input/{residency}" + ("" if order == "time" else f"-{order}"),
        unit="examples/s",
        ours=(EXACT,),
        peers=(replace(FUXICTR, spec=loader),),
        spec={
            "job": "feed",
            "schema": prepare.schema.to_json(),
            "batch": batch,
            "residency": residency,
            "order": order,
        },
        prepare=prepare,
        check=Check(tolerance=1e-9) if order == "time" else None,
    )


def size(where: str, prepare: PreparedSpec) -> Case:
    """Bytes of a row on disk or in memory, beside FuxiCTR's two formats."""
    formats = ("npz", "parquet") if where == "disk" else ("npz",)
    return Case(
        name=f"input/bytes-{where}",
        unit="bytes/row",
        ours=(EXACT,),
        peers=tuple(replace(FUXICTR, name=f"fuxictr-{f}", spec={"format": f}) for f in formats),
        spec={"job": "bytes", "schema": prepare.schema.to_json(), "where": where},
        prepare=prepare,
        more_is_better=False,
        seconds=0.0,
    )
