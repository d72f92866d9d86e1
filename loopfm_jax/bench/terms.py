"""What a row of `loopfm bench` is: a case, its sides, its check, what they read."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from loopfm_jax.bench.child import TUNED
from loopfm_jax.bench.data import write_log
from loopfm_jax.data.schema import Schema

Facts = dict[str, Any]
Mode = Literal["exact", "fast"]
PAYS = 1.25
"""Times float32's peak from which on products of bfloat16 are worth a row on CPU."""


@dataclass(frozen=True)
class Side:
    """One process of a case."""

    name: str
    mode: Mode = "exact"
    """`fast`: the arithmetic of the updates differs from the public reference."""
    worker: Literal["ours", "fuxictr"] = "ours"
    spec: Mapping[str, Any] = field(default_factory=dict)
    """On top of the case's."""
    env: Mapping[str, str] = field(default_factory=dict)
    dtype: str = "float32"
    where: Literal["everywhere", "accelerator", "bfloat16"] = "everywhere"
    """Left out elsewhere; the last: on accelerators, and on CPUs that multiply bfloat16 faster."""

    @property
    def key(self) -> str:
        """One of a case's sides."""
        return f"{self.name} {self.mode} {self.dtype}"

    def runs(self, limits: Facts) -> bool:
        """On a machine with these limits."""
        if self.where == "everywhere" or limits["platform"] != "cpu":
            return True
        return self.where == "bfloat16" and limits["flops_bfloat16"] > PAYS * limits["flops"]


@dataclass(frozen=True)
class Check:
    """The first losses agree, else the row is invalid."""

    steps: int = 3
    """1 where only the start can agree: random masks, other updates, other statistics."""
    tolerance: float = 1e-3
    """Relative; ten times that where one of the two computes in bfloat16."""


@dataclass(frozen=True)
class LogSpec:
    """Writes the examples of `data.write_log`; the same one is written once."""

    schema: Schema
    rows: int = 65_536
    """16 batches of 4,096: 50 MB of ids as int32, and the table rows they touch."""
    fill: float = 0.58

    def __call__(self, folder: Path) -> Facts:
        path = folder / "log.npz"
        return {"log": str(path), **write_log(path, self.schema, rows=self.rows, fill=self.fill)}


@dataclass(frozen=True)
class Case:
    """One row, of which every side of ours is compared with every peer."""

    name: str
    """`<row>/<what>`."""
    unit: str
    ours: tuple[Side, ...]
    peers: tuple[Side, ...]
    """The first is the reference."""
    spec: Mapping[str, Any]
    prepare: Callable[[Path], Facts]
    flops: Callable[[Facts], float] | None = None
    """Facts of `prepare` -> FLOPs of an example."""
    check: Check | None = None
    more_is_better: bool = True
    seconds: float | None = None
    """Of a slice; default: the command's."""
    batches: tuple[int | None, ...] = (None,)
    """Sizes of the requests that its sides, one process each, are asked in turn: a row each, named
    by it. None: what the sides do has no size of its own."""

    def row(self, batch: int | None) -> str:
        """The name of a row."""
        return self.name if batch is None else f"{self.name}-batch-{batch}"


def nothing(folder: Path) -> Facts:
    """Sides generate what they read."""
    return {}


EXACT = Side("loopfm")
FUXICTR = Side("fuxictr", worker="fuxictr", env=TUNED)
BF16 = Side("fuxictr-bf16", worker="fuxictr", env=TUNED, spec={"autocast": True}, dtype="bfloat16")
