"""The simulated feed: who comes when, what is shown, and the logit of a click on it.

U users    I items    R requests    K rows of a slate    C topics
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.random import Generator

from loopfm_jax.data.bayes import Floats, Ints, Law
from loopfm_jax.data.shelf import OWN, TAG, Shelf
from loopfm_jax.errors import UserError
from loopfm_jax.units import DAY_MS

# Sizes of effects on the click logit (standard deviations, but FRESHNESS: lift of a new item).
USER, AFFINITY, FRESHNESS, DAYTIME = 0.4, 0.3, 0.3, 0.15
SURFACES = {"feed": 0.0, "search": 0.3, "related": -0.2}
TASTE = 0.7
"""Dirichlet parameter of a user's taste: below 1 a user prefers few topics."""

LIMITS: dict[str, tuple[float, float]] = {
    "seed": (0, 2**63 - 1),
    "rows": (100, 50_000_000),
    "rows_per_user": (1, 100_000),
    "slate": (1, 32),
    "days": (1, 366),
    "topics": (2, 64),
    "items_per_topic": (1, 100_000),
    "item_half_life_days": (0.01, 1e6),
    "item_rows": (0, 10_000_000),
    "interest_half_life_days": (0.001, 1e6),
    "appeal": (0, 10),
    "trend": (0, 10),
    "trend_half_life_days": (0.01, 1e6),
    "strength": (0, 10),
    "personalisation": (0, 1),
    "gap": (0, 1),
    "click_rate": (0.001, 0.9),
}
"""Knob: smallest and largest value."""


@dataclass(frozen=True)
class FeedConfig:
    """Knobs of the simulation."""

    seed: int = 0
    rows: int = 60_000
    """Exactly so many impressions; the number of users follows from `rows_per_user`."""
    rows_per_user: int = 100
    """On average; activity varies between users."""
    slate: int = 3
    """Items shown together, at one time; the last request is cut where `rows` asks for it."""
    days: int = 14
    topics: int = 8
    items_per_topic: int = 50
    """On offer at any one time, with Zipf popularity."""
    item_half_life_days: float = 60.0
    """After it half of the items are replaced: 365 is a shop, 0.5 is news."""
    item_rows: int = 0
    """Rows of the item table, by hashing: new items are learned as they come. 0 = one row per
    item of the FM window, new ones share the unknown id."""
    interest_half_life_days: float = 2.0
    """How long a current interest lasts; what history is worth falls with its age on this scale."""
    appeal: float = 1.0
    """How much items differ by themselves; with a short half-life, what an old FM cannot know."""
    trend: float = 0.0
    """How much topics differ in appeal on a day; what was true of one last week may be wrong."""
    trend_half_life_days: float = 2.0
    """After it half of a topic's appeal is forgotten."""
    strength: float = 2.5
    """Logit difference between an item of the current interest and any other item."""
    personalisation: float = 0.1
    """Share of rows whose topic is the current interest; the rest follows topic popularity."""
    gap: float = 0.8
    """Share of `signal` readings that are true, the rest are noise; 0 = no feature gap."""
    click_rate: float = 0.25
    """About this share of rows is clicked."""

    def __post_init__(self) -> None:
        for name, (low, high) in LIMITS.items():
            if not low <= (value := getattr(self, name)) <= high:
                raise UserError(
                    f"synthetic data: {name} is {value}, but must lie between {low:g} and "
                    f"{high:g}; set --data.{name.replace('_', '-')} within these limits"
                )


@dataclass(frozen=True)
class Users:
    law: Law
    activity_U: Floats
    """Share of all requests."""
    bias_U: Floats
    affinity_UC: Floats


@dataclass(frozen=True)
class Feed:
    """What was shown when, sorted by (user, time), and the hidden interest behind it."""

    user_R: Ints
    time_R: Ints
    """Milliseconds since START_MS, distinct within a user."""
    stay_R: Floats
    interest_R: Ints
    surface_R: Ints
    topic_RK: Ints
    item_RK: Ints

    @property
    def hour_R(self) -> Ints:
        return self.time_R // 3_600_000 % 24


