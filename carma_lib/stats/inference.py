"""Paired tests over the long result table: is one method better, no worse, or steadier than another?

Methods are compared in pairs: on the same items, and on the same seeds (which fix data order and starting weights).
"""
from __future__ import annotations

from dataclasses import replace
from functools import reduce
from itertools import product
from typing import Iterable, NamedTuple

import numpy as np
import pandas as pd
from scipy import stats
from scipy.special import gammaln
from statsmodels.stats.multitest import multipletests

from carma_lib.stats.intervals import CONFIDENCE, critical_value, crossed_interval, tail_probability
from carma_lib.stats.metrics import CELL_COLUMNS, METRICS, RUN_COLUMNS, Crossed, cells, counted_items, require_columns
from carma_lib.stats.table import matches, select

#: A claim of difference between methods needs at least so many seeds; with fewer there are estimates only.
FEWEST_SEEDS = 3
FILTER_COLUMNS = [name for name in CELL_COLUMNS if name != "method"]


class NotComparable(ValueError):
    """Two methods that cannot be compared on the rows at hand; the message says why."""


class Comparison(NamedTuple):
    """An estimate with its interval, its p, its standard error (NaN where there is none) and a note."""
    estimate: float
    low: float
    high: float
    p: float
    standard_error: float
    note: str


def find_crossed(results: pd.DataFrame, metric: str, method: str, where: dict) -> Crossed:
    """The one cell of a method that fits the filters `where`, e.g. {"split": "test", "rate": 0.4}.

    Filters are any of `FILTER_COLUMNS`; that of the budget is not put to an untuned model. Raises `NotComparable` if no
    cell fits or none of its items counts, ValueError if several cells fit or no row at all has the task, split, model
    or start asked for.
    """
    run, asked = _asked(results, metric, method, where)
    if METRICS[metric].against_clean:
        asked |= (run["condition"] == "clean").to_numpy()
    found = list(cells(run[asked], metric))
    if len(found) > 1:
        keys = pd.DataFrame([key for key, _ in found])
        several = [name for name in FILTER_COLUMNS if keys[name].nunique(dropna=False) > 1]
        raise ValueError(f"{metric} of {method}: the table holds several {several}; name the one to compare")
    cell = found[0][1]
    if not cell.seeds.size or not cell.items.size:
        raise NotComparable(f"{method}: {'; '.join(cell.notes)}")
    return cell


def _asked(results: pd.DataFrame, metric: str, method: str, where: dict) -> tuple[pd.DataFrame, np.ndarray]:
    """A method's rows, and which of them the metric and the filters ask for; errors as in `find_crossed`."""
    if unknown := [name for name in where if name not in FILTER_COLUMNS]:
        raise ValueError(f"unknown filters {unknown}; known are {FILTER_COLUMNS}")
    if metric not in METRICS:
        raise ValueError(f"unknown metric {metric!r}; known are {list(METRICS)}")
    require_columns(results, CELL_COLUMNS)
    for name in ("task", "split", "model", "start"):
        if name in where and where[name] not in (known := sorted(results[name].astype(str).unique())):
            raise ValueError(f"the table has no {name} {where[name]!r}; it has {', '.join(known)}")
    asked = {name: value for name, value in where.items() if (method, name) != ("untuned", "budget")}
    of_run = {name: value for name, value in asked.items() if name in RUN_COLUMNS}
    run = select(results, **of_run, method=method)
    changed = matches(run, **{name: value for name, value in asked.items() if name not in of_run})
    changed &= run["condition"].isin(METRICS[metric].conditions).to_numpy()
    if not changed.any():
        filters = ", ".join(f"{name} {value}" for name, value in asked.items())
        raise NotComparable(f"no rows of {method} for {metric}" + f" with {filters}" * bool(filters))
    return run, changed


