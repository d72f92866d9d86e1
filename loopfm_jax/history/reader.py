"""What a model reads of histories: entries on the device -> K more fields of its backbone.

A history can be read for the FM's codes (LoopFM), for codes of another tap (item-only), for the
soft labels alone, or for the raw ids that a VM could have logged without any FM (PAPER section 3,
tables 4, 5 and 11). Each of them, for every kind of key, has an encoder of its own; the summaries
join the backbone as fields of the embedding width, before the interaction layers (section 1,
stage 4).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, struct

from loopfm_jax.data.schema import Schema
from loopfm_jax.errors import UserError
from loopfm_jax.history.codes import Codec, dequantise, look_up
from loopfm_jax.history.encoders import ENCODERS, Attentive, EncoderConfig
from loopfm_jax.history.store import Side
from loopfm_jax.packing import Tokens, pack
from loopfm_jax.tables import Embedded, TableConfig

Content = Literal["loopfm", "item-only", "soft", "raw"]
Array = jax.Array | np.ndarray
MINUTE, WEEK = 60.0, 7 * 86_400.0
CODE_RMS = 0.3
"""Of the paper's codes: norms of 1.71 over 32 numbers (PAPER section 3)."""


@struct.dataclass
class Entries:
    """A store by one kind of key on the device, or those of its rows that the tokens of a batch
    are; what nobody reads is None or absent."""

    codes: dict[str, Array]
    """tap -> [S, columns]."""
    ids_SF: Array | None
    """Fused ids of the fields of `raw`, in the reading model's id space."""
    seconds: Array | None
    outcome: Array | None
    soft: Array | None
    longest: int = struct.field(pytree_node=False)
    gathered: bool = struct.field(pytree_node=False, default=False)
    """One row per token of a batch, [P,S], instead of [S]."""
    split: bool = struct.field(pytree_node=False, default=False)
    """In as many parts as tokens, rows counted from the first of each (`partition`)."""

    def at(self, values: Array, tokens: Tokens) -> jax.Array:
        """The rows of the tokens, [T, ...]."""
        values = jnp.asarray(values)
        if self.gathered:
            return values.reshape(-1, *values.shape[2:])
        if self.split:
            return tokens.by_part(lambda _, own, row_S: own[row_S], values, tokens.row_T)
        return values[tokens.row_T]


@struct.dataclass
class Past:
    """All that a step reads of the FM besides its batch."""

    entries: dict[str, Entries]
    """By kind of key."""
    codecs: dict[str, Codec]
    """By tap."""


@dataclass(frozen=True)
class Reading:
    """What is read."""

    contents: tuple[Content, ...]
    keys: tuple[str, ...]
    side: tuple[Side, ...]
    """Told of every entry besides its content."""
    codecs: Mapping[str, Codec]
    """By tap."""
    tap: str
    """The tap of `loopfm`; `item-only` reads the tap `item`."""
    raw: tuple[str, ...] = ()
    """The fields of `raw`, see `raw_fields`."""

    @property
    def parts(self) -> tuple[tuple[str, Content], ...]:
        """(key, content) of every summary."""
        return tuple((key, content) for key in self.keys for content in self.contents)

    def tap_of(self, content: Content) -> str | None:
        return {"loopfm": self.tap, "item-only": "item"}.get(content)

    def width(self, content: Content, tables: TableConfig) -> int:
        """Numbers per token."""
        tap = self.tap_of(content)
        own = {"soft": 1, "raw": len(self.raw) * tables.width}
        return (self.codecs[tap].width if tap else own[content]) + len(self.side)


def raw_fields(schema: Schema, chosen: tuple[str, ...] = ()) -> tuple[str, ...]:
    """The fields whose ids `raw` histories hold: `chosen`, or the candidate's with trained tables.

    Raises:
      UserError: `chosen` names a field twice, or one that the schema has no trained table for.
    """
    trained = [f.name for f in schema.categorical if not f.frozen_width]
    for name in chosen:
        if name not in trained:
            raise UserError(
                f"history.raw names {name!r}, which is no categorical field with a trained table "
                f"that vertical models see ({', '.join(trained)})"
            )
    if len(set(chosen)) != len(chosen):
        raise UserError(f"history.raw is {list(chosen)}: name each field once")
    return chosen or tuple(name for name in schema.item if name in trained)


