"""The embedded data set: a simulated feed whose every click probability is known.

Users have a static taste over topics and a current interest that drifts (it stays with probability
2^(-dt / half-life), else it is redrawn from the taste). A request shows a slate of items; an item
is clicked more when its topic is the interest. The interest is never logged. What betrays it: past
clicks, what a personalising feed shows, and `signal`, which only the foundation model sees. So a
log of the FM's past embeddings is worth something to a model that sees neither, and `bayes.py`
says exactly how much: the truth columns are the best log loss anyone can reach.

Simplifications, so that everything stays computable: rows of a slate are drawn independently (an
item may appear twice), and request times do not depend on the interest.

    U users    I items    R requests    K rows of a slate    C topics
"""

from dataclasses import dataclass

import numpy as np
import polars as pl

from loopfm_jax.data.bayes import Floats, Requests, click_probabilities
from loopfm_jax.data.feed import (
    SURFACES,
    Feed,
    FeedConfig,
    base_logit,
    draw_feed,
    draw_users,
    sigmoid,
)
from loopfm_jax.data.raw import Card, Column, RawLog, Windows
from loopfm_jax.data.shelf import Shelf, draw_shelf
from loopfm_jax.units import DAY_MS

START_MS = 1_704_067_200_000
"""2024-01-01T00:00:00Z."""


@dataclass(frozen=True)
class Synthetic(FeedConfig):
    """Simulated feed. Same knobs and seed, same log; another `gap` leaves the clicks as they are.

    Truth columns, P(click | ...): those of `bayes.TRUTH` (definitions there), then `oracle`. Their
    NE on the default test window, in this order: .899, .874, .840, .807, .805, .784, .768.
    """

    name: str = "synthetic"
    windows: Windows = Windows()

    @property
    def card(self) -> Card:
        return Card(description="A simulated feed whose every click probability is known.")

    def fingerprint(self) -> dict[str, str]:
        return {}

    def read(self) -> RawLog:
        """Simulates the log; about 4 seconds and 1 GB for 3 million rows on one core."""
        streams = np.random.SeedSequence(self.seed).spawn(5)
        people, goods, visits, signals, clicks = (np.random.default_rng(s) for s in streams)
        users = draw_users(self, people)
        places, life = self.topics * self.items_per_topic, self.item_half_life_days
        shelf = draw_shelf(
            goods, places=places, days=self.days, half_life_days=life, appeal=self.appeal
        )
        feed = draw_feed(self, users, shelf, visits)
        noise_R = signals.integers(self.topics, size=len(feed.user_R))
        true_R = signals.random(len(feed.user_R)) < self.gap
        logit_RK = base_logit(self, users, shelf, feed)
        on_RK, off_RK = sigmoid(logit_RK + self.strength), sigmoid(logit_RK)
        oracle_RK = np.where(feed.topic_RK == feed.interest_R[:, None], on_RK, off_RK)
        requests = Requests(
            user_R=feed.user_R,
            stay_R=feed.stay_R,
            signal_R=np.where(true_R, feed.interest_R, noise_R),
            topic_RK=feed.topic_RK,
            click_RK=clicks.random(oracle_RK.shape) < oracle_RK,
            on_topic_RK=on_RK,
            off_topic_RK=off_RK,
        )
        truth = click_probabilities(users.law, requests) | {"oracle": oracle_RK}
        return RawLog(
            frame=_frame(self, shelf, feed, requests, truth),
            columns=_columns(item_rows=self.item_rows),
            item=("item_id", "topic"),
            entity=("user_id",),
            behaviour=("item_id", "topic"),
            truth=tuple(truth),
            notes={"users": len(users.bias_U), "items": len(shelf.birth_I)},
        )


def _columns(*, item_rows: int) -> tuple[Column, ...]:
    return (
        *(Column(name) for name in ("user_id", "topic", "hour", "surface")),
        Column("item_id", min_count=3, hashed=item_rows),
        Column("tags", kind="sequence", length=2),
        Column("item_age_days", kind="numeric", log=True),
        Column("signal", fm_only=True),
    )


def _frame(
    knobs: Synthetic, shelf: Shelf, feed: Feed, requests: Requests, truth: dict[str, Floats]
) -> pl.DataFrame:
    """Rows in time order, the last ones cut."""
    by_time_R = np.argsort(feed.time_R, kind="stable")
    row = np.repeat(by_time_R, knobs.slate)[: knobs.rows]

    def flat(array_RK: np.ndarray) -> np.ndarray:
        return array_RK[by_time_R].reshape(-1)[: knobs.rows]

    item = flat(feed.item_RK)
    tags = pl.Series(shelf.tags_I2).arr.to_list().list.unique(maintain_order=True)
    return pl.DataFrame(
        {
            "key": feed.user_R[row],
            "time": feed.time_R[row] + START_MS,
            "group": np.arange(len(row)) // knobs.slate,
            "label": flat(requests.click_RK).astype(np.int8),
            "user_id": feed.user_R[row],
            "item_id": item,
            "topic": flat(feed.topic_RK),
            "hour": feed.hour_R[row],
            "surface": pl.Series(list(SURFACES)).gather(feed.surface_R[row]),
            "tags": tags.gather(item),
            "item_age_days": (feed.time_R[row] - shelf.birth_I[item]) / DAY_MS,
            "signal": requests.signal_R[row],
            **{name: flat(p_RK) for name, p_RK in truth.items()},
        }
    )
