"""Orbax checkpoints: the whole training state with the data position, and final models.

Orbax restores a flipped bit without a word, so final models live in a stage folder whose manifest
holds the sha256 of every file.
"""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import grain
import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx
from jax.sharding import Mesh

from loopfm_jax import processes, sharding
from loopfm_jax.rngs import Rngs
from loopfm_jax.tables import Frozen, with_pretrained, without_frozen

CHECKPOINTS = "checkpoints"


class Saver:
    """Periodic checkpoints of (state, data iterator) under a folder; a context manager.

    Pretrained tables stay where they are, in the prepared log.
    """

    def __init__(self, directory: Path, *, every: int):
        self._directory, self._every = directory / CHECKPOINTS, every
        self._manager: ocp.CheckpointManager | None = None

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, *_: Any) -> None:
        if self._manager is not None:
            self._manager.wait_until_finished()
            self._manager.close()

    def _open(self) -> ocp.CheckpointManager:
        if self._manager is None:
            options = ocp.CheckpointManagerOptions(max_to_keep=2, create=True)
            self._manager = ocp.CheckpointManager(self._directory.resolve(), options=options)
        return self._manager

    def due(self, step: int) -> bool:
        return step % self._every == 0

    def save(self, step: int, state: Any, batches: grain.DatasetIterator, curve: Any) -> None:
        manager = self._open()
        manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(without_frozen(state)),
                data=ocp.args.JsonSave(batches.get_state()),  # one, however many processes
                curve=ocp.args.JsonSave(curve),
            ),
        )

    def restore(self, state: Any, batches: grain.DatasetIterator) -> tuple[Any, Any]:
        """(state, curve) of the newest checkpoint, with the shardings and the pretrained tables of
        `state`; moves `batches` to its position. (`state`, None) where there is none."""
        manager = self._open() if self._directory.exists() else None
        if manager is None or manager.latest_step() is None:
            return state, None
        wanted = jax.tree.map(ocp.utils.to_shape_dtype_struct, without_frozen(state))
        args = ocp.args.Composite(
            state=ocp.args.StandardRestore(wanted),
            data=ocp.args.JsonRestore(),
            curve=ocp.args.JsonRestore(),
        )
        restored = manager.restore(manager.latest_step(), args=args)
        batches.set_state(restored["data"])
        learned = jax.tree.map(lambda x, y: x if y is None else y, state, restored["state"])
        return learned, restored["curve"]


def discard(directory: Path) -> None:
    """Removes the checkpoints under a folder: what they led to is written."""
    processes.first(lambda: shutil.rmtree(directory / CHECKPOINTS, ignore_errors=True))


def save_model(model: nnx.Module, directory: Path) -> None:
    """What training made of the model, under `directory`/model; pretrained tables stay where they
    are, in the prepared log."""
    _, _, state = nnx.split(model, Frozen, ...)
    with ocp.StandardCheckpointer() as saver:
        saver.save((directory / "model").resolve(), nnx.to_pure_dict(state))


def load_model(
    build: Callable[[nnx.Rngs], nnx.Module],
    directory: Path,
    mesh: Mesh,
    *,
    pretrained: Mapping[str, np.ndarray] | None = None,
) -> nnx.Module:
    """The model that `save_model` wrote, onto any mesh.

    Args:
      pretrained: the tables that were not saved, by field.
    """
    shapes = nnx.eval_shape(lambda: build(Rngs(0)))
    graphdef, *parts = nnx.split(shapes, Frozen, ...)
    frozen, state = (
        jax.tree.map(
            lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
            nnx.to_pure_dict(part),
            sharding.for_state(mesh, nnx.to_pure_dict(part)),
        )
        for part in parts
    )
    with ocp.StandardCheckpointer() as reader:
        state = reader.restore((directory / "model").resolve(), state)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, frozen)
    frozen = with_pretrained(frozen, pretrained or {}, shardings)
    return nnx.merge(graphdef, frozen, state)
