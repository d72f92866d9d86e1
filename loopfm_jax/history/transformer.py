"""A small transformer over entries: causal self-attention whose positions are time gaps.

Kunlun (arXiv 2602.10016, PAPER section 6) has rotary positions on log(1 + dt).
"""

import jax
from flax import nnx

from loopfm_jax.backbones.layers import dense
from loopfm_jax.backbones.rotary import time_angles, turn
from loopfm_jax.backbones.self_attention import self_attend
from loopfm_jax.packing import Tokens


class Block(nnx.Module):
    """Pre-norm transformer block: x + attention(norm x), then x + feed-forward(norm x)."""

    def __init__(self, width: int, heads: int, *, rngs: nnx.Rngs):
        self.heads = heads
        self.norm_attend = nnx.LayerNorm(width, rngs=rngs)
        self.attend = dense(width, 3 * width, rngs=rngs, bias=False)
        self.mix = dense(width, width, rngs=rngs, bias=False)
        self.norm_grow = nnx.LayerNorm(width, rngs=rngs)
        self.grow = dense(width, 2 * width, rngs=rngs)
        self.shrink = dense(2 * width, width, rngs=rngs)

    def __call__(self, x_TW: jax.Array, angle_TD: jax.Array, tokens: Tokens) -> jax.Array:
        qkv_TX = turn(self.attend(self.norm_attend(x_TW)), angle_TD, heads=self.heads)
        seen_THD = self_attend(qkv_TX, tokens, heads=self.heads)
        x_TW = x_TW + self.mix(seen_THD.reshape(x_TW.shape))
        return x_TW + self.shrink(nnx.relu(self.grow(self.norm_grow(x_TW))))


class Transformer(nnx.Module):
    """Entries and their ages -> the entries as they see what is older, [T,W]."""

    def __init__(self, width: int, *, heads: int, layers: int, rngs: nnx.Rngs):
        self.pairs = width // heads // 2
        self.blocks = nnx.List(Block(width, heads, rngs=rngs) for _ in range(layers))
        self.norm = nnx.LayerNorm(width, rngs=rngs)

    def __call__(self, x_TW: jax.Array, tokens: Tokens) -> jax.Array:
        assert tokens.age_T is not None
        angle_TD = time_angles(tokens.age_T, pairs=self.pairs)
        for block in self.blocks:
            x_TW = block(x_TW, angle_TD, tokens)
        return self.norm(x_TW)
