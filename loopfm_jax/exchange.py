"""Rows of a table that is split over all devices: asked for where examples lie, answered where the
rows lie.

Of every row that its examples look up a device asks once, and of its owner alone; a gradient goes
back the same way. What travels is a few times the looked-up rows and never of a table's size. Sizes
must be known to the compiler and owners are not asked evenly, so a device sends to each owner its
share of the lookups, again and again until the longest list is through. All that devices have for
one row arrives in one pass.

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
SORTED: dict[str, Any] = {"mode": "drop", "indices_are_sorted": True}
"""Of a scatter: accelerators sort before they scatter, unless they are told that it was done."""


class Wanted(NamedTuple):
    """What a device asks for."""

    ids_n: jax.Array
    """Every row once, ascending, then a number that is no row's."""
    place_n: jax.Array
    """Where among them a lookup's row stands; n for padding, which nobody is asked for."""
    order_n: jax.Array
    """Lookups in the order of these places."""


def applies(rows_VE: jax.Array, ids: Sequence[jax.Array]) -> bool:
    """Whether the step that is being traced has a table split so (`sharding.RULES`)."""
    devices, batches = sharding.devices(), jax.sharding.get_abstract_mesh().shape.get("data", 1)
    return devices > 1 and not (len(rows_VE) % devices or any(len(i) % batches for i in ids))


@jax.custom_vjp
def look_up(rows_VE: jax.Array, ids: list[jax.Array]) -> list[jax.Array]:
    """Ids [X, ...], X split over `data` -> their rows [X, ..., E], split alike; padding gives
    zeros. Differentiable by the table."""
    return _forward(rows_VE, ids)[0]


def fetch(rows_VE: jax.Array, ids: list[jax.Array]) -> tuple[list[jax.Array], Wanted]:
    """As `look_up`, and who was asked for what, for `learn`."""

    def ask(rows_RE: jax.Array, ids: list[jax.Array]) -> tuple[list[jax.Array], Wanted]:
        wanted = sort(_own_share(ids), none=len(rows_VE))
        found_nE = _fetch(rows_RE, wanted.ids_n)
        row_nE = found_nE.at[wanted.place_n].get(mode="fill", fill_value=0)
        return _all_shares(row_nE, ids), wanted

    return _on_every_device(ask, (ROWS, IDS), (IDS, OWN))(rows_VE, ids)


def _forward(rows_VE: jax.Array, ids: list[jax.Array]) -> tuple[list[jax.Array], Any]:
    rows, wanted = fetch(rows_VE, ids)
    return rows, (wanted, rows_VE)


