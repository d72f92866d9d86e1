"""One mesh (data, model) and one table of rules: which axis of which array is split over what.

"pjit" in this project means `jax.jit` with these shardings. Tables are split by rows over all
devices, kernels of a DNN by columns over `model`, a compressor's as the activation that it reads,
batches, and a store that is read alone, over `data`; everything else is replicated. With FSDP a
DNN's kernels lie split over `data` too, and are gathered for the step.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.experimental.mesh_utils import create_device_mesh
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from loopfm_jax import processes
from loopfm_jax.errors import UserError, check_limits
from loopfm_jax.packing import Parts

ALL = ("data", "model")
"""The axes of every mesh."""
AXES: dict[str, str | tuple[str, ...] | None] = {
    "rows": ALL,
    "columns": "model",
    "columns and data": ("model", "data"),
    "tapped": "model",
    "examples": "data",
    "entries": "data",
}
"""Axes of arrays by what they count -> the axes of the mesh that split them; None: whole."""
YIELDING = {"tapped"}
"""Axes that stay whole where the mesh does not divide them: of a tap the user chooses no width."""
COLUMNS, FSDP = (PartitionSpec(None, AXES[name]) for name in ("columns", "columns and data"))
"""Of a kernel that is split over `model`, and over all devices."""
RULES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r"\brows_VE$", ("rows", None)),
    (r"\bdnn/layers/\d+/kernel$", (None, "columns")),
    (r"\bcompressors/\w+/encoder/layers/0/kernel$", ("tapped", None)),
    (r"\bcompressors/\w+/decoders/\d+/layers/[1-9]\d*/kernel$", (None, "tapped")),
)
"""The axes of a parameter, and of what an optimiser keeps of it, by the end of its path."""
REMEDY = {
    "rows": "make tables.row_multiple a multiple of that",
    "columns": "make every width of the backbone's `hidden` a multiple of that",
    "columns and data": "make every width of the backbone's `hidden` a multiple of that, or leave "
    "train.fsdp out",
    "examples": "choose a mesh.data that divides them, a power of two for most sizes",
}


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
    """Raises UserError when the devices that are there do not fill the mesh, or when processes
    would have no part in it."""
    if processes.alone():
        raise UserError(
            "something is left to train, which all processes do together: run `loopfm train-vm` "
            "with them first"
        )
    devices = jax.devices()
    wanted = config.data * config.model
    if wanted > len(devices):
        raise UserError(
            f"mesh data={config.data} x model={config.model} needs {wanted} devices, but there are "
            f"{len(devices)} ({devices[0].platform}): lower --mesh.data or --mesh.model"
        )
    if processes.many() and wanted < len(devices):
        raise UserError(
            f"mesh data={config.data} x model={config.model} has {wanted} of {len(devices)} "
            f"devices, but all devices of all processes work together: raise --mesh.data"
        )
    return mesh_of(config, devices[:wanted])


def mesh_of(config: MeshConfig, devices: Sequence[Any]) -> Mesh:
    """Of these devices, which need not be here. An axis may take a part of one of a TPU's."""
    shape, auto = (config.data, config.model), (AxisType.Auto,) * 2
    grid = create_device_mesh(shape, list(devices), allow_split_physical_axes=True)
    return Mesh(grid, ALL, axis_types=auto)


def devices() -> int:
    """How many the step that is being traced runs on; 1 if nobody said so
    (`jax.sharding.use_abstract_mesh`)."""
    return math.prod(jax.sharding.get_abstract_mesh().shape.values())


def platform() -> str:
    """Of the devices that the step which is being traced runs on, which need not be here."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.platform if device else jax.default_backend()


def parts(mesh: Mesh) -> Parts:
    """How batches are laid out on a mesh; own are the parts on devices of this process."""
    here = jax.process_index()
    local = [any(d.process_index == here for d in row.flat) for row in mesh.devices]
    return Parts(len(local), tuple(np.flatnonzero(local).tolist()))


def everywhere(mesh: Mesh, tree: Any) -> Any:
    """Arrays of the host, the same in every process, whole on every device."""
    return jax.block_until_ready(jax.tree.map(partial(place, where=split(mesh)), tree))


def place(values: Any, where: Any) -> jax.Array:
    """An array of the host, the same and whole in every process, split over devices of all."""
    return jax.make_array_from_process_local_data(where, values, values.shape)


def split(mesh: Mesh, *axes: str | None) -> NamedSharding:
    """Of an array with these axes, by their names in `AXES`; further axes are whole."""
    return NamedSharding(mesh, PartitionSpec(*(axis and AXES[axis] for axis in axes)))


def for_state(mesh: Mesh, tree: Any, *, fsdp: bool = False) -> Any:
    """Shardings of a parameter or optimiser tree (of arrays or their shapes), by leaf path.

    fsdp: what `RULES` split by columns over `model` is split over `data` too.

    Raises:
      UserError: a size that the mesh does not divide.
    """

    def rule(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        name = "/".join(str(getattr(k, "key", getattr(k, "name", k))) for k in path)
        axes = axes_of(name)
        if fsdp:
            axes = tuple("columns and data" if axis == "columns" else axis for axis in axes)
        axes = tuple(
            None if axis in YIELDING and size % parts_over(mesh, axis) else axis
            for size, axis in zip(leaf.shape, axes, strict=False)
        )
        check_divides(mesh, name, leaf.shape, axes)
        return split(mesh, *axes)

    return jax.tree.map_with_path(rule, tree)


def axes_of(name: str) -> tuple[str | None, ...]:
    """By the one rule that knows the path; none: the array is whole everywhere.

    Raises:
      ValueError: two rules know it.
    """
    found = {pattern: axes for pattern, axes in RULES if re.search(pattern, name)}
    if len(found) > 1:
        raise ValueError(f"{name}: the rules {' and '.join(found)} collide")
    return next(iter(found.values()), ())


def over(axis: str | None) -> tuple[str, ...]:
    """The axes of the mesh that split an axis."""
    found = AXES[axis] if axis else None
    return (found,) if isinstance(found, str) else found or ()


def parts_over(mesh: Mesh, axis: str | None) -> int:
    """Into how many parts a mesh splits an axis."""
    return math.prod(mesh.shape[one] for one in over(axis))


def check_divides(
    mesh: Mesh, name: str, shape: tuple[int, ...], axes: tuple[str | None, ...]
) -> None:
    """Raises UserError where the mesh does not divide an axis, with both names of it."""
    for size, axis in zip(shape, axes, strict=False):
        parts = parts_over(mesh, axis)
        if axis and size % parts:
            told = " x ".join(f"mesh.{one}" for one in over(axis))
            raise UserError(
                f"{name}: {size} {axis.split()[0]} do not divide over {told} = {parts}: "
                f"{REMEDY[axis]}"
            )


@jax.custom_vjp
def gather(kernel: jax.Array) -> jax.Array:
    """A kernel that FSDP splits, as the step computes with it: split over `model` alone. Its
    gradient is split as the kernel was."""
    return jax.lax.with_sharding_constraint(kernel, COLUMNS)


def _scatter(_: None, gradient: jax.Array) -> tuple[jax.Array]:
    gradient = jax.lax.with_sharding_constraint(gradient, COLUMNS)
    return (jax.lax.with_sharding_constraint(gradient, FSDP),)


gather.defvjp(lambda kernel: (gather(kernel), None), _scatter)
