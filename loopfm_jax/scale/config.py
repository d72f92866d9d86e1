"""What `loopfm scale` sweeps."""

from dataclasses import dataclass
from typing import Literal

from loopfm_jax.errors import UserError, check_limits, check_tuples

Sweep = Literal["fm", "vm", "tables"]
MIN_ROWS, MAX_ROWS = 1000, 2_000_000_000
"""Of a table: the small fields of the schema, and ids that are int32."""


@dataclass(frozen=True)
class ScaleConfig:
    """`loopfm scale`: models of `fm` and `vm`, widened. Examples are generated, histories int4."""

    sweeps: tuple[Sweep, ...] = ("fm", "vm", "tables")
    """fm, vm: by dense parameters; tables: the FM as configured, by rows of its tables."""
    sizes: tuple[float, ...] = (1e6, 2.5e6, 6e6, 16e6, 40e6, 100e6, 250e6, 500e6, 1e9)
    """Dense parameters: all but the embedding tables."""
    rows: tuple[float, ...] = (1e5, 1e6, 1e7, 3e7)
    """Table rows in the sweep `tables`, learned by touched rows."""
    table_rows: int = 100_000
    """Table rows in the sweeps over dense parameters."""
    widen: Literal["dnn", "all"] = "dnn"
    """Which hidden widths grow: the DNN's, or those of the attention scores as well."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Arithmetic of the dense layers; auto: float32 on CPU, else bfloat16."""
    seconds: float = 3.0
    """Time of a point, compilation not counted."""
    steps: int = 3
    """Steps of a point at least."""
    examples: int = 65_536
    """Generated examples, read in turns."""
    memory_gib: float = 0.0
    """What a point may need; 0: what the machine has free."""

    def __post_init__(self) -> None:
        check_tuples("scale", self)
        sizes = {f"sizes[{i}]": size for i, size in enumerate(self.sizes)}
        rows = {f"rows[{i}]": count for i, count in enumerate(self.rows)}
        rows["table_rows"] = self.table_rows
        check_limits("scale", sizes, low=1, high=1e12)
        check_limits("scale", rows, low=MIN_ROWS, high=MAX_ROWS)
        check_limits("scale", {"steps": self.steps}, low=3)  # two gaps between them
        check_limits("scale", {"examples": self.examples}, low=1)
        check_limits("scale", {"seconds": self.seconds, "memory_gib": self.memory_gib}, low=0)
        for name in ("sweeps", "sizes", "rows"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                given = " ".join(f"{v:g}" if isinstance(v, float) else v for v in values)
                raise UserError(f"scale.{name} is [{given}]: name each once, at least one")
