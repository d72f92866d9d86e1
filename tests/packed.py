"""Padded sequences, as people write them down, as the packed batch that models take."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from loopfm_jax.data.schema import Schema


def pack_batch(
    schema: Schema,
    ids: Mapping[str, np.ndarray],
    floats_BN: np.ndarray,
    *,
    spare: int | Mapping[str, int] = 3,
) -> dict[str, Any]:
    """Fused ids by field, [B,1] or [B,L] oldest first with 0 as padding -> a batch.

    `spare` unreal slots follow the real ones, in every group or by group.
    """
    events = {}
    for group, names in schema.groups.items():
        real_BL = np.any([ids[n] > 0 for n in names], axis=0)
        rows = [np.stack([ids[n][b][r][::-1] for n in names], 1) for b, r in enumerate(real_BL)]
        unreal = spare if isinstance(spare, int) else spare[group]
        ids_TG = np.concatenate([*rows, np.zeros((unreal, len(names)))])
        length_B = real_BL.sum(axis=1).astype(np.int32)
        events[group] = {"ids_PSG": ids_TG[None].astype(np.int32), "length_B": length_B}
    return {
        "ids_BF": np.concatenate([ids[f.name] for f in schema.categorical], 1).astype(np.int32),
        "floats_BN": np.asarray(floats_BN, np.float32),
        "events": events,
    }
