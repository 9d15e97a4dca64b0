"""Compute 95% intervals of mean scores and of their differences, and paired tests.

Scores from 0 to 1 enter, one a prompt. If all are 0 or 1 they are counts of right answers, and the
formulas are those for proportions. Otherwise the scores are resampled with a fixed seed, so that
the same scores have the same interval.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

Z = NormalDist().inv_cdf(0.975)  # standard errors on each side of a 95% interval
_RESAMPLES = 10_000
_MOST_VALUES = 1_000_000  # drawn at once, which bounds the memory
_SEED = 0


class Interval(NamedTuple):
    low: float
    high: float


class Difference(NamedTuple):
    """The second mean less the first over the same prompts, its 95% interval, and the two-sided p:
    the probability of a difference at least as large if the two do not differ."""

    value: float
    low: float
    high: float
    p: float


def interval(scores: Sequence[float]) -> Interval:
    """Return the 95% interval of the mean of at least one score: Wilson's for scores of 0 and 1,
    else a BCa bootstrap's."""
    if _are_binary(scores):
        return wilson(round(sum(scores)), len(scores))
    return _bootstrap(np.asarray(scores))


def paired(first: Sequence[float], second: Sequence[float]) -> Difference:
    """Compare two lists of scores of the same prompts, at least one: the second less the first.

    For scores of 0 and 1 by Newcombe's interval and McNemar's exact test. Otherwise by a BCa
    bootstrap of the differences, and a test that exchanges the two sides at random.
    """
    assert len(first) == len(second), "scores of the same prompts"
    if _are_binary([*first, *second]):
        pairs = [(bool(a), bool(b)) for a, b in zip(first, second, strict=True)]
        both, gained, lost = map(pairs.count, ((True, True), (False, True), (True, False)))
        low, high = newcombe(both, gained, lost, len(pairs))
        return Difference((gained - lost) / len(pairs), low, high, mcnemar(gained, lost))
    differences = np.asarray(second, dtype=np.float64) - np.asarray(first, dtype=np.float64)
    return Difference(float(differences.mean()), *_bootstrap(differences), _sign_flips(differences))


def wilson(successes: int, n: int) -> Interval:
    """Return the score interval of a proportion (Wilson, J. Am. Stat. Assoc. 22, 1927)."""
    p = successes / n
    centre = (p + Z**2 / (2 * n)) / (1 + Z**2 / n)
    half = Z / (1 + Z**2 / n) * math.sqrt(p * (1 - p) / n + Z**2 / (4 * n**2))
    # with 0 or n successes one end is p itself, which rounding would miss
    return Interval(min(max(0.0, centre - half), p), max(min(1.0, centre + half), p))


def newcombe(both: int, gained: int, lost: int, n: int) -> Interval:
    """Return the interval of the difference of two proportions over the same n: square-and-add,
    method 10 of Newcombe (Stat. Med. 17, 2635-2650, 1998).

    Args:
        gained: right in the second alone.
        lost: right in the first alone.
    """
    neither = n - both - gained - lost
    ones = both + gained, both + lost  # right in the second, in the first
    (p2, p1), (w2, w1) = [k / n for k in ones], [wilson(k, n) for k in ones]
    excess = both * neither - gained * lost
    margins = math.prod((*ones, *(n - k for k in ones)))
    corrected = max(excess - n / 2, 0.0) if excess > 0 else excess
    phi = corrected / math.sqrt(margins) if margins else 0.0
    low = _hypotenuse(p2 - w2.low, w1.high - p1, phi)
    high = _hypotenuse(w2.high - p2, p1 - w1.low, phi)
    return Interval(p2 - p1 - low, p2 - p1 + high)


def _hypotenuse(a: float, b: float, correlation: float) -> float:
    return math.sqrt(max(0.0, a**2 - 2 * correlation * a * b + b**2))


def mcnemar(gained: int, lost: int) -> float:
    """Return the p of the exact two-sided test that as many are gained as lost: a binomial of 1/2
    (McNemar, Psychometrika 12, 1947)."""
    n = gained + lost
    tail = sum(math.comb(n, k) for k in range(min(gained, lost) + 1))
    return min(1.0, 2 * tail / 2**n)


def _are_binary(scores: Sequence[float]) -> bool:
    return all(score in (0, 1) for score in scores)


def _bootstrap(values: np.ndarray) -> Interval:
    """Return the mean's interval, bias-corrected and accelerated (Efron, J. Am. Stat. Assoc. 82,
    1987), by 10,000 resamples. If all values are equal, the interval is a point."""
    values = values.astype(np.float64)
    n = len(values)
    if n == 1 or not np.ptp(values):
        return Interval(float(values[0]), float(values[0]))
    means = _resampled(n, lambda random, size: values[random.integers(n, size=size)].mean(axis=1))
    normal = NormalDist()
    # ties count as half
    below = (np.sum(means < values.mean()) + np.sum(means <= values.mean())) / 2
    bias = normal.inv_cdf(float(np.clip(below, 1, _RESAMPLES - 1)) / _RESAMPLES)
    # the jackknife's influences, but for a factor that cancels
    apart = values - values.mean()
    acceleration = float((apart**3).sum() / (6 * (apart**2).sum() ** 1.5))
    ends = []
    for z in (-Z, Z):
        shifted = bias + z
        share = normal.cdf(bias + shifted / (1 - acceleration * shifted))
        ends.append(float(np.quantile(means, share)))
    return Interval(*ends)


def _sign_flips(differences: np.ndarray) -> float:
    """Return the share of random exchanges of the two sides under which the mean differs as much.
    The true order counts as one of them, so that p is never 0 (Phipson and Smyth, Stat. Appl.
    Genet. Mol. Biol. 9, 2010)."""
    n = len(differences)
    flipped = _resampled(
        n, lambda random, size: (differences * random.choice((-1.0, 1.0), size)).mean(axis=1)
    )
    # 1e-12: sums in another order may round otherwise
    as_much = np.sum(np.abs(flipped) >= abs(differences.mean()) - 1e-12)
    return float(1 + as_much) / (1 + _RESAMPLES)


def _resampled(
    n: int, means: Callable[[np.random.Generator, tuple[int, int]], np.ndarray]
) -> np.ndarray:
    """Return the (10,000,) means of resamples of n values. `means(random, (resamples, n))` draws
    some of them at a time, so that memory does not grow with n."""
    random = np.random.default_rng(_SEED)
    at_once = max(1, _MOST_VALUES // n)
    sizes = [min(at_once, _RESAMPLES - start) for start in range(0, _RESAMPLES, at_once)]
    return np.concatenate([means(random, (size, n)) for size in sizes])
