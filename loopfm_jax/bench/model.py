"""Our models in a benchmark: what training and serving run, built from a row's JSON."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from loopfm_jax import loop
from loopfm_jax.backbones import BackboneConfig
from loopfm_jax.bench import data
from loopfm_jax.bench.protocol import Spec
from loopfm_jax.data.batches import OrderConfig
from loopfm_jax.data.schema import Schema
from loopfm_jax.fm.compressor import CompressorConfig
from loopfm_jax.fm.teacher import FMConfig, Teacher
from loopfm_jax.fm.teacher import loss as teacher_loss
from loopfm_jax.fm.train import Lessons
from loopfm_jax.history.encoders import TIMED, EncoderConfig
from loopfm_jax.history.reader import Past
from loopfm_jax.optim import OptimConfig
from loopfm_jax.sharding import MeshConfig, make_mesh
from loopfm_jax.tables import TableConfig
from loopfm_jax.vm.methods import find_method
from loopfm_jax.vm.student import DistilConfig, Student, VMConfig
from loopfm_jax.vm.train import Examples

FOREVER = 1_000_000
"""Epochs: time ends a run, not the data."""


@dataclass(frozen=True)
class Taught:
    """An FM with its compressor over generated examples, as `train-fm` trains it."""

    examples: Lessons
    config: FMConfig
    mesh: Mesh
    past: None
    seed: int

    @property
    def build(self) -> Callable[[nnx.Rngs], Teacher]:
        return self.examples.builder(self.config)

    @property
    def task(self) -> loop.Trainable:
        """Cross-entropy plus the compressor's loss."""
        return loop.Trainable(self.build, partial(teacher_loss, config=self.config))

    @property
    def rows(self) -> np.ndarray:
        return self.examples.inputs.rows("vm")


@dataclass(frozen=True)
class Subject:
    """A student over generated examples; without histories it is the backbone alone."""

    examples: Examples
    config: VMConfig
    mesh: Mesh
    past: Past
    seed: int

    def build(self, rngs: nnx.Rngs) -> Student:
        of = self.examples
        return Student(of.inputs.schema, self.config, of.method, of.reading, rngs=rngs)

    @property
    def task(self) -> loop.Trainable:
        """Mean cross-entropy of the label."""
        return loop.Trainable(self.build, partial(Student.loss, config=DistilConfig()))

    @property
    def rows(self) -> np.ndarray:
        return self.examples.inputs.rows("vm")


def make_subject(spec: Spec) -> Subject | Taught:
    """What `spec` describes: schema, log, backbone, optim, batch and, if any, histories, or an FM's
    taps and compressor."""
    inputs = data.read_log(Path(spec["log"]), Schema.from_json(spec["schema"]))
    train = loop.TrainConfig(
        OrderConfig(epochs=FOREVER, batch=spec["batch"]),
        OptimConfig(**spec.get("optim", {})),
        dtype=spec.get("dtype", "float32"),
    )
    backbone = from_json(BackboneConfig, spec["backbone"], tables=TableConfig)
    mesh, seed = make_mesh(MeshConfig(**spec.get("mesh", {}))), spec.get("seed", 0)
    if spec.get("compressor"):
        compressor = from_json(CompressorConfig, spec["compressor"])
        teacher = FMConfig(backbone, tuple(spec["taps"]), compressor, train=train)
        return Taught(Lessons(inputs, None), teacher, mesh, None, seed)
    encoder = from_json(EncoderConfig, spec.get("encoder", {}))
    config = VMConfig(backbone=backbone, encoder=encoder, train=train)
    reading, join, method = data.no_reading(), None, "base"
    if spec.get("histories"):
        histories = data.HistorySpec(**spec["histories"])
        timed = encoder.name in TIMED
        reading, join = data.join_histories(inputs, histories, timed=timed)
        method = "loopfm"
    examples = Examples(inputs, find_method(method), reading, None, join)
    return Subject(examples, config, mesh, examples.past(mesh), seed)


def from_json(kind: Callable[..., Any], values: Mapping[str, Any], **parts: Callable) -> Any:
    """A flat configuration whose lists are tuples and whose `parts` are configurations."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        if name in parts:
            found[name] = from_json(parts[name], value)
        else:
            found[name] = tuple(value) if isinstance(value, list) else value
    return kind(**found)


def save_weights(state: loop.State, path: Path) -> None:
    """Writes the backbone's whole state by path, for `benchmarks.peers.weights`."""
    arrays = {}
    for tree in (state.params, state.rest):
        for keys, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
            root, *names = (str(k.key) for k in keys)
            if root == "backbone":
                arrays["/".join(names)] = jax.device_get(leaf)
    np.savez(path, **arrays)  # pyright: ignore[reportArgumentType]
