"""Rows of a table that is split over all devices: asked for where examples lie, answered where the
rows lie.

Of every row that its examples look up a device asks once, and of its owner alone; a gradient goes
back the same way. What travels is a few times the looked-up rows and never of a table's size. Sizes
must be known to the compiler and owners are not asked evenly, so a device sends to each owner its
share of the lookups, again and again until the longest list is through.

n lookups of a device, R rows of a table that it owns, D devices.
"""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from loopfm_jax import sharding
from loopfm_jax.sharding import ALL

ROWS, IDS = PartitionSpec(ALL, None), PartitionSpec("data")
OWN = PartitionSpec(ALL)
"""What every device has of its own."""


class Wanted(NamedTuple):
    """What a device asks for."""

    ids_n: jax.Array
    """Every row once, ascending, then a number that is no row's."""
    place_n: jax.Array
    """Where among them a lookup's row stands; n for padding, which nobody is asked for."""


def applies(rows_VE: jax.Array, ids: Sequence[jax.Array]) -> bool:
    """Whether the step that is being traced has a table split so (`sharding.RULES`)."""
    devices, batches = sharding.devices(), jax.sharding.get_abstract_mesh().shape.get("data", 1)
    return devices > 1 and not (len(rows_VE) % devices or any(len(i) % batches for i in ids))


@jax.custom_vjp
def look_up(rows_VE: jax.Array, ids: list[jax.Array]) -> list[jax.Array]:
    """Ids [X, ...], X split over `data` -> their rows [X, ..., E], split alike; padding gives
    zeros. Differentiable by the table."""
    return _forward(rows_VE, ids)[0]


def _forward(rows_VE: jax.Array, ids: list[jax.Array]) -> tuple[list[jax.Array], Any]:
    def ask(rows_RE: jax.Array, ids: list[jax.Array]) -> tuple[list[jax.Array], Wanted]:
        wanted = sort(_own_share(ids), none=len(rows_VE))
        found_nE = _fetch(rows_RE, wanted.ids_n)
        row_nE = found_nE.at[wanted.place_n].get(mode="fill", fill_value=0)
        return _all_shares(row_nE, ids), wanted

    run = _on_every_device(ask, (ROWS, IDS), (IDS, OWN))
    rows, wanted = run(rows_VE, ids)
    return rows, (wanted, rows_VE)


