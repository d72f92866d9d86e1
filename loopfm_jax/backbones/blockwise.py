"""A function of tokens over a cache's worth of them at a time."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from loopfm_jax.backbones.layers import Key
from loopfm_jax.packing import BLOCK, Tokens
from loopfm_jax.sharding import data_shards


def by_block(f: Callable[..., Any], *, ahead: int = 0) -> Callable[..., Any]:
    """`f(tokens, *per_token, key=..)` over BLOCK tokens of a device at a time, computed again for
    the gradient.

    On CPU only: what a block needs stays in the cache, and memory does not grow with T. An
    accelerator wants the large products, and few tokens are one block anyway.

    Args:
      f: arrays [T, ...] -> arrays [T, ...], of any part of the tokens.
      ahead: how many tokens after a token its answer may depend on.
    """

    def run(tokens: Tokens, *per_token: jax.Array, key: Key) -> Any:
        slots, parts = len(tokens.real_T), data_shards()
        if jax.default_backend() != "cpu" or slots % BLOCK or slots % parts or slots == BLOCK:
            return f(tokens, *per_token, key=key)
        cut = Cut(slots, parts, ahead)
        if ahead > cut.piece:
            return f(tokens, *per_token, key=key)
        keys = None if key is None else jax.random.split(key, cut.count)
        part = jax.checkpoint(lambda blocks, key: f(*jax.tree.map(cut.lay, *blocks), key=key))
        blocks = cut.blocks((tokens, *per_token))
        return jax.tree.map(cut.join, jax.lax.map(lambda at: part(*at), (blocks, keys)))

    return run


class Cut:
    """T slots as `count` blocks. A block holds a piece of every device's share, or one would work
    while the others wait."""

    def __init__(self, slots: int, parts: int, ahead: int):
        share = slots // parts
        self.count = next(n for n in range(-(-share // BLOCK), share + 1) if share % n == 0)
        self.slots, self.parts, self.piece, self.ahead = slots, parts, share // self.count, ahead

    def blocks(self, given: Any) -> list[Any]:
        """Trees of [count, parts, slots of a piece, ...]: the pieces; what they look at ahead."""
        own = jax.tree.map(self._divide, given)
        return [own, jax.tree.map(self._ahead, given)] if self.ahead else [own]

    def _divide(self, x: jax.Array) -> jax.Array:
        return jnp.moveaxis(x.reshape(self.parts, self.count, -1, *x.shape[1:]), 1, 0)

    def _ahead(self, x: jax.Array) -> jax.Array:
        starts = x.reshape(-1, self.piece, *x.shape[1:])[1:, : self.ahead]
        starts = jnp.concatenate([starts, jnp.zeros_like(starts[:1])])  # nothing real after all
        return self._divide(starts.reshape(-1, *x.shape[1:]))

    def lay(self, *of_block: jax.Array) -> jax.Array:
        """A block's slots one after the other, each piece with what follows it."""
        x = jnp.concatenate(of_block, axis=1)
        return x.reshape(-1, *x.shape[2:])

    def join(self, x: jax.Array) -> jax.Array:
        """Answers of all blocks as [T, ...]."""
        x = x.reshape(self.count, self.parts, -1, *x.shape[2:])[:, :, : self.piece]
        return jnp.moveaxis(x, 1, 0).reshape(self.slots, *x.shape[3:])
