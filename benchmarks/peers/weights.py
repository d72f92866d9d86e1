"""Which array of ours is which tensor of the twin: for copying weights and comparing gradients.

Every relation is linear (transpose, slice, sign), so it holds for gradients as it does for weights.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from fuxictr.pytorch.layers import Dice, MLP_Block
from torch import nn

from benchmarks.peers import attention, models
from loopfm_jax.data.schema import Field, Schema

Tree = Mapping[Any, Any]
Path = tuple[Any, ...]


@dataclass(frozen=True)
class Pair:
    """A tensor of the twin, and how it comes from arrays of ours."""

    name: str
    tensor: torch.Tensor
    paths: tuple[Path, ...]
    layout: Callable[..., np.ndarray]

    def read(self, tree: Tree) -> np.ndarray:
        """Our arrays of `tree` (weights or gradients) as the twin holds them."""
        arrays = []
        for path in self.paths:
            node: Any = tree
            for step in path:
                node = node[step]
            arrays.append(np.asarray(node))
        return self.layout(*arrays)


def copy(ours: Tree, twin: nn.Module, schema: Schema) -> None:
    """Gives the twin the weights, statistics and pretrained tables of `ours`, a whole state."""
    for pair in pairs(twin, schema):
        with torch.no_grad():
            pair.tensor.copy_(torch.tensor(pair.read(ours)))


def pairs(twin: nn.Module, schema: Schema) -> list[Pair]:
    """All of them; every parameter of the twin is there once."""
    found = list(_all(twin, schema))
    given = {id(p.tensor) for p in found}
    missing = [n for n, p in twin.named_parameters() if id(p) not in given]
    assert not missing and len(given) == len(found), missing
    return found


def _all(twin: Any, schema: Schema) -> Iterator[Pair]:
    sequence = isinstance(twin, models.Sequence)
    embedding = twin.embedding if sequence else twin.pooled.embedding.embedding_layer
    yield from _embedding(embedding, schema)
    if isinstance(twin, models.FM2 | models.DeepFM):
        yield from _first_order(twin.fm.lr_layer, schema)
    if isinstance(twin, models.FmFM):
        yield from _first_order(twin.first, schema)
        yield Pair("weight", twin.weight, (("pairs_PE",),), np.asarray)
    if isinstance(twin, models.DeepFM | models.Sequence):
        yield from _mlp(twin.dnn, ("dnn",))
    if isinstance(twin, models.DCNv2):
        yield from _mlp(twin.dnn, ("dnn",))
        for i, layer in enumerate(twin.cross.cross_layers):
            yield from _linear(layer, ("cross", i))
        kernels = (("cross_out", "kernel"), ("dnn", "out", "kernel"))
        yield Pair("out", twin.out.weight, kernels, lambda *k: np.concatenate(k).T)
        yield Pair("out bias", twin.out.bias, (("dnn", "out", "bias"),), np.asarray)
    if sequence:
        for i, interest in enumerate(twin.interests):
            yield from INTERESTS[type(interest)](interest, ("interests", i))
        for i, tables in enumerate(twin.second):
            target = schema.behaviours[i].target
            path = ("interests", i, "match", "table", "table", "rows_VE")
            yield from _second(tables, [schema[n] for n in target], path)


def _rows(start: int, count: int) -> Callable[[np.ndarray], np.ndarray]:
    """A field's rows of the fused table; local id 0 is padding, zeros there."""

    def layout(rows_VE: np.ndarray) -> np.ndarray:
        own = np.array(rows_VE[start : start + count])
        own[0] = 0
        return own

    return layout


def _embedding(layer: Any, schema: Schema) -> Iterator[Pair]:
    for f in schema.fields:
        table = layer.embedding_layers[f.name]
        if not f.shares:
            path = ("embedder", "frozen", f.name) if f.frozen_width else _TABLE
            start = 0 if f.frozen_width else schema.offsets[f.name]
            yield Pair(f.name, table.weight, (path,), _rows(start, f.rows))
        if f.frozen_width:
            linear = next(
                m for m in layer.feature_encoders[f.name].modules() if isinstance(m, nn.Linear)
            )
            yield from _linear(linear, ("embedder", "project", f.name))
    for i, n in enumerate(schema.numeric):
        weight, path = layer.embedding_layers[n.name].weight, ("embedder", "numeric_NE")
        yield Pair(n.name, weight, (path,), lambda x, i=i: x[i][:, None])


_TABLE = ("embedder", "table", "rows_VE")


def _first_order(layer: Any, schema: Schema) -> Iterator[Pair]:
    tables, start = layer.embedding_layer.embedding_layer.embedding_layers, 0
    path = ("first_order", "table", "table", "rows_VE")
    for f in (*schema.categorical, *schema.sequences):
        yield Pair(f"first {f.name}", tables[f.name].weight, (path,), _rows(start, f.rows))
        start += f.rows
    for i, n in enumerate(schema.numeric):
        weight, path = tables[n.name].weight, ("first_order", "numeric_N")
        yield Pair(f"first {n.name}", weight, (path,), lambda x, i=i: x[i][None, None])
    yield Pair("first bias", layer.bias, (("first_order", "bias"),), lambda x: x[None])