def _backward(kept: Any, gradients: list[jax.Array]) -> tuple[jax.Array, None]:
    wanted, rows_VE = kept
    devices = sharding.devices()

    def give(wanted: Wanted, gradients: list[jax.Array]) -> jax.Array:
        by_lookup_nE = _own_share(gradients, inner=1)
        by_row_nE = jnp.zeros_like(by_lookup_nE).at[wanted.place_n].add(by_lookup_nE, mode="drop")
        shard = jnp.zeros((len(rows_VE) // devices, rows_VE.shape[1]), rows_VE.dtype)
        return _give(shard, wanted.ids_n, by_row_nE)

    run = _on_every_device(give, (OWN, IDS), ROWS)
    return run(wanted, gradients), None


look_up.defvjp(_forward, _backward)


def _on_every_device(f: Callable[..., Any], given: Any, found: Any) -> Callable[..., Any]:
    return jax.shard_map(f, in_specs=given, out_specs=found, check_vma=False)


def sort(ids_n: jax.Array, *, none: int) -> Wanted:
    """Every id once; `none` fills up."""
    order_n = jnp.argsort(ids_n)
    sorted_n = ids_n[order_n]
    new_n = (sorted_n > 0) & (sorted_n != jnp.roll(sorted_n, 1).at[0].set(0))
    rank_n = jnp.cumsum(new_n) - 1
    first_n = jnp.where(new_n, rank_n, len(ids_n))
    once_n = jnp.full_like(ids_n, none).at[first_n].set(sorted_n, mode="drop")
    place_n = jnp.where(sorted_n > 0, rank_n, len(ids_n)).astype(jnp.int32)
    return Wanted(once_n, jnp.zeros_like(place_n).at[order_n].set(place_n))


class _Rounds:
    """Who is sent what in which round, known before the first."""

    def __init__(self, ids_n: jax.Array, rows: int):
        self.devices, self.ids_n, self.rows = sharding.devices(), ids_n, rows
        self.size = -(-len(ids_n) // self.devices)
        bounds = rows * jnp.arange(self.devices + 1, dtype=ids_n.dtype)
        stops = jnp.searchsorted(ids_n, bounds).astype(jnp.int32)
        self.start_D, self.stop_D = stops[:-1], stops[1:]
        longest = jnp.max(self.stop_D - self.start_D)
        self.count = jax.lax.pmax(-(-longest // self.size), ALL)

    def at(self, number: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Places among the ids, n where a list is through, and the owners' row numbers; [D,C]."""
        place_DC = self.start_D[:, None] + number * self.size + jnp.arange(self.size)[None]
        open_DC = place_DC < self.stop_D[:, None]
        place_DC = jnp.where(open_DC, place_DC, len(self.ids_n))
        first_D1 = self.rows * jnp.arange(self.devices, dtype=self.ids_n.dtype)[:, None]
        row_DC = self.ids_n.at[place_DC].get(mode="fill", fill_value=0) - first_D1
        return place_DC, jnp.where(open_DC, row_DC, self.rows)

    def run(self, one: Callable[..., jax.Array], start: jax.Array) -> jax.Array:
        """`one(places, rows, so far)` for every round."""
        body = lambda number, so_far: one(*self.at(number), so_far)  # noqa: E731
        return jax.lax.fori_loop(0, self.count, body, start)


def _fetch(rows_RE: jax.Array, ids_n: jax.Array) -> jax.Array:
    """The rows of ids that ascend, [n,E]; zeros for what is no row."""
    rounds = _Rounds(ids_n, len(rows_RE))

    def one(place_DC: jax.Array, row_DC: jax.Array, found_nE: jax.Array) -> jax.Array:
        asked_DC = _swap(row_DC)
        answer_DCE = _swap(rows_RE.at[asked_DC].get(mode="fill", fill_value=0))
        return found_nE.at[place_DC].set(answer_DCE, mode="drop")

    return rounds.run(one, jnp.zeros((len(ids_n), rows_RE.shape[1]), rows_RE.dtype))


def _give(shard_RE: jax.Array, ids_n: jax.Array, gradient_nE: jax.Array) -> jax.Array:
    """The owners' rows plus what all devices have for them."""
    rounds = _Rounds(ids_n, len(shard_RE))

    def one(place_DC: jax.Array, row_DC: jax.Array, shard_RE: jax.Array) -> jax.Array:
        sent_DCE = gradient_nE.at[place_DC].get(mode="fill", fill_value=0)
        return shard_RE.at[_swap(row_DC)].add(_swap(sent_DCE), mode="drop")

    return rounds.run(one, shard_RE)


_swap = partial(jax.lax.all_to_all, axis_name=ALL, split_axis=0, concat_axis=0)


def _own_share(parts: Sequence[jax.Array], *, inner: int = 0) -> jax.Array:
    """All of a data shard as one column [n, ..], of which every device of `model` takes a part."""
    column = jnp.concatenate([x.reshape(-1, *x.shape[x.ndim - inner :]) for x in parts])
    model = jax.lax.axis_size("model")
    if model == 1:
        return column
    column = jnp.pad(column, [(0, -len(column) % model)] + [(0, 0)] * inner)
    share = len(column) // model
    return jax.lax.dynamic_slice_in_dim(column, share * jax.lax.axis_index("model"), share)


def _all_shares(row_nE: jax.Array, ids: Sequence[jax.Array]) -> list[jax.Array]:
    """What `_own_share` took apart, as the ids were."""
    if jax.lax.axis_size("model") > 1:
        row_nE = jax.lax.all_gather(row_nE, "model", tiled=True)
    stops = list(accumulate(i.size for i in ids))
    parts = jnp.split(row_nE[: stops[-1]], stops[:-1])
    return [part.reshape(*i.shape, -1) for part, i in zip(parts, ids, strict=True)]