def draw_users(knobs: FeedConfig, rng: Generator) -> Users:
    users, topics = max(1, knobs.rows // knobs.rows_per_user), knobs.topics
    activity_U = rng.gamma(2.0, size=users)
    taste_UC = rng.dirichlet(np.full(topics, TASTE), size=users) + 1e-3  # no topic is impossible
    return Users(
        law=Law(
            taste_UC=taste_UC / taste_UC.sum(axis=1, keepdims=True),
            popularity_C=rng.dirichlet(np.full(topics, 10.0)),
            personalisation=knobs.personalisation,
            gap=knobs.gap,
        ),
        activity_U=activity_U / activity_U.sum(),
        bias_U=USER * rng.standard_normal(users),
        affinity_UC=AFFINITY * rng.standard_normal((users, topics)),
    )


def draw_feed(knobs: FeedConfig, users: Users, shelf: Shelf, rng: Generator) -> Feed:
    requests, law = -(-knobs.rows // knobs.slate), users.law
    user_R, time_R = _draw_visits(knobs, users.activity_U, requests, rng)
    first_R = np.diff(user_R, prepend=-1) != 0
    waited_days_R = np.diff(time_R, prepend=0) / DAY_MS
    half_life = knobs.interest_half_life_days
    stay_R = np.where(first_R, 0.0, 0.5 ** (np.maximum(waited_days_R, 0) / half_life))

    # A new interest is drawn at every request; the one of the last jump is in force.
    fresh_R = (rng.random((requests, 1)) >= law.taste_UC.cumsum(axis=1)[user_R, :-1]).sum(axis=1)
    jump_R = rng.random(requests) >= stay_R
    interest_R = fresh_R[np.maximum.accumulate(np.where(jump_R, np.arange(requests), 0))]

    shape = (requests, knobs.slate)
    popular_RK = rng.choice(knobs.topics, p=law.popularity_C, size=shape)
    topic_RK = np.where(rng.random(shape) < law.personalisation, interest_R[:, None], popular_RK)
    zipf = 1 / np.arange(1, knobs.items_per_topic + 1)
    rank_RK = rng.choice(knobs.items_per_topic, p=zipf / zipf.sum(), size=shape)
    place_RK = topic_RK * knobs.items_per_topic + rank_RK
    return Feed(
        user_R=user_R,
        time_R=time_R,
        stay_R=stay_R,
        interest_R=interest_R,
        surface_R=rng.choice(len(SURFACES), p=[0.6, 0.2, 0.2], size=requests),
        topic_RK=topic_RK,
        item_RK=shelf.occupants(place_RK, time_R, span=2 * knobs.days * DAY_MS),
    )


def _draw_visits(
    knobs: FeedConfig, activity_U: Floats, requests: int, rng: Generator
) -> tuple[Ints, Ints]:
    """(user_R, time_R) sorted by both; busy evenings, quiet mornings, no tie within a user."""
    wave = 1 - 0.8 * np.sin(2 * np.pi * np.arange(24) / 24)
    hour = rng.choice(24, p=wave / wave.sum(), size=requests)
    day = rng.integers(knobs.days, size=requests)
    time = (day * 24 + hour) * 3_600_000 + rng.integers(3_600_000, size=requests)
    stride = 2 * knobs.days * DAY_MS
    packed = np.sort(rng.choice(len(activity_U), p=activity_U, size=requests) * stride + time)
    packed = np.maximum.accumulate(packed - np.arange(requests)) + np.arange(requests)
    return packed // stride, packed % stride


def base_logit(knobs: FeedConfig, users: Users, shelf: Shelf, feed: Feed) -> Floats:
    """Click logit of every row if its topic is not the interest, (R, K)."""
    surface = np.array(list(SURFACES.values()))
    context_R = DAYTIME * np.cos(2 * np.pi * feed.hour_R / 24) + surface[feed.surface_R]
    age_days_RK = (feed.time_R[:, None] - shelf.birth_I[feed.item_RK]) / DAY_MS
    return (
        _click_bias(knobs, users)
        + (users.bias_U[feed.user_R] + context_R)[:, None]
        + users.affinity_UC[feed.user_R[:, None], feed.topic_RK]
        + shelf.quality_I[feed.item_RK]
        + _draw_trend(knobs)[feed.topic_RK, (feed.time_R // DAY_MS)[:, None]]
        + FRESHNESS * np.exp(-age_days_RK)
        - knobs.strength / knobs.topics
    )


def _draw_trend(knobs: FeedConfig) -> Floats:
    """Appeal of every topic on every day, (C, days): forgotten and renewed at a constant rate."""
    rng = np.random.default_rng((knobs.seed, 1))
    kept = 0.5 ** (1 / knobs.trend_half_life_days)
    noise_CD = knobs.trend * rng.standard_normal((knobs.topics, knobs.days))
    trend_CD = noise_CD.copy()
    for day in range(1, knobs.days):
        fresh_C = math.sqrt(1 - kept**2) * noise_CD[:, day]
        trend_CD[:, day] = kept * trend_CD[:, day - 1] + fresh_C
    return trend_CD


def _click_bias(knobs: FeedConfig, users: Users) -> float:
    """The constant that gives `click_rate` on average over users, interests, topics and items.

    Found from the parameters alone: a constant fitted to the drawn rows would carry a trace of
    the hidden interests, and the truth columns would no longer be exact.
    """
    law, some = users.law, slice(2000)
    same_CC = np.eye(knobs.topics)
    shown_CC = law.personalisation * same_CC + (1 - law.personalisation) * law.popularity_C
    weight = (users.activity_U[some, None] * law.taste_UC[some])[..., None] * shown_CC
    logit = (users.bias_U[some, None] + users.affinity_UC[some])[:, None, :]
    logit = logit + knobs.strength * (same_CC - 1 / knobs.topics)
    node, node_weight = np.polynomial.hermite_e.hermegauss(5)  # items differ like a Gaussian
    logit = logit[..., None] + knobs.appeal * math.hypot(OWN, TAG) * node
    weight = weight[..., None] * node_weight
    low, high = -30.0, 30.0
    for _ in range(40):
        middle = (low + high) / 2
        rate = np.average(sigmoid(logit + middle), weights=weight)
        low, high = (middle, high) if rate < knobs.click_rate else (low, middle)
    return low


def sigmoid(logit: Floats) -> Floats:
    return 1 / (1 + np.exp(-logit))
