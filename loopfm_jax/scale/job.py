"""A point in its process: does it fit, and how fast is it."""

import statistics
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from loopfm_jax import loop, memory, sharding
from loopfm_jax.aot.programs import state_shapes
from loopfm_jax.bench import flops
from loopfm_jax.bench.jobs import Train
from loopfm_jax.bench.model import FOREVER, Subject, Taught, make_subject
from loopfm_jax.bench.protocol import Measured, Spec, timed
from loopfm_jax.data.batches import Batch, GlobalBatches
from loopfm_jax.optim import make_optimiser
from loopfm_jax.rngs import Rngs


def nothing() -> Measured:
    """Of a job that has nothing to time."""
    return timed(lambda: None, lambda: None, seconds=0, steps=1, examples=0)


class Machine:
    """The job: what JAX calls the devices."""

    def __init__(self, spec: Spec):
        device = jax.devices()[0]
        self.facts = {
            "device": device.device_kind,
            "platform": device.platform,
            "devices": jax.device_count(),
        }

    def run(self, *, seconds: float, steps: int) -> Measured:
        return nothing()


class Needs:
    """The job: memory of a device (of the host on CPU) that a model takes, before it is taken.

    The compiler's own account of the larger of two programs: what draws the parameters (a random
    table takes several times its size while it is drawn), and a step with its moments, examples,
    gradients and activations. What the process or the device holds already is added to it.
    """

    def __init__(self, spec: Spec):
        memory.keep_freed()
        subject = make_subject(spec)
        drawing, step = (program.compile().memory_analysis() for program in _programs(subject))
        told = jax.local_devices()[0].memory_stats()
        if told:
            held, limit, again = told["bytes_in_use"], told.get("bytes_limit"), 0
        else:
            held, free = memory.resident_bytes(), memory.free_bytes()
            limit = None if free is None else held + free
            again = step.temp_size_in_bytes  # malloc finds no room where the last step's were
        needs = max(_bytes(drawing), _bytes(step) + again)
        self.facts = {"needs_bytes": held + needs, "limit_bytes": limit}

    def run(self, *, seconds: float, steps: int) -> Measured:
        return nothing()


def _bytes(account: Any) -> int:
    """What a program holds while it runs; results that take the place of arguments count once."""
    made = account.output_size_in_bytes - account.alias_size_in_bytes
    return account.argument_size_in_bytes + account.temp_size_in_bytes + made


def _programs(subject: Subject | Taught) -> tuple[Any, Any]:
    """What makes the state, and the step, lowered from shapes alone."""
    train = subject.config.train
    optimiser = make_optimiser(train.optim, steps=FOREVER)
    graphdef, init, state = state_shapes(subject.task, optimiser, subject.mesh, fsdp=train.fsdp)
    shardings = jax.tree.map(lambda x: x.sharding, state)
    seed = jnp.asarray(subject.seed, jnp.uint32)
    batch = loop.put(source_of(subject)[0], subject.mesh)
    step = loop.make_step(subject.task, optimiser, graphdef, shardings, dtype=train.dtype)
    drawing = jax.jit(init, out_shardings=shardings).lower(seed)
    return drawing, step.lower(state, batch, subject.past)


class Pace:
    """The job: training steps as `bench` times them, by the median of the times between them."""

    def __init__(self, spec: Spec):
        self._train = Train(spec)
        for batch in every_shape(source_of(self._train.subject)):
            self._train.step(batch)  # the last one's numbers are the first that `run` reads
        flops_each, tokens = count(self._train.subject, spec)
        self.facts = {**self._train.facts, "flops_per_example": flops_each, "tokens": tokens}

    def run(self, *, seconds: float, steps: int) -> Measured:
        found = self._train.run(seconds=seconds, steps=steps)
        told = jax.local_devices()[0].memory_stats() or {}
        more = {**found.more, "step_s": statistics.median(np.diff(self._train.ticks).tolist())}
        if "peak_bytes_in_use" in told:
            more["peak_device_bytes"] = told["peak_bytes_in_use"]
        return replace(found, more=more)


def source_of(subject: Subject | Taught) -> GlobalBatches:
    """One pass over the examples."""
    order = subject.config.train.order
    return GlobalBatches(
        subject.rows,
        subject.examples.batch,
        config=replace(order, epochs=1),
        parts=sharding.parts(subject.mesh),
    )


def every_shape(source: GlobalBatches) -> list[Batch]:
    """A batch of every shape: token budgets differ, and what they need is compiled beforehand."""
    found: dict[str, Batch] = {}
    for i in range(len(source)):
        batch = source[i]
        found.setdefault(str(jax.tree.map(np.shape, batch)), batch)
    return list(found.values())


def count(subject: Subject | Taught, spec: Spec) -> tuple[float, float]:
    """FLOPs of an example's training step, and how many events it reads, padding left out.

    Args:
      spec: with `tokens` and `pairs` of the examples.
    """
    config, schema = subject.config.backbone, subject.examples.inputs.schema
    tokens, pairs = (spec[name] if schema.behaviours else 0.0 for name in ("tokens", "pairs"))
    if isinstance(subject, Taught):
        model = nnx.eval_shape(lambda: subject.build(Rngs(0)))
        inputs = [compressor.inputs for compressor in model.compressors]
        whole = flops.train(schema, config, tokens=tokens, pairs=pairs)
        whole += sum(flops.compressor_train(subject.config.compressor, n) for n in inputs)
        return whole, tokens
    join, encoder = subject.examples.join, subject.config.encoder
    assert join is not None
    (store,) = join.histories.stores.values()
    length = store.length.astype(np.float64)
    entries, reading = float(length.mean()), subject.examples.reading
    whole = flops.train(schema, config, tokens=tokens, pairs=pairs, extra_fields=encoder.fields)
    width = config.tables.width
    whole += flops.encoder_train(
        encoder,
        inputs=reading.width("loopfm", config.tables),
        query=len(schema.item) * width,
        field=width,
        tokens=entries,
        pairs=float((length * (length + 1) / 2).mean()),
    )
    return whole, tokens + entries