def pair(results: pd.DataFrame, metric: str, method: str, baseline: str,
         where: dict) -> tuple[Crossed, Crossed, list[str]]:
    """The cells of two methods on their common seeds and items, and notes on what was left out.

    The one run of an untuned model stands beside every seed of the other method.
    """
    seeds_of = {name: np.unique(run.loc[asked, "seed"]) for name in (method, baseline)
                for run, asked in [_asked(results, metric, name, where)]}
    trained = {name: seeds for name, seeds in seeds_of.items() if name != "untuned" or len(seeds) > 1}
    seeds = reduce(np.intersect1d, trained.values())
    notes = [f"seeds {', '.join(map(str, alone))} of {name} left out: not in both methods" for name, has in trained.items()
             if len(alone := np.setdiff1d(has, seeds))]
    if notes:  # what those seeds answered must not decide which items count
        results = results[results["seed"].isin(seeds) | ~results["method"].isin([*trained])]
    if not len(seeds):
        raise NotComparable(f"{method} and {baseline} share no seeds")
    found = {name: find_crossed(results, metric, name, where) for name in (method, baseline)}
    notes += [note for cell in found.values() for note in cell.notes]
    for name, other in ((method, found[baseline]), (baseline, found[method])):
        if name == "untuned" and len(found[name].seeds) == 1:
            cell, every = found[name], np.zeros(len(other.seeds), int)
            found[name] = replace(cell, seeds=other.seeds, numerator=cell.numerator[every], denominator=cell.denominator[every])
    seeds, items = (np.intersect1d(getattr(found[method], name), getattr(found[baseline], name)) for name in ("seeds", "items"))
    if not len(seeds) or not len(items):
        raise NotComparable(f"{method} and {baseline} share no {'items' if len(seeds) else 'seeds'}")
    for name, cell in found.items():
        if len(alone := np.setdiff1d(cell.seeds, seeds)):
            notes.append(f"seeds {', '.join(map(str, alone))} of {name} left out: not in both methods")
        if len(cell.items) > len(items):
            notes.append(f"{len(cell.items) - len(items)} items of {name} left out: not in both methods")
        rows, columns = np.isin(cell.seeds, seeds), pd.Index(cell.items).get_indexer(items)
        found[name] = Crossed(seeds, items, cell.numerator[rows][:, columns], cell.denominator[rows][:, columns], key=cell.key)
    first, second = found[method], found[baseline]
    if not (first.denominator.any(axis=1) & second.denominator.any(axis=1)).all():
        raise NotComparable(f"{method} and {baseline}: a seed has no right answer among the common items")
    return first, second, list(dict.fromkeys(notes))


def paired_test(first: Crossed, second: Crossed, *, margin: float | None = None) -> Comparison:
    """Difference first - second with its `crossed_interval` and the test of difference = 0.

    With a `margin` (in the metric's units, above 0) the null hypothesis is difference ≤ -margin instead. That test is
    one-sided and its p doubled, so that p < 0.05 exactly if the interval lies above -margin.

    p is NaN (not tested) with fewer than `FEWEST_SEEDS` seeds. Without any spread there is no t: if every item differs
    alike, p is the sign test's over items, 2 · 0.5^items; if no answer differs, p is 1, and with a margin the chance of
    no such item if a share of `margin` were answered worse, 2 · (1 - margin)^items. A margin is not tested where both
    have nothing right: there is no performance to preserve.
    """
    values = first.values - second.values
    shares = all(np.isin(cell.numerator, (0, 1)).all() for cell in (first, second))
    counted, constant = counted_items(first, second), np.ptp(values) < 1e-12
    found = crossed_interval(values, counted=counted,
                             bounds=(-1, 1) if shares and constant else (-np.inf, np.inf))
    above, note = found.estimate + (margin or 0.0), found.note
    if len(values) < FEWEST_SEEDS:
        p = np.nan
    elif constant and abs(found.estimate) < 1e-12:
        p = 1.0 if margin is None else min(1.0, 2 * (1 - margin) ** counted)
        if margin is not None and not (shares and first.numerator.any()):
            p, note = np.nan, "no answer differs, and none is right: no test" if shares else "no answer differs between the two: no test"
    elif constant and not shares:
        p, note = np.nan, "all items differ by the same: no spread to test by"
    elif constant:
        p = min(2 * 0.5**counted, 1.0) if margin is None or above > 0 else 1.0
    else:
        statistic = above / found.standard_error
        p = min(1.0, 2 * tail_probability(abs(statistic) if margin is None else statistic, found.seed_share, len(values), counted))
    return Comparison(*found[:3], p, found.standard_error, note)


