"""Two integers per example -> tokens, packed or padded, inside the jitted step.

Packed: only real entries, one after the other, in a budget of T slots; segments say whose they
are. Padded: L slots per example. Both are the same `Tokens`, so an encoder is written once and must
give the same answer for either (a contract test). Within an example the most recent entry is first.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

BLOCK = 2048
"""Large budgets are multiples of this: what runs over tokens block by block needs no remainder."""
LARGE = 32 * BLOCK
"""Slots B * L from which on a program takes longer to run than to compile: finer budgets pay."""


@struct.dataclass
class Tokens:
    """T slots. A slot that is not `real` belongs to no example: its segment is `examples`."""

    row_T: jax.Array
    """Store row, int32."""
    segment_T: jax.Array
    """Example number, sorted."""
    rank_T: jax.Array
    """0 = the most recent entry of its example."""
    real_T: jax.Array
    age_T: jax.Array | None = None
    """Seconds since the entry, for who looks at time."""
    examples: int = struct.field(pytree_node=False, default=0)
    length: int = struct.field(pytree_node=False, default=0)

    def spread(self, per_example: jax.Array) -> jax.Array:
        """[B, ...] -> [T, ...]: every token gets its example's value."""
        return per_example.at[self.segment_T].get(mode="clip")

    def sum(self, per_token: jax.Array) -> jax.Array:
        """[T, ...] -> [B, ...]; an example without tokens gets zeros."""
        return jax.ops.segment_sum(
            per_token, self.segment_T, num_segments=self.examples, indices_are_sorted=True
        )

    def count(self) -> jax.Array:
        """Tokens per example, [B] float32."""
        return self.sum(self.real_T.astype(jnp.float32))

    def softmax(self, score_T: jax.Array) -> jax.Array:
        """Softmax over each example's tokens, [T] or [T, H]; unreal slots get 0."""
        real = self.real_T.reshape(self.real_T.shape + (1,) * (score_T.ndim - 1))
        score_T = jnp.where(real, score_T, -jnp.inf)  # an unreal slot must not set the scale
        top = jax.ops.segment_max(
            score_T, self.segment_T, num_segments=self.examples, indices_are_sorted=True
        )
        top = jax.lax.stop_gradient(jnp.where(real, self.spread(top), 0))
        weight = jnp.exp(score_T - top)
        return weight / jnp.where(real, self.spread(self.sum(weight)), 1)

    def pad(self, per_token: jax.Array) -> jax.Array:
        """[T, ...] -> [B, L, ...] in rank order; empty places are zeros."""
        slots = jnp.zeros((self.examples * self.length, *per_token.shape[1:]), per_token.dtype)
        padded = slots.at[self._place_T].set(per_token, mode="drop")
        return padded.reshape(self.examples, self.length, *per_token.shape[1:])

    def unpad(self, padded: jax.Array) -> jax.Array:
        """[B, L, ...] -> [T, ...], the inverse of `pad`."""
        return padded.reshape(-1, *padded.shape[2:]).at[self._place_T].get(mode="clip")

    @property
    def column_T(self) -> jax.Array:
        """Place in a history of L that is padded in front: L - 1 = the most recent entry."""
        return self.length - 1 - self.rank_T

    def mean(self, per_token: jax.Array) -> jax.Array:
        """[T, X] -> [B, X], over the real tokens; zeros where there is none."""
        total = self.sum(jnp.where(self.real_T[:, None], per_token, 0))
        return total / jnp.maximum(self.count(), 1)[:, None]

    @property
    def _place_T(self) -> jax.Array:
        return jnp.where(
            self.real_T, self.segment_T * self.length + self.rank_T, self.examples * self.length
        )


def lay_out(length_B: jax.Array, *, slots: int, longest: int) -> Tokens:
    """Tokens whose values came with the batch, one example's after the other's."""
    return pack(jnp.cumsum(length_B), length_B, slots=slots, longest=longest)


def pack(end_B: jax.Array, length_B: jax.Array, *, slots: int, longest: int) -> Tokens:
    """Packs histories `store[end - length : end]` into `slots` >= sum(length) slots."""
    stop_B = jnp.cumsum(length_B)
    slot_T = jnp.arange(slots, dtype=jnp.int32)
    # How many examples stop at or before a slot; a binary search per slot or a sort is dearer.
    stops_T = jnp.zeros(slots, jnp.int32).at[stop_B].add(1, mode="drop")
    segment_T = jnp.cumsum(stops_T, dtype=jnp.int32)
    real_T = slot_T < stop_B[-1]
    example_T = jnp.minimum(segment_T, len(end_B) - 1)
    rank_T = jnp.where(real_T, slot_T - (stop_B - length_B)[example_T], 0)
    row_T = jnp.where(real_T, end_B[example_T] - 1 - rank_T, 0)
    return Tokens(row_T, segment_T, rank_T, real_T, examples=len(end_B), length=longest)


def pad(end_B: jax.Array, length_B: jax.Array, *, longest: int) -> Tokens:
    """The padded layout: `longest` slots per example. The reference that `pack` is held against."""
    examples = len(end_B)
    rank_BL = jnp.broadcast_to(jnp.arange(longest, dtype=jnp.int32), (examples, longest))
    real_BL = rank_BL < length_B[:, None]
    row_BL = jnp.where(real_BL, end_B[:, None] - 1 - rank_BL, 0)
    segment_BL = jnp.broadcast_to(jnp.arange(examples, dtype=jnp.int32)[:, None], rank_BL.shape)
    flat = [x.reshape(-1) for x in (row_BL, segment_BL, rank_BL, real_BL)]
    return Tokens(*flat, examples=examples, length=longest)


def budget(lengths_B: np.ndarray, *, longest: int) -> int:
    """The smallest token budget that holds these histories; nothing is ever dropped.

    Few shapes, so that few programs compile: B * L, a half, a quarter and an eighth of it, and
    where that is large eight steps from each half to the next.
    """
    total, whole = max(int(lengths_B.sum()), 1), len(lengths_B) * longest
    octaves = math.log2(whole / total) + 1e-9
    if whole < LARGE:
        unit, octaves = 64, min(math.floor(octaves), 3)
    else:
        unit, octaves = BLOCK, math.floor(8 * octaves) / 8
    return -(-max(total, math.ceil(whole * 2**-octaves)) // unit) * unit
