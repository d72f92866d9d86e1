"""Running a model over rows: every result in its place, and a rate without compiling."""

import itertools
import math
import threading
from collections.abc import Iterator
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from loopfm_jax import infer
from loopfm_jax.sharding import MeshConfig, make_mesh


class Scale(nnx.Module):
    def __init__(self):
        self.by = nnx.Param(jnp.full((), 3.0))


def as_batch(rows: np.ndarray, parts: object) -> dict[str, np.ndarray]:
    return {"row_B": rows.astype(np.float32)}


def run(rows: np.ndarray, *, batch: int) -> tuple[np.ndarray, float]:
    found, model, mesh = np.full(len(rows), -1.0), Scale(), make_mesh(MeshConfig())
    step = infer.make_step(
        lambda model, batch, constants: {"x": model.by[...] * batch["row_B"] + constants},
        nnx.graphdef(model),
        mesh,
    )
    rate = infer.run(
        model,
        step,
        rows,
        as_batch,
        {"x": found},
        batch=batch,
        mesh=mesh,
        constants=jnp.ones(()),
        title="",
    )
    return found, rate


@pytest.mark.parametrize("batch", [1, 2, 5, 8])
def test_every_row_in_its_place(batch):
    rows = np.array([4, 0, 7, 9, 2])
    np.testing.assert_array_equal(run(rows, batch=batch)[0], 3 * rows + 1)


def test_rate_counts_every_row_after_the_first_batch(monkeypatch):
    """By a clock that is read at the start, after the first batch and at the end."""
    clock = SimpleNamespace(monotonic=itertools.count(0, 10).__next__)
    monkeypatch.setattr(infer, "time", clock)
    assert run(np.arange(5), batch=2)[1] == (2 + 1) / 10
    assert math.isnan(run(np.arange(5), batch=8)[1])


def test_a_program_is_traced_once_for_all_passes_of_one_form():
    traced = []

    def step(model, batch, constants):
        traced.append(model)
        return {"x": model.by[...] * batch["row_B"]}

    model, mesh = Scale(), make_mesh(MeshConfig())
    program = infer.make_step(step, nnx.graphdef(model), mesh)
    for by in (3.0, 4.0):
        model.by.set_value(jnp.full((), by))
        found, rows = np.zeros(4), np.arange(4)
        infer.run(model, program, rows, as_batch, {"x": found}, batch=2, mesh=mesh, title="")
        np.testing.assert_array_equal(found, by * rows)
    assert len(traced) == 1


def batches(count: int) -> list[dict[str, np.ndarray]]:
    return [{"row_B": np.full(2, n)} for n in range(count)]


def test_two_batches_are_in_flight_on_one_cpu_device_and_their_results_in_order():
    """Every odd batch but the first waits for the one after it."""
    ended = [threading.Event() for _ in range(6)]

    def answer(batch: dict[str, np.ndarray]) -> int:
        n = int(batch["row_B"][0])
        if n % 2 and n + 1 < len(ended):
            assert ended[n + 1].wait(10)
        ended[n].set()
        return n

    found = infer.in_flight(answer, batches(len(ended)), make_mesh(MeshConfig()))
    assert list(found) == list(range(len(ended)))


def test_programs_of_several_cpu_devices_are_asked_for_one_after_the_other():
    mesh = make_mesh(MeshConfig(data=2))
    threads = infer.in_flight(lambda batch: threading.get_ident(), batches(6), mesh)
    assert len(set(threads)) == 1


def test_no_batch_is_drawn_while_one_of_a_new_shape_compiles():
    """Its answer waits in vain for the next one."""
    drawn = [threading.Event() for _ in range(7)]

    def asked() -> Iterator[dict[str, np.ndarray]]:
        for n, size in enumerate((2, 2, 2, 3, 3, 3)):
            drawn[n].set()
            yield {"row_B": np.full(size, n)}

    def answer(batch: dict[str, np.ndarray]) -> bool:
        return drawn[int(batch["row_B"][0]) + 1].wait(0.2)

    found = list(infer.in_flight(answer, asked(), make_mesh(MeshConfig())))
    assert (found[0], found[3]) == (False, False)
