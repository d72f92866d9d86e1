"""What steps are given, as shapes: batches as the input pipelines make them, stores, states."""

import re
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from loopfm_jax import sharding
from loopfm_jax.data.schema import Schema
from loopfm_jax.history.codes import Codec
from loopfm_jax.history.reader import Entries, Past
from loopfm_jax.packing import budget
from loopfm_jax.tables import blank


def place(tree: Any, shardings: Any) -> Any:
    """Shapes with where they lie; one sharding, or one for every leaf."""
    if not isinstance(shardings, jax.sharding.Sharding):
        return jax.tree.map(_at, tree, shardings)
    return jax.tree.map(lambda x: _at(x, shardings), tree)


def _at(x: Any, where: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(np.shape(x), x.dtype, sharding=where)


def batch(schema: Schema, mesh: Mesh, *, examples: int, fill: float, longest: int = 0) -> Any:
    """A batch of `fm.train.Lessons`, or of `vm.train.Examples` if histories have a `longest`.

    Args:
      fill: mean share of a sequence's or history's longest length.
    """
    grow = partial(_grown, examples=examples, parts=mesh.shape["data"])
    one: dict[str, Any] = blank(schema) | {
        "label_B": np.zeros(1, np.float32),
        "weight_B": np.zeros(1, np.float32),
    }
    events = {
        group: grow(x, slots=_slots(examples, schema[group].length, fill, mesh))
        for group, x in one.pop("events").items()
    }
    found = grow(one, slots=0) | {"events": events}
    if longest:
        number = np.zeros(1, np.int32)
        part = {"end_B": number, "length_B": number, "slot_PS": np.zeros((1, 1), np.uint8)}
        part = grow(part, slots=_slots(examples, longest, fill, mesh))
        found |= {"slices": {"key": part}} | grow({"seconds_B": number}, slots=0)
    return place(found, sharding.split(mesh, "examples"))


def _slots(examples: int, longest: int, fill: float, mesh: Mesh) -> int:
    """The token budget of a batch whose lengths are all alike."""
    lengths = np.full(examples, round(fill * longest))
    return budget(lengths, longest=longest, parts=mesh.shape["data"])


def _grown(
    tree: Mapping[str, Any], *, examples: int, slots: int, parts: int
) -> dict[str, jax.ShapeDtypeStruct]:
    """What the first axes of an array count is in its name: examples, or parts and their slots."""

    def grow(path: Any, x: np.ndarray) -> jax.ShapeDtypeStruct:
        if re.search(r"_PS[A-Z]*$", str(path[-1].key)):
            return jax.ShapeDtypeStruct((parts, slots // parts, *x.shape[2:]), x.dtype)
        return jax.ShapeDtypeStruct((examples, *x.shape[1:]), x.dtype)

    return dict(jax.tree.map_with_path(grow, tree))


def past(codec: Codec, mesh: Mesh, *, entries: int, longest: int, timed: bool) -> Past:
    """A store on the devices, split over `data`, read for its codes."""
    shards = mesh.shape["data"]
    rows = -(-entries // shards) * shards
    stored: Any = jax.ShapeDtypeStruct((rows, codec.columns), jnp.dtype(codec.dtype))
    seconds: Any = jax.ShapeDtypeStruct((rows,), jnp.int32) if timed else None
    read = Entries({"hidden_0": stored}, None, seconds, None, None, longest, split=shards > 1)
    return Past({"key": place(read, sharding.split(mesh, "entries"))}, {"hidden_0": codec})
