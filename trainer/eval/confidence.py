"""What a mean of scores, and the difference of two, is worth: 95% intervals and paired tests.

Scores enter, one a prompt, from 0 to 1. Where all are 0 or 1 they are counts of right answers, and
the formulas are those for proportions; else the scores are resampled, with a fixed seed: the same
scores have the same interval.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

_Z = NormalDist().inv_cdf(0.975)
_RESAMPLES = 10_000
_MOST_VALUES = 1_000_000  # in memory at once
_SEED = 0


class Interval(NamedTuple):
    low: float
    high: float


class Difference(NamedTuple):
    """Of two means over the same prompts: the second's less the first's, its 95% interval, and the
    probability of one at least as large, either way, where the two do not differ."""

    value: float
    low: float
    high: float
    p: float


def interval(scores: Sequence[float]) -> Interval:
    """The 95% interval of the mean: Wilson's for scores of 0 and 1, else a BCa bootstrap's. Needs a
    score.
    """
    return (
        wilson(round(sum(scores)), len(scores))
        if _are_binary(scores)
        else _bootstrap(np.asarray(scores))
    )


def paired(first: Sequence[float], second: Sequence[float]) -> Difference:
    """How much better the second scores are than the first, prompt by prompt. Needs a prompt.

    Scores of 0 and 1: Newcombe's interval and McNemar's exact test. Else: a BCa bootstrap of the
    differences, and a test that exchanges the two at random.
    """
    assert len(first) == len(second), "scores of the same prompts"
    if _are_binary([*first, *second]):
        pairs = [(bool(a), bool(b)) for a, b in zip(first, second, strict=True)]
        both, gained, lost = (
            pairs.count(pair) for pair in ((True, True), (False, True), (True, False))
        )
        low, high = newcombe(both, gained, lost, len(pairs))
        return Difference((gained - lost) / len(pairs), low, high, mcnemar(gained, lost))
    differences = np.asarray(second, dtype=np.float64) - np.asarray(first, dtype=np.float64)
    return Difference(float(differences.mean()), *_bootstrap(differences), _sign_flips(differences))


def wilson(successes: int, n: int) -> Interval:
    """The score interval of a proportion (Wilson, J. Am. Stat. Assoc. 22, 1927)."""
    p = successes / n
    centre = (p + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
    half = _Z / (1 + _Z**2 / n) * math.sqrt(p * (1 - p) / n + _Z**2 / (4 * n**2))
    return Interval(
        min(max(0.0, centre - half), p), max(min(1.0, centre + half), p)
    )  # p: of 0 and n, exactly


def newcombe(both: int, gained: int, lost: int, n: int) -> Interval:
    """Of the difference of two proportions over the same n: the square-and-add interval, method 10
    of Newcombe (Stat. Med. 17, 2635-2650, 1998). `gained` are right in the second alone, `lost` in
    the first alone."""
    neither = n - both - gained - lost
    ones = both + gained, both + lost  # of the second, of the first
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
    """The exact two-sided test of whether as many are gained as lost: a binomial of 1/2 (McNemar,
    Psychometrika 12, 1947)."""
    n = gained + lost
    tail = sum(math.comb(n, k) for k in range(min(gained, lost) + 1))
    return min(1.0, 2 * tail / 2**n)


def _are_binary(scores: Sequence[float]) -> bool:
    return all(score in (0, 1) for score in scores)


def _bootstrap(values: np.ndarray) -> Interval:
    """Of the mean: bias-corrected and accelerated (Efron, J. Am. Stat. Assoc. 82, 1987), 10,000
    resamples. Where the values do not differ there is nothing to resample, and the interval is a
    point."""
    values = values.astype(np.float64)
    n = len(values)
    if n == 1 or not np.ptp(values):
        return Interval(float(values[0]), float(values[0]))
    means = _resampled(n, lambda random, size: values[random.integers(n, size=size)].mean(axis=1))
    normal = NormalDist()
    below = (
        np.sum(means < values.mean()) + np.sum(means <= values.mean())
    ) / 2  # ties count as half
    bias = normal.inv_cdf(float(np.clip(below, 1, _RESAMPLES - 1)) / _RESAMPLES)
    apart = values - values.mean()  # the jackknife's influences, but for a factor that cancels
    acceleration = float((apart**3).sum() / (6 * (apart**2).sum() ** 1.5))
    ends = []
    for z in (-_Z, _Z):
        shifted = bias + z
        share = normal.cdf(bias + shifted / (1 - acceleration * shifted))
        ends.append(float(np.quantile(means, share)))
    return Interval(*ends)


def _sign_flips(differences: np.ndarray) -> float:
    """The share of random exchanges of the two under which the mean differs as much, the true one
    counted as one of them (Phipson and Smyth, Stat. Appl. Genet. Mol. Biol. 9, 2010)."""
    n = len(differences)
    flipped = _resampled(
        n, lambda random, size: (differences * random.choice((-1.0, 1.0), size)).mean(axis=1)
    )
    as_much = np.sum(np.abs(flipped) >= abs(differences.mean()) - 1e-12)
    return float(1 + as_much) / (1 + _RESAMPLES)


def _resampled(
    n: int, means: Callable[[np.random.Generator, tuple[int, int]], np.ndarray]
) -> np.ndarray:
    """(10,000,) means of resamples of n values, which `means` draws by (resamples, n): a few at a
    time, so that memory does not grow with n."""
    random = np.random.default_rng(_SEED)
    at_once = max(1, _MOST_VALUES // n)
    sizes = [min(at_once, _RESAMPLES - start) for start in range(0, _RESAMPLES, at_once)]
    return np.concatenate([means(random, (size, n)) for size in sizes])
