"""One mesh (data, model) and one table of rules: which axis of which array is split over what.

"pjit" in this project means `jax.jit` with these shardings. Tables are split by rows over all
devices, dense kernels by columns over `model`, batches over `data`; everything else is replicated.
"""

import math
import re
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from loopfm_jax.errors import UserError, check_limits

ALL = ("data", "model")
"""The axes of every mesh."""
RULES: tuple[tuple[str, PartitionSpec], ...] = (
    (r"rows_VE$", PartitionSpec(ALL, None)),
    (r"(hidden|dnn).*kernel$", PartitionSpec(None, "model")),
)


@dataclass(frozen=True)
class MeshConfig:
    """Shape of the device mesh."""

    data: int = 1
    """Devices that split the batch."""
    model: int = 1
    """Devices that split tables and wide layers."""

    def __post_init__(self) -> None:
        check_limits("mesh", {"data": self.data, "model": self.model}, low=1)


def make_mesh(config: MeshConfig) -> Mesh:
    """Raises UserError when the devices that are there do not fill the mesh."""
    devices = jax.devices()
    wanted = config.data * config.model
    if wanted > len(devices):
        raise UserError(
            f"mesh data={config.data} x model={config.model} needs {wanted} devices, but there are "
            f"{len(devices)} ({devices[0].platform}): lower --mesh.data or --mesh.model"
        )
    shape = config.data, config.model
    return jax.make_mesh(shape, ALL, axis_types=(AxisType.Auto,) * 2, devices=devices[:wanted])


def devices() -> int:
    """How many the step that is being traced runs on; 1 if nobody said so
    (`jax.sharding.use_abstract_mesh`)."""
    return math.prod(jax.sharding.get_abstract_mesh().shape.values())


def split(mesh: Mesh, *axes: str | None) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec(*axes))


def for_state(mesh: Mesh, tree: Any) -> Any:
    """Shardings of a parameter or optimiser tree (of arrays or their shapes), by leaf path.

    A leaf whose size a rule's axis does not divide stays replicated.
    """

    def rule(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        name = "/".join(str(getattr(k, "key", getattr(k, "name", k))) for k in path)
        for pattern, spec in RULES:
            if re.search(pattern, name) and _divides(mesh, spec, leaf.shape):
                return NamedSharding(mesh, spec)
        return NamedSharding(mesh, PartitionSpec())

    return jax.tree.map_with_path(rule, tree)


def _divides(mesh: Mesh, spec: PartitionSpec, shape: tuple[int, ...]) -> bool:
    if len(spec) != len(shape):
        return False
    for size, axes in zip(shape, spec, strict=True):
        names = (axes,) if isinstance(axes, str) else axes or ()
        parts = 1
        for name in names:
            parts *= mesh.shape[name]
        if size % parts:
            return False
    return True
