"""Training a vertical model on the VM window and judging it on the holdout."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from loopfm_jax import checkpoint, infer, loop, sharding, stages
from loopfm_jax.data.batches import Seating
from loopfm_jax.data.log import LogResidency
from loopfm_jax.data.raw import Holdout, vm_windows
from loopfm_jax.errors import UserError
from loopfm_jax.history.encoders import TIMED
from loopfm_jax.history.join import Join
from loopfm_jax.history.keys import key_values
from loopfm_jax.history.reader import Past, Reading, raw_fields
from loopfm_jax.history.rowfile import RowFile
from loopfm_jax.history.store import (
    Exported,
    Residency,
    open_export,
    open_histories,
    swapped,
)
from loopfm_jax.inputs import Inputs, open_inputs
from loopfm_jax.packing import WHOLE, Parts
from loopfm_jax.vm.methods import Method
from loopfm_jax.vm.student import Student, VMConfig, now_taps


@dataclass(frozen=True)
class Examples:
    """Rows of the log joined with what the FM left behind; call `batch(rows)`."""

    inputs: Inputs
    method: Method
    reading: Reading
    exported: Exported | None
    join: Join | None

    def batch(self, rows: np.ndarray, parts: Parts = WHOLE) -> dict[str, Any]:
        """Features, and for the open channels `teacher_B`, `codes` [B, columns] by tap, and what
        `history.join.Join.batch` brings."""
        batch: dict[str, Any] = dict(self.inputs.batch(rows, parts))
        if self.exported is not None:
            example = parts.mine(rows) - self.exported.facts["first"]
            if {"kd", "adapter"} & set(self.method.heads):
                batch["teacher_B"] = self.exported.soft[example]
            taps = set(now_taps(self.method, self.reading).values())
            if taps:
                batch["codes"] = {tap: self.exported.codes[tap][example] for tap in sorted(taps)}
        return batch | (self.join.batch(rows, parts) if self.join else {})

    def on(self, mesh: Mesh) -> "Examples":
        """The same for steps on a mesh."""
        return replace(self, join=self.join.on(mesh)) if self.join else self

    @property
    def seating(self) -> Seating | None:
        """Of batches."""
        return self.join.seating if self.join else None

    def past(self, mesh: Mesh) -> Past:
        """What waits on the device."""
        if self.join is not None:
            return self.join.past(mesh)
        return sharding.everywhere(mesh, Past({}, dict(self.reading.codecs)))


@dataclass(frozen=True)
class Sources:
    """Stage folders a VM is trained from, and what it is told of them."""

    data: Path
    export: Path | None
    """For methods with auxiliary heads or features."""
    history: Path | None
    """For methods that read histories."""
    tap: str | None = None
    """The tap LoopFM reads; default: the first that was exported."""
    raw: tuple[str, ...] = ()
    """The fields whose ids `raw` histories hold; default: the candidate's."""
    swap: bool = False
    """Every example reads the history of another key (a control)."""
    residency: Residency = "auto"
    """Where histories wait."""
    log_residency: LogResidency = "auto"
    """Where the prepared log waits."""


def open_examples(sources: Sources, config: VMConfig, method: Method) -> Examples:
    """Joins the prepared log with what the FM left behind."""
    inputs = open_inputs(
        sources.data,
        reader="vm",
        behaviours=config.backbone.reads_behaviours,
        timed=config.backbone.reads_times,
        residency=sources.log_residency,
        order=config.train.order.order,
    )
    folders = [folder for folder in (sources.export, sources.history) if folder]
    facts = [stages.verify(folder)["facts"] for folder in folders]
    first = inputs.splits["vm"].start
    for said in facts:
        check_cutoffs(said["cutoffs"], int(inputs.log["time"][first]))
    exported = open_export(sources.export, facts[0]) if sources.export else None
    histories = open_histories(sources.history, facts[-1]) if sources.history else None
    if histories and sources.swap:
        keys = key_values(inputs.log, tuple(histories.stores))
        histories = swapped(histories, {name: key[first:] for name, key in keys.items()})
    told = histories or exported
    reading = Reading(
        contents=method.contents,
        keys=tuple(histories.stores) if histories else (),
        side=method.side,
        codecs=told.codecs if told else {},
        tap=sources.tap or (facts[0]["taps"][0] if facts else ""),
        raw=raw_fields(inputs.schema, sources.raw),
    )
    check_entity(method, inputs.schema.entity)
    check_taps(method, reading)
    join = None
    if histories:
        timed = config.encoder.name in TIMED
        join = Join(inputs, histories, reading, first, timed, sources.residency)
    return Examples(inputs, method, reading, exported, join)


