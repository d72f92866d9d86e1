"""What XLA is asked for where it compiles a step: what each brings stands in benchmarks/LOG.md."""

import os
from functools import cache
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

CACHE = Path("~/.cache/loopfm_jax/xla")
VECTORS = {"xla_cpu_prefer_vector_width": 512}
YNNPACK = "xla_cpu_experimental_ynn_fusion_type"
ASKED: dict[tuple[str, str], dict[str, Any]] = {
    ("cpu", "float32"): VECTORS | {YNNPACK: ""},  # large products by Eigen
    ("cpu", "bfloat16"): VECTORS | {YNNPACK: "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT"},
}
"""(platform, arithmetic of the large products) -> options."""


def keep_programs(*, from_s: float) -> None:
    """Those that take so long to compile, or longer, are kept between runs."""
    cache = os.environ.get("JAX_COMPILATION_CACHE_DIR") or str(CACHE.expanduser())
    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", from_s)


def options(mesh: Mesh | None = None, *, dtype: str = "float32") -> dict[str, Any]:
    """`compiler_options` of `jax.jit`.

    Args:
      mesh: of the step; default: the default device. Simulated devices, which share the cores,
        get XLA's defaults.
      dtype: arithmetic of the large products.
    """
    if mesh is not None and mesh.size > 1:
        return {}
    return dict(_known(mesh.devices.flat[0].platform if mesh else jax.default_backend(), dtype))


@cache
def _known(platform: str, dtype: str) -> dict[str, Any]:
    """Those that this jaxlib has: XLA promises none of them."""
    asked = ASKED.get((platform, dtype), {})
    return {name: value for name, value in asked.items() if _takes(name, value)}


def _takes(name: str, value: Any) -> bool:
    nothing = jax.jit(lambda: 0, compiler_options={name: value})
    try:
        nothing.lower().compile()
    except jax.errors.JaxRuntimeError:
        return False
    return True
