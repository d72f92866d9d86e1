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
from loopfm_jax.history.encoders import EncoderConfig
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


def make_subject(spec: Spec) -> Subject:
    """What `spec` describes: schema, log, backbone, optim, batch and, if any, histories."""
    schema = Schema.from_json(spec["schema"])
    inputs = data.read_log(Path(spec["log"]), schema)
    optim = OptimConfig(**spec.get("optim", {}))
    train = loop.TrainConfig(
        OrderConfig(epochs=FOREVER, batch=spec["batch"]), optim, dtype=spec.get("dtype", "float32")
    )
    config = VMConfig(
        backbone=from_json(BackboneConfig, spec["backbone"], tables=TableConfig),
        encoder=from_json(EncoderConfig, spec.get("encoder", {})),
        train=train,
    )
    reading, join, method = data.no_reading(), None, "base"
    if spec.get("histories"):
        histories = data.HistorySpec(**spec["histories"])
        reading, join = data.join_histories(inputs, histories)
        method = "loopfm"
    examples = Examples(inputs, find_method(method), reading, None, join)
    mesh = make_mesh(MeshConfig(*spec.get("mesh", (1, 1))))
    past = examples.past(mesh)
    return Subject(examples, config, mesh, past, spec.get("seed", 0))


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
