"""The eight backbones as PyTorch modules: inputs by feature name -> logits [B]."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from fuxictr.pytorch.layers import (
    CrossNetV2,
    FactorizationMachine,
    FeatureEmbedding,
    FeatureEmbeddingDict,
    LogisticRegression,
    MLP_Block,
)
from torch import Tensor, nn

from benchmarks.peers import attention
from benchmarks.peers.features import Inputs, feature_map
from loopfm_jax.data.schema import Behaviour, Schema

if TYPE_CHECKING:  # a timed peer runs without JAX
    from loopfm_jax.backbones import BackboneConfig

INTERESTS = {
    "din": attention.DIN,
    "dien": attention.DIEN,
    "dmr": attention.DMR,
    "dmin": attention.DMIN,
}


def make(schema: Schema, config: BackboneConfig, *, ours: bool = True) -> nn.Module:
    """The twin of `build(config, schema)`; `ours` as in `attention`."""
    if config.name in INTERESTS:
        return Sequence(schema, config, ours=ours)
    return {"fm2": FM2, "fmfm": FmFM, "deepfm": DeepFM, "dcnv2": DCNv2}[config.name](schema, config)


def dnn(config: BackboneConfig, width_in: int, *, output_dim: int | None = 1) -> MLP_Block:
    return MLP_Block(
        width_in,
        hidden_units=list(config.hidden),
        hidden_activations=config.activation,
        output_dim=output_dim,
        dropout_rates=config.dropout,
        batch_norm=config.norm != "none",
        bn_only_once=config.norm == "input",
    )


def freeze(layer: FeatureEmbeddingDict, schema: Schema) -> FeatureEmbeddingDict:
    """With its pretrained tables frozen."""
    for f in schema.fields:
        if f.frozen_width:
            layer.embedding_layers[f.name].weight.requires_grad_(False)
    return any_float(layer)


def any_float(tables: nn.Module) -> Any:
    """FuxiCTR casts numeric inputs to float32; here they follow the weights' type."""
    for layer in tables.modules():
        if isinstance(layer, nn.Linear) and layer.in_features == 1:
            layer.register_forward_pre_hook(lambda m, x: (x[0].to(m.weight.dtype),))
    return tables


class Pooled(nn.Module):
    """What models without attention start from: all fields [B,F,E], sequences as their means."""

    def __init__(self, schema: Schema, width: int):
        super().__init__()
        self.map = feature_map(schema, width, pooled=[f.name for f in schema.sequences])
        self.embedding = FeatureEmbedding(self.map, width)
        freeze(self.embedding.embedding_layer, schema)

    def forward(self, inputs: Inputs) -> Tensor:
        return self.embedding(inputs)


class FM2(nn.Module):
    def __init__(self, schema: Schema, config: BackboneConfig):
        super().__init__()
        self.pooled = Pooled(schema, config.tables.width)
        self.fm = any_float(FactorizationMachine(self.pooled.map))

    def forward(self, inputs: Inputs) -> Tensor:
        return self.fm(inputs, self.pooled(inputs))[:, 0]


class FmFM(nn.Module):
    pairs: Tensor

    def __init__(self, schema: Schema, config: BackboneConfig):
        super().__init__()
        width = config.tables.width
        self.pooled = Pooled(schema, width)
        self.first = any_float(LogisticRegression(self.pooled.map))
        count = self.pooled.map.num_fields
        self.register_buffer("pairs", torch.triu_indices(count, count, offset=1))
        sizes = [width] * (1 if config.pair == "vector" else 2)
        self.weight = nn.Parameter(torch.empty(self.pairs.shape[1], *sizes))
        nn.init.xavier_normal_(self.weight)

    def forward(self, inputs: Inputs) -> Tensor:
        fields_BFE = self.pooled(inputs)
        left_BPE, right_BPE = fields_BFE[:, self.pairs[0]], fields_BFE[:, self.pairs[1]]
        if self.weight.ndim == 2:
            left_BPE = left_BPE * self.weight
        else:
            left_BPE = (left_BPE[:, :, None] @ self.weight)[:, :, 0]
        return (left_BPE * right_BPE).sum(dim=(1, 2)) + self.first(inputs)[:, 0]


