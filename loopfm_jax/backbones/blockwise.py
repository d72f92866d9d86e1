"""A function of tokens over a cache's worth of them at a time."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jax.tree_util import Partial

from loopfm_jax import sharding
from loopfm_jax.backbones.layers import KEPT, Key
from loopfm_jax.packing import BLOCK, Tokens
from loopfm_jax.sharding import ALL

ONE_BLOCK = 64 * BLOCK
"""Slots that one device takes at once, several all together as many over their number: nothing is
computed again for the gradient, which is faster and takes memory (DIN of the BARS size: 11 KB a
slot)."""
LEAST = 512
"""Slots of a block below which its products slow down."""


def by_block(f: Callable[..., Any], *, ahead: int = 0) -> Callable[..., Any]:
    """`f(tokens, *per_token, key=..)` over BLOCK tokens of a device at a time, computed again for
    the gradient but for what is named KEPT.

    Many tokens on CPU only, whose memory then hardly grows with T. Up to ONE_BLOCK, and on an
    accelerator, all at once is faster.

    Args:
      f: arrays [T, ...] -> arrays [T, ...], of any part of the tokens. What else it reads, modules
        too, comes to it in a `Partial`, or several devices could not share it.
      ahead: how many tokens after a token its answer may depend on.
    """
    f = f if isinstance(f, Partial) else Partial(f)

    def run(tokens: Tokens, *per_token: jax.Array, key: Key) -> Any:
        slots, devices = len(tokens.real_T), sharding.devices()
        whole = sharding.platform() != "cpu" or slots % BLOCK or slots * devices <= ONE_BLOCK
        if whole or slots % devices or block(slots // devices, devices) < ahead:
            return f(tokens, *per_token, key=key)
        given = replace(tokens, parts=1), *per_token  # a block knows all examples by their number
        if devices == 1:
            after = jax.tree.map(lambda x: jnp.zeros_like(x[:ahead]), given)
            return _run(f, given, after, key)

        def own(f: Partial, given: Any, key: Key) -> Any:
            key = None if key is None else jax.random.fold_in(key, jax.lax.axis_index(ALL))
            after = jax.tree.map(lambda x: _next(x[:ahead], devices), given)
            return _run(f, given, after, key)

        # Every device its share: gradients of what all read are added up once, not by block.
        split, shared = PartitionSpec(ALL), PartitionSpec()
        over = jax.shard_map(
            own, in_specs=(shared, split, shared), out_specs=split, check_vma=False
        )
        return over(f, given, key)

    return run


def block(slots: int, devices: int) -> int:
    """Slots of a block: of those numbers that divide a device's slots, the largest for which all
    devices, which share the machine's cache, have room."""
    limit = max(BLOCK // devices, LEAST)
    return slots // next(n for n in range(-(-slots // limit), slots + 1) if slots % n == 0)


def _run(f: Callable[..., Any], given: Any, after: Any, key: Key) -> Any:
    """`given` by block, each with the start of what follows it; `after` follows the last."""
    size = block(len(given[0].real_T), sharding.devices())

    def divide(x: jax.Array, after: jax.Array) -> jax.Array:
        own = x.reshape(-1, size, *x.shape[1:])
        if not len(after):
            return own
        return jnp.concatenate([own, jnp.concatenate([own[1:, : len(after)], after[None]])], axis=1)

    blocks = jax.tree.map(divide, given, after)
    count = len(blocks[0].real_T)
    keys = None if key is None else jax.random.split(key, count)
    keep = jax.checkpoint_policies.save_only_these_names(KEPT)
    part = jax.checkpoint(lambda at, key: f(*at, key=key), policy=keep)
    found = jax.lax.map(lambda at: jax.tree.map(lambda x: x[:size], part(*at)), (blocks, keys))
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), found)


def _next(start: jax.Array, devices: int) -> jax.Array:
    """The start of the next device's share, zeros for the last: nothing real."""
    return jax.lax.ppermute(start, ALL, [(n, n - 1) for n in range(1, devices)])
