"""Training a vertical model on the VM window and judging it on the holdout."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from loopfm_jax import checkpoint, infer, loop, sharding
from loopfm_jax.data.batches import Batch
from loopfm_jax.data.raw import Holdout, vm_windows
from loopfm_jax.errors import UserError
from loopfm_jax.history.packing import budget
from loopfm_jax.history.store import Store, open_store, swapped
from loopfm_jax.inputs import Inputs, open_inputs
from loopfm_jax.vm.methods import Method
from loopfm_jax.vm.student import History, Student, VMConfig, loss

Histories = Literal["own", "swapped"]


@dataclass(frozen=True)
class Examples:
    """Rows of the log joined with their histories and soft labels; call `batch(rows)`."""

    inputs: Inputs
    store: Store
    end: np.ndarray
    length: np.ndarray
    longest: int
    method: Method

    def batch(self, rows: np.ndarray) -> Batch:
        """Features, and for the open channels `teacher_B`, `end_B`, `length_B`, `seconds_B`, and
        `slot_T`, whose length is the token budget of this batch."""
        batch = self.inputs.batch(rows)
        exported = rows - self.inputs.splits["vm"].start
        if self.method.kd:
            batch["teacher_B"] = self.store.teacher[exported]
        if self.method.history:
            seconds = (self.inputs.log["time"][rows] - self.store.start_ms) // 1000
            batch |= {
                "end_B": self.end[exported].astype(np.int32),
                "length_B": self.length[exported],
                "seconds_B": seconds.astype(np.int32),
            }
            slots = budget(batch["length_B"], longest=self.longest)
            batch["slot_T"] = np.zeros(slots, np.uint8)
        return batch


def open_examples(
    data: Path,
    history: Path,
    facts: Mapping[str, Any],
    config: VMConfig,
    method: Method,
    *,
    histories: Histories = "own",
) -> Examples:
    """Joins the prepared log with the histories of stage folder `history` (and its facts)."""
    inputs = open_inputs(data, reader="vm", behaviours=config.backbone.reads_behaviours)
    _check_cutoff(facts["cutoff_ms"], int(inputs.log["time"][inputs.splits["vm"].start]))
    store = open_store(history, dict(facts))
    end, length = store.end, store.length
    if histories == "swapped":
        end, length = swapped(store, inputs.log["key"][inputs.rows("vm", "validation", "test")])
    return Examples(inputs, store, end, length, facts["longest"], method)


def _check_cutoff(cutoff_ms: int, first_ms: int) -> None:
    """The FM behind the codes must not have seen a label at or after any example's time."""
    if cutoff_ms >= first_ms:
        raise UserError(
            f"the FM was trained on rows until {cutoff_ms} ms, but the VM window starts at "
            f"{first_ms} ms: the codes would leak; train the FM on the FM window"
        )


def on_device(store: Store, facts: Mapping[str, Any], mesh: Mesh) -> History:
    """The store as the step reads it, resident on the devices."""
    arrays = {n: np.asarray(getattr(store, n)) for n in ("codes", "seconds", "outcome")}
    return History(
        **jax.device_put(arrays, sharding.split(mesh)),
        code=facts["code"],
        width=facts["width"],
        longest=facts["longest"],
    )


def train_vm(
    examples: Examples,
    facts: Mapping[str, Any],
    config: VMConfig,
    *,
    mesh: Mesh,
    seed: int,
    holdout: Holdout,
    directory: Path,
    title: str,
) -> dict[str, Any]:
    """One VM: trains on the windows before `holdout`, predicts that.

    Writes the model and prediction.npy [rows of the holdout] into `directory`.
    """
    method = examples.method

    def build(rngs: nnx.Rngs) -> Student:
        return Student(examples.inputs.schema, config, method, code_width=facts["width"], rngs=rngs)

    history = on_device(examples.store, facts, mesh) if method.history else None
    trained = loop.train(
        loop.Trainable(build, partial(loss, config=config.distil)),
        examples.inputs.rows(*vm_windows(holdout)),
        examples.batch,
        config=config.train,
        mesh=mesh,
        seed=seed,
        directory=directory,
        constants=history,
        title=title,
    )
    judged = examples.inputs.rows(holdout)
    prediction = np.lib.format.open_memmap(
        directory / "prediction.npy",
        mode="w+",
        dtype=np.float32,
        shape=(len(judged),),
    )
    infer.run(
        trained.model,
        _predict,
        judged,
        examples.batch,
        {"prediction": prediction},
        batch=4096,
        mesh=mesh,
        constants=history,
        title=f"{title} {holdout}",
    )
    prediction.flush()
    checkpoint.save_model(trained.model, directory)
    checkpoint.discard(directory)
    return {
        "params": trained.params,
        "curve": trained.curve,
        "measured": {"examples_per_s": trained.examples_per_s},
    }


def _predict(
    model: Student, batch: dict[str, jax.Array], history: History | None
) -> dict[str, jax.Array]:
    return {"prediction": nnx.sigmoid(model(batch, history)[0])}
