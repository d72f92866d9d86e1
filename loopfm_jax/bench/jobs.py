"""Our side of the rows about models: training steps, inference in batches, one request at a time.

Training and inference assemble every host batch inside the timed loop, as `loop.train` and
`infer.run` do; a peer gets its batches ready-made, its best.
"""

import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import jax
import numpy as np
from flax import nnx

from loopfm_jax import compiler, loop, memory, sharding
from loopfm_jax.bench.data import write_log
from loopfm_jax.bench.model import FOREVER, Subject, Taught, make_subject, save_weights
from loopfm_jax.bench.protocol import Measured, Spec, timed, timed_each
from loopfm_jax.data.batches import Batch, GlobalBatches, iterate
from loopfm_jax.data.schema import Schema
from loopfm_jax.infer import in_flight, programs_of
from loopfm_jax.optim import make_optimiser
from loopfm_jax.packing import Parts
from loopfm_jax.serve import open_predictor
from loopfm_jax.vm.train import Examples

REQUESTS = 16
"""Different requests that a latency row asks in turn."""


def _start(spec: Spec) -> tuple[Subject | Taught, Any, loop.State, Any, Any]:
    """(subject, graph, state, shardings, optimiser), with the weights where the spec wants them."""
    memory.keep_freed()
    subject = make_subject(spec)
    optimiser = make_optimiser(subject.config.train.optim, steps=FOREVER)
    graphdef, state, shardings = loop.create(subject.build, optimiser, subject.mesh, subject.seed)
    if spec.get("weights_to"):
        save_weights(state, Path(spec["weights_to"]))
    return subject, graphdef, state, shardings, optimiser


def _facts(subject: Subject | Taught, state: loop.State) -> dict[str, Any]:
    return {
        "device": jax.devices()[0].device_kind,
        "platform": jax.devices()[0].platform,
        "params": loop.count(state.params),
        "batch": subject.config.train.order.batch,
    }


