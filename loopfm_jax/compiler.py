"""What XLA is asked for where it compiles a step: what each brings stands in benchmarks/LOG.md."""

from functools import cache
from typing import Any

import jax
from jax.sharding import Mesh

ASKED: dict[str, dict[str, Any]] = {
    "cpu": {
        "xla_cpu_experimental_ynn_fusion_type": "",  # large products by Eigen, not by YNNPACK
        "xla_cpu_prefer_vector_width": 512,
    }
}
"""Platform -> options."""


def options(mesh: Mesh | None = None) -> dict[str, Any]:
    """`compiler_options` of `jax.jit`.

    Args:
      mesh: of the step; default: the default device. Simulated devices, which share the cores,
        get XLA's defaults.
    """
    if mesh is not None and mesh.size > 1:
        return {}
    return dict(_known(mesh.devices.flat[0].platform if mesh else jax.default_backend()))


@cache
def _known(platform: str) -> dict[str, Any]:
    """Those that this jaxlib has: XLA promises none of them."""
    return {name: value for name, value in ASKED.get(platform, {}).items() if _takes(name, value)}


def _takes(name: str, value: Any) -> bool:
    nothing = jax.jit(lambda: 0, compiler_options={name: value})
    try:
        nothing.lower().compile()
    except jax.errors.JaxRuntimeError:
        return False
    return True
