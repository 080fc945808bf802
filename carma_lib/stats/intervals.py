"""Intervals for few seeds: of a mean over items crossed with seeds, and of a coefficient of variation.

Why not the percentile of a two-level bootstrap: with 3 to 10 seeds it misses the truth too often when seeds
differ much, because resampling n seeds gives (n-1)/n of their variance, and too seldom when they differ
little, because item noise is counted twice. `benchmarks/statistics.py` measures both.
"""
from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy import stats
from scipy.optimize import brentq
from scipy.special import stdtrit


class Interval(NamedTuple):
    """An estimate with its interval, standard error, the seeds' share of its variance, and a note."""
    estimate: float
    low: float
    high: float
    standard_error: float
    seed_share: float
    note: str


def critical_value(tail: float, seed_share: float, seeds: int, items: int) -> float:
    """The value that the standardised mean exceeds with probability `tail` (one-sided).

    Cochran and Cox's approximation: Student's t quantiles for seeds - 1 and for items - 1 degrees of freedom,
    weighted by the shares of the variance that seeds and items contribute.
    """
    by_seed, by_item = -stdtrit([max(seeds - 1, 1), max(items - 1, 1)], tail)  # by symmetry; 1 - tail would round
    return float(seed_share * by_seed + (1 - seed_share) * by_item)


def tail_probability(statistic: float, seed_share: float, seeds: int, items: int) -> float:
    """One-sided p of the standardised mean: the `tail` whose `critical_value` is the statistic."""
    if statistic < 0:
        return 1 - tail_probability(-statistic, seed_share, seeds, items)
    smallest = 1e-12
    if statistic >= critical_value(smallest, seed_share, seeds, items):
        return smallest
    return brentq(lambda tail: critical_value(tail, seed_share, seeds, items) - statistic, smallest, 0.5)


def crossed_interval(values: np.ndarray, *, confidence: float = 0.95,
                     bounds: tuple[float, float] = (-np.inf, np.inf)) -> Interval:
    """Mean of a seeds × items matrix with an interval for crossed random seeds and items.

    variance = s²(seed means) / seeds + max(0, s²(item means) / items - s²(residuals) / (seeds · items));
    its first term is the seeds' part, its second what the choice of items adds. Half width:
    `critical_value` times the standard error; where items add nothing, this is the t interval over seeds.
    Cut at `bounds`.

    Where one seed or one item stands alone, the interval covers the other factor only and the note says so.
    Where all values are the same and lie on a bound of (0, 1), the other end is the exact binomial limit.
    """
    values = np.asarray(values, dtype=float)
    if values.ndim != 2 or values.size == 0 or not np.isfinite(values).all():
        raise ValueError("values must be a matrix, seeds × items, of finite numbers and not empty")
    seeds, items = values.shape
    mean = values.mean()
    if seeds == items == 1:
        return Interval(mean, np.nan, np.nan, np.nan, np.nan, "one seed and one item: no interval")
    if np.ptp(values) == 0:
        return _constant(mean, items, confidence, bounds)
    parts = _variance_parts(values)
    if not sum(parts):
        return Interval(mean, mean, mean, 0.0, np.nan, "seeds and items do not differ: no width")
    error, share = np.sqrt(sum(parts)), parts[0] / sum(parts)
    half = critical_value((1 - confidence) / 2, share, seeds, items) * error
    note = ("one seed: interval over items only" if seeds == 1 else
            "one item: interval over seeds only" if items == 1 else "")
    return Interval(mean, max(mean - half, bounds[0]), min(mean + half, bounds[1]), error, share, note)


def _variance_parts(values: np.ndarray) -> tuple[float, float]:
    """What seeds and items contribute to the variance of the matrix's mean."""
    (seeds, items), by_seed, by_item = values.shape, values.mean(axis=1), values.mean(axis=0)
    seed_part = by_seed.var(ddof=1) / seeds if seeds > 1 else 0.0
    item_part = by_item.var(ddof=1) / items if items > 1 else 0.0
    if seeds > 1 and items > 1:
        residual = values - by_seed[:, None] - by_item + values.mean()
        item_part -= np.square(residual).sum() / ((seeds - 1) * (items - 1)) / (seeds * items)
    return seed_part, max(item_part, 0.0)


def _constant(value: float, items: int, confidence: float, bounds: tuple[float, float]) -> Interval:
    if bounds != (0, 1) or value not in bounds:
        return Interval(value, value, value, 0.0, np.nan, "all values the same: no width")
    limit = ((1 - confidence) / 2) ** (1 / items)
    low, high = (limit, 1.0) if value == 1 else (0.0, 1 - limit)
    return Interval(value, low, high, 0.0, np.nan, "all values the same: exact binomial limit")


def cv_interval(values: np.ndarray, *, confidence: float = 0.95) -> Interval:
    """Standard deviation (n - 1) over mean, with Vangel's modified McKay interval for normal values.

    Vangel, The American Statistician 50, 1996. Empty, with a note, for one value or a mean of 0 or less;
    without an upper limit where the spread is too large for the number of values.
    """
    values = np.asarray(values, dtype=float)
    n, mean = len(values), values.mean()
    if n < 2 or mean <= 0:
        reason = "one seed: no spread to measure" if n < 2 else "mean is not above 0: CV undefined"
        return Interval(*[np.nan] * 5, reason)
    ratio = values.std(ddof=1) / mean
    if ratio < 1e-12:
        return Interval(0.0, 0.0, 0.0, np.nan, np.nan, "seeds do not differ")
    edges = stats.chi2.ppf([(1 + confidence) / 2, (1 - confidence) / 2], n - 1)
    below = ((edges + 2) / n - 1) * ratio**2 + edges / (n - 1)
    if below[1] <= 0:
        return Interval(ratio, ratio / np.sqrt(below[0]), np.inf, np.nan, np.nan,
                        "too few seeds for an upper limit at this spread")
    return Interval(ratio, *(ratio / np.sqrt(below)), np.nan, np.nan, "")