def check_cutoffs(cutoffs: Sequence[Sequence[int]], first_ms: int) -> None:
    """The FM behind a code must not have seen a label at or after the code's row.

    Args:
      cutoffs: (first ms of the rows, last ms that their FM was trained on), in order.
      first_ms: when the VM window starts.
    """
    starts = [first_ms, *(start for start, _ in cutoffs[1:])]
    for start_ms, (_, cutoff_ms) in zip(starts, cutoffs, strict=True):
        if cutoff_ms >= start_ms:
            raise UserError(
                f"the FM was trained on rows until {cutoff_ms} ms, but exported rows from "
                f"{start_ms} ms on: the codes would leak; train the FM on what comes before"
            )


def check_entity(method: Method, entity: tuple[str, ...]) -> None:
    """Raises UserError where a channel describes the key, but no column does."""
    if "entity" in method.features and not entity:
        raise UserError("the method entity needs columns that describe the key: data.entity")


def check_taps(method: Method, reading: Reading) -> None:
    """Raises UserError where a channel reads a tap that is not exported."""
    wanted = [tap for c in method.contents if (tap := reading.tap_of(c))]
    for tap in (*wanted, *now_taps(method, reading).values()):
        if tap not in reading.codecs:
            raise UserError(
                f"a channel reads the tap {tap!r}, but the export holds "
                f"{', '.join(reading.codecs)}: name it in --fm.taps"
            )


def train_vm(
    examples: Examples,
    config: VMConfig,
    *,
    mesh: Mesh,
    seed: int,
    holdout: Holdout,
    directory: Path,
    title: str,
) -> dict[str, Any]:
    """One VM: trains on the windows before `holdout`, on what of them has its label by then;
    predicts that.

    Writes the model and prediction.npy [rows of the holdout] into `directory`.
    """
    examples = examples.on(mesh)
    past, judged = examples.past(mesh), examples.inputs.rows(holdout)
    learned = examples.inputs.known(examples.inputs.rows(*vm_windows(holdout)), before=judged[0])
    trained = loop.train(
        loop.Trainable(_builder(examples, config), partial(Student.loss, config=config.distil)),
        learned,
        examples.batch,
        config=config.train,
        mesh=mesh,
        seed=seed,
        directory=directory,
        constants=past,
        pretrained=examples.inputs.log.pretrained,
        seating=examples.seating,
        title=title,
    )
    assert isinstance(trained.model, Student)
    told = f"{title} {holdout}"
    _write_prediction(
        trained.model, examples, judged, past, mesh=mesh, directory=directory, title=told
    )
    checkpoint.save_model(trained.model, directory)
    checkpoint.discard(directory)
    return {
        "params": trained.params,
        "curve": trained.curve,
        "measured": trained.measured,
    }


def _write_prediction(
    model: Student,
    examples: Examples,
    rows: np.ndarray,
    past: Past,
    *,
    mesh: Mesh,
    directory: Path,
    title: str,
) -> None:
    prediction = RowFile(directory / "prediction.npy", shape=(len(rows),), dtype=np.float32)
    predict = infer.make_step(_predict, model, mesh, written="once")
    infer.run(
        model,
        predict,
        rows,
        examples.batch,
        {"prediction": prediction},
        batch=4096,
        mesh=mesh,
        constants=past,
        title=title,
        seating=examples.seating,
    )
    prediction.close()


def load_vm(examples: Examples, config: VMConfig, directory: Path, mesh: Mesh) -> Student:
    """The model that `train_vm` left in a folder."""
    model = checkpoint.load_model(
        _builder(examples, config), directory, mesh, pretrained=examples.inputs.log.pretrained
    )
    assert isinstance(model, Student)
    return model


def _builder(examples: Examples, config: VMConfig) -> Callable[[nnx.Rngs], Student]:
    def build(rngs: nnx.Rngs) -> Student:
        schema, method = examples.inputs.schema, examples.method
        return Student(schema, config, method, examples.reading, rngs=rngs)

    return build


def _predict(model: Student, batch: dict[str, Any], past: Past) -> dict[str, jax.Array]:
    return {"prediction": nnx.sigmoid(model(batch, past).logits_B)}
