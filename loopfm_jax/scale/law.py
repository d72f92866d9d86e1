"""The power law: rate = a * size^-b, least squares in logarithms, with a 95 % band of its mean.

Interval and band are those of simple linear regression (Student's t with n - 2 degrees of
freedom); they suppose independent errors of one relative size, which sizes measured one after the
other on one machine have only roughly. Where small sizes are bound by something else than
arithmetic, the points bend and R2 says so.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import t as student

LEVEL = 0.95
POOR, CLOSE = 0.9, 0.1
"""An R2 below this is said to be poor, unless the points lie as close to the line as this (residual
standard deviation, about a share of the rate): of a flat line there is nothing to explain."""


@dataclass(frozen=True)
class Law:
    """rate = exp(log_a) * size^-b, from n points; `low` and `high` enclose b at the level 95 %."""

    b: float
    low: float
    high: float
    log_a: float
    r2: float
    n: int
    mean_x: float
    """Mean of log size, sum of squares about it, and residual standard deviation."""
    square_x: float
    residual: float

    def at(self, size: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Rate, and the band's lower and upper end, [sizes] each."""
        x = np.log(size)
        y = self.log_a - self.b * x
        error = self.residual * np.sqrt(1 / self.n + (x - self.mean_x) ** 2 / self.square_x)
        half = _quantile(self.n) * error
        return np.exp(y), np.exp(y - half), np.exp(y + half)

    @property
    def poor(self) -> bool:
        return self.r2 < POOR and self.residual > CLOSE


def fit(size: Sequence[float], rate: Sequence[float]) -> Law | None:
    """The law of these points; None of fewer than three sizes, of which no interval is known."""
    x, y = np.log(np.asarray(size, np.float64)), np.log(np.asarray(rate, np.float64))
    n = len(np.unique(x))
    if n < 3 or n < len(x):
        return None
    mean_x, mean_y = x.mean(), y.mean()
    square_x = float(((x - mean_x) ** 2).sum())
    slope = float(((x - mean_x) * (y - mean_y)).sum() / square_x)
    left = y - mean_y - slope * (x - mean_x)
    residual = float(np.sqrt((left**2).sum() / (n - 2)))
    total = float(((y - mean_y) ** 2).sum())
    half = _quantile(n) * residual / np.sqrt(square_x)
    return Law(
        b=-slope,
        low=float(-slope - half),
        high=float(-slope + half),
        log_a=float(mean_y - slope * mean_x),
        r2=1 - float((left**2).sum()) / total if total else 0.0,
        n=n,
        mean_x=float(mean_x),
        square_x=square_x,
        residual=residual,
    )


def _quantile(n: int) -> float:
    return float(student.ppf((1 + LEVEL) / 2, n - 2))
