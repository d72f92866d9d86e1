"""A schema and its batches as FuxiCTR has them: a feature map, local ids by feature name."""

from collections.abc import Collection, Mapping

import numpy as np
import torch
from fuxictr.features import FeatureMap

from loopfm_jax.data.schema import Field, Schema

Inputs = dict[str, torch.Tensor]


def feature_map(schema: Schema, width: int, *, pooled: Collection[str]) -> FeatureMap:
    """Features in the order categorical, numeric, sequences; those in `pooled` become means.

    Pretrained tables are ordinary ones here, before the projection of their field; whoever builds
    the embedding layer freezes them.
    """
    features = FeatureMap("peer", data_dir=".")
    features.default_emb_dim = width
    for f in schema.categorical:
        features.features[f.name] = _table(f) | _encoders(_projection(f, width))
    for n in schema.numeric:
        features.features[n.name] = {"type": "numeric"}
    for f in schema.sequences:
        mean = ["layers.MaskedAveragePooling()"] if f.name in pooled else []
        encoders = _encoders(mean + _projection(f, width))
        features.features[f.name] = _table(f) | encoders | {"type": "sequence", "max_len": f.length}
    features.num_fields = features.get_num_fields()
    return features


def _table(f: Field) -> dict:
    shared = {"share_embedding": f.shares} if f.shares else {}
    size = {"embedding_dim": f.frozen_width} if f.frozen_width else {}
    return {"type": "categorical", "vocab_size": f.rows, "padding_idx": 0} | shared | size


def _projection(f: Field, width: int) -> list[str]:
    return [f"nn.Linear({f.frozen_width}, {width}, bias=False)"] if f.frozen_width else []


def _encoders(encoders: list[str]) -> dict:
    return {"feature_encoder": encoders} if encoders else {}


def inputs(schema: Schema, ids: Mapping[str, np.ndarray], floats_BN: np.ndarray) -> Inputs:
    """Fused ids by field, [B,1] or padded [B,L], as tensors by feature name, ids local."""
    found = {}
    for f in schema.fields:
        local = np.where(ids[f.name] > 0, ids[f.name] - schema.offsets[f.name], 0)
        tensor = torch.as_tensor(local).long()
        found[f.name] = tensor[:, 0] if f.kind == "categorical" else tensor
    for i, n in enumerate(schema.numeric):
        found[n.name] = torch.as_tensor(floats_BN[:, i])
    return {n: found[n] for n in _order(schema)}


def _order(schema: Schema) -> list[str]:
    return [x.name for x in (*schema.categorical, *schema.numeric, *schema.sequences)]