class DeepFM(nn.Module):
    def __init__(self, schema: Schema, config: BackboneConfig):
        super().__init__()
        self.pooled = Pooled(schema, config.tables.width)
        self.fm = any_float(FactorizationMachine(self.pooled.map))
        self.dnn = dnn(config, self.pooled.map.num_fields * config.tables.width)

    def forward(self, inputs: Inputs) -> Tensor:
        fields_BFE = self.pooled(inputs)
        return (self.fm(inputs, fields_BFE) + self.dnn(fields_BFE.flatten(1)))[:, 0]


class DCNv2(nn.Module):
    def __init__(self, schema: Schema, config: BackboneConfig):
        super().__init__()
        self.pooled = Pooled(schema, config.tables.width)
        width = self.pooled.map.num_fields * config.tables.width
        self.cross = CrossNetV2(width, config.cross_layers)
        self.dnn = dnn(config, width, output_dim=None)
        self.out = nn.Linear(width + config.hidden[-1], 1)

    def forward(self, inputs: Inputs) -> Tensor:
        flat_BX = self.pooled(inputs).flatten(1)
        return self.out(torch.cat([self.cross(flat_BX), self.dnn(flat_BX)], dim=-1))[:, 0]


class Sequence(nn.Module):
    """DIN, DIEN, DMR, DMIN: an interest per behaviour, all other fields, a DNN."""

    def __init__(self, schema: Schema, config: BackboneConfig, *, ours: bool):
        super().__init__()
        width, self.behaviours = config.tables.width, schema.behaviours
        past = {name for pair in schema.behaviours for name in pair.history}
        self.fields = [
            x.name
            for x in (*schema.categorical, *schema.numeric, *schema.sequences)
            if x.name not in past
        ]
        pooled = [f.name for f in schema.sequences if f.name not in past]
        features = feature_map(schema, width, pooled=pooled)
        self.embedding = freeze(FeatureEmbeddingDict(features, width), schema)
        kind = INTERESTS[config.name]
        interests = [
            kind(config, width * len(pair.target), schema[pair.history[0]].length, ours=ours)
            for pair in self.behaviours
        ]
        self.interests = nn.ModuleList(interests)
        self.second = nn.ModuleList()
        if config.u2i:
            self.second.extend(_second_tables(schema, pair, width) for pair in self.behaviours)
        inputs = sum(i.width for i in interests) + width * len(self.fields)
        self.dnn = dnn(config, inputs)
        self.asks = config.name == "dmr"

    def forward(self, inputs: Inputs) -> Tensor:
        embedded = self.embedding(inputs)
        parts = []
        for i, (pair, interest) in enumerate(zip(self.behaviours, self.interests, strict=True)):
            target_BM = torch.cat([embedded[n] for n in pair.target], dim=-1)
            events_BLM = torch.cat([embedded[n] for n in pair.history], dim=-1)
            more = [self._candidate(inputs, pair, i)] if self.asks else []
            parts.append(interest(target_BM, events_BLM, inputs[pair.history[0]] > 0, *more))
        parts.extend(embedded[name] for name in self.fields)
        return self.dnn(torch.cat(parts, dim=-1))[:, 0]

    def _candidate(self, inputs: Inputs, pair: Behaviour, i: int) -> Tensor | None:
        if not self.second:
            return None
        tables: Any = self.second[i]
        found = [table(inputs[n]) for n, table in zip(pair.target, tables, strict=True)]
        return torch.cat(found, dim=-1)


def _second_tables(schema: Schema, pair: Behaviour, width: int) -> nn.ModuleList:
    return nn.ModuleList(nn.Embedding(schema[n].rows, width, padding_idx=0) for n in pair.target)