def _second(tables: Any, fields: list[Field], path: Path) -> Iterator[Pair]:
    start = 0
    for f, table in zip(fields, tables, strict=True):
        yield Pair(f"second {f.name}", table.weight, (path,), _rows(start, f.rows))
        start += f.rows


def _linear(layer: Any, path: Path) -> Iterator[Pair]:
    yield Pair(f"{path} kernel", layer.weight, ((*path, "kernel"),), np.transpose)
    if layer.bias is not None:
        yield Pair(f"{path} bias", layer.bias, ((*path, "bias"),), np.asarray)


def _norm(layer: Any, path: Path) -> Iterator[Pair]:
    names = {"weight": "scale", "bias": "bias", "running_mean": "mean", "running_var": "var"}
    for name, ours in names.items():
        tensor = getattr(layer, name, None)
        if tensor is not None:
            yield Pair(f"{path} {name}", tensor, ((*path, ours),), np.asarray)


def _mlp(block: MLP_Block, path: Path) -> Iterator[Pair]:
    layers = list(block.mlp)
    linears = [m for m in layers if isinstance(m, nn.Linear)]
    norms = [m for m in layers if isinstance(m, nn.BatchNorm1d)]
    if isinstance(layers[0], nn.BatchNorm1d):
        yield from _norm(norms.pop(0), (*path, "input_norm"))
    for i, norm in enumerate(norms):
        yield from _norm(norm, (*path, "norms", i))
    for i, dice in enumerate(m for m in layers if isinstance(m, Dice)):
        own = {"mean_W": dice.bn.running_mean, "variance_W": dice.bn.running_var}
        for name, tensor in {**own, "alpha_W": dice.alpha}.items():
            yield Pair(f"{path} {name}", tensor, ((*path, "dice", i, name),), np.asarray)
    if isinstance(layers[-1], nn.Linear):
        yield from _linear(linears.pop(), (*path, "out"))
    for i, linear in enumerate(linears):
        yield from _linear(linear, (*path, "layers", i))


def _din(din: Any, path: Path) -> Iterator[Pair]:
    yield from _mlp(din.attention.attention_layer, (*path, "scores", "mlp"))


def _dien(dien: Any, path: Path) -> Iterator[Pair]:
    yield from _mlp(dien.scores, (*path, "scores", "mlp"))
    yield from _linear(dien.input, (*path, "evolution", "input"))
    yield from _linear(dien.state, (*path, "evolution", "state"))
    for side, ours in (("ih", "input"), ("hh", "state")):
        for kind, name in (("weight", "kernel"), ("bias", "bias")):
            tensor = getattr(dien.extraction, f"{kind}_{side}_l0")
            yield Pair(
                f"{path} {kind}_{side}", tensor, ((*path, "extraction", ours, name),), _torch_gates
            )


def _torch_gates(ours: np.ndarray) -> np.ndarray:
    """Gates u, r, n side by side -> torch's r, z, n, where z = 1 - u."""
    u, r, n = np.split(ours.T, 3)
    return np.concatenate([r, -u, n])


def _query(positions: torch.Tensor, query: nn.Linear, path: Path) -> Iterator[Pair]:
    yield Pair(f"{path} positions", positions, ((*path, "position_LP"),), np.asarray)
    yield from _linear(query, (*path, "project"))


def _dmr(dmr: Any, path: Path) -> Iterator[Pair]:
    yield from _query(dmr.positions, dmr.query[0], (*path, "query"))
    yield from _mlp(dmr.scores, (*path, "scores", "mlp"))
    if dmr.match is not None:
        path = (*path, "match")
        yield Pair("u2i positions", dmr.match.positions, ((*path, "position_LP"),), np.asarray)
        yield from _linear(dmr.match.query[0], (*path, "query"))
        yield from _mlp(dmr.match.scores, (*path, "scores", "mlp"))
        yield from _linear(dmr.match.user[0], (*path, "user"))


def _forward(net: Any, path: Path) -> Iterator[Pair]:
    yield from _norm(net.norm, (*path, "norm"))
    yield from _linear(net.up, (*path, "up"))
    yield from _linear(net.down, (*path, "down"))


def _dmin(dmin: Any, path: Path) -> Iterator[Pair]:
    if dmin.refiner is not None and dmin.refined is not None:
        qkv, whole = (*path, "refiner", "qkv"), dmin.refiner
        yield Pair("refiner kernel", whole.in_proj_weight, ((*qkv, "kernel"),), np.transpose)
        yield Pair("refiner bias", whole.in_proj_bias, ((*qkv, "bias"),), np.asarray)
        yield from _linear(whole.out_proj, (*path, "refiner", "out"))
        yield from _forward(dmin.refined, (*path, "refiner", "forward"))
    yield from _linear(dmin.qkv, (*path, "qkv"))
    for i, head in enumerate(dmin.interests):
        own = (*path, "heads", i)
        yield from _linear(head.out, (*own, "out"))
        yield from _forward(head.forward_net, (*own, "forward"))
        if head.query is not None and head.positions is not None:
            yield from _query(head.positions, head.query, (*own, "query"))
        yield from _mlp(head.scores, (*own, "scores", "mlp"))


INTERESTS = {
    attention.DIN: _din,
    attention.DIEN: _dien,
    attention.DMR: _dmr,
    attention.DMIN: _dmin,
}