def cv_ratio_test(first: np.ndarray, second: np.ndarray, *, draws: int = 10_000) -> Comparison:
    """CV(first) / CV(second) of two methods' values, one a seed in the same order; below 1 first is steadier.

    p: permutation over seeds. Values are divided by their method's mean, then the two methods' labels are
    swapped within seeds, all 2ⁿ ways for up to 13 seeds, else `draws` random ones (the observed one
    included); the statistic is |log ratio|. The interval is Pitman and Morgan's for paired normal
    variances, so the two may disagree with few seeds: with n seeds no p is below 2 / 2ⁿ.
    """
    first, second = np.asarray(first, float), np.asarray(second, float)
    n = len(first)
    if n < FEWEST_SEEDS or n != len(second):
        raise NotComparable(f"a CV ratio needs at least three common seeds, here {min(n, len(second))}")
    if first.mean() <= 0 or second.mean() <= 0 or min(np.ptp(first), np.ptp(second)) < 1e-12:
        raise NotComparable("a method's values do not differ across seeds or have a mean of 0: no CV ratio")
    first, second = first / first.mean(), second / second.mean()
    swaps = np.array(list(product((False, True), repeat=n))) if n <= 13 else np.random.default_rng(0).random((draws, n)) < 0.5
    swaps[0] = False
    swapped = np.where(swaps, second, first), np.where(swaps, first, second)
    with np.errstate(divide="ignore", invalid="ignore"):
        one, two = (np.log(values.std(axis=1, ddof=1) / values.mean(axis=1)) for values in swapped)
        shifts = np.abs(one - two)
    p = float((shifts >= shifts[0] - 1e-12).mean())
    variance_ratio = first.var(ddof=1) / second.var(ddof=1)
    t, apart = stats.t.ppf((1 + CONFIDENCE) / 2, n - 2), 1 - np.corrcoef(first, second)[0, 1] ** 2
    k = 1 + 2 * apart * t**2 / (n - 2)
    low, high = np.sqrt(variance_ratio * (k + np.array([-1, 1]) * np.sqrt(max(k**2 - 1, 0))))
    notes = [f"{n} seeds: no p below {2 / 2**n:.3g} is possible"] if 2 / 2**n >= 1 - CONFIDENCE else []
    if apart < 1e-9:  # the formula would give an interval without width
        low, high, notes = np.nan, np.nan, [*notes, "both methods' values move in step: no interval"]
    return Comparison(np.sqrt(variance_ratio), low, high, p, np.nan, "; ".join(notes))


def effect_size(differences: np.ndarray) -> float:
    """d_z: mean over standard deviation of n seeds' paired differences, times Hedges' small-sample factor.

    d_z (Lakens, Frontiers in Psychology 4:863, 2013) is in units of the *differences'* spread, so it is larger than
    Cohen's d or Hedges' g of the same data wherever seeds move both methods alike. The factor is
    Γ(f / 2) / (√(f / 2) Γ((f - 1) / 2)) with f = n - 1; NaN for fewer than three seeds or no spread.
    """
    freedom = len(differences) - 1
    deviation = np.std(differences, ddof=1) if freedom > 1 else 0.0
    if deviation < 1e-12:
        return np.nan
    return float(np.mean(differences) / deviation * np.exp(gammaln(freedom / 2) - gammaln((freedom - 1) / 2))
                 / np.sqrt(freedom / 2))


def holm(p: Iterable[float]) -> np.ndarray:
    """Holm's step-down adjusted p values of a family; NaN (not tested) stays NaN and does not count."""
    adjusted = np.array(list(p), dtype=float)
    if (tested := np.isfinite(adjusted)).any():
        adjusted[tested] = multipletests(adjusted[tested], method="holm")[1]
    return adjusted


def power(difference: float, seeds: int, seed_deviation: float, *, item_error: float = 0.0, items: int = 1000,
          level: float = 0.05) -> float:
    """Chance that the two-sided paired test at `level` finds a true `difference` with this many seeds.

    `seed_deviation`: standard deviation across seeds of the paired difference; `item_error`: the part of
    its standard error that comes from the choice of the `items` and that more seeds do not lower.
    Noncentral t with variance seed_deviation² / seeds + item_error², Satterthwaite's degrees of freedom and
    the paired test's own critical value.
    """
    parts = np.array([seed_deviation**2 / seeds, item_error**2])
    freedom = parts.sum() ** 2 / (parts**2 / [seeds - 1, max(items - 1, 1)]).sum()
    limit = critical_value(level / 2, parts[0] / parts.sum(), seeds, items)
    shift = difference / np.sqrt(parts.sum())
    below = np.nan_to_num(stats.nct.cdf(-limit, freedom, shift))  # scipy gives next to nothing as NaN
    return float(stats.nct.sf(limit, freedom, shift) + below)
