"""The three programs of a run, lowered for a mesh from shapes alone."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from loopfm_jax import infer, loop, rows, sharding
from loopfm_jax.aot import shapes
from loopfm_jax.config import Config
from loopfm_jax.data.schema import Schema
from loopfm_jax.fm import codebook
from loopfm_jax.fm.exporter import code_width, log_batch
from loopfm_jax.fm.teacher import Teacher
from loopfm_jax.fm.teacher import loss as teacher_loss
from loopfm_jax.history.codes import Codec
from loopfm_jax.history.encoders import TIMED
from loopfm_jax.optim import Optimiser, make_optimiser
from loopfm_jax.rngs import Rngs
from loopfm_jax.scale.plan import builder
from loopfm_jax.vm.student import Student

STEPS = 1_000_000
"""Of a run; what a step costs does not depend on it."""


@dataclass(frozen=True)
class Program:
    """A jitted step that was never run."""

    lowered: jax.stages.Lowered
    held: dict[str, Any]
    """Kind -> shapes, with their shardings, of what the step is given."""
    swept: Any
    """Those of it that a step goes over from end to end: all but rows that are looked up."""
    examples: int
    """Of a step, all devices together."""


def codec_of(config: Config) -> Codec:
    """How codes are stored, in a book of zeros where they need one."""
    export, width = config.export, code_width(config.export, config.fm)
    book = codebook.blank(export.code, width=width, books=export.books)
    return Codec(export.code, width, book)


@dataclass(frozen=True)
class Setting:
    """What is compiled: an experiment over a schema, on a mesh."""

    config: Config
    schema: Schema
    mesh: Mesh

    @property
    def codec(self) -> Codec:
        return codec_of(self.config)

    def examples(self, configured: int) -> int:
        """A step's, of all devices."""
        return self.config.compile.batch * self.mesh.shape["data"] or configured

    def batch(self, schema: Schema, examples: int, *, longest: int = 0) -> Any:
        fill = self.config.compile.fill
        return shapes.batch(schema, self.mesh, examples=examples, fill=fill, longest=longest)


def fm_train(setting: Setting) -> Program:
    """Teacher and compressor, as `train-fm` trains them."""
    config = setting.config.fm
    task = loop.Trainable(teacher(setting), partial(teacher_loss, config=config))
    examples = setting.examples(config.train.order.batch)
    batch = setting.batch(_read_by_fm(setting), examples)
    return _training(task, config.train, setting.mesh, batch, None, examples)


def vm_train(setting: Setting) -> Program:
    """A student of LoopFM alone, which reads one store."""
    config, mesh = setting.config.vm, setting.mesh
    schema = setting.schema.for_vm()
    build = builder(setting.config, "vm", config.backbone, schema, setting.codec)
    task = loop.Trainable(build, partial(Student.loss, config=config.distil))
    examples = setting.examples(config.train.order.batch)
    longest = setting.config.history.length
    schema = schema.read(behaviours=config.backbone.reads_behaviours)
    past = shapes.past(
        setting.codec,
        mesh,
        entries=setting.config.compile.store_rows,
        longest=longest,
        timed=config.encoder.name in TIMED,
    )
    batch = setting.batch(schema, examples, longest=longest)
    return _training(task, config.train, mesh, batch, past, examples)


def export(setting: Setting) -> Program:
    """Batch -> stored bytes, as `export` runs it."""
    config, mesh = setting.config, setting.mesh
    model = nnx.eval_shape(lambda: teacher(setting)(Rngs(0)))
    plain = nnx.to_pure_dict(nnx.state(model))
    state = shapes.place(plain, sharding.for_state(mesh, plain))
    examples = setting.examples(config.export.batch)
    batch = setting.batch(_read_by_fm(setting), examples)
    codecs = {tap: setting.codec for tap in config.fm.taps}
    step = infer.make_step(log_batch, model, mesh, written="once")
    lowered = step.lower(state, batch, (codecs, {}, None))
    held = _parts(state)
    return Program(lowered, held | {"batch": batch}, (held["dense"], batch), examples)


PROGRAMS: dict[str, Callable[[Setting], Program]] = {
    "fm-train": fm_train,
    "export": export,
    "vm-train": vm_train,
}


def state_shapes(
    task: loop.Trainable, optimiser: Optimiser, mesh: Mesh, *, fsdp: bool
) -> tuple[Any, Any, Any]:
    """(graph, seed -> fresh state, the state's shapes with their shardings)."""
    graphdef, init = loop.outline(task.build, optimiser)
    found = jax.eval_shape(init, jnp.zeros((), jnp.uint32))
    return graphdef, init, shapes.place(found, sharding.for_state(mesh, found, fsdp=fsdp))


def _training(
    task: loop.Trainable,
    train: loop.TrainConfig,
    mesh: Mesh,
    batch: Any,
    past: Any,
    examples: int,
) -> Program:
    optimiser = make_optimiser(train.optim, steps=STEPS)
    graphdef, _, state = state_shapes(task, optimiser, mesh, fsdp=train.fsdp)
    where = jax.tree.map(lambda x: x.sharding, state)
    step = loop.make_step(task, optimiser, graphdef, where, dtype=train.dtype)
    held = _parts(state.params) | {"optimiser": state.optimiser, "batch": batch}
    swept = held if train.optim.tables == "adam" else (held["dense"], state.optimiser.dense, batch)
    if past is not None:
        held = held | {"store": past}
    return Program(step.lower(state, batch, past), held, swept, examples)


def _parts(params: Any) -> dict[str, Any]:
    dense, tables = rows.split(params)
    return {"dense": dense, "tables": tables}


def teacher(setting: Setting) -> Callable[[nnx.Rngs], Teacher]:
    """As `train-fm` builds it."""
    schema, config = _read_by_fm(setting), setting.config.fm
    return lambda rngs: Teacher(schema, config, rngs=rngs)


def _read_by_fm(setting: Setting) -> Schema:
    return setting.schema.read(behaviours=setting.config.fm.backbone.reads_behaviours)


def with_dtype(config: Config, dtype: Any) -> Config:
    """Both models' dense layers in this arithmetic."""
    fm, vm = (replace(m, train=replace(m.train, dtype=dtype)) for m in (config.fm, config.vm))
    return replace(config, fm=fm, vm=vm)
