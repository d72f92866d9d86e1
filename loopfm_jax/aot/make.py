"""The whole of `loopfm compile`: every topology, size and program, then files."""

import math
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import date
from functools import partial
from importlib.util import find_spec
from typing import Any, Literal

import jax

from loopfm_jax.aot import chips, report
from loopfm_jax.aot.account import account, estimate
from loopfm_jax.aot.programs import PROGRAMS, Setting, codec_of, with_dtype
from loopfm_jax.aot.work import work_of
from loopfm_jax.bench.child import PACKAGES, versions
from loopfm_jax.config import Config
from loopfm_jax.data.log import read_schema
from loopfm_jax.data.schema import Schema
from loopfm_jax.errors import UserError
from loopfm_jax.progress import say
from loopfm_jax.report import finite
from loopfm_jax.scale.dial import ALIGNED, Growth, Known, Size, measure, turn
from loopfm_jax.scale.plan import builder, schema_of
from loopfm_jax.sharding import ALL, MeshConfig, mesh_of
from loopfm_jax.units import short

NO_ROOM = ("RESOURCE_EXHAUSTED", "Ran out of memory")


def make(config: Config, *, command: str) -> dict[str, Any]:
    """Compiles what is asked for, writes `<workdir>/compile/`, returns its JSON.

    Raises:
      UserError: a topology that is not known, or sizes that its mesh does not divide.
    """
    jax.config.update("jax_platforms", "cpu")  # the devices need not be here
    # The compile cache cannot give back programs of devices that are not here, and says so.
    warnings.filterwarnings("ignore", message="Error reading persistent compilation cache")
    chips.simulate(config.compile.topology)
    slices = [chips.find(topology) for topology in config.compile.topology]
    schema = _schema(config)
    started, folder = time.monotonic(), config.workdir / "compile"
    found: dict[str, Any] = {
        "command": command,
        "date": date.today().isoformat(),
        "versions": versions((*PACKAGES, *(["libtpu"] if find_spec("libtpu") else []))),
        "table_rows": schema.table_rows,
        "programs": [],
    }
    for name, sized, size in _jobs(config, schema, slices):
        for devices in slices:
            found["programs"].append(finite(_compile(sized, size, schema, devices, name)))
            found["minutes"] = (time.monotonic() - started) / 60
            report.write(found, folder)  # what was found stays, whatever comes
    return found


def _schema(config: Config) -> Schema:
    if config.compile.table_rows:
        return schema_of(config.compile.table_rows)
    folder = config.workdir / "data"
    if not (folder / "schema.json").exists():
        raise UserError(
            f"compile.table_rows is 0, but {folder} holds no prepared log: run `loopfm prepare` "
            "first, or give a number of rows"
        )
    return read_schema(folder)


def _jobs(
    config: Config, schema: Schema, slices: Sequence[chips.Slice]
) -> Iterator[tuple[str, Config, Size]]:
    """Programs, each of a model of some size: the FM's of every size, the VM's as configured.
    Widened layers divide over all devices of the largest slice."""
    largest = max(len(devices.devices) for devices in slices)
    growth = Growth(config.scale.widen, aligned=math.lcm(ALIGNED, largest))
    for name in config.compile.programs:
        side = "vm" if name == "vm-train" else "fm"
        count = partial(_count, config, schema, side)
        if side == "vm" or not config.compile.sizes:
            yield name, config, count((config.vm if side == "vm" else config.fm).backbone)
            continue
        known: Known = {}
        for target in sorted(config.compile.sizes):
            turned = turn(config.fm.backbone, target, count, growth=growth, known=known)
            wide = replace(config, fm=replace(config.fm, backbone=turned.backbone))
            yield name, wide, turned.size


def _count(config: Config, schema: Schema, side: Literal["fm", "vm"], backbone: Any) -> Size:
    return measure(builder(config, side, backbone, schema, codec_of(config)))


def _compile(
    config: Config, size: Size, schema: Schema, devices: chips.Slice, name: str
) -> dict[str, Any]:
    """One program on one slice."""
    chip, count = devices.chip, len(devices.devices)
    dtype = config.compile.dtype
    if dtype == "auto":
        dtype = "float32" if chip is None else "bfloat16"
    shape = chips.mesh_sizes(count, config.mesh.model, devices.name)
    mesh = mesh_of(MeshConfig(*shape), devices.devices)
    setting = Setting(with_dtype(config, dtype), schema, mesh)
    row: dict[str, Any] = {
        "program": name,
        "topology": devices.name,
        "devices": count,
        "mesh": dict(zip(ALL, shape, strict=True)),
        "dtype": dtype,
        "dense": size.dense,
        "tables": size.tables,
        "hidden": list((config.vm if name == "vm-train" else config.fm).backbone.hidden),
    }
    at = f"compile: {name} of {short(size.dense)} on {devices.name}"
    started = time.monotonic()
    program = PROGRAMS[name](setting)
    try:
        compiled = program.lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), "")
        if not any(word in str(error) for word in NO_ROOM):
            raise
        say(f"{at}: does not fit ({reason[:160]})")
        return row | {"examples": program.examples, "fits": False, "reason": reason[:400]}
    row |= account(program, compiled, devices=count)
    if chip is not None:
        flops = work_of(setting, name, program.examples)
        row |= estimate(row, chip, flops=flops, devices=count)
    say(f"{at}: {report.summary(row)} ({time.monotonic() - started:.0f} s)")
    return row


def headline(found: Mapping[str, Any]) -> dict[str, Any]:
    """The last line of stdout."""
    kept = ("program", "topology", "devices", "dense", "fits", "total_bytes", "collective_bytes")
    more = ("at_best_s", "at_worst_s")
    return {
        "minutes": round(found["minutes"], 1),
        "programs": [{k: row[k] for k in (*kept, *more) if k in row} for row in found["programs"]],
    }
