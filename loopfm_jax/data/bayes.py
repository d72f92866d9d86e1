"""Exact click probabilities of a simulated log whose users have one hidden, drifting interest.

"Bayes" means: every static parameter (tastes, click logits, exposure) is known and only the
interest is not. It is a hidden Markov chain per user, so a forward filter gives the exact
P(interest | log so far); a click then depends on the interest only through "is it the topic
shown?". No learned model beats these numbers on average, and a learned one, which must also
estimate the parameters, stays some way behind. One row is judged on its own features; the other
rows of its slate count only once they are the past. The past is the whole log, also where a
store of embeddings starts later.

    U users    R requests, sorted by (user, time)    K rows of a slate    C topics
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

TRUTH = (
    "bayes_vm",
    "bayes_vm_items",
    "bayes_vm_raw_history",
    "bayes_vm_codes",
    "bayes_vm_history",
    "bayes_fm_history",
)
"""What `click_probabilities` returns, worst informed first."""

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Law:
    """How interest moves and how it shows; all of it is known to the filter."""

    taste_UC: Floats
    """Each user's static distribution: the first interest and every new one is drawn from it."""
    popularity_C: Floats
    personalisation: float
    """P(topic c shown | interest s) = personalisation [c = s] + (1 - personalisation) popularity_c,
    independently for every row of a slate."""
    gap: float
    """P(signal c | interest s) = gap [c = s] + (1 - gap) / C."""


@dataclass(frozen=True)
class Requests:
    """The log, and what a click would be worth under either answer to "is it the interest?"."""

    user_R: Ints
    stay_R: Floats
    """P(no jump of the interest since the user's previous request); 0 at the first one."""
    signal_R: Ints
    topic_RK: Ints
    click_RK: NDArray[np.bool_]
    on_topic_RK: Floats
    """P(click | the interest is the topic shown)."""
    off_topic_RK: Floats


def click_probabilities(law: Law, requests: Requests) -> dict[str, Floats]:
    """P(click | ...) of every row, (R, K) per name; "earlier" is strictly before this request.

    bayes_vm: the row's features without `signal`. bayes_vm_items: and the items of all earlier
    requests; bayes_vm_raw_history: their clicks, too; bayes_vm_codes: their signals, but no
    clicks, as codes of an FM would tell. bayes_vm_history: items, clicks and signals of earlier
    requests; bayes_fm_history: and the row's own signal.
    """
    shown_RC, seen_RC = (_slate_likelihood(law, requests, clicks=c) for c in (False, True))
    read_RC = _signal_likelihood(law, requests.signal_R)
    taste_RC = law.taste_UC[requests.user_R]
    past_RC = predict_interest(law, requests, seen_RC * read_RC)
    beliefs = (
        taste_RC,
        predict_interest(law, requests, shown_RC),
        predict_interest(law, requests, seen_RC),
        predict_interest(law, requests, shown_RC * read_RC),
        past_RC,
        past_RC * read_RC,
    )
    return {name: _click_given(b, law, requests) for name, b in zip(TRUTH, beliefs, strict=True)}


def predict_interest(law: Law, requests: Requests, likelihood_RC: Floats) -> Floats:
    """P(interest at a request | evidence of the user's earlier requests), (R, C).

    `likelihood_RC` is P(a request's evidence | interest). Users advance side by side, the busiest
    first, so that those who still have a request are always a prefix.
    """
    count_U = np.bincount(requests.user_R, minlength=len(law.taste_UC))
    start_U = np.cumsum(count_U) - count_U
    busiest_U = np.argsort(-count_U, kind="stable")
    count_U, start_U, taste_UC = count_U[busiest_U], start_U[busiest_U], law.taste_UC[busiest_U]
    belief_UC, predicted_RC = taste_UC.copy(), np.empty_like(likelihood_RC)
    for step in range(count_U[0]):
        users = int(np.searchsorted(-count_U, -step))
        rows = start_U[:users] + step
        stay = requests.stay_R[rows, None]
        predicted = stay * belief_UC[:users] + (1 - stay) * taste_UC[:users]
        predicted_RC[rows] = predicted
        joint = predicted * likelihood_RC[rows]
        belief_UC[:users] = joint / joint.sum(axis=1, keepdims=True)
    return predicted_RC


def _shown(law: Law, topic_RK: Ints) -> tuple[Floats, Floats]:
    """P(the topic shown | it is the interest), P(the topic shown | it is not)."""
    other_RK = (1 - law.personalisation) * law.popularity_C[topic_RK]
    return law.personalisation + other_RK, other_RK


def _slate_likelihood(law: Law, requests: Requests, *, clicks: bool) -> Floats:
    """P(topics of a slate, and its clicks or not | interest), (R, C)."""
    on_RK, off_RK = _shown(law, requests.topic_RK)
    if clicks:
        click_RK, if_on_RK, if_off_RK = (
            requests.click_RK,
            requests.on_topic_RK,
            requests.off_topic_RK,
        )
        on_RK = on_RK * np.where(click_RK, if_on_RK, 1 - if_on_RK)
        off_RK = off_RK * np.where(click_RK, if_off_RK, 1 - if_off_RK)
    topics_C = np.arange(len(law.popularity_C))
    likelihood_RC = np.ones((len(requests.user_R), len(topics_C)))
    for topic_R, on_R, off_R in zip(requests.topic_RK.T, on_RK.T, off_RK.T, strict=True):
        likelihood_RC *= np.where(topic_R[:, None] == topics_C, on_R[:, None], off_R[:, None])
    return likelihood_RC


def _signal_likelihood(law: Law, signal_R: Ints) -> Floats:
    """P(signal | interest), (R, C)."""
    topics = len(law.popularity_C)
    return law.gap * (signal_R[:, None] == np.arange(topics)) + (1 - law.gap) / topics


def _click_given(belief_RC: Floats, law: Law, requests: Requests) -> Floats:
    """P(click), (R, K), from an unnormalised belief and the evidence of the row's own topic."""
    shown_on_RK, shown_off_RK = _shown(law, requests.topic_RK)
    match_RK = np.take_along_axis(belief_RC, requests.topic_RK, axis=1)
    other_RK = np.maximum(belief_RC.sum(axis=1, keepdims=True) - match_RK, 0)
    on_RK, off_RK = match_RK * shown_on_RK, other_RK * shown_off_RK
    return (on_RK * requests.on_topic_RK + off_RK * requests.off_topic_RK) / (on_RK + off_RK)
