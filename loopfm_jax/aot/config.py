"""What `loopfm compile` compiles, and for which machines."""

from dataclasses import dataclass
from typing import Literal

from loopfm_jax.errors import UserError, check_limits, check_tuples

ProgramName = Literal["fm-train", "export", "vm-train"]


@dataclass(frozen=True)
class CompileConfig:
    """`loopfm compile`: programs of `fm` and `vm`, for devices that need not be there."""

    topology: tuple[str, ...] = ("v5e:4x4",)
    """TPU slices (v4:2x2x4, v5e:16x16, v5p:4x4x8, v6e:8x8), or cpu:N, N simulated devices. The
    mesh's `model` is as configured, its `data` what the slice leaves."""
    programs: tuple[ProgramName, ...] = ("fm-train", "export", "vm-train")
    sizes: tuple[float, ...] = ()
    """Dense parameters of the FM, which is widened to each; empty: as configured."""
    table_rows: int = 1_000_000
    """Over generated fields (TaobaoAd's, scaled); 0: the prepared log of the working directory."""
    store_rows: int = 10_000_000
    """Entries of the histories that the VM reads, split over `data`."""
    batch: int = 0
    """Examples of a step per device along `data`; 0: the global batches as configured."""
    fill: float = 0.58
    """How full sequences and histories are, 1 = as long as they may get."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Arithmetic of the dense layers; auto: bfloat16, on CPU float32."""

    def __post_init__(self) -> None:
        check_tuples("compile", self)
        for name in ("topology", "programs"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise UserError(f"compile.{name} is {list(values)}: name each once, at least one")
        sizes = {f"sizes[{i}]": size for i, size in enumerate(self.sizes)}
        check_limits("compile", sizes, low=1, high=1e12)
        check_limits("compile", {"table_rows": self.table_rows}, low=0, high=2_000_000_000)
        check_limits("compile", {"store_rows": self.store_rows}, low=1, high=2_000_000_000)
        check_limits("compile", {"batch": self.batch}, low=0)
        check_limits("compile", {"fill": self.fill}, low=0, high=1)
