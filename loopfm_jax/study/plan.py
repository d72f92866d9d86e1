"""What a study will run: known to be possible before the first model trains."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from flax import nnx

from loopfm_jax.auto import AUTO
from loopfm_jax.backbones import build
from loopfm_jax.config import Config
from loopfm_jax.data.schema import Schema
from loopfm_jax.errors import UserError
from loopfm_jax.fm.teacher import Teacher
from loopfm_jax.progress import say
from loopfm_jax.rngs import Rngs
from loopfm_jax.study.cells import Cell, Table, changed
from loopfm_jax.vm.methods import find_method


def with_taps(config: Config, schema: Schema) -> Config:
    """The configuration whose FM exports what the study reads, as far as the log has it."""
    absent = {name for name in ("item", "entity") if not getattr(schema, name)}
    wanted = [*config.fm.taps, *(tap for tap in config.study.taps if tap not in absent)]
    return replace(config, fm=replace(config.fm, taps=tuple(dict.fromkeys(wanted))))


def possible(tables: Iterable[Table], config: Config, schema: Schema) -> list[Table]:
    """The tables without the rows whose taps are not exported, which are named on stderr.

    Args:
      config: with the taps that will be exported.
      schema: of the prepared log.

    Raises:
      UserError: a cell that no model can be built for, or a table of which nothing is left.
    """
    built: set[Any] = set()
    found = []
    for table in tables:
        cells = [cell for cell in table.cells if not _missing(table, cell, config)]
        if not cells:
            raise UserError(f"the table {table.name} has no row that this log allows")
        for cell in cells:
            _check(table, cell, config, schema, built)
        found.append(replace(table, cells=tuple(cells)))
    return found


def _missing(table: Table, cell: Cell, config: Config) -> bool:
    if cell.method == AUTO:
        return False
    method = find_method(cell.method)
    needs = {"item"} if "item-only" in method.contents else set()
    needs |= {"entity"} if "entity" in method.features else set()
    for tap in needs - set(config.fm.taps):
        say(f"study: {table.name} without {cell.row}: no tap {tap!r} (--study.taps, or the data)")
        return True
    return False


def _check(table: Table, cell: Cell, config: Config, schema: Schema, built: set[Any]) -> None:
    """The FM and the VM's backbone of a cell, by their shapes alone."""
    try:
        found = changed(config, cell.changes)
        fm, vm = found.fm, found.vm.backbone
        read = schema.read(behaviours=fm.backbone.reads_behaviours)
        served = schema.for_vm().read(behaviours=vm.reads_behaviours)
        if fm not in built:
            _build(lambda rngs: Teacher(read, fm, rngs=rngs))
        if vm not in built:
            _build(lambda rngs: build(vm, served, rngs=rngs))
        built |= {fm, vm}
    except UserError as error:
        raise UserError(f"table {table.name}, {cell.row} {cell.column}: {error}") from None


def _build(model: Callable[[nnx.Rngs], nnx.Module]) -> None:
    nnx.eval_shape(lambda: model(Rngs(0)))
