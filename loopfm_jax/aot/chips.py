"""Devices to compile for: TPU slices by libtpu, or simulated ones on the host.

Peaks are those that cloud.google.com/tpu/docs publishes per chip (v4, v5e, v5p, v6e; read in
2026): dense bfloat16, HBM, and the inter-chip links of one chip, all directions together.
"""

import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import jax

from loopfm_jax.errors import UserError
from loopfm_jax.units import GIB

QUIET = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",
    "TPU_LOG_DIR": "disabled",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
"""Environment in which libtpu does not look for a slice around it; names of a real one stay."""


@dataclass(frozen=True)
class Chip:
    """What one device can do."""

    flops: float
    """Per second, bfloat16."""
    memory: int
    """Bytes of HBM."""
    bandwidth: float
    """Bytes per second from and to HBM."""
    links: float
    """Bytes per second that the links of a chip carry."""


CHIPS = {
    "v4": Chip(275e12, 32 * GIB, 1228e9, 300e9),
    "v5e": Chip(197e12, 16 * GIB, 819e9, 200e9),
    "v5p": Chip(459e12, 95 * GIB, 2765e9, 600e9),
    "v6e": Chip(918e12, 32 * GIB, 1640e9, 448e9),
}


@dataclass(frozen=True)
class Slice:
    """Devices of one kind."""

    name: str
    devices: Sequence[Any]
    chip: Chip | None
    """None: simulated devices, of which only bytes are told."""

    @property
    def platform(self) -> str:
        return "cpu" if self.chip is None else "tpu"


def simulate(topologies: Sequence[str]) -> None:
    """Makes enough simulated devices for every cpu:N; call before JAX looks for devices."""
    counts = [int(n) for t in topologies if (n := t.removeprefix("cpu:")).isdigit()]
    if counts:
        jax.config.update("jax_num_cpu_devices", max(counts))


def find(topology: str) -> Slice:
    """The devices of a slice, or the first of the simulated ones.

    Raises:
      UserError: no such chip or shape, or libtpu is not installed.
    """
    kind, _, shape = topology.partition(":")
    if kind == "cpu" and shape.isdigit() and int(shape):
        devices = jax.devices("cpu")
        if len(devices) < int(shape):
            raise UserError(f"{topology}: there are {len(devices)} simulated devices")
        return Slice(topology, devices[: int(shape)], None)
    if kind not in CHIPS or not re.fullmatch(r"\d+(x\d+)+", shape):
        raise UserError(
            f"no topology {topology!r}: name a chip ({', '.join(CHIPS)}) and its slice, as in "
            "v5e:16x16 or v5p:4x4x8, or cpu:8 for simulated devices"
        )
    return Slice(topology, _tpus(topology), CHIPS[kind])


def _tpus(topology: str) -> Sequence[Any]:
    if find_spec("libtpu") is None:
        raise UserError(
            f"compiling for {topology} takes the TPU compiler: pip install -e '.[aot]' in its "
            "repository"
        )
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    from jax.experimental import topologies

    alone = {"chips_per_host_bounds": (1, 1, 1)} if topology.endswith(":1x1") else {}
    try:
        found = topologies.get_topology_desc(topology_name=topology, platform="tpu", **alone)
        return found.devices
    except Exception as error:  # libtpu says in many ways that a slice has no such shape
        said = str(error).splitlines()[0][:200]
        raise UserError(f"libtpu knows no topology {topology!r}: {said}") from None


def mesh_sizes(devices: int, model: int, topology: str) -> tuple[int, int]:
    """(data, model) of the mesh over a slice.

    Raises:
      UserError: `model` does not divide it.
    """
    if devices % model:
        raise UserError(
            f"{topology} has {devices} devices, which do not divide over mesh.model = {model}: "
            f"choose one of {', '.join(str(n) for n in _divisors(devices))}"
        )
    return devices // model, model


def _divisors(number: int) -> list[int]:
    low = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return sorted({*low, *(number // n for n in low)})
