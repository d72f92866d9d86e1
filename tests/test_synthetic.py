"""The simulated log: exact row counts, and truth columns that are what they claim to be."""

import dataclasses
import itertools
import time

import numpy as np
import polars as pl
import pytest
from polars.testing import assert_frame_equal

from loopfm_jax.data.bayes import TRUTH, Law, Requests, click_probabilities
from loopfm_jax.data.raw import Windows
from loopfm_jax.data.synthetic import Synthetic
from loopfm_jax.errors import UserError

COLUMNS = (*TRUTH, "oracle")


@pytest.fixture(scope="module")
def frame() -> pl.DataFrame:
    return Synthetic().read().frame


def normalised_entropy(frame: pl.DataFrame, name: str) -> float:
    click, p = frame["label"].to_numpy(), frame[name].to_numpy()
    loss = -np.mean(np.where(click, np.log(p), np.log(1 - p)))
    rate = click.mean()
    return loss / -(rate * np.log(rate) + (1 - rate) * np.log(1 - rate))


def test_describes_the_log_it_delivers(frame):
    raw = Synthetic(rows=1000).read()
    assert raw.truth == COLUMNS
    assert {c.name for c in raw.columns if c.fm_only} == {"signal"}
    features = {c.name for c in raw.columns}
    assert set(raw.frame.columns) == {"key", "time", "group", "label", *features, *raw.truth}
    assert not features & set(raw.truth)
    assert raw.frame.null_count().sum_horizontal().item() == 0
    assert set(raw.frame["tags"].list.len()) == {1, 2}
    assert frame["item_age_days"].min() >= 0  # pyright: ignore[reportOptionalOperand]
    assert Synthetic().windows == Windows()
    assert 590 < frame["key"].n_unique() <= 600
    assert 0.2 < frame["label"].mean() < 0.3


@pytest.mark.parametrize("rows, slate", [(100, 1), (1000, 3), (1001, 4), (2500, 32)])
def test_delivers_exactly_the_rows_asked_for(rows, slate):
    frame = Synthetic(rows=rows, slate=slate, rows_per_user=50).read().frame
    assert len(frame) == rows
    sizes = frame["group"].value_counts()["count"].to_list()
    assert sorted(sizes)[1:] == [slate] * (len(sizes) - 1)


def test_rows_of_a_slate_are_one_moment(frame):
    assert frame["time"].is_sorted()
    moments = frame.select("group", "key", "time", "signal").unique()
    assert len(moments) == frame["group"].n_unique()
    assert not moments.select("key", "time").is_duplicated().any()


def test_a_crowded_user_has_no_ties():
    frame = Synthetic(rows=100_000, slate=1, rows_per_user=100_000, days=1).read().frame
    assert frame["key"].n_unique() == 1
    assert frame["time"].n_unique() == len(frame)


def test_seed_decides_everything():
    config = Synthetic(rows=3000, seed=7)
    assert_frame_equal(config.read().frame, config.read().frame)
    other = dataclasses.replace(config, seed=8).read().frame
    assert not config.read().frame["label"].equals(other["label"])


def test_gap_leaves_the_world_alone():
    world = [Synthetic(rows=3000, gap=gap).read().frame for gap in (0.0, 0.9)]
    same = [c for c in world[0].columns if c not in {"signal", *TRUTH}]
    assert_frame_equal(world[0].select(same), world[1].select(same))
    assert not world[0]["signal"].equals(world[1]["signal"])


@pytest.mark.parametrize("name", COLUMNS)
def test_truth_is_calibrated(frame, name):
    """Means agree overall, per tenth of the prediction and where the signal (mis)matches."""
    p, click = frame[name].to_numpy(), frame["label"].to_numpy()
    # These columns do not claim to know the signal of their own row.
    told = name in ("bayes_fm_history", "oracle")
    match = (frame["signal"] == frame["topic"]).to_numpy()
    tenth = np.argsort(np.argsort(p)) * 10 // len(p)
    parts = [p >= 0, *(tenth == i for i in range(10)), *([match, ~match] if told else [])]
    for part in parts:
        sigma = np.sqrt(np.sum(p[part] * (1 - p[part]))) / part.sum()
        assert abs(p[part].mean() - click[part].mean()) < 4 * sigma


def test_more_knowledge_is_less_entropy(frame):
    ne = {name: normalised_entropy(frame, name) for name in COLUMNS}
    for told in (
        ("bayes_vm", "bayes_vm_items", "bayes_vm_raw_history", "bayes_vm_history"),
        ("bayes_vm_items", "bayes_vm_codes", "bayes_vm_history", "bayes_fm_history", "oracle"),
    ):
        assert all(ne[less] - ne[more] > 0.001 for less, more in itertools.pairwise(told))
    late = frame.filter(pl.col("time") > pl.col("time").quantile(0.85))
    gain = normalised_entropy(late, "bayes_vm") - normalised_entropy(late, "bayes_vm_history")
    assert gain >= 0.02


def test_without_gap_the_signal_is_worth_nothing():
    frame = Synthetic(rows=5000, gap=0.0).read().frame
    for name in ("bayes_vm_history", "bayes_fm_history"):
        np.testing.assert_allclose(frame[name], frame["bayes_vm_raw_history"], rtol=1e-9)
    np.testing.assert_allclose(frame["bayes_vm_codes"], frame["bayes_vm_items"], rtol=1e-9)


def test_without_strength_there_is_nothing_to_know():
    frame = Synthetic(rows=2000, strength=0.0).read().frame
    for name in TRUTH:
        np.testing.assert_allclose(frame[name], frame["oracle"], rtol=1e-9)


