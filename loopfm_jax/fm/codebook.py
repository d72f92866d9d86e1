"""Fitting the learned codes on codes of the FM window: k-means centres and residual codebooks.

Nothing later than the FM window is looked at (no quantiser may know the test rows).
"""

import warnings

import numpy as np
from scipy.cluster.vq import kmeans2

from loopfm_jax.errors import UserError
from loopfm_jax.history.codes import Code

CENTRES, VECTORS = 16, 256
ITERATIONS = 20


def fit(z: np.ndarray, code: Code, *, books: int, seed: int) -> np.ndarray | None:
    """The book of `history.codes.Codec` for codes z [rows, Z]; None where `code` needs none.

    Raises:
      UserError: fewer rows than a book has vectors.
    """
    if code == "kmeans4":
        return np.stack([_centres(column) for column in z.T]).astype(np.float32)
    if code == "rq":
        return _residual_books(z, books=books, seed=seed)
    return None


def blank(code: Code, *, width: int, books: int) -> np.ndarray | None:
    """A book of zeros, for who asks for shapes."""
    shapes = {"kmeans4": (width, CENTRES), "rq": (books, VECTORS, width)}
    return np.zeros(shapes[code], np.float32) if code in shapes else None


def _centres(values: np.ndarray) -> np.ndarray:
    """16 rising centres of one dimension, from its quantiles on: no chance involved."""
    start = np.quantile(values, (np.arange(CENTRES) + 0.5) / CENTRES)
    return np.sort(_kmeans(values[:, None], start[:, None])[0][:, 0])


def _residual_books(z: np.ndarray, *, books: int, seed: int) -> np.ndarray:
    if len(z) < VECTORS:
        raise UserError(
            f"residual quantisation needs {VECTORS} rows of the FM window to fit its vectors, but "
            f"there are {len(z)}: use --export.code int4"
        )
    found, rest = [], z.astype(np.float64)
    for k in range(books):
        rng = np.random.default_rng((seed, k))
        start = rest[rng.choice(len(rest), VECTORS, replace=False)]
        book, label = _kmeans(rest, start)
        found.append(book)
        rest = rest - book[label]
    return np.stack(found).astype(np.float32)


def _kmeans(points: np.ndarray, start: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Centres and the number of every point's; a centre that loses its points stays where it is."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "One of the clusters is empty")
        return kmeans2(points, start, iter=ITERATIONS, minit="matrix", missing="warn")