class Readers(nnx.Module):
    """Histories of a batch -> [B, K, E]: `config.fields` fields per key and content.

    Args:
      reading: what is read.
      schema: of the model; its `item` fields are the query.
      config: the encoders.
      tables: the model's embedding tables.
    """

    def __init__(
        self,
        reading: Reading,
        schema: Schema,
        config: EncoderConfig,
        tables: TableConfig,
        *,
        rngs: nnx.Rngs,
    ):
        self.item, self.width = schema.item, tables.width
        self.side, self.keys, self.parts = reading.side, reading.keys, reading.parts
        self.taps = tuple(reading.tap_of(content) for _, content in self.parts)
        self.fields = config.fields * len(self.parts)
        query = len(schema.item) * tables.width
        self.encoders = nnx.List(
            ENCODERS[config.name](reading.width(content, tables), query, config, rngs=rngs)
            for _, content in self.parts
        )
        self.books = nnx.List(
            self._book(reading.codecs[tap], config, rngs=rngs) if tap else None for tap in self.taps
        )
        self.summaries = nnx.List(
            # As small as the rows they join: training starts from the model without histories.
            nnx.Linear(
                encoder.outputs,
                config.fields * tables.width,
                kernel_init=nnx.initializers.normal(tables.init_std),
                rngs=rngs,
            )
            for encoder in self.encoders
        )

    def __call__(
        self,
        batch: Mapping[str, Any],
        embedded: Embedded,
        past: Past,
        lookup: Callable[[jax.Array], jax.Array],
    ) -> jax.Array:
        """Args:
        batch: `slices` by key (`end_B`, `length_B`, `slot_PS`) and `seconds_B`.
        embedded: the batch's features.
        past: the stores.
        lookup: fused ids -> rows of the model's table.
        """
        read = self._encoder_inputs(batch, embedded, past, lookup)
        fields = []
        for encoder, summary, inputs in zip(self.encoders, self.summaries, read, strict=True):
            summary_BX = summary(encoder(*inputs))
            fields.append(summary_BX.reshape(len(summary_BX), -1, self.width))
        return jnp.concatenate(fields, axis=1)

    def attention(
        self,
        batch: Mapping[str, Any],
        embedded: Embedded,
        past: Past,
        lookup: Callable[[jax.Array], jax.Array],
    ) -> list[jax.Array | None]:
        """What every part's encoder attends to, mean over its interests, [B,L], the newest entry
        first, zeros behind the last; None of an encoder without attention."""
        read = self._encoder_inputs(batch, embedded, past, lookup)
        found: list[jax.Array | None] = []
        for encoder, (value_TX, query_BQ, tokens) in zip(self.encoders, read, strict=True):
            if not isinstance(encoder, Attentive):
                found.append(None)
                continue
            weights = [w_T for w_T, _ in encoder.weigh(value_TX, query_BQ, tokens)]
            found.append(tokens.pad(jnp.mean(jnp.stack(weights), axis=0)))
        return found

    def _encoder_inputs(
        self,
        batch: Mapping[str, Any],
        embedded: Embedded,
        past: Past,
        lookup: Callable[[jax.Array], jax.Array],
    ) -> list[tuple[jax.Array, jax.Array, Tokens]]:
        """Of every part: values of its tokens, the query, the tokens."""
        query_BQ = jnp.concatenate([embedded.fields[name] for name in self.item], axis=1)
        brought = {key: s["entries"] for key, s in batch["slices"].items() if "entries" in s}
        past = replace(past, entries={**past.entries, **brought})
        tokens = {key: self._tokens(batch, key, past.entries[key]) for key in self.keys}
        return [
            (self._values(past, tokens[key], i, lookup), query_BQ, tokens[key])
            for i, (key, _) in enumerate(self.parts)
        ]

    def _book(self, codec: Codec, config: EncoderConfig, *, rngs: nnx.Rngs) -> "Book | None":
        config.check_code(codec.code)
        return Book(codec, rngs=rngs) if config.trainable_codes else None

    def _tokens(self, batch: Mapping[str, Any], key: str, entries: Entries) -> Tokens:
        found = batch["slices"][key]
        tokens = pack(
            found["end_B"],
            found["length_B"],
            slots=found["slot_PS"].size,
            longest=entries.longest,
            parts=len(found["slot_PS"]),
        )
        if entries.seconds is None:
            return tokens
        age_T = (tokens.spread(batch["seconds_B"]) - entries.at(entries.seconds, tokens)).astype(
            jnp.float32
        )
        return replace(tokens, age_T=jnp.maximum(age_T, 0))

    def _values(
        self,
        past: Past,
        tokens: Tokens,
        part: int,
        lookup: Callable[[jax.Array], jax.Array],
    ) -> jax.Array:
        """Entries of the tokens with their side information, [T,X]; zeros at unreal slots."""
        (key, content), tap = self.parts[part], self.taps[part]
        entries = past.entries[key]
        if tap is not None:
            stored_TX, book = entries.at(entries.codes[tap], tokens), self.books[part]
            parts = [book(stored_TX) if book else dequantise(stored_TX, past.codecs[tap])]
        elif content == "raw":
            assert entries.ids_SF is not None
            ids_TF = entries.at(entries.ids_SF, tokens)
            parts = [lookup(ids_TF).reshape(len(ids_TF), -1)]
        else:
            assert entries.soft is not None
            parts = [entries.at(entries.soft, tokens)[:, None]]
        parts += [tell(entries, tokens, side)[:, None] for side in self.side]
        return jnp.where(tokens.real_T[:, None], jnp.concatenate(parts, axis=1), 0)


class Book(nnx.Module):
    """Trained vectors in place of those that a residual code names, of their shape [K,256,Z].

    They start at random, at the scale of codes: all that is kept of the FM is who shares a code.
    """

    def __init__(self, codec: Codec, *, rngs: nnx.Rngs):
        assert codec.book is not None
        scale = CODE_RMS / len(codec.book) ** 0.5
        self.vectors_KCZ = nnx.Param(scale * jax.random.normal(rngs.params(), codec.book.shape))

    def __call__(self, stored_TK: jax.Array) -> jax.Array:
        """[T,Z]."""
        return look_up(stored_TK, self.vectors_KCZ[...]).sum(-2)


def tell(entries: Entries, tokens: Tokens, side: Side) -> jax.Array:
    """A fact about every entry, [T]: `outcome` is -1 or 1; `age` the logarithm of the seconds
    since the entry, scaled to about [0, 1]."""
    if side == "outcome":
        assert entries.outcome is not None
        return 2 * entries.at(entries.outcome, tokens).astype(jnp.float32) - 1
    assert tokens.age_T is not None
    return jnp.log1p(tokens.age_T / MINUTE) / jnp.log1p(WEEK / MINUTE)
