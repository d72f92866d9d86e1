"""Running a model over rows: every result in its place, and a rate without compiling."""

import itertools
import math
import threading
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from loopfm_jax import infer
from loopfm_jax.sharding import MeshConfig, make_mesh


class Scale(nnx.Module):
    dtype = "float32"

    def __init__(self):
        self.by = nnx.Param(jnp.full((), 3.0))


def as_batch(rows: np.ndarray, parts: object) -> dict[str, np.ndarray]:
    return {"row_B": rows.astype(np.float32)}


def run(rows: np.ndarray, *, batch: int) -> tuple[np.ndarray, float]:
    found, model, mesh = np.full(len(rows), -1.0), Scale(), make_mesh(MeshConfig())
    step = infer.make_step(
        lambda model, batch, constants: {"x": model.by[...] * batch["row_B"] + constants},
        model,
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
    program = infer.make_step(step, model, mesh)
    for by in (3.0, 4.0):
        model.by.set_value(jnp.full((), by))
        found, rows = np.zeros(4), np.arange(4)
        infer.run(model, program, rows, as_batch, {"x": found}, batch=2, mesh=mesh, title="")
        np.testing.assert_array_equal(found, by * rows)
    assert len(traced) == 1


def batches(count: int) -> list[dict[str, np.ndarray]]:
    return [{"row_B": np.full(2, n)} for n in range(count)]


def test_a_batch_is_answered_while_the_caller_reads_the_one_before():
    ended = [threading.Event() for _ in range(6)]

    def answer(batch: dict[str, np.ndarray]) -> int:
        n = int(batch["row_B"][0])
        ended[n].set()
        return n

    read = []
    for n in infer.in_flight(answer, batches(len(ended))):
        assert all(event.wait(10) for event in ended[n + 1 : n + 2])
        read.append(n)
    assert read == list(range(len(ended)))


def test_two_threads_answer_side_by_side_and_their_results_are_in_order():
    """Every odd batch waits for the one after it."""
    ended = [threading.Event() for _ in range(6)]

    def answer(batch: dict[str, np.ndarray]) -> int:
        n = int(batch["row_B"][0])
        if n % 2 and n + 1 < len(ended):
            assert ended[n + 1].wait(10)
        ended[n].set()
        return n

    assert list(infer.in_flight(answer, batches(6), threads=2)) == list(range(6))


def test_a_batch_of_new_shapes_is_answered_before_the_next_is_asked():
    """Or two threads would compile the same program."""
    second = threading.Event()

    def answer(batch: dict[str, np.ndarray]) -> bool:
        if batch["row_B"][0]:
            second.set()
        return second.wait(0.1)

    assert list(infer.in_flight(answer, batches(2), threads=2)) == [False, True]


def test_programs_are_asked_for_by_one_thread_apart():
    threads = set(infer.in_flight(lambda batch: threading.get_ident(), batches(6)))
    assert len(threads) == 1 and threading.get_ident() not in threads


@pytest.mark.parametrize(
    ("devices", "platform", "batch", "programs"),
    [
        (1, "cpu", infer.HALVED, 2),
        (1, "cpu", infer.HALVED - 1, 1),
        (1, "tpu", infer.HALVED, 1),
        (8, "cpu", infer.HALVED, 1),  # they wait for each other within, two might crosswise
    ],
)
def test_halves_of_a_large_batch_where_one_cpu_device_answers(devices, platform, batch, programs):
    on = SimpleNamespace(flat=[SimpleNamespace(platform=platform)])
    mesh: Any = SimpleNamespace(size=devices, devices=on)
    assert infer.programs_of(batch, mesh) == programs


def test_halves_are_what_a_program_answers(monkeypatch):
    monkeypatch.setattr(infer, "HALVED", 8)
    seen = []

    def assemble(rows: np.ndarray, parts: object) -> dict[str, np.ndarray]:
        seen.append(rows.tolist())
        return as_batch(rows, parts)

    rows, found = np.arange(20), np.full(20, -1.0)
    model, mesh = Scale(), make_mesh(MeshConfig())
    program = infer.make_step(
        lambda model, batch, constants: {"x": model.by[...] * batch["row_B"]}, model, mesh
    )
    infer.run(model, program, rows, assemble, {"x": found}, batch=8, mesh=mesh, title="")
    np.testing.assert_array_equal(found, 3 * rows)
    assert sorted(seen) == [[n, n + 1, n + 2, n + 3] for n in range(0, 20, 4)]