def test_extreme_knobs_stay_finite():
    frame = Synthetic(rows=2000, slate=32, gap=1.0, personalisation=1.0, strength=10.0).read().frame
    for name in COLUMNS:
        assert frame[name].is_between(0, 1).all()


def unseen_share(half_life: float) -> float:
    frame = Synthetic(rows=20_000, item_half_life_days=half_life).read().frame
    span = frame["time"] - frame["time"][0]
    fm, test = frame.filter(span < span[-1] * 0.5), frame.filter(span >= span[-1] * 0.85)
    return float((~test["item_id"].is_in(fm["item_id"].unique().implode())).to_numpy().mean())


def test_item_half_life_decides_how_many_items_are_new():
    shop, week, news = (unseen_share(days) for days in (365.0, 7.0, 0.5))
    assert shop < 0.1 < week < 0.8 < news


@pytest.mark.parametrize(
    "knobs, text",
    [
        ({"gap": 1.5}, "gap is 1.5, but must lie between 0 and 1; set --data.gap"),
        ({"rows": 3}, "--data.rows "),
        ({"item_half_life_days": float("nan")}, "--data.item-half-life-days"),
    ],
)
def test_refuses_impossible_knobs(knobs, text):
    with pytest.raises(UserError, match=text):
        Synthetic(**knobs)


def draw_tiny(rng: np.random.Generator, *, per_user: tuple[int, ...], topics=3, slate=2):
    """A world of arbitrary numbers: the filter has to be right for all of them."""
    user_R = np.repeat(np.arange(len(per_user)), per_user)
    shape = (len(user_R), slate)
    first_R = np.diff(user_R, prepend=-1) != 0
    law = Law(
        taste_UC=rng.dirichlet(np.ones(topics), size=len(per_user)),
        popularity_C=rng.dirichlet(np.ones(topics)),
        personalisation=0.4,
        gap=0.6,
    )
    return law, Requests(
        user_R=user_R,
        stay_R=np.where(first_R, 0.0, rng.random(len(user_R))),
        signal_R=rng.integers(topics, size=len(user_R)),
        topic_RK=rng.integers(topics, size=shape),
        click_RK=rng.random(shape) < 0.5,
        on_topic_RK=rng.random(shape),
        off_topic_RK=rng.random(shape),
    )


def enumerate_paths(law: Law, log: Requests, rows: list[int], row: int, k: int, name: str) -> float:
    """P(click of (row, k)) by summing over every path of the interest up to `row`."""
    topics = range(len(law.popularity_C))
    user = log.user_R[row]
    past = rows[: rows.index(row)]

    def shown(r, k, s):
        topic = log.topic_RK[r, k]
        return (
            law.personalisation * (topic == s) + (1 - law.personalisation) * law.popularity_C[topic]
        )

    def click(r, k, s):
        return (log.on_topic_RK if log.topic_RK[r, k] == s else log.off_topic_RK)[r, k]

    def signal(r, s):
        return law.gap * (log.signal_R[r] == s) + (1 - law.gap) / len(topics)

    total = clicked = 0.0
    for path in itertools.product(topics, repeat=len(past) + 1):
        p, before = 1.0, None
        for r, s in zip([*past, row], path, strict=True):
            stay = log.stay_R[r]
            p *= stay * (s == before) + (1 - stay) * law.taste_UC[user, s]
            before = s
            if r == row:
                break
            if name != "bayes_vm":
                for j in range(log.topic_RK.shape[1]):
                    p *= shown(r, j, s)
                    if name not in ("bayes_vm_items", "bayes_vm_codes"):
                        hit = click(r, j, s)
                        p *= hit if log.click_RK[r, j] else 1 - hit
            if name in ("bayes_vm_codes", "bayes_vm_history", "bayes_fm_history"):
                p *= signal(r, s)
        p *= shown(row, k, path[-1])
        if name == "bayes_fm_history":
            p *= signal(row, path[-1])
        total += p
        clicked += p * click(row, k, path[-1])
    return clicked / total


@pytest.mark.parametrize("seed", range(3))
def test_filter_equals_the_sum_over_all_paths(seed):
    law, log = draw_tiny(np.random.default_rng(seed), per_user=(2, 0, 5, 1))
    found = click_probabilities(law, log)
    assert tuple(found) == TRUTH
    for row, k, name in itertools.product(range(8), range(2), TRUTH):
        rows = np.flatnonzero(log.user_R == log.user_R[row]).tolist()
        expected = enumerate_paths(law, log, rows, row, k, name)
        np.testing.assert_allclose(found[name][row, k], expected, rtol=1e-10)


def test_history_is_strictly_earlier():
    """Another outcome and signal of a request move only later requests of the same user."""
    law, log = draw_tiny(np.random.default_rng(0), per_user=(3, 4, 3))
    other = dataclasses.replace(log, click_RK=log.click_RK.copy(), signal_R=log.signal_R.copy())
    other.click_RK[4] = ~other.click_RK[4]
    other.signal_R[4] = (other.signal_R[4] + 1) % 3
    before, after = click_probabilities(law, log), click_probabilities(law, other)
    moved = {n: np.flatnonzero(np.any(before[n] != after[n], axis=1)).tolist() for n in TRUTH}
    assert moved == {
        "bayes_vm": [],
        "bayes_vm_items": [],
        "bayes_vm_raw_history": [5, 6],
        "bayes_vm_codes": [5, 6],
        "bayes_vm_history": [5, 6],
        "bayes_fm_history": [4, 5, 6],
    }


def test_a_million_rows():
    start = time.perf_counter()
    assert len(Synthetic(rows=1_000_000).read().frame) == 1_000_000
    print(f"1,000,000 simulated rows in {time.perf_counter() - start:.1f} s")
