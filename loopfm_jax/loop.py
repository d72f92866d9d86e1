"""The training loop that FM and VM share.

Step n is dispatched before the numbers of step n-1 are read, the state is donated, transfers are
explicit, and a loss that is not finite stops the run, as does a parameter when a checkpoint is due.
A checkpoint holds the model state and the position in the data, so a resumed run ends bit-equal to
one that was never interrupted.

On CPU a step runs in the thread that asks for it, if all that it reads is there already, for which
who comes here waits: a step in flight beside it would be no faster, but hold its own temporaries
(benchmarks/LOG.md, 2026-11-30).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, struct
from jax.sharding import Mesh

from loopfm_jax import checkpoint, compiler, memory, sharding
from loopfm_jax.curve import Curve, Waiting
from loopfm_jax.data.batches import Assemble, Batch, GlobalBatches, OrderConfig, Seating, iterate
from loopfm_jax.errors import UserError, check_limits
from loopfm_jax.optim import OptimConfig, Optimiser, make_optimiser
from loopfm_jax.progress import track
from loopfm_jax.rngs import Rngs
from loopfm_jax.tables import with_pretrained

jax.config.update("jax_cpu_enable_async_dispatch", False)  # here: devices are opened but once

STEPS = 2**31 - 1
"""Number of the stream of keys that steps draw with: above that of any parameter."""


@struct.dataclass
class State:
    """What a step changes. `rest` is all that is not trained by gradient (running statistics)."""

    step: jax.Array
    seed: jax.Array
    """In the state, not in the program: every seed runs the same compiled step."""
    params: Any
    rest: Any
    optimiser: Any


@dataclass(frozen=True)
class TrainConfig:
    """How a model is trained."""

    order: OrderConfig = field(default_factory=OrderConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Arithmetic of the dense layers; parameters stay float32. On CPU bfloat16 is faster where the
    processor multiplies it (AVX512-BF16, AMX), else slower."""
    checkpoint_steps: int = 1000
    """Steps between checkpoints."""
    fsdp: bool = False
    """The DNN's kernels and their moments lie split over mesh.data too: less memory, at the price
    of gathering them every step."""

    def __post_init__(self) -> None:
        check_limits("train", {"checkpoint_steps": self.checkpoint_steps}, low=1)


class Trainable(NamedTuple):
    """A model and its objective."""

    build: Callable[[nnx.Rngs], nnx.Module]
    loss: Callable[[Any, dict[str, jax.Array], Any, jax.Array], tuple[jax.Array, Any]]
    """(model, batch, constants, key) -> mean loss, dict of scalars for the curve."""


class Trained(NamedTuple):
    """`curve`: step -> mean loss terms since the point before."""

    model: nnx.Module
    params: int
    curve: list[dict[str, float]]
    measured: dict[str, float]
    """`examples_per_s` after compiling; `wait_share` of the time that the loop waited for input."""


def train(
    task: Trainable,
    rows: np.ndarray,
    assemble: Assemble,
    *,
    config: TrainConfig,
    mesh: Mesh,
    seed: int,
    directory: Path,
    constants: Any = (),
    pretrained: Mapping[str, np.ndarray] | None = None,
    start: nnx.Module | None = None,
    seating: Seating | None = None,
    title: str = "train",
) -> Trained:
    """Trains over `rows`, from the last checkpoint under `directory` if there is one.

    Args:
      rows: row numbers of the window, in time order.
      assemble: row numbers -> batch.
      constants: arrays on the device that every step reads (a history store).
      pretrained: tables that are never trained, by field.
      start: a model to go on from, with a fresh optimiser; default: a new one.
      seating: of `GlobalBatches`.
    """
    check_batch(config.order.batch, mesh.shape["data"])
    memory.keep_freed()  # here and not earlier: preparing a log should give its memory back
    source = GlobalBatches(
        rows,
        assemble,
        config=config.order,
        seed=seed,
        parts=sharding.parts(mesh),
        seating=seating,
    )
    optimiser = make_optimiser(config.optim, steps=len(source))
    graphdef, state, shardings = create(task.build, optimiser, mesh, seed, fsdp=config.fsdp)
    state = replace(state, rest=with_pretrained(state.rest, pretrained or {}, shardings.rest))
    if start is not None:
        state = _gone_on(start, state, shardings)
    step = make_step(task, optimiser, graphdef, shardings, dtype=config.dtype)
    batches, waiting = iterate(source), Waiting()
    with checkpoint.Saver(directory, every=config.checkpoint_steps) as saver:
        state, past = saver.restore(state, batches)
        jax.block_until_ready(state)
        curve = Curve(len(source), config.order.batch, past)
        with track(title, total=len(source) * config.order.batch, unit="examples") as advance:
            with jax.transfer_guard("disallow"):
                done = int(jax.device_get(state.step))
                for n, batch in enumerate(waiting.watch(batches), start=done):
                    batch = put(batch, mesh)
                    state, numbers = step(state, batch, constants)
                    curve.add(n, numbers)
                    advance(config.order.batch)
                    if saver.due(n + 1) and n + 1 < len(source):
                        _check_finite(state.params, n + 1)
                        saver.save(n + 1, state, batches, curve.flush())
                curve.flush()
                _check_finite(state.params, len(source))
    model = nnx.merge(graphdef, state.params, state.rest)
    measured = {"examples_per_s": curve.examples_per_s(), "wait_share": waiting.share()}
    return Trained(model, count(state.params), curve.points, measured)


