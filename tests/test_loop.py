"""The training loop: resume, bad losses, meshes. Models here are tiny or the tiny real ones."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from loopfm_jax import checkpoint, loop
from loopfm_jax.backbones import BackboneConfig, build
from loopfm_jax.curve import Curve
from loopfm_jax.data.batches import Batch, OrderConfig
from loopfm_jax.data.schema import Field, Schema
from loopfm_jax.errors import UserError
from loopfm_jax.optim import OptimConfig
from loopfm_jax.packing import WHOLE, Parts
from loopfm_jax.sharding import MeshConfig, make_mesh
from loopfm_jax.tables import Frozen, TableConfig

ROWS, WIDTH = 160, 4
FEATURES = np.random.default_rng(0).normal(size=(ROWS, WIDTH)).astype(np.float32)
LABEL = (FEATURES.sum(1) > 0).astype(np.float32)
ORDER = OrderConfig(order="shuffled", epochs=3, batch=16)
CONFIG = loop.TrainConfig(order=ORDER, checkpoint_steps=4)


class Noisy(nnx.Module):
    """A linear model whose loss draws randomness, with a running statistic."""

    def __init__(self, rngs: nnx.Rngs):
        self.linear = nnx.Linear(WIDTH, 1, rngs=rngs)
        self.norm = nnx.BatchNorm(WIDTH, rngs=rngs)


class Pretrained(nnx.Module):
    """A linear model of a table that is never trained."""

    def __init__(self, rngs: nnx.Rngs):
        self.linear = nnx.Linear(WIDTH, 1, rngs=rngs)
        self.frozen = nnx.Dict({"item": Frozen(jnp.zeros((100 * ROWS, WIDTH)))})


def pretrained_loss(model: Pretrained, batch: dict[str, jax.Array], _: Any, __: jax.Array) -> Any:
    logit_B = model.linear(model.frozen["item"][...][batch["item_B"]])[:, 0]
    value = jnp.mean(jnp.logaddexp(0, logit_B) - batch["y_B"] * logit_B)
    return value, {"logloss": value}


class Ctr(nnx.Module):
    """The tiny real model, its features drawn from its own tables."""

    def __init__(self, rngs: nnx.Rngs):
        schema = Schema((Field("user", 100), Field("item", 120)), item=("item",))
        config = BackboneConfig(hidden=(6,), dropout=0.2, tables=TableConfig(width=3))
        self.backbone = build(config, schema, rngs=rngs)


def ctr_loss(model: Ctr, batch: dict[str, jax.Array], _: Any, key: jax.Array) -> Any:
    logit_B = model.backbone(model.backbone.embed(batch), key=key).logits_B
    value = jnp.mean(jnp.logaddexp(0, logit_B) - batch["y_B"] * logit_B)
    return value, {"logloss": value}


def ctr_batch(rows: np.ndarray, _: Parts = WHOLE) -> Batch:
    ids = np.random.default_rng(1).integers([1, 101], [100, 220], (ROWS, 2)).astype(np.int32)
    floats_BN = np.zeros((len(rows), 0), np.float32)
    return {"ids_BF": ids[rows], "floats_BN": floats_BN, "events": {}, "y_B": LABEL[rows]}


def loss(model: Noisy, batch: dict[str, jax.Array], _: Any, key: jax.Array) -> Any:
    noise = 0.01 * jax.random.normal(key, batch["x_BX"].shape)
    logit_B = model.linear(model.norm(batch["x_BX"] + noise, use_running_average=False))[:, 0]
    value = jnp.mean(jnp.logaddexp(0, logit_B) - batch["y_B"] * logit_B)
    return value, {"logloss": value}


def assemble(rows: np.ndarray, _: Parts = WHOLE) -> Batch:
    return {"x_BX": FEATURES[rows], "y_B": LABEL[rows]}


def run(
    directory: Path,
    *,
    assemble=assemble,
    config=CONFIG,
    mesh=None,
    model=(Noisy, loss),
    pretrained=None,
) -> loop.Trained:
    return loop.train(
        loop.Trainable(*model),
        np.arange(ROWS),
        assemble,
        config=config,
        mesh=mesh or make_mesh(MeshConfig()),
        seed=3,
        directory=directory,
        pretrained=pretrained,
    )


def values(trained: loop.Trained) -> list[np.ndarray]:
    return [np.asarray(x) for x in jax.tree.leaves(nnx.to_pure_dict(nnx.state(trained.model)))]


@pytest.mark.parametrize("stop_at", [3, 13, 29])
def test_a_resumed_run_ends_bit_equal(tmp_path: Path, stop_at: int) -> None:
    whole = run(tmp_path / "whole")
    calls = iter(range(10**6))

    def dies(rows: np.ndarray, _: Parts = WHOLE) -> Batch:
        if next(calls) == stop_at:
            raise RuntimeError("killed")
        return assemble(rows)

    with pytest.raises(RuntimeError, match="killed"):
        run(tmp_path / "torn", assemble=dies)
    steps: list[int] = []

    def counts(rows: np.ndarray, _: Parts = WHOLE) -> Batch:
        steps.append(1)
        return assemble(rows)

    resumed = run(tmp_path / "torn", assemble=counts)
    for a, b in zip(values(whole), values(resumed), strict=True):
        np.testing.assert_array_equal(a, b)
    assert resumed.curve == whole.curve
    total = 3 * ROWS // ORDER.batch
    assert len(steps) <= total - (stop_at - 3) // CONFIG.checkpoint_steps * CONFIG.checkpoint_steps
    checkpoint.discard(tmp_path / "torn")
    assert not (tmp_path / "torn" / "checkpoints").exists()


def test_a_pretrained_table_is_no_part_of_checkpoints(tmp_path: Path) -> None:
    table_VE = np.random.default_rng(1).normal(size=(100 * ROWS, WIDTH)).astype(np.float32)
    how = {"model": (Pretrained, pretrained_loss), "pretrained": {"item": table_VE}}
    stop_at = ROWS

    def dies(rows: np.ndarray, _: Parts = WHOLE) -> Batch:
        nonlocal stop_at
        stop_at -= 1
        if not stop_at:
            raise RuntimeError("killed")
        return {"item_B": rows.astype(np.int32), "y_B": LABEL[rows]}

    whole, stop_at = run(tmp_path / "whole", assemble=dies, **how), 13
    with pytest.raises(RuntimeError, match="killed"):
        run(tmp_path / "torn", assemble=dies, **how)
    files = [f for f in (tmp_path / "torn" / "checkpoints").rglob("*") if f.is_file()]
    assert files and sum(f.stat().st_size for f in files) < table_VE.nbytes / 2
    resumed = run(tmp_path / "torn", assemble=dies, **how)
    for a, b in zip(values(whole), values(resumed), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("rule", ["adam", "rowwise_rms", "lazy_adam"])
def test_every_rule_of_tables_learns_and_resumes_on_any_mesh(tmp_path: Path, rule: str) -> None:
    config = replace(CONFIG, optim=OptimConfig(tables=rule, embedding_l2=1e-3, cooldown=0.5))
    how = {"config": config, "model": (Ctr, ctr_loss)}
    whole = run(tmp_path / "whole", assemble=ctr_batch, **how)
    assert whole.curve[-1]["logloss"] < whole.curve[0]["logloss"]
    calls = iter(range(10**6))

    def dies(rows: np.ndarray, _: Parts = WHOLE) -> Batch:
        if next(calls) == 17:
            raise RuntimeError("killed")
        return ctr_batch(rows)

    with pytest.raises(RuntimeError, match="killed"):
        run(tmp_path / "torn", assemble=dies, **how)
    resumed = run(tmp_path / "torn", assemble=ctr_batch, **how)
    for a, b in zip(values(whole), values(resumed), strict=True):
        np.testing.assert_array_equal(a, b)
    mesh = make_mesh(MeshConfig(4, 2))
    many = run(tmp_path / "many", assemble=ctr_batch, mesh=mesh, **how)
    for a, b in zip(values(whole), values(many), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_learns_and_reports(tmp_path: Path) -> None:
    config = replace(CONFIG, order=replace(ORDER, epochs=20))
    trained = run(tmp_path, config=config)
    assert trained.curve[-1]["logloss"] < trained.curve[0]["logloss"] - 0.03
    assert trained.params == WIDTH + 1 + 2 * WIDTH
    assert trained.measured["examples_per_s"] > 0
    assert 0 <= trained.measured["wait_share"] < 1


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    def poisoned(rows: np.ndarray, _: Parts = WHOLE) -> Batch:
        batch = assemble(rows)
        batch["x_BX"] = np.where(rows[:, None] == 7, np.nan, batch["x_BX"])
        return batch

    with pytest.raises(UserError, match="not finite at step"):
        run(tmp_path, assemble=poisoned)


def poisoned_slope(model: Noisy, batch: dict[str, jax.Array], _: Any, key: jax.Array) -> Any:
    """A root whose value is 0 and whose slope is not a number, at the seventh row."""
    value, numbers = loss(model, batch, _, key)
    weight = model.linear.kernel[...].sum()
    return value + jnp.sqrt(jnp.where(batch["poison_B"], 0 * weight, 1.0)).min(), numbers


@pytest.mark.parametrize("every", [1, 1000])
def test_a_gradient_that_is_not_finite_leaves_no_checkpoint_and_no_model(tmp_path, every):
    """Where the step after would find out, and where there is none after it."""

    def slopes(rows: np.ndarray, _: Parts = WHOLE) -> Batch:
        return assemble(rows) | {"poison_B": rows == ROWS - 1}

    order = replace(ORDER, order="time", epochs=1)  # the last step is the bad one
    config = replace(CONFIG, order=order, checkpoint_steps=every)
    with pytest.raises(UserError, match="parameters are not finite after step 10"):
        run(tmp_path, assemble=slopes, config=config, model=(Noisy, poisoned_slope))
    with pytest.raises(UserError, match="parameters are not finite after step 10"):
        run(tmp_path, assemble=slopes, config=config, model=(Noisy, poisoned_slope))


def test_what_a_checkpoint_holds_of_the_curve_stays_as_it_is():
    """It is written while the loop goes on."""
    curve = Curve(steps=600, batch=1, past=None)
    for n in range(95):
        curve.add(n, {"logloss": jnp.float32(n)})
    held = curve.flush()
    before = json.dumps(held)
    for n in range(95, 140):
        curve.add(n, {"logloss": jnp.float32(n)})
    curve.flush()
    assert json.dumps(held) == before


@pytest.mark.parametrize("shape", [(8, 1), (4, 2), (1, 8)])
def test_any_mesh_gives_the_same_answer(tmp_path: Path, shape: tuple[int, int]) -> None:
    one = run(tmp_path / "one")
    many = run(tmp_path / "many", mesh=make_mesh(MeshConfig(*shape)))
    for a, b in zip(values(one), values(many), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6)


def test_a_batch_must_divide_over_the_mesh(tmp_path: Path) -> None:
    config = replace(CONFIG, order=replace(ORDER, batch=10))
    with pytest.raises(UserError, match="batch of 10 .* mesh.data = 4"):
        run(tmp_path, config=config, mesh=make_mesh(MeshConfig(4, 2)))


def test_a_mesh_larger_than_the_machine_is_refused() -> None:
    with pytest.raises(UserError, match="needs 16 devices, but there are 8"):
        make_mesh(MeshConfig(8, 2))


def test_a_model_without_numeric_columns_is_saved_and_loaded(tmp_path: Path) -> None:
    schema = Schema((Field("user", 5), Field("item", 7)), item=("item",))

    def create(rngs: nnx.Rngs) -> nnx.Module:
        config = BackboneConfig(hidden=(4,), tables=TableConfig(width=2))
        return build(config, schema, rngs=rngs)

    model = create(nnx.Rngs(0))
    checkpoint.save_model(model, tmp_path)
    loaded = checkpoint.load_model(create, tmp_path, make_mesh(MeshConfig(4, 2)))
    for a, b in zip(
        jax.tree.leaves(nnx.state(model)), jax.tree.leaves(nnx.state(loaded)), strict=True
    ):
        assert a.size > 0
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_a_step_on_cpu_is_done_when_its_call_returns():
    """Or the next one would take temporaries of its own beside it."""
    batch = loop.put({"x_BW": np.ones((2000, 2000), np.float32)}, make_mesh(MeshConfig()))
    assert batch["x_BW"].is_ready()
    product = jax.jit(lambda x: x @ x @ x @ x).lower(batch["x_BW"]).compile()
    for _ in range(3):
        assert product(batch["x_BW"]).is_ready()