def _batches(subject: Subject | Taught, spec: Spec, *, programs: int = 1) -> Iterator[Batch]:
    """Those of the first one's shapes, each for one of so many programs that share a batch: a
    larger token budget is a program more, whose compiling a rate should not hold. Where sides lay
    them out in parts of several numbers, `parts` has all of these: a batch that would need another
    budget in any of them is left out by every side."""
    whole = subject.config.train.order
    order = replace(whole, batch=whole.batch // programs)

    def laid_out(parts: Parts) -> GlobalBatches:
        return GlobalBatches(subject.rows, subject.examples.batch, config=order, parts=parts)

    source = laid_out(sharding.parts(subject.mesh))
    others = [laid_out(Parts(count, tuple(range(count)))) for count in spec.get("parts", ())]

    def shapes(step: int, batch: Batch) -> Any:
        return jax.tree.map(np.shape, [batch, *(other[step] for other in others)])

    first, steps = shapes(0, source[0]), enumerate(iterate(source))
    shares = zip(*[steps] * programs, strict=False)
    fit = (share for share in shares if all(shapes(*one) == first for one in share))
    return (batch for share in fit for _, batch in share)


class Train:
    """The compiled step of `loop`, its numbers read one step late."""

    def __init__(self, spec: Spec):
        subject, graphdef, state, shardings, optimiser = _start(spec)
        self.facts = _facts(subject, state)
        self.subject, self._state, self._batches = subject, state, _batches(subject, spec)
        self.ticks: list[float] = []
        """When the numbers of each step of the last run were read, by `time.perf_counter`."""
        dtype = subject.config.train.dtype
        self._step = loop.make_step(subject.task, optimiser, graphdef, shardings, dtype=dtype)
        self._waiting: list[Any] = []
        self._losses: list[float] = []

    def run(self, *, seconds: float, steps: int) -> Measured:
        batch = self.subject.config.train.order.batch
        self.ticks.clear()
        self._waited = 0.0
        found = timed(
            self._one, self._read, seconds=seconds, steps=steps, examples=batch, losses=self._losses
        )
        return replace(found, more={"wait_share": self._waited / found.seconds})

    def _one(self) -> None:
        asked = time.perf_counter()
        batch = next(self._batches)
        self._waited += time.perf_counter() - asked
        self.step(batch)

    def step(self, batch: Batch) -> None:
        """Dispatches a step and reads the numbers of the one before."""
        subject = self.subject
        placed = loop.put(batch, subject.mesh)
        self._state, numbers = self._step(self._state, placed, subject.past)
        self._read()
        self._waiting.append(numbers)

    def _read(self) -> None:
        while self._waiting:
            self._losses.append(float(jax.device_get(self._waiting.pop()["logloss"])))
            self.ticks.append(time.perf_counter())


class Grown(Train):
    """The same over a log that is generated here: sides whose tables differ cannot share one."""

    def __init__(self, spec: Spec):
        schema = Schema.from_json(spec["schema"])
        with TemporaryDirectory() as folder:
            log = Path(folder) / "log.npz"
            write_log(log, schema, rows=spec["log_rows"], fill=spec["fill"])
            super().__init__({**spec, "log": str(log)})


class Predict:
    """A trained model as it serves: batch -> click probabilities."""

    def __init__(self, spec: Spec):
        subject, graphdef, state, _, _ = _start(spec)
        self.facts = _facts(subject, state)
        self.subject = subject
        self._state = (state.params, state.rest)
        self.programs = 0
        """How many were compiled."""
        del state  # the optimiser's part is not served

        asked = compiler.options(subject.mesh, dtype=subject.config.train.dtype)

        @partial(jax.jit, compiler_options=asked)
        def predict(state: Any, batch: Any, past: Any) -> jax.Array:
            self.programs += 1  # once per tracing
            return nnx.sigmoid(nnx.merge(graphdef, *state)(batch, past).logits_B)

        self._predict = predict

    def __call__(self, batch: Batch) -> jax.Array:
        """Dispatches; returns before the answer is there."""
        return self._predict(self._state, loop.put(batch, self.subject.mesh), self.subject.past)


class Infer:
    """Batches one after the other, as `infer.run` asks for them; all of a slice's end in it."""

    def __init__(self, spec: Spec):
        self._predict = Predict(spec)
        self.facts = self._predict.facts
        subject = self._predict.subject
        self._programs = programs_of(subject.config.train.order.batch, subject.mesh)
        self._batches = _batches(subject, spec, programs=self._programs)

    def run(self, *, seconds: float, steps: int) -> Measured:
        losses, programs = [], self._programs

        def asked(started: float) -> Iterator[Batch]:
            for count, batch in enumerate(self._batches, start=1):
                yield batch
                enough = count >= steps * programs and count % programs == 0
                if enough and time.perf_counter() - started >= seconds:
                    return

        def answer(batch: Batch) -> tuple[jax.Array, np.ndarray]:
            return self._predict(batch), batch["label_B"]

        def whole() -> None:
            batches = asked(time.perf_counter())
            for probability_B, label_B in in_flight(answer, batches, threads=programs):
                losses.append(entropy(np.asarray(probability_B), label_B))

        found = timed(whole, lambda: None, seconds=0, steps=1, examples=0)
        by_batch = np.mean(np.reshape(losses, (-1, programs)), axis=1)
        count = len(by_batch) * self._predict.subject.config.train.order.batch
        return replace(
            found,
            value=count / found.seconds,
            steps=len(by_batch),
            examples=count,
            losses=tuple(by_batch.tolist()),
            more={"programs": self._predict.programs},
        )


class Latency:
    """Requests of one batch each, from host arrays to host probabilities, as `serve` answers: one
    predictor for all sizes."""

    def __init__(self, spec: Spec):
        subject, graphdef, state, _, _ = _start(spec)
        self.facts = _facts(subject, state)
        model, examples = nnx.merge(graphdef, state.params, state.rest), subject.examples
        assert isinstance(examples, Examples), "a vertical model answers requests"
        self._predictor = open_predictor(model, examples, buckets=spec["batches"])
        self._requests = {
            size: [
                examples.batch(rows) for rows in subject.rows[: REQUESTS * size].reshape(-1, size)
            ]
            for size in spec["batches"]
        }
        self._asked = dict.fromkeys(spec["batches"], 0)

    def run(self, *, seconds: float, steps: int, batch: int) -> Measured:
        losses: list[float] = []
        one = partial(self._one, self._requests[batch], batch, losses)
        found = timed_each(one, seconds=seconds, steps=steps, examples=batch)
        programs = {"programs": len(self._predictor.programs)}
        return replace(found, losses=tuple(losses), more=programs)

    def _one(self, requests: list[Batch], size: int, losses: list[float]) -> None:
        asked = self._asked[size]
        request = requests[asked % REQUESTS]
        probability_B = np.asarray(self._predictor.answer(request))
        if asked < REQUESTS:
            losses.append(entropy(probability_B[:size], request["label_B"]))
        self._asked[size] += 1


def entropy(probability_B: np.ndarray, label_B: np.ndarray) -> float:
    """Mean cross-entropy of float32 probabilities."""
    p_B = np.clip(probability_B.astype(np.float64), 1e-7, 1 - 1e-7)
    return float(-np.mean(np.where(label_B > 0, np.log(p_B), np.log1p(-p_B))))
