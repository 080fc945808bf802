"""Intervals for few seeds: of a mean over items crossed with seeds, and of a coefficient of variation.

Why not the percentile of a two-level bootstrap: with 3 to 10 seeds it misses the truth too often if seeds differ much,
because resampling n seeds gives (n-1)/n of their variance, and too seldom if they differ little, because item noise is
counted twice. `benchmarks/evidence.py` measures both.
"""
from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
from scipy import stats
from scipy.optimize import brentq
from scipy.special import stdtrit

#: Of every interval of this project.
CONFIDENCE = 0.95


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
    """One-sided p of the standardised mean: the `tail` whose `critical_value` is the statistic, at least 1e-12."""
    if statistic < 0:
        return 1 - tail_probability(-statistic, seed_share, seeds, items)
    smallest = 1e-12
    if statistic >= critical_value(smallest, seed_share, seeds, items):
        return smallest
    return brentq(lambda tail: critical_value(tail, seed_share, seeds, items) - statistic, smallest, 0.5)


def crossed_interval(values: np.ndarray, *, counted: int | None = None,
                     bounds: tuple[float, float] = (-np.inf, np.inf)) -> Interval:
    """Mean of a seeds × items matrix with an interval for crossed random seeds and items.

    variance = seeds' part + items' part, with residuals r, their mean square MS_r on (seeds - 1)(items - 1) degrees of
    freedom, and F₀.₀₅ the lower 5 % point of F(seeds - 1, (seeds - 1)(items - 1)):

    - seeds' part: the larger of s²(seed means) / seeds and F₀.₀₅ · MS_r / (seeds · items). If seeds do not differ at
      all, chance answers alone leave a smaller spread of seed means in one study of twenty only; few seeds whose means
      happen to agree are therefore no certainty.
    - items' part, what the choice of items adds: max(0, s²(item means) / items - MS_r / (seeds · items)).

    Half width: `critical_value` times the standard error. The interval is cut at `bounds`. With one seed or one item
    it covers the other factor only, and the note says so. If all values are the same, `_constant_interval` applies.
    counted: how many items are in a ratio's denominator, all by default; the others hold still, and the spread over
    items and its degrees of freedom are those of the counted ones.
    """
    values = np.asarray(values, dtype=float)
    if values.ndim != 2 or values.size == 0 or not np.isfinite(values).all():
        raise ValueError("values must be a matrix, seeds × items, of finite numbers and not empty")
    (seeds, items), mean = values.shape, values.mean()
    if seeds == items == 1:
        return Interval(mean, *[np.nan] * 4, "one seed and one item: no interval")
    if np.ptp(values) < 1e-12:
        return _constant_interval(mean, counted or items, bounds)
    by_seed, by_item = values.mean(axis=1), values.mean(axis=0)
    seed_part = by_seed.var(ddof=1) / seeds if seeds > 1 else 0.0
    counted, of_counted = counted or items, 1.0
    if 1 < counted < items:  # the others hold still, so n - 1 is that of the counted ones
        of_counted = (1 - 1 / items) / (1 - 1 / counted)
    item_part = of_counted * by_item.var(ddof=1) / items if counted > 1 else 0.0
    if seeds > 1 and counted > 1:
        freedom = (seeds - 1) * (counted - 1)
        residual = values - by_seed[:, None] - by_item + mean
        residual_part = of_counted * np.square(residual).sum() / ((seeds - 1) * (items - 1)) / (seeds * items)
        seed_part = max(seed_part, _low_ratio(seeds - 1, freedom) * residual_part)
        item_part = max(item_part - residual_part, 0.0)
    error, share = np.sqrt(seed_part + item_part), seed_part / (seed_part + item_part)
    half = critical_value((1 - CONFIDENCE) / 2, share, seeds, counted) * error
    note = ("one seed: interval over items only" if seeds == 1 else
            "one item: interval over seeds only" if counted == 1 else "")
    return Interval(mean, max(mean - half, bounds[0]), min(mean + half, bounds[1]), error, share, note)


@lru_cache
def _low_ratio(of_seeds: int, of_residuals: int) -> float:
    return float(stats.f.ppf(0.05, of_seeds, of_residuals))


def _constant_interval(value: float, items: int, bounds: tuple[float, float]) -> Interval:
    """Interval of a mean whose values are all the same: exact binomial limits over items.

    With tail = (1 - CONFIDENCE) / 2 and q = 1 - tail^(1 / items), the largest share of unlike items that shows none of
    them among `items` with probability `tail`: a share on its bound 0 or 1 gets q to the inside; a difference in
    [-1, 1] gets 2q to the inside at ±1, q to both sides at 0. Anything else has no interval.
    """
    unlike = 1 - ((1 - CONFIDENCE) / 2) ** (1 / items)
    reaches = {(0, 1): {0: (0, unlike), 1: (unlike, 0)},
               (-1, 1): {-1: (0, 2 * unlike), 0: (unlike, unlike), 1: (2 * unlike, 0)}}
    reach = reaches.get(bounds, {}).get(round(value, 9))
    if reach is None:
        return Interval(value, np.nan, np.nan, 0.0, np.nan, "all values the same: no interval")
    return Interval(value, value - reach[0], value + reach[1], 0.0, np.nan, "all values the same: exact binomial limit")


def cv_interval(values: np.ndarray) -> Interval:
    """Standard deviation (n - 1) over mean, with Vangel's modified McKay interval for normal values.

    Vangel, The American Statistician 50, 1996. Empty, with a note, for one value or a mean of 0 or less; no interval if
    the values do not differ, which few seeds may do by chance; no upper limit if the spread is too large for their number.
    """
    values = np.asarray(values, dtype=float)
    n, mean = len(values), values.mean()
    if n < 2 or mean <= 0:
        return Interval(*[np.nan] * 5, "one seed: no spread to measure" if n < 2 else "mean is not above 0: CV undefined")
    ratio = values.std(ddof=1) / mean
    if ratio < 1e-12:
        return Interval(0.0, np.nan, np.nan, np.nan, np.nan, "seeds do not differ: no interval")
    edges = stats.chi2.ppf([(1 + CONFIDENCE) / 2, (1 - CONFIDENCE) / 2], n - 1)
    below = ((edges + 2) / n - 1) * ratio**2 + edges / (n - 1)
    low, high = np.where(below > 0, ratio / np.sqrt(np.abs(below)), np.inf)
    return Interval(ratio, low, high, np.nan, np.nan,
                    "too few seeds for an upper limit at this spread" if high == np.inf else "")