def _gone_on(start: nnx.Module, state: State, shardings: State) -> State:
    """A fresh state with the numbers of a model."""
    params, rest = jax.tree.map(jnp.copy, _parts(start))  # the step donates what it is given
    return jax.device_put(replace(state, params=params, rest=rest), shardings)


def create(
    build: Callable[[nnx.Rngs], nnx.Module],
    optimiser: Optimiser,
    mesh: Mesh,
    seed: int,
    *,
    fsdp: bool = False,
) -> tuple[Any, State, State]:
    """A fresh state, born sharded: (graph, state, its shardings)."""
    graphdef, init = outline(build, optimiser)
    number = jnp.asarray(seed, jnp.uint32)
    shardings = sharding.for_state(mesh, jax.eval_shape(init, number), fsdp=fsdp)
    state = jax.block_until_ready(jax.jit(init, out_shardings=shardings)(number))
    memory.set_aside()
    return graphdef, state, shardings


def outline(
    build: Callable[[nnx.Rngs], nnx.Module], optimiser: Optimiser
) -> tuple[Any, Callable[[jax.Array], State]]:
    """(graph, seed -> fresh state), of which `jax.eval_shape` knows the size without making it."""
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: build(Rngs(0))))

    def init(seed: jax.Array) -> State:
        params, rest = _parts(build(Rngs(jax.random.key(seed))))
        step = jnp.zeros((), jnp.int32)
        return State(step, seed, params, rest, optimiser.init(params))

    return graphdef, init


def _parts(model: nnx.Module) -> tuple[Any, Any]:
    _, params, rest = nnx.split(model, nnx.Param, ...)
    return nnx.to_pure_dict(params), nnx.to_pure_dict(rest)


def make_step(
    task: Trainable,
    optimiser: Optimiser,
    graphdef: Any,
    shardings: State,
    *,
    dtype: str = "float32",
) -> Callable[..., Any]:
    """The jitted step (state, batch, constants) -> (state, numbers); the old state is donated.

    dtype: arithmetic of the model's large products, for the compiler.
    """

    where: Any = shardings.step  # the shardings have the form of the state
    mesh = where.mesh.abstract_mesh

    def step(state: State, batch: dict[str, jax.Array], constants: Any) -> tuple[State, Any]:
        with jax.sharding.use_abstract_mesh(mesh):
            return learn(state, batch, constants)

    def learn(state: State, batch: dict[str, jax.Array], constants: Any) -> tuple[State, Any]:
        key = step_key(state.seed, state.step)

        def loss(model: nnx.Module) -> tuple[jax.Array, Any]:
            gather_kernels(model, shardings.params)
            value, numbers = task.loss(model, batch, constants, key)
            return value, (numbers, _parts(model)[1])

        params, moments, (numbers, rest) = optimiser.learn(
            loss, graphdef, state.params, state.rest, state.optimiser
        )
        return State(state.step + 1, state.seed, params, rest, moments), numbers

    return jax.jit(
        step,
        donate_argnums=0,
        out_shardings=(shardings, None),
        compiler_options=compiler.options(where.mesh, dtype=dtype),
    )


def step_key(seed: jax.Array, step: jax.Array) -> jax.Array:
    """What a step draws with: no key that drew a parameter (`rngs.Rngs`)."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), STEPS), step)


def gather_kernels(model: nnx.Module, shardings: Any) -> None:
    """Its kernels that FSDP splits, as the step computes with them."""
    if any(where.spec == sharding.FSDP for where in jax.tree.leaves(shardings)):
        params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
        whole = jax.tree.map(
            lambda x, where: sharding.gather(x) if where.spec == sharding.FSDP else x,
            params,
            shardings,
        )
        nnx.update(model, whole)


def put(batch: Batch, mesh: Mesh) -> dict[str, jax.Array]:
    """A host batch on the devices, split over `data` by its first axis; of several processes, each
    brings its own parts. On an accelerator it may still be on its way.

    Raises:
      UserError: a size that the mesh does not divide.
    """
    try:
        with jax.transfer_guard("allow"):  # one that is asked for, though JAX does not know it
            where = sharding.split(mesh, "examples")
            placed = jax.make_array_from_process_local_data(where, batch)
    except ValueError:
        for path, leaf in jax.tree_util.tree_leaves_with_path(batch):
            name = "batch" + jax.tree_util.keystr(path)
            sharding.check_divides(mesh, name, leaf.shape, ("examples",))
        raise
    return jax.block_until_ready(placed) if mesh.devices.flat[0].platform == "cpu" else placed


def _check_finite(params: Any, steps: int) -> None:
    """A finite loss may have a gradient that is not."""
    if not jax.device_get(_finite(params)):
        raise UserError(
            f"the parameters are not finite after step {steps}: lower the learning rate or look at "
            "the inputs; no checkpoint of this state was written"
        )


@jax.jit
def _finite(params: Any) -> jax.Array:
    return jnp.stack([jnp.isfinite(x).all() for x in jax.tree.leaves(params)]).all()


def count(params: Any) -> int:
    """Number of trained parameters."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def check_batch(batch: int, data: int) -> None:
    """Raises UserError for a batch that mesh.data does not divide."""
    if batch % data:
        raise UserError(
            f"a batch of {batch} does not divide over mesh.data = {data}: change order.batch"
        )
