"""Items that come and go: shelf places with one occupant at a time, for the simulated log.

I items    R requests    K rows of a slate
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.random import Generator

from loopfm_jax.data.bayes import Floats, Ints
from loopfm_jax.units import DAY_MS

TAGS = 40
TAG, OWN = 0.5, 0.3
"""Standard deviations of quality: what a tag brings, and what is the item's own."""


@dataclass(frozen=True)
class Shelf:
    """Every item that was ever on offer, sorted by (place, birth)."""

    place_I: Ints
    birth_I: Ints
    """Milliseconds since the start of the log; negative for the first occupants."""
    tags_I2: Ints
    """Twice the same where an item has one tag."""
    quality_I: Floats
    """Added to the click logit."""

    def occupants(self, place_RK: Ints, time_R: Ints, *, span: int) -> Ints:
        """The items at these places at these times, all of them before `span`."""
        arrival_I = self.place_I * span + np.maximum(self.birth_I, 0)
        return np.searchsorted(arrival_I, place_RK * span + time_R[:, None], side="right") - 1


def draw_shelf(
    rng: Generator, *, places: int, days: int, half_life_days: float, appeal: float
) -> Shelf:
    """Occupants are replaced at exponential times; the first ones are already some age."""
    span, life = days * DAY_MS, half_life_days * DAY_MS / math.log(2)
    successors = rng.poisson(span / life, size=places)
    place_I = np.concatenate([np.arange(places), np.repeat(np.arange(places), successors)])
    birth_I = np.concatenate(
        [-rng.exponential(life, size=places), rng.uniform(0, span, size=successors.sum())]
    ).astype(np.int64)
    order = np.lexsort((birth_I, place_I))
    items = len(order)
    one_I, step_I = rng.integers(TAGS, size=items), rng.integers(TAGS, size=items)
    second_I = np.where(rng.random(items) < 0.5, one_I, (one_I + step_I) % TAGS)
    tags_I2 = np.stack([one_I, second_I], axis=1)
    tag_quality = TAG * rng.standard_normal(TAGS)
    return Shelf(
        place_I=place_I[order],
        birth_I=birth_I[order],
        tags_I2=tags_I2,
        quality_I=appeal * (tag_quality[tags_I2].mean(axis=1) + OWN * rng.standard_normal(items)),
    )
