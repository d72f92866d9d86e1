"""Training the teacher on the FM window."""

from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jax.sharding import Mesh

from loopfm_jax import checkpoint, loop
from loopfm_jax.data.batches import Batch
from loopfm_jax.data.schema import Schema
from loopfm_jax.fm.teacher import FMConfig, Teacher, loss
from loopfm_jax.inputs import Inputs, open_inputs

Labels = Literal["true", "shuffled"]


def builder(schema: Schema, config: FMConfig) -> Any:
    return lambda rngs: Teacher(schema, config, rngs=rngs)


def train_fm(
    data: Path, config: FMConfig, *, mesh: Mesh, seed: int, directory: Path, labels: Labels = "true"
) -> dict[str, Any]:
    """Trains on the FM window of the prepared log `data`; writes the model into `directory`.

    Args:
      labels: `shuffled` permutes the FM window's labels (a control: the FM learns nothing true).
    """
    inputs = open_inputs(data, reader="fm", behaviours=config.backbone.reads_behaviours)
    rows = known_rows(inputs)
    assemble = inputs.batch if labels == "true" else _shuffled(inputs, rows, seed)
    trained = loop.train(
        loop.Trainable(builder(inputs.schema, config), partial(loss, config=config)),
        rows,
        assemble,
        config=config.train,
        mesh=mesh,
        seed=seed,
        directory=directory,
        title="train-fm",
    )
    checkpoint.save_model(trained.model, directory)
    checkpoint.discard(directory)
    return {
        "params": trained.params,
        "curve": trained.curve,
        "cutoff_ms": int(inputs.log["logged_time"][rows].max()),
        "measured": {"examples_per_s": trained.examples_per_s},
    }


def known_rows(inputs: Inputs) -> np.ndarray:
    """FM rows whose label was there before the VM window began: an impression group may straddle
    its start, and a label of after it would leak into every code."""
    rows, first_ms = inputs.rows("fm"), inputs.log["time"][inputs.splits["vm"].start]
    return rows[inputs.log["logged_time"][rows] < first_ms]


def _shuffled(inputs: Inputs, rows: np.ndarray, seed: int) -> Any:
    label = np.array(inputs.log["label"], np.float32)
    label[rows] = np.random.default_rng((seed, 1)).permutation(label[rows])

    def assemble(batch_rows: np.ndarray) -> Batch:
        return inputs.batch(batch_rows) | {"label_B": label[batch_rows]}

    return assemble
