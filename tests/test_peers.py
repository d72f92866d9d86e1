"""Numerical parity with public PyTorch code: same weights, same batch, same logits and gradients.

`pytest -m peers`, with the extra `[peers]`. Each public configuration with its three data sets'
structure, in small: vocabularies, widths and lengths shrink, options stay.
"""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from noise import noisy, parts
from packed import pack_batch

from loopfm_jax.backbones import BackboneConfig, build
from loopfm_jax.backbones.config import SEQUENCE_BACKBONES
from loopfm_jax.bench.public import PUBLIC
from loopfm_jax.data.schema import Schema
from loopfm_jax.tables import TableConfig

pytestmark = pytest.mark.peers
B, E = 24, 8
TOLERANCE = {"float32": 1e-4, "float64": 1e-6}
EVERY = [(data, name) for data, public in PUBLIC.items() for name in public.models]
every_model = pytest.mark.parametrize(("data", "name"), EVERY, ids=[f"{n}-{d}" for d, n in EVERY])


@pytest.fixture(scope="module")
def peers():
    """The PyTorch side: (models, weights, features, torch)."""
    torch = pytest.importorskip("torch", reason="torch is missing: pip install -e .[dev,peers]")
    pytest.importorskip("fuxictr", reason="fuxictr is missing: pip install -e .[dev,peers]")
    from benchmarks.peers import features, models, weights

    torch.set_num_threads(1)
    return models, weights, features, torch


def shrink(schema: Schema) -> Schema:
    """The same fields with at most 12 ids, 7 events and 5 pretrained numbers."""
    fields = tuple(
        replace(
            f,
            rows=min(f.rows, 12),
            length=min(f.length, 7),
            frozen_width=min(f.frozen_width, 5),
        )
        for f in schema.fields
    )
    return replace(schema, fields=fields)


def small(config: BackboneConfig) -> BackboneConfig:
    """The same options, with few units and no randomness."""
    return replace(
        config,
        tables=TableConfig(width=E, row_multiple=1),
        hidden=(16, 12, 8),
        attention_hidden=(12, 6),
        position_width=min(config.position_width, 3),
        dropout=0.0,
        attention_dropout=0.0,
    )


def make_batch(schema: Schema, *, empty: bool) -> dict[str, Any]:
    """Features and labels, ids by field oldest first; empty: some examples have no events."""
    rng, ids, lengths = np.random.default_rng(0), {}, {}
    for f in (*schema.categorical, *schema.sequences):
        ids[f.name] = schema.offsets[f.name] + rng.integers(1, f.rows, (B, f.length))
        if f.kind == "sequence":
            # Histories of one behaviour have their events in common.
            group = next(b.history for b in schema.behaviours if f.name in b.history)
            real_B = lengths.setdefault(group, rng.integers(0 if empty else 1, f.length + 1, B))
            real = np.arange(f.length) >= f.length - real_B[:, None]
            ids[f.name] = np.where(real, ids[f.name], 0)
    return {
        "ids": ids,
        # What float32 can hold: FuxiCTR casts its inputs.
        "floats_BN": rng.normal(size=(B, len(schema.numeric))).astype(np.float32),
        "label_B": rng.integers(0, 2, B).astype(np.float64),
    }


def in_front(ids_BL: np.ndarray) -> np.ndarray:
    """Padding at the end."""
    return np.take_along_axis(ids_BL, np.argsort(ids_BL == 0, axis=1, kind="stable"), axis=1)


class Ours:
    """Our backbone filled with noise; everything in `dtype`."""

    def __init__(self, config: BackboneConfig, schema: Schema, dtype: str):
        def cast(x):
            return x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x

        kind = jnp.dtype(dtype)
        model = noisy(lambda rngs: build(config, schema, rngs=rngs, dtype=kind))
        self.graphdef, params, rest = parts(model)
        self.params, self.rest = jax.tree.map(cast, (params, rest))
        merged = nnx.merge(self.graphdef, self.params, self.rest)
        self.state = nnx.to_pure_dict(nnx.state(merged))
        self.dtype = dtype
        self.run = jax.jit(self._run, static_argnames="train")

    def _run(self, batch, *, train: bool):
        """Gradients of the mean cross-entropy, and the logits."""

        def loss(params):
            model = nnx.merge(self.graphdef, params, self.rest)
            features = batch | {"floats_BN": batch["floats_BN"].astype(self.dtype)}
            key = jax.random.key(0) if train else None
            logits_B = model(model.embed(features), key=key).logits_B
            return optax.sigmoid_binary_cross_entropy(logits_B, batch["label_B"]).mean(), logits_B

        grads, logits_B = jax.grad(loss, has_aux=True)(self.params)
        return grads, logits_B


def apart(a, b) -> float:
    """Largest difference, relative to the largest value or 1."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert a.shape == b.shape
    return float(np.abs(a - b).max() / max(1.0, np.abs(b).max()))


def compare(peers, data: str, name, batch, *, dtype: str, train: bool, ours: bool):
    """Differences of the logits, and of every gradient by name."""
    models, weights, features, torch = peers
    schema, config = shrink(PUBLIC[data].schema), small(PUBLIC[data].config(name))
    model = Ours(config, schema, dtype)
    twin = models.make(schema, config, ours=ours).to(getattr(torch, dtype)).train(train)
    weights.copy(model.state, twin, schema)
    packed = pack_batch(schema, batch["ids"], batch["floats_BN"]) | {"label_B": batch["label_B"]}
    grads, logits_B = model.run(packed, train=train)
    ids = batch["ids"]
    if name == "dien":  # the twin's recurrence wants padding behind; others count places from there
        ids = {n: in_front(x) for n, x in ids.items()}
    twin_B = twin(features.inputs(schema, ids, batch["floats_BN"]))
    label_B = torch.as_tensor(batch["label_B"]).to(twin_B.dtype)
    torch.nn.functional.binary_cross_entropy_with_logits(twin_B, label_B).backward()
    assert str(logits_B.dtype) == dtype and str(twin_B.dtype) == f"torch.{dtype}"
    assert np.abs(np.asarray(logits_B)).max() > 0.1
    slopes = {
        pair.name: apart(pair.read(grads), pair.tensor.grad)
        for pair in weights.pairs(twin, schema)
        if pair.tensor.requires_grad
    }
    return apart(logits_B, twin_B.detach()), slopes


@pytest.mark.parametrize("train", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("dtype", TOLERANCE)
@every_model
def test_same_weights_same_batch_same_logits_and_gradients(peers, data, name, dtype, train):
    """Our way, where it differs on purpose (benchmarks/peers/attention.py says where)."""
    batch = make_batch(shrink(PUBLIC[data].schema), empty=True)
    with jax.enable_x64(dtype == "float64"):
        logits, slopes = compare(peers, data, name, batch, dtype=dtype, train=train, ours=True)
    assert logits < TOLERANCE[dtype]
    wrong = {n: x for n, x in slopes.items() if not x < TOLERANCE[dtype]}
    assert not wrong


@pytest.mark.parametrize(("data", "name"), [(d, n) for d, n in EVERY if n in SEQUENCE_BACKBONES])
def test_the_public_way_differs_only_where_said(peers, data, name):
    """At inference, all examples with events, only DMIN's refiner (Amazon) is another model."""
    batch = make_batch(shrink(PUBLIC[data].schema), empty=False)
    logits, slopes = compare(peers, data, name, batch, dtype="float32", train=False, ours=False)
    same = max(logits, *slopes.values()) < TOLERANCE["float32"]
    assert same == (not PUBLIC[data].config(name).refiner)
