"""What codes look like: how many directions they use, their range, what each number is about."""

from typing import Any

import numpy as np
from scipy.stats import rankdata

from loopfm_jax.progress import say


def spectrum(z: np.ndarray) -> dict[str, Any]:
    """Singular values of centred codes [rows, Z], the share of variance in the largest ones, and
    the effective rank: the exponential of the entropy of these shares."""
    values = np.linalg.svd(z - z.mean(axis=0), compute_uv=False)
    share = values**2 / np.square(values).sum()
    positive = share[share > 0]
    return {
        "singular_values": values.tolist(),
        "top_4": float(share[:4].sum()),
        "top_8": float(share[:8].sum()),
        "effective_rank": float(np.exp(-(positive * np.log(positive)).sum())),
    }


def spread(z: np.ndarray) -> dict[str, Any]:
    """Range, norms, and how many dimensions vary at all."""
    norm = np.linalg.norm(z, axis=1)
    return {
        "width": z.shape[1],
        "used": int((z.std(axis=0) > 1e-3).sum()),
        "low": float(z.min()),
        "high": float(z.max()),
        "norm": float(norm.mean()),
        "norm_sd": float(norm.std()),
    }


def profiles(z: np.ndarray, soft: np.ndarray, outcome: np.ndarray) -> dict[str, Any]:
    """Pearson correlation of every dimension with the soft label and with the outcome, and the
    rank correlation of these two profiles."""
    with_soft, with_outcome = (_pearson(z, y.astype(np.float64)) for y in (soft, outcome))
    ranks = np.corrcoef(rankdata(with_soft), rankdata(with_outcome))
    return {
        "with_soft_label": with_soft.tolist(),
        "with_outcome": with_outcome.tolist(),
        "profiles_agree": float(ranks[0, 1]) if z.shape[1] > 1 else None,
    }


def _pearson(z: np.ndarray, y: np.ndarray) -> np.ndarray:
    z, y = z - z.mean(axis=0), y - y.mean()
    scale = np.linalg.norm(z, axis=0) * np.linalg.norm(y)
    return z.T @ y / np.where(scale > 0, scale, 1)


def principal(z: np.ndarray) -> np.ndarray:
    """The first two principal components, [rows, 2]."""
    centred = z - z.mean(axis=0)
    return centred @ np.linalg.svd(centred, full_matrices=False)[2][:2].T


def neighbours(z: np.ndarray) -> np.ndarray | None:
    """t-SNE [rows, 2]; None, with the reason on stderr, without scikit-learn."""
    try:
        from sklearn.manifold import TSNE
    except ImportError:
        say("analyse: no t-SNE picture, scikit-learn is not installed (pip install scikit-learn)")
        return None
    return TSNE(init="pca", random_state=0).fit_transform(z)
