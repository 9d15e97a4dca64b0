"""Intervals and paired tests equal values that are published or counted by hand."""

import math

import numpy as np
import pytest

from packhorse.trainer.eval.confidence import interval, mcnemar, newcombe, paired, wilson


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [
        (81, 263, 0.2553, 0.3662),  # Newcombe, Stat. Med. 17, 857-872 (1998), table I, method 3
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilsons_interval_is_the_published_one(successes, n, low, high):
    assert wilson(successes, n) == pytest.approx((low, high), abs=5e-5)


@pytest.mark.parametrize("n", [1, 2, 7, 64, 1000])
def test_wilsons_interval_holds_the_proportion_and_stays_between_0_and_1(n):
    for k in range(n + 1):
        low, high = wilson(k, n)
        assert 0 <= low <= k / n <= high <= 1
        assert low < high


def test_newcombes_interval_is_the_published_one():
    """Cavo et al. 2012, in Fagerland, Lydersen and Laake, Statistical Analysis of Contingency
    Tables, chapter 8.
    """
    low, high = newcombe(both=59, gained=6, lost=16, n=161)
    assert (low, high) == pytest.approx((-0.1186, -0.0046), abs=5e-5)


def test_mcnemars_test_is_a_binomial_one():
    assert mcnemar(0, 0) == 1.0
    assert mcnemar(3, 3) == 1.0
    assert mcnemar(5, 0) == mcnemar(0, 5) == 2 / 2**5
    assert mcnemar(1, 7) == pytest.approx(2 * (1 + 8) / 2**8)
    assert mcnemar(6, 16) == pytest.approx(2 * sum(math.comb(22, k) for k in range(7)) / 2**22)
    assert 0 < mcnemar(0, 1000) < 1e-300


def test_scores_of_0_and_1_have_wilsons_interval_whether_they_are_numbers_or_truths():
    assert interval([1.0, 0.0, 1.0, 1.0]) == interval([True, False, True, True]) == wilson(3, 4)


def test_other_scores_have_the_bootstraps_and_always_the_same():
    scores = list(np.random.default_rng(1).beta(2, 5, size=80))
    low, high = interval(scores)
    assert low < np.mean(scores) < high
    assert interval(scores) == (low, high)
    normal = 1.96 * np.std(scores, ddof=1) / math.sqrt(80)
    assert (high - low) / 2 == pytest.approx(normal, rel=0.1)


def test_the_bootstrap_is_scipys_bca():
    """What scipy.stats.bootstrap (1.17, method BCa, 200,000 resamples) gives for the same skewed
    scores.
    """
    scores = [0.0] * 20 + [0.1] * 8 + [0.25] * 5 + [0.5] * 3 + [0.9, 1.0, 1.0, 1.0]
    assert interval(scores) == pytest.approx(SCIPYS, abs=0.006)


SCIPYS = (0.1113, 0.3038)


@pytest.mark.parametrize("scores", [[0.5], [0.5] * 9])
def test_scores_that_do_not_differ_have_a_point(scores):
    assert interval(scores) == (0.5, 0.5)


def test_nine_in_ten_intervals_and_more_hold_the_mean_that_scores_come_from():
    """Of 200 intervals of 95%; fewer than 180 would come by chance once in a thousand times, and
    the seed is fixed.
    """
    random = np.random.default_rng(0)
    held = 0
    for _ in range(200):
        low, high = interval(list(random.choice([0.0, 0.25, 1.0], size=40, p=[0.5, 0.3, 0.2])))
        held += low <= 0.275 <= high
    assert held >= 180


def test_a_difference_is_the_seconds_less_the_firsts():
    first = [0.0] * 10 + [1.0] * 2 + [0.0] * 5 + [1.0] * 3
    second = [1.0] * 10 + [0.0] * 2 + [0.0] * 5 + [1.0] * 3
    difference = paired(first, second)
    assert difference.value == pytest.approx(0.4)
    assert difference[1:3] == newcombe(both=3, gained=10, lost=2, n=20)
    assert difference.p == mcnemar(10, 2)
    assert paired(second, first) == pytest.approx(
        (-0.4, -difference.high, -difference.low, difference.p)
    )


def test_a_difference_of_grades_is_resampled_and_tested_by_exchange():
    first = [0.25, 0.5, 0.0, 0.75, 0.5, 0.25, 0.5, 0.5]
    better = [score + 0.25 for score in first]
    assert paired(first, better).p == pytest.approx(
        2 / 2**8, rel=0.3
    )  # all one way, of 256 exchanges
    difference = paired(first, [*better[:4], *[score - 0.25 for score in first[4:]]])
    assert difference.value == pytest.approx(0)
    assert difference.p == 1.0
    assert difference.low < 0 < difference.high


def test_scores_that_are_the_same_do_not_differ():
    for scores in ([1.0, 0.0, 1.0], [0.5, 0.25, 0.0]):
        value, low, high, p = paired(scores, scores)
        assert (value, p) == (0, 1)
        assert low <= 0 <= high
