"""Columns as small integers, whatever their type.

A column of a hundred million values has far fewer distinct ones: strings are made of those only,
and every later step (counting, fitting, encoding) is a gather over integers.
"""

import zlib
from dataclasses import dataclass

import numpy as np
import polars as pl

DENSE = 1 << 16
"""Integers are their own codes if their range is not much larger than this or their number."""


@dataclass(frozen=True)
class Coded:
    """`codes` [values] integers >= 0; `texts` [codes' range] strings, "" = missing."""

    codes: np.ndarray
    texts: pl.Series

    def counts(self, weights: np.ndarray | None = None, *, step: int = 1 << 24) -> np.ndarray:
        """How often each code occurs, or the sum of `weights` [values] where it does."""
        total = np.zeros(len(self.texts), np.int64)
        for low in range(0, len(self.codes), step):  # bincount copies what it is given
            part = slice(low, low + step)
            weight = None if weights is None else weights[part]
            total += np.bincount(self.codes[part], weight, len(total)).astype(np.int64)
        return total


def code(values: pl.Series) -> Coded:
    """Codes in the order of the values where they are integers, in no particular one otherwise."""
    if isinstance(values.dtype, (pl.Categorical, pl.Enum)):
        return _code_categories(values)
    if values.dtype.is_integer() and len(values) > values.null_count():
        low, high = int(values.min()), int(values.max())  # pyright: ignore[reportArgumentType]
        low = min(low, 0) if high < 4 * len(values) + DENSE else low
        if high - low < 4 * len(values) + DENSE:
            return _code_integers(values, low, high)
    if values.dtype == pl.String:
        values = values.fill_null("")
    known = values.unique()
    codes = values.replace_strict(known, pl.int_range(len(known), dtype=pl.Int32, eager=True))
    return Coded(codes.cast(pl.Int32).to_numpy(), as_text(known))  # the type of no values stays


def as_text(values: pl.Series) -> pl.Series:
    """Values of any type as vocabularies spell them; missing ones are empty."""
    return values.cast(pl.String).fill_null("")


def hashed(coded: Coded, rows: int) -> Coded:
    """Every value in one of so many rows, the same one wherever and whenever it occurs."""
    row = np.array([zlib.crc32(text.encode()) % rows for text in coded.texts], np.int32)
    return Coded(row[coded.codes], as_text(pl.int_range(rows, eager=True)))


def dense(values: pl.Series) -> np.ndarray:
    """Values of any type -> int64 0..K-1 in the order of the values."""
    return (values.rank("dense") - 1).cast(pl.Int64).to_numpy()


def by_appearance(coded: Coded) -> np.ndarray:
    """Values -> int32 0..K-1 by first appearance: later values renumber nothing."""
    codes = coded.codes
    first = np.full(len(coded.texts), len(codes))
    first[codes[::-1]] = np.arange(len(codes) - 1, -1, -1)  # of equal codes the last one stays
    numbers = np.empty(len(first), np.int32)
    numbers[np.argsort(first)] = np.arange(len(first), dtype=np.int32)
    return numbers[codes]


def _code_integers(values: pl.Series, low: int, high: int) -> Coded:
    texts = as_text(pl.int_range(low, high + 1, eager=True))
    if low == 0 and not values.null_count():
        return Coded(values.to_numpy(), texts)
    shifted = (values.cast(pl.Int64) - low).fill_null(len(texts)).cast(pl.Int32)
    return Coded(shifted.to_numpy(), pl.concat([texts, pl.Series([""], dtype=pl.String)]))


def _code_categories(values: pl.Series) -> Coded:
    known = values.unique().drop_nulls()
    at = known.to_physical().to_numpy().astype(np.int64)
    texts = np.full(int(at.max(initial=-1)) + 2, "", dtype=object)
    texts[at] = as_text(known).to_numpy()
    codes = values.to_physical().cast(pl.Int64).fill_null(len(texts) - 1).cast(pl.Int32)
    return Coded(codes.to_numpy(), pl.Series(texts.tolist(), dtype=pl.String))
