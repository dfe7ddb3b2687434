"""Intervals: known values, honest refusals, and coverage where the truth is known."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from circuitvit.engine import effect
from circuitvit.errors import DataError, OptionError
from circuitvit.verification import (
    Bootstrap,
    Estimate,
    mean_above,
    mean_interval,
    ratio_interval,
    share_interval,
)

numbers = st.lists(st.floats(-100, 100).map(lambda value: round(value, 3)), min_size=1, max_size=30)


@given(numbers)
def test_the_value_is_the_mean_and_lies_in_its_interval(values: list[float]) -> None:
    estimate = mean_interval(values)
    assert estimate.value == pytest.approx(np.mean(values), abs=1e-9)
    assert (estimate.low is None) == (estimate.high is None) == (len(values) < 5)
    if estimate.low is not None and estimate.high is not None:
        assert min(values) - 1e-9 <= estimate.low <= estimate.value + 1e-9
        assert estimate.value - 1e-9 <= estimate.high <= max(values) + 1e-9


def test_a_ratio_of_means_is_not_the_mean_of_ratios() -> None:
    kept, whole = [1.0, 9.0], [2.0, 10.0]
    assert ratio_interval(kept, whole).value == 10 / 12
    assert np.mean(np.divide(kept, whole)) == pytest.approx(0.7)


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_too_few_pairs_have_no_interval(n: int) -> None:
    values = np.arange(1.0, n + 1)
    assert mean_interval(values) == Estimate(values.mean())
    assert ratio_interval(values, values) == Estimate(1.0)
    assert share_interval(values > 0) == Estimate(1.0)


def test_equal_pairs_give_an_interval_of_no_width() -> None:
    assert mean_interval([2.0] * 6) == Estimate(2.0, 2.0, 2.0)
    whole = np.array([3.1, 4.7, 2.9, 5.3, 8.8, 1.7])
    assert ratio_interval(whole, whole) == Estimate(1.0, 1.0, 1.0)
    nothing = ratio_interval(np.zeros(6), whole)
    assert nothing == Estimate(0.0, 0.0, 0.0)


def test_the_same_seed_gives_the_same_interval() -> None:
    values = np.random.default_rng(0).normal(size=12)
    assert mean_interval(values, Bootstrap(seed=3)) == mean_interval(values, Bootstrap(seed=3))
    assert mean_interval(values, Bootstrap(seed=3)) != mean_interval(values, Bootstrap(seed=4))


def test_many_pairs_are_resampled_in_pieces_with_the_same_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    above, below = rng.normal(1, 1, 300), rng.normal(3, 1, 300)
    at_once = ratio_interval(above, below)
    monkeypatch.setattr(effect, "DRAWN_AT_ONCE", 1000)
    in_pieces = ratio_interval(above, below)
    assert (in_pieces.low, in_pieces.high) == pytest.approx((at_once.low, at_once.high), rel=1e-12)


def test_memory_for_an_interval_does_not_grow_with_the_pairs() -> None:
    def peak(n: int) -> int:
        values = np.random.default_rng(0).normal(1, 1, n)
        tracemalloc.start()
        ratio_interval(values, values + 3)
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    peak(10)  # what is imported on the way
    assert peak(20_000) < 1.2 * peak(5_000)


def test_more_confidence_is_a_wider_interval() -> None:
    values = np.random.default_rng(0).exponential(size=12)
    narrow, wide = (mean_interval(values, Bootstrap(level=level)) for level in (0.8, 0.99))
    assert wide.low < narrow.low < narrow.high < wide.high  # type: ignore[operator]


def test_large_samples_agree_with_scipy() -> None:
    """With many pairs the widening fades, and what is left is the BCa interval."""
    rng = np.random.default_rng(0)
    den = rng.exponential(2.0, 400)
    num = 0.7 * den + rng.normal(size=400)
    ours = ratio_interval(num, den, Bootstrap(n_resamples=20_000))
    theirs = stats.bootstrap(
        (num, den),
        lambda x, y, axis: x.mean(axis=axis) / y.mean(axis=axis),
        paired=True,
        n_resamples=20_000,
        method="BCa",
        batch=1000,
    ).confidence_interval
    assert ours.low == pytest.approx(theirs.low, abs=0.005)
    assert ours.high == pytest.approx(theirs.high, abs=0.005)


@pytest.mark.parametrize(("n", "least"), [(5, 0.82), (10, 0.87), (40, 0.90)])
@pytest.mark.parametrize("kind", ["normal mean", "skewed mean", "ratio"])
def test_intervals_cover_the_truth(kind: str, n: int, least: float) -> None:
    """Of 300 draws; bounds lie three standard deviations below what 1500 draws gave."""
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(300):
        ones = np.ones(n)
        if kind == "normal mean":
            num, den, truth = rng.normal(1.0, 1.0, n), ones, 1.0
        elif kind == "skewed mean":
            num, den, truth = rng.exponential(1.0, n), ones, 1.0
        else:
            den, truth = rng.normal(10.0, 3.0, n), 0.7
            num = truth * den + rng.normal(0.0, 2.0, n)
        estimate = ratio_interval(num, den, Bootstrap(n_resamples=500, seed=int(rng.integers(2**31))))
        hits += estimate.low <= truth <= estimate.high  # type: ignore[operator]
    assert least <= hits / 300 <= 0.985


def test_pairing_makes_a_ratio_precise() -> None:
    rng = np.random.default_rng(0)
    whole = rng.exponential(5.0, 30)
    kept = 0.8 * whole + rng.normal(0.0, 0.1, 30)
    paired, shuffled = (ratio_interval(values, whole) for values in (kept, rng.permutation(kept)))
    assert paired.high - paired.low < 0.1 * (shuffled.high - shuffled.low)  # type: ignore[operator]


@pytest.mark.parametrize(
    "denominator",
    [[1.0, -1.0], [5.0, 6.0, -0.1], [0.0], [3.0, -2.0, 2.5, -3.0, 1.0, -1.2], [0.0] * 8],
)
def test_a_ratio_over_something_near_zero_is_refused(denominator: list[float]) -> None:
    with pytest.raises(DataError, match="not distinguishable from 0"):
        ratio_interval([1.0] * len(denominator), denominator)


def test_a_negative_denominator_is_fine() -> None:
    assert ratio_interval([-2.0] * 6, [-4.0] * 6) == Estimate(0.5, 0.5, 0.5)


def test_shares_have_the_exact_interval() -> None:
    estimate = share_interval([True] * 8)
    assert estimate.value == estimate.high == 1.0
    assert estimate.low == pytest.approx(0.025 ** (1 / 8))  # P(8 hits) at the lower end is 2.5 %
    assert share_interval([False] * 8).low == 0.0


@pytest.mark.parametrize("values", [[], [[1.0, 2.0]], [1.0, float("nan")], [float("inf")]])
def test_values_that_are_no_list_of_numbers_are_refused(values: list[float]) -> None:
    with pytest.raises(DataError, match="pair"):
        mean_interval(values)


def test_numerators_and_denominators_must_match() -> None:
    with pytest.raises(DataError, match="2 numerators and 3 denominators"):
        ratio_interval([1.0, 2.0], [1.0, 2.0, 3.0])


@pytest.mark.parametrize("settings", [{"n_resamples": 10}, {"level": 0.0}, {"level": 95}, {"seed": -1}])
def test_settings_without_sense_are_refused(settings: dict[str, int]) -> None:
    with pytest.raises(OptionError):
        Bootstrap(**settings)


# -- p-values and clusters -----------------------------------------------------------------------


@pytest.mark.parametrize("level", [0.8, 0.9, 0.98])
def test_a_p_value_is_the_interval_read_backwards(level: float) -> None:
    values = np.random.default_rng(5).exponential(size=25)
    settings = Bootstrap(n_resamples=20_000, level=level)
    low = mean_interval(values, settings).low
    assert low is not None
    assert mean_above(values, low, settings) == pytest.approx((1 - level) / 2, rel=0.05)


def test_p_values_reject_a_true_null_as_often_as_they_say() -> None:
    rng = np.random.default_rng(0)
    for sign in (1.0, -1.0):
        draws = [sign * (rng.exponential(size=40) - 1) for _ in range(400)]
        rejected = np.mean(
            [(mean_above(draw, 0.0, Bootstrap(n_resamples=400)) or 0) <= 0.05 for draw in draws]
        )
        assert 0.02 <= rejected <= 0.10


def test_p_values_at_the_edges() -> None:
    assert mean_above([1.0] * 4) is None
    assert mean_above([1.0] * 6) == 0.0005
    assert mean_above([0.0] * 6) == 1.0
    assert mean_above([-3.0, -2.0, -1.0, -2.5, -1.5, -2.2]) > 0.95  # type: ignore[operator]


def test_clusters_are_drawn_whole() -> None:
    rng = np.random.default_rng(1)
    centres = rng.normal(size=20)
    values = np.repeat(centres, 5) + rng.normal(scale=0.01, size=100)
    clusters = np.repeat(np.arange(20), 5)
    naive, honest = mean_interval(values), mean_interval(values, clusters=clusters)
    alone = mean_interval(values.reshape(20, 5).mean(axis=1))
    assert honest.value == pytest.approx(naive.value)
    assert honest.low == pytest.approx(alone.low, abs=1e-9)
    assert honest.high - honest.low > 1.8 * (naive.high - naive.low)  # type: ignore[operator]
    assert mean_interval(values, clusters=np.repeat(np.arange(4), 25)).low is None
    assert ratio_interval(values + 5, np.full(100, 2.0), clusters=clusters).low is not None
    with pytest.raises(DataError, match="give one for each"):
        mean_interval(values, clusters=[1, 2])
