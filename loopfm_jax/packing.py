"""Two integers per example -> tokens, packed or padded, inside the jitted step.

Packed: only real entries, one after the other, in a budget of T slots; segments say whose they
are. Padded: L slots per example. Both are the same `Tokens`, so an encoder is written once and must
give the same answer for either (a contract test). Within an example the most recent entry is first.

Packed slots stand in equal parts, one per shard of the batch: a part holds the tokens of its own
examples and a tail that is not real. So tokens lie where their examples lie, and what is added up
or looked up by example never leaves its device.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.typing import DTypeLike

BLOCK = 2048
"""Large budgets are multiples of this: what runs over tokens block by block needs no remainder."""
SMALL, LARGE = 4 * BLOCK, 32 * BLOCK
"""Slots B * L below which a program runs shorter than it compiles, so that few budgets pay, and
from which on it runs so much longer that the finest do."""

FEW = 32
"""Examples that are asked one by one whether they stop before a slot: dearer than a sum over slots
when there are more."""


@struct.dataclass
class Tokens:
    """T slots. A slot that is not `real` belongs to no example: its segment is `examples`."""

    row_T: jax.Array
    """Store row, int32."""
    segment_T: jax.Array
    """Example number, sorted within a part."""
    rank_T: jax.Array
    """0 = the most recent entry of its example."""
    real_T: jax.Array
    age_T: jax.Array | None = None
    """Seconds since the entry, for who looks at time."""
    examples: int = struct.field(pytree_node=False, default=0)
    length: int = struct.field(pytree_node=False, default=0)
    parts: int = struct.field(pytree_node=False, default=1)
    """Equal shares of the slots, each with an equal share of the examples, in order."""

    def spread(self, per_example: jax.Array) -> jax.Array:
        """[B, ...] -> [T, ...]: every token gets its example's value."""
        return self.by_part(lambda segment_S, x: x.at[segment_S].get(mode="clip"), per_example)

    def sum(self, per_token: jax.Array) -> jax.Array:
        """[T, ...] -> [B, ...]; an example without tokens gets zeros."""
        return self._by_example(jax.ops.segment_sum, per_token)

    def count(self) -> jax.Array:
        """Tokens per example, [B] float32."""
        return self.sum(self.real_T.astype(jnp.float32))

    def softmax(self, score_T: jax.Array) -> jax.Array:
        """Softmax over each example's tokens, [T] or [T, H]; unreal slots get 0."""
        real = self.real_T.reshape(self.real_T.shape + (1,) * (score_T.ndim - 1))
        score_T = jnp.where(real, score_T, -jnp.inf)  # an unreal slot must not set the scale
        top = self._by_example(jax.ops.segment_max, score_T)
        top = jax.lax.stop_gradient(jnp.where(real, self.spread(top), 0))
        weight = jnp.exp(score_T - top)
        return weight / jnp.where(real, self.spread(self.sum(weight)), 1)

    def pad(self, per_token: jax.Array) -> jax.Array:
        """[T, ...] -> [B, L, ...] in rank order; empty places are zeros."""
        count = self.examples // self.parts

        def scatter(segment_S: jax.Array, rank_S: jax.Array, real_S: jax.Array, x: jax.Array):
            place_S = jnp.where(real_S, segment_S * self.length + rank_S, count * self.length)
            slots = jnp.zeros((count * self.length, *x.shape[1:]), x.dtype)
            padded = slots.at[place_S].set(x, mode="drop")
            return padded.reshape(count, self.length, *x.shape[1:])

        return self.by_part(scatter, self.rank_T, self.real_T, per_token)

    def unpad(self, padded: jax.Array) -> jax.Array:
        """[B, L, ...] -> [T, ...], the inverse of `pad`."""

        def look_up(segment_S: jax.Array, rank_S: jax.Array, x: jax.Array) -> jax.Array:
            place_S = segment_S * self.length + rank_S
            return x.reshape(-1, *x.shape[2:]).at[place_S].get(mode="clip")

        return self.by_part(look_up, self.rank_T, padded)

    @property
    def column_T(self) -> jax.Array:
        """Place in a history of L that is padded in front: L - 1 = the most recent entry."""
        return self.length - 1 - self.rank_T

    def mean(self, per_token: jax.Array) -> jax.Array:
        """[T, X] -> [B, X], over the real tokens; zeros where there is none."""
        total = self.sum(jnp.where(self.real_T[:, None], per_token, 0))
        return total / jnp.maximum(self.count(), 1)[:, None]

    def _by_example(self, reduce: Callable[..., jax.Array], per_token: jax.Array) -> jax.Array:
        count = self.examples // self.parts

        def one(segment_S: jax.Array, x: jax.Array) -> jax.Array:
            return reduce(x, segment_S, num_segments=count, indices_are_sorted=True)

        return self.by_part(one, per_token)

    def by_part(self, f: Callable[..., jax.Array], *given: jax.Array) -> jax.Array:
        """`f(segment_S, *given)` of every part alone, segments counted from its first example; no
        real slot has one beyond its last."""
        if self.parts == 1:
            return f(self.segment_T, *given)
        segment_PS = self.segment_T.reshape(self.parts, -1)
        first_P = jnp.arange(self.parts, dtype=jnp.int32) * (self.examples // self.parts)
        split = (x.reshape(self.parts, -1, *x.shape[1:]) for x in given)
        found = jax.vmap(f)(segment_PS - first_P[:, None], *split)
        return found.reshape(-1, *found.shape[2:])


def lay_out(length_B: jax.Array, *, slots: int, longest: int, parts: int = 1) -> Tokens:
    """Tokens whose values came with the batch, of every part one example's after the other's."""
    return pack(jnp.cumsum(length_B), length_B, slots=slots, longest=longest, parts=parts)


def pack(
    end_B: jax.Array, length_B: jax.Array, *, slots: int, longest: int, parts: int = 1
) -> Tokens:
    """Packs histories `store[end - length : end]` into `slots`, of which every part has room for
    those of its examples."""
    examples, one = len(end_B), partial(_pack, slots=slots // parts)
    if parts == 1:
        return Tokens(*one(end_B, length_B), examples=examples, length=longest)
    row_PS, segment_PS, rank_PS, real_PS = jax.vmap(one)(
        end_B.reshape(parts, -1), length_B.reshape(parts, -1)
    )
    first_P = jnp.arange(parts, dtype=jnp.int32) * (examples // parts)
    segment_PS = jnp.where(real_PS, first_P[:, None] + segment_PS, examples)
    flat = [x.reshape(-1) for x in (row_PS, segment_PS, rank_PS, real_PS)]
    return Tokens(*flat, examples=examples, length=longest, parts=parts)


def _pack(end_B: jax.Array, length_B: jax.Array, *, slots: int) -> tuple[jax.Array, ...]:
    """Rows, segments, ranks and what is real of one part."""
    stop_B = jnp.cumsum(length_B)
    slot_T = jnp.arange(slots, dtype=jnp.int32)
    # How many examples stop at or before a slot; a binary search per slot or a sort is dearer.
    if len(stop_B) <= FEW:
        segment_T = (stop_B[None] <= slot_T[:, None]).sum(axis=1, dtype=jnp.int32)
    else:
        stops_T = jnp.zeros(slots, jnp.int32).at[stop_B].add(1, mode="drop")
        segment_T = jnp.cumsum(stops_T, dtype=jnp.int32)
    real_T = slot_T < stop_B[-1]
    example_T = jnp.minimum(segment_T, len(end_B) - 1)
    rank_T = jnp.where(real_T, slot_T - (stop_B - length_B)[example_T], 0)
    row_T = jnp.where(real_T, end_B[example_T] - 1 - rank_T, 0)
    return row_T, segment_T, rank_T, real_T


def pad(end_B: jax.Array, length_B: jax.Array, *, longest: int) -> Tokens:
    """The padded layout: `longest` slots per example. The reference that `pack` is held against."""
    examples = len(end_B)
    rank_BL = jnp.broadcast_to(jnp.arange(longest, dtype=jnp.int32), (examples, longest))
    real_BL = rank_BL < length_B[:, None]
    row_BL = jnp.where(real_BL, end_B[:, None] - 1 - rank_BL, 0)
    segment_BL = jnp.broadcast_to(jnp.arange(examples, dtype=jnp.int32)[:, None], rank_BL.shape)
    flat = [x.reshape(-1) for x in (row_BL, segment_BL, rank_BL, real_BL)]
    return Tokens(*flat, examples=examples, length=longest)


# ------------------------------------------------------------------------------- on the host


@dataclass(frozen=True)
class Parts:
    """How a batch is laid out: in equal parts, one per shard of `data`."""

    count: int = 1
    own: tuple[int, ...] = (0,)
    """Those that this process assembles, in order."""

    def mine(self, per_example: np.ndarray) -> np.ndarray:
        """[B, ...] -> the examples of the own parts."""
        if len(self.own) == self.count:
            return per_example
        split = per_example.reshape(self.count, -1, *per_example.shape[1:])
        return split[list(self.own)].reshape(-1, *per_example.shape[1:])

    def deal(
        self,
        write: Callable[[slice, np.ndarray], object],
        length_B: np.ndarray,
        *,
        slots: int,
        shape: tuple[int, ...],
        dtype: DTypeLike,
    ) -> np.ndarray:
        """The tokens of the own examples in the own parts' slots, [P, S, ...]: the step sees from
        the shape how a batch is laid out. Zeros where there is no token.

        Args:
          write: puts those of the tokens that a slice names into an array.
          length_B: of the own examples.
          slots: of the whole batch.
          shape: of a token.
        """
        found = np.zeros((len(self.own), slots // self.count, *shape), dtype)
        start = 0
        for part, count in zip(found, length_B.reshape(len(self.own), -1).sum(axis=1), strict=True):
            if count:
                write(slice(start, start + count), part[:count])
            start += count
        return found


WHOLE = Parts()


def budget(lengths_B: np.ndarray, *, longest: int, parts: int = 1) -> int:
    """The smallest token budget whose parts hold these histories; nothing is ever dropped.

    Few shapes, so that few programs compile: of B * L that is small the whole and the quarter; else
    two steps from each half to the next, where it is large sixteen, of 5 % or the rest of a block.
    """
    total = parts * max(int(lengths_B.reshape(parts, -1).sum(axis=1).max()), 1)
    whole = len(lengths_B) * longest
    octaves = math.log2(whole / total) + 1e-9
    if whole < SMALL:
        unit, octaves = 64 * parts, 2 * min(math.floor(octaves / 2), 1)
    elif whole < LARGE:
        unit, octaves = math.lcm(BLOCK, parts), min(math.floor(2 * octaves) / 2, 3)
    else:
        unit, octaves = math.lcm(BLOCK, parts), math.floor(16 * octaves) / 16
    return -(-max(total, math.ceil(whole * 2**-octaves)) // unit) * unit
