"""What a prepared log holds, as models see it: fields, their rows in the fused id space, sequences.

All trainable fields share one id space: a field owns the rows `[offset, offset + rows)`. Its local
id 0 is padding and its last id is "unknown", as in the public BARS preparation, so that parameter
counts equal the published ones. In columns padding is always the fused id 0. A field with a
`frozen_width` reads a fixed (pretrained) table instead, whose ids start at 0.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Field:
    """A categorical column (one id) or a sequence column (`length` ids, 0 = padding)."""

    name: str
    rows: int
    """Vocabulary size, padding and unknown included."""
    kind: Literal["categorical", "sequence"] = "categorical"
    length: int = 1
    """Longest sequence that is kept; 1 for a categorical field."""
    shares: str | None = None
    """Name of the field whose table this one reads."""
    fm_only: bool = False
    frozen_width: int = 0
    """Width of the pretrained, never trained table behind this field; 0 = an ordinary field."""
    from_log: bool = False
    """Not stored: made on loading, from the earlier positive rows of the same key."""
    slices: str = ""
    """Values stand once for all rows, in the side array `sequences/<name>.npy`: each row carries
    the `<slices>/end` and `<slices>/length` of its part."""


@dataclass(frozen=True)
class Numeric:
    """A float column, stored as `(f(x) - mean) / std` fitted on the FM window; f is log1p or x."""

    name: str
    mean: float = 0.0
    std: float = 1.0
    log: bool = False
    fm_only: bool = False


@dataclass(frozen=True)
class Behaviour:
    """Sequence fields that list earlier events, and the candidate's fields they answer to."""

    target: tuple[str, ...]
    history: tuple[str, ...]

    def keep(self, names: Collection[str]) -> "Behaviour":
        """The pairs of which both sides are among `names`."""
        pairs = zip(self.target, self.history, strict=True)
        kept = [(t, h) for t, h in pairs if t in names and h in names]
        return Behaviour(tuple(t for t, _ in kept), tuple(h for _, h in kept))


@dataclass(frozen=True)
class Schema:
    """Columns of a log."""

    fields: tuple[Field, ...]
    numeric: tuple[Numeric, ...] = ()
    behaviours: tuple[Behaviour, ...] = ()
    item: tuple[str, ...] = ()
    """Fields that describe the candidate: the query of target attention over histories."""
    entity: tuple[str, ...] = ()
    """Fields that describe the key alone: what an entity embedding is made of."""

    @property
    def categorical(self) -> tuple[Field, ...]:
        return tuple(f for f in self.fields if f.kind == "categorical")

    @property
    def sequences(self) -> tuple[Field, ...]:
        return tuple(f for f in self.fields if f.kind == "sequence")

    @property
    def owners(self) -> tuple[Field, ...]:
        """Fields that own rows of the fused trainable table, in its order."""
        return tuple(f for f in self.fields if not f.shares and not f.frozen_width)

    @property
    def table_rows(self) -> int:
        """Rows of the fused trainable table."""
        return sum(f.rows for f in self.owners)

    @property
    def offsets(self) -> dict[str, int]:
        """First row of every field in its table (a sharing field has its owner's)."""
        offsets, row = {}, 0
        for f in self.owners:
            offsets[f.name] = row
            row += f.rows
        for f in self.fields:
            if f.name not in offsets:
                offsets[f.name] = 0 if f.frozen_width else offsets[f.shares or f.name]
        return offsets

    @property
    def groups(self) -> dict[str, tuple[str, ...]]:
        """Sequences that are read side by side, event by event, under the name of the first: those
        of one behaviour, those of one `slices`; any other alone."""
        groups: dict[str, tuple[str, ...]] = {}
        for f in self.sequences:
            if any(f.name in names for names in groups.values()):
                continue
            together = [b.history for b in self.behaviours if f.name in b.history]
            if f.slices:
                together.append(tuple(g.name for g in self.sequences if g.slices == f.slices))
            groups[f.name] = (f.name, *dict.fromkeys(n for t in together for n in t if n != f.name))
        return groups

    def __getitem__(self, name: str) -> Field:
        return next(f for f in self.fields if f.name == name)

    def keep(self, names: Iterable[str], *, numeric: tuple[Numeric, ...]) -> "Schema":
        """The part of this schema with the fields `names`, in a compact id space of its own."""
        names = set(names)
        return Schema(
            fields=tuple(f for f in self.fields if f.name in names),
            numeric=numeric,
            behaviours=tuple(k for b in self.behaviours if (k := b.keep(names)).target),
            item=tuple(n for n in self.item if n in names),
            entity=tuple(n for n in self.entity if n in names),
        )

    def for_vm(self) -> "Schema":
        """What vertical models see: no FM-only columns (the feature gap)."""
        numeric = tuple(n for n in self.numeric if not n.fm_only)
        return self.keep({f.name for f in self.fields if not f.fm_only}, numeric=numeric)

    def read(self, *, behaviours: bool) -> "Schema":
        """What a model reads that does, or does not, read the sequences of earlier events."""
        return self if behaviours else self.without_behaviours()

    def without_behaviours(self) -> "Schema":
        past = {name for b in self.behaviours for name in b.history}
        return self.keep({f.name for f in self.fields} - past, numeric=self.numeric)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, text: Mapping[str, Any]) -> "Schema":
        behaviours = (
            Behaviour(tuple(b["target"]), tuple(b["history"])) for b in text["behaviours"]
        )
        return cls(
            fields=tuple(Field(**f) for f in text["fields"]),
            numeric=tuple(Numeric(**n) for n in text["numeric"]),
            behaviours=tuple(behaviours),
            item=tuple(text["item"]),
            entity=tuple(text["entity"]),
        )