def _backward(kept: Any, gradients: list[jax.Array]) -> tuple[jax.Array, None]:
    wanted, rows_VE = kept
    devices = sharding.devices()

    def give(wanted: Wanted, gradients: list[jax.Array]) -> jax.Array:
        shard_RE = jnp.zeros((len(rows_VE) // devices, rows_VE.shape[1]), rows_VE.dtype)

        def add(row_M: jax.Array, gradient_ME: jax.Array, shard_RE: jax.Array) -> jax.Array:
            return shard_RE.at[row_M].add(gradient_ME, **SORTED)

        return _sweep(add, wanted, gradients, shard_RE, rows=len(shard_RE))

    run = _on_every_device(give, (OWN, IDS), ROWS)
    return run(wanted, gradients), None


look_up.defvjp(_forward, _backward)


def learn(
    visit: Callable[..., Any],
    wanted: Wanted,
    gradients: list[jax.Array],
    own: Any,
    shared: Any,
) -> Any:
    """What owners make of the gradients of their rows.

    Args:
      visit: (row numbers [M] of the owner's shard, gradients [M,E], own, shared) -> own, pass after
        pass; numbers ascend, each row's once and in one pass; those out of bounds are no rows.
      wanted: of `fetch`.
      gradients: by what `fetch` found.
      own: a tree of arrays [V,X], split by rows, and of zeros, to which every owner adds.
      shared: what they all read.
    """
    where = jax.tree.map(lambda x: ROWS if x.ndim else PartitionSpec(), own)
    rows = next(len(x) for x in jax.tree.leaves(own) if x.ndim) // sharding.devices()

    def run(wanted: Wanted, gradients: list[jax.Array], own: Any, shared: Any) -> Any:
        step = partial(visit, shared=shared)
        found = _sweep(step, wanted, gradients, own, rows=rows)
        return jax.tree.map(lambda x: x if x.ndim else jax.lax.psum(x, ALL), found)

    given = OWN, IDS, where, PartitionSpec()
    return _on_every_device(run, given, where)(wanted, gradients, own, shared)


def _on_every_device(f: Callable[..., Any], given: Any, found: Any) -> Callable[..., Any]:
    return jax.shard_map(f, in_specs=given, out_specs=found, check_vma=False)


def sort(ids_n: jax.Array, *, none: int) -> Wanted:
    """Every id above 0 once; `none`, which is above all of them, fills up."""
    key_n = jnp.where(ids_n > 0, ids_n, none)
    order_n = jnp.argsort(key_n)
    sorted_n = key_n[order_n]
    new_n = sorted_n != jnp.roll(sorted_n, 1).at[0].set(0)
    rank_n = jnp.where(sorted_n < none, jnp.cumsum(new_n, dtype=jnp.int32) - 1, len(ids_n))
    once_n = jnp.full_like(ids_n, none).at[rank_n].set(sorted_n, **SORTED)
    return Wanted(once_n, jnp.zeros_like(rank_n).at[order_n].set(rank_n), order_n)


def add_up(gradient_nE: jax.Array, wanted: Wanted) -> jax.Array:
    """Of lookups -> of `wanted.ids_n`."""
    gradient_nE, place_n = gradient_nE[wanted.order_n], wanted.place_n[wanted.order_n]
    return jnp.zeros_like(gradient_nE).at[place_n].add(gradient_nE, **SORTED)


class _Passes:
    """What is left of every owner's list, of ids that ascend, after some passes. An owner answers
    all devices up to the same row, the furthest that they all reach."""

    def __init__(self, ids_n: jax.Array, rows: int):
        self.devices, self.ids_n, self.rows = sharding.devices(), ids_n, rows
        self.size = -(-len(ids_n) // self.devices)
        self.first_D1 = rows * jnp.arange(self.devices, dtype=ids_n.dtype)[:, None]
        bounds = rows * jnp.arange(self.devices + 1, dtype=ids_n.dtype)
        stops = jnp.searchsorted(ids_n, bounds).astype(jnp.int32)
        self.start_D, self.stop_D = stops[:-1], stops[1:]

    def _rows(self, place_DX: jax.Array) -> jax.Array:
        """The owners' row numbers at these places; `rows` behind the end of a list."""
        row_DX = self.ids_n.at[place_DX].get(mode="fill", fill_value=0) - self.first_D1
        return jnp.where(place_DX < self.stop_D[:, None], row_DX, self.rows)

    def run(self, one: Callable[..., Any], start: Any) -> Any:
        """`one(places [D,C], n where nothing is sent, rows [D,C], so far)` for every pass."""

        def body(state: tuple[jax.Array, jax.Array, Any]) -> tuple[jax.Array, jax.Array, Any]:
            at_D, _, so_far = state
            place_DC = at_D[:, None] + jnp.arange(self.size)[None]
            row_DC = self._rows(place_DC)
            next_D1 = jax.lax.pmin(self._rows(at_D[:, None] + self.size), ALL)
            sent_DC = row_DC < next_D1
            place_DC = jnp.where(sent_DC, place_DC, len(self.ids_n))
            so_far = one(place_DC, jnp.where(sent_DC, row_DC, self.rows), so_far)
            at_D = at_D + sent_DC.sum(1, dtype=jnp.int32)
            return at_D, self._left(at_D), so_far

        state = self.start_D, self._left(self.start_D), start
        return jax.lax.while_loop(lambda state: state[1] > 0, body, state)[2]

    def _left(self, at_D: jax.Array) -> jax.Array:
        """Of the longest list of any device."""
        return jax.lax.pmax(jnp.max(self.stop_D - at_D), ALL)


def _fetch(rows_RE: jax.Array, ids_n: jax.Array) -> jax.Array:
    """The rows of ids that ascend, [n,E]; zeros for what is no row."""
    number_n, rows = jnp.arange(len(ids_n), dtype=jnp.int32), len(rows_RE)
    owner_n = jnp.minimum(ids_n // rows, sharding.devices() - 1)

    def one(place_DC: jax.Array, row_DC: jax.Array, found_nE: jax.Array) -> jax.Array:
        asked_DC = _swap(row_DC)
        answer_DCE = _swap(rows_RE.at[asked_DC].get(mode="fill", fill_value=0))
        # Every place looks for its answer: accelerators gather rows faster than they scatter them.
        size = place_DC.shape[1]
        at_n = owner_n * size + jnp.clip(number_n - place_DC[:, 0][owner_n], 0, size - 1)
        mine_n = place_DC.reshape(-1)[at_n] == number_n
        answer_nE = answer_DCE.reshape(-1, answer_DCE.shape[-1])[at_n]
        return jnp.where(mine_n[:, None], answer_nE, found_nE)

    start_nE = jnp.zeros((len(ids_n), rows_RE.shape[1]), rows_RE.dtype)
    return _Passes(ids_n, rows).run(one, start_nE)


def _sweep(
    visit: Callable[..., Any], wanted: Wanted, gradients: list[jax.Array], own: Any, *, rows: int
) -> Any:
    """`visit` of what all devices have for the owner's rows, pass after pass."""
    by_row_nE = add_up(_own_share(gradients, inner=1), wanted)

    def one(place_DC: jax.Array, row_DC: jax.Array, own: Any) -> Any:
        sent_DCE = by_row_nE.at[place_DC].get(mode="fill", fill_value=0)
        row_M, received_DCE = _swap(row_DC).reshape(-1), _swap(sent_DCE)
        once = sort(row_M + 1, none=rows + 1)
        by_row_ME = add_up(received_DCE.reshape(len(row_M), -1), once)
        return visit(once.ids_n - 1, by_row_ME, own)

    return _Passes(wanted.ids_n, rows).run(one, own)


_swap = partial(jax.lax.all_to_all, axis_name=ALL, split_axis=0, concat_axis=0)


def _own_share(parts: Sequence[jax.Array], *, inner: int = 0) -> jax.Array:
    """All of a data shard as one column [n, ..], of which every device of `model` takes a part."""
    column = in_one(parts, inner=inner)
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
    return apart(row_nE, ids)


def in_one(parts: Sequence[jax.Array], *, inner: int = 0) -> jax.Array:
    """One after the other, [N, ..]; the last `inner` axes stay."""
    return jnp.concatenate([x.reshape(-1, *x.shape[x.ndim - inner :]) for x in parts])


def apart(rows_NE: jax.Array, ids: Sequence[jax.Array]) -> list[jax.Array]:
    """The rows [..., E] of every array of ids; they stand one after the other."""
    stops = list(accumulate(i.size for i in ids))
    parts = jnp.split(rows_NE[: stops[-1]], stops[:-1])
    return [part.reshape(*i.shape, -1) for part, i in zip(parts, ids, strict=True)]
