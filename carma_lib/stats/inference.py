"""Tests and models over the long result table: is one method better, no worse, or steadier than another?

Methods are compared in pairs: the same items, and the same seeds (which fix data order and starting
weights). `primary_comparisons` takes a plan written before looking and returns one row a claim, corrected
over the plan.
"""
from __future__ import annotations

from itertools import product
from typing import Iterable, NamedTuple

import numpy as np
import pandas as pd
import statsmodels.api as sm
from scipy import stats
from scipy.special import gamma

from carma_lib.stats.intervals import critical_value, crossed_interval, tail_probability
from carma_lib.stats.metrics import (CELL_COLUMNS, CONDITION_COLUMNS, METRICS, RUN_COLUMNS, Crossed, cells,
                                  require_columns)

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


def _matches(results: pd.DataFrame, where: dict, columns: list[str]) -> np.ndarray:
    chosen = np.ones(len(results), bool)
    for name in columns:
        if name in where:
            column, value = results[name], where[name]
            chosen &= np.isclose(column, value) if isinstance(value, float) else (column == value).to_numpy()
    return chosen


def find_crossed(results: pd.DataFrame, metric: str, method: str, where: dict | None = None) -> Crossed:
    """The one cell of a method that fits the filters `where`, e.g. {"split": "test", "rate": 0.4}.

    Filters are any of `CELL_COLUMNS` but the method; that of the budget is not put to an untuned model.

    Raises `NotComparable` where no cell fits or none of its items counts, ValueError where several cells fit.
    """
    where = dict(where or {})
    if unknown := [name for name in where if name not in FILTER_COLUMNS]:
        raise ValueError(f"unknown filters {unknown}; known are {FILTER_COLUMNS}")
    if metric not in METRICS:
        raise ValueError(f"unknown metric {metric!r}; known are {list(METRICS)}")
    if method == "untuned":
        where.pop("budget", None)
    require_columns(results, CELL_COLUMNS)
    chosen = _matches(results, where | {"method": method}, RUN_COLUMNS)
    changed = chosen & _matches(results, where, CONDITION_COLUMNS)
    changed &= results["condition"].isin(METRICS[metric].conditions).to_numpy()
    if not changed.any():
        raise NotComparable(f"no rows of {method} for {metric}{_text(where)}")
    if METRICS[metric].against_clean:
        changed |= chosen & (results["condition"] == "clean").to_numpy()
    found = list(cells(results[changed], metric))
    if len(found) > 1:
        keys = pd.DataFrame([key for key, _ in found])
        several = [name for name in FILTER_COLUMNS if keys[name].nunique(dropna=False) > 1]
        raise ValueError(f"{metric} of {method}: the table holds several {several}; name the one to compare")
    cell = found[0][1]
    if not cell.seeds.size or not cell.items.size:
        raise NotComparable(f"{method}: {'; '.join(cell.notes)}")
    return cell


def _text(where: dict) -> str:
    return " with " + ", ".join(f"{name} {value}" for name, value in where.items()) if where else ""


def pair(results: pd.DataFrame, metric: str, method: str, baseline: str,
         where: dict | None = None) -> tuple[Crossed, Crossed, list[str]]:
    """The cells of two methods on their common seeds and items, and notes on what was left out.

    The one run of an untuned model stands beside every seed of the other method.
    """
    pair_of = [find_crossed(results, metric, name, where) for name in (method, baseline)]
    notes = [note for cell in pair_of for note in cell.notes]
    for place, name in enumerate((method, baseline)):
        cell, other = pair_of[place], pair_of[1 - place]
        if name == "untuned" and len(cell.seeds) == 1:
            repeat = np.zeros(len(other.seeds), int)
            pair_of[place] = Crossed(other.seeds, cell.items, cell.numerator[repeat],
                                     cell.denominator[repeat])
    seeds = np.intersect1d(pair_of[0].seeds, pair_of[1].seeds)
    items = np.intersect1d(pair_of[0].items, pair_of[1].items)
    if not len(seeds) or not len(items):
        raise NotComparable(f"{method} and {baseline} share no {'items' if len(seeds) else 'seeds'}")
    for name, cell in zip((method, baseline), pair_of):
        if len(alone := np.setdiff1d(cell.seeds, seeds)):
            notes.append(f"seeds {', '.join(map(str, alone))} of {name} left out: not in both methods")
        if len(cell.items) > len(items):
            notes.append(f"{len(cell.items) - len(items)} items of {name} left out: not in both methods")
    first, second = (_take(cell, seeds, items) for cell in pair_of)
    if not (first.denominator.any(axis=1) & second.denominator.any(axis=1)).all():
        raise NotComparable(f"{method} and {baseline}: a seed has no right answer among the common items")
    return first, second, list(dict.fromkeys(notes))


def _take(cell: Crossed, seeds: np.ndarray, items: np.ndarray) -> Crossed:
    rows = np.flatnonzero(np.isin(cell.seeds, seeds))
    columns = pd.Index(cell.items).get_indexer(items)
    return Crossed(seeds, items, cell.numerator[rows][:, columns], cell.denominator[rows][:, columns])


def paired_test(first: Crossed, second: Crossed, *, margin: float | None = None,
                confidence: float = 0.95) -> Comparison:
    """Difference first - second with its `crossed_interval` and the test of difference = 0.

    With a `margin` (in the metric's units, above 0) the null hypothesis is difference ≤ -margin instead.
    That test is one-sided and its p doubled, so that p < 1 - confidence exactly where the interval lies
    above -margin. Where no answer differs between the two, a margin is not tested: without any spread there is
    nothing to say how far they could differ.
    """
    found = crossed_interval(first.values - second.values, confidence=confidence)
    if margin is not None and not np.any(first.values != second.values):
        return Comparison(*found[:3], np.nan, 0.0, "no answer differs between the two: no test")
    if not found.standard_error > 0:
        apart = found.estimate != 0 if margin is None else found.estimate > -margin
        return Comparison(*found[:3], np.nan if np.isnan(found.low) else float(not apart), 0.0, found.note)
    statistic = (found.estimate + (margin or 0.0)) / found.standard_error
    tail = tail_probability(abs(statistic) if margin is None else statistic, found.seed_share,
                            *first.numerator.shape)
    return Comparison(*found[:3], min(2 * tail, 1.0), found.standard_error, found.note)


def hierarchical_bootstrap(first: Crossed, second: Crossed | None = None, *, draws: int = 2000,
                           seed: int = 0) -> np.ndarray:
    """Draws of the mean of the seeds' ratios, or of the difference of two cells, over seeds and items.

    Each draw resamples seeds with replacement, then items with replacement, the same items for every seed and
    both methods, as weights: multinomial counts. Shape (draws,). A draw in which a seed has no item in the
    denominator leaves that seed out; a draw without any is NaN.
    """
    generator = np.random.default_rng(seed)
    seeds, items = first.numerator.shape
    of_seeds = generator.multinomial(seeds, np.full(seeds, 1 / seeds), draws)
    of_items = generator.multinomial(items, np.full(items, 1 / items), draws).astype(float)

    def means(cell: Crossed) -> np.ndarray:
        below = of_items @ cell.denominator.T
        ratio = np.divide(of_items @ cell.numerator.T, below, out=np.zeros_like(below), where=below > 0)
        weight = of_seeds * (below > 0)
        total = weight.sum(axis=1)
        return np.divide((weight * ratio).sum(axis=1), total, out=np.full(draws, np.nan), where=total > 0)

    return means(first) - (means(second) if second is not None else 0.0)


def bootstrap_interval(first: Crossed, second: Crossed | None = None, *, draws: int = 2000, seed: int = 0,
                       confidence: float = 0.95) -> tuple[float, float]:
    """Percentile interval of `hierarchical_bootstrap`, widened by √(n / (n - 1)) for n seeds.

    A check beside `crossed_interval`, not a replacement: its coverage depends on how much seeds differ.
    """
    values = hierarchical_bootstrap(first, second, draws=draws, seed=seed)
    centre = first.values.mean() - (second.values.mean() if second is not None else 0.0)
    seeds = len(first.seeds)
    widened = centre + (values - centre) * (np.sqrt(seeds / (seeds - 1)) if seeds > 1 else 1.0)
    low, high = np.nanquantile(widened, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def cv_ratio_test(first: np.ndarray, second: np.ndarray, *, confidence: float = 0.95,
                  draws: int = 10_000) -> Comparison:
    """CV(first) / CV(second) of two methods' values, one a seed in the same order; below 1 first is steadier.

    p: permutation over seeds. Values are divided by their method's mean, then the two methods' labels are
    swapped within seeds, all 2ⁿ ways for up to 13 seeds, else `draws` random ones (the observed one
    included); the statistic is |log ratio|. The interval is Pitman and Morgan's for paired normal
    variances, so the two may disagree with few seeds: with n seeds no p is below 2 / 2ⁿ.
    """
    first, second = np.asarray(first, float), np.asarray(second, float)
    n = len(first)
    if n < 3 or n != len(second):
        raise NotComparable(f"a CV ratio needs at least three common seeds, here {min(n, len(second))}")
    if first.mean() <= 0 or second.mean() <= 0 or min(np.ptp(first), np.ptp(second)) < 1e-12:
        raise NotComparable("a method's values do not differ across seeds or have a mean of 0: no CV ratio")
    first, second = first / first.mean(), second / second.mean()
    if n <= 13:
        swaps = np.array(list(product((False, True), repeat=n)))
    else:
        swaps = np.random.default_rng(0).random((draws, n)) < 0.5
        swaps[0] = False

    def log_cv(values: np.ndarray) -> np.ndarray:
        with np.errstate(divide="ignore"):
            return np.log(values.std(axis=1, ddof=1) / values.mean(axis=1))

    with np.errstate(invalid="ignore"):
        shifts = np.abs(log_cv(np.where(swaps, second, first)) - log_cv(np.where(swaps, first, second)))
    p = float((shifts >= shifts[0] - 1e-12).mean())
    variance_ratio = first.var(ddof=1) / second.var(ddof=1)
    t = stats.t.ppf((1 + confidence) / 2, n - 2)
    k = 1 + 2 * (1 - np.corrcoef(first, second)[0, 1] ** 2) * t**2 / (n - 2)
    low, high = np.sqrt(variance_ratio * (k + np.array([-1, 1]) * np.sqrt(max(k**2 - 1, 0))))
    note = f"{n} seeds: no p below {2 / 2**n:.3g} is possible" if 2 / 2**n >= 1 - confidence else ""
    return Comparison(np.sqrt(variance_ratio), low, high, p, np.nan, note)


def hedges_g(differences: np.ndarray) -> float:
    """Mean over standard deviation of n seeds' paired differences, with Hedges' correction for small samples.

    The factor is Γ(d / 2) / (√(d / 2) Γ((d - 1) / 2)) with d = n - 1; NaN for fewer than three seeds or no
    spread.
    """
    freedom = len(differences) - 1
    deviation = np.std(differences, ddof=1) if freedom > 1 else 0.0
    if deviation < 1e-12:
        return np.nan
    return float(np.mean(differences) / deviation * gamma(freedom / 2) / gamma((freedom - 1) / 2)
                 / np.sqrt(freedom / 2))


def mcnemar(results: pd.DataFrame, method: str, baseline: str, where: dict | None = None) -> pd.DataFrame:
    """McNemar's exact test within each seed: columns seed, only_method, only_baseline (items right), p.

    It asks about this pair of trained models only; what another seed would give is `paired_test`'s question.
    """
    first, second, _ = pair(results, "accuracy", method, baseline, where)
    lines = []
    for place, number in enumerate(first.seeds):
        gained = int((first.numerator[place] > second.numerator[place]).sum())
        lost = int((first.numerator[place] < second.numerator[place]).sum())
        p = stats.binomtest(gained, gained + lost).pvalue if gained + lost else 1.0
        lines.append({"seed": number, "only_method": gained, "only_baseline": lost, "p": p})
    return pd.DataFrame(lines)


def logistic_model(results: pd.DataFrame, *, baseline: str, confidence: float = 0.95) -> pd.DataFrame:
    """Odds of a right answer by method × condition: term, odds_ratio, low, high, p; one row a term.

    A population-averaged (GEE) logistic model with independence as the working correlation and standard
    errors clustered two ways, over items and over seeds; Student's t with (smaller number of clusters - 1)
    degrees of freedom. Terms 'method', 'condition' and 'method × condition' against `baseline` and the
    first condition. Rows: one task, split, model, start; every method and condition with right and wrong
    answers in it.
    """
    columns = ["task", "split", "model", "start", *CONDITION_COLUMNS, "method", "seed", "item_id", "correct"]
    require_columns(results, columns)
    if several := [name for name in columns[:4] if results[name].nunique() > 1]:
        raise ValueError(f"the logistic model takes one {several[0]}; filter the table")
    if baseline not in set(results["method"]):
        raise ValueError(f"no rows of the baseline {baseline!r}")
    if results["seed"].nunique() < 2:
        raise ValueError("the logistic model needs at least two seeds")
    method, condition = results["method"].astype(str), condition_labels(results)
    right = results["correct"].to_numpy(float)
    shares = pd.Series(right, results.index).groupby([method, condition]).mean()
    if flat := [name for name, share in shares.items() if share in (0.0, 1.0)]:
        raise ValueError(f"all or no answers right for {flat[0]}: its odds are not finite; leave it out")
    methods = [name for name in dict.fromkeys(method) if name != baseline]
    design = {"intercept": np.ones(len(results))}
    design |= {name: (method == name).to_numpy(float) for name in methods}
    for name in list(dict.fromkeys(condition))[1:]:
        design[name] = (condition == name).to_numpy(float)
        design |= {f"{one} × {name}": design[one] * design[name] for one in methods}
    groups = np.column_stack([pd.factorize(results[name])[0] for name in ("seed", "item_id")])
    fit = sm.GLM(right, np.column_stack(list(design.values())), family=sm.families.Binomial()).fit(
        cov_type="cluster", cov_kwds={"groups": groups}, use_t=True)
    low, high = np.exp(fit.conf_int(1 - confidence)).T
    note = np.where(np.isfinite(fit.bse), "", "clusters too few for a variance")
    return pd.DataFrame({"term": list(design), "odds_ratio": np.exp(fit.params), "low": low, "high": high,
                         "p": fit.pvalues, "note": note})


def condition_labels(table: pd.DataFrame) -> pd.Series:
    """A readable name of each row's condition: 'clean', 'replaced 25 %', 'pooled mean from layer 3'."""
    rate = (100 * table["rate"]).round(1).map("{:g}".format)
    pooled = "pooled " + table["protocol"].astype(str) + " from layer " + table["start_layer"].astype(str)
    condition = table["condition"].astype(str)
    replaced = condition.mask(condition == "replaced", "replaced " + rate + " %")
    return replaced.mask(condition == "pooled", pooled)


def holm(p: Iterable[float]) -> np.ndarray:
    """Holm's step-down adjusted p values of a family; NaN (not tested) stays NaN and does not count."""
    p = np.asarray(list(p), dtype=float)
    adjusted, tested = np.full(len(p), np.nan), np.isfinite(p)
    order = np.flatnonzero(tested)[np.argsort(p[tested])]
    adjusted[order] = np.maximum.accumulate(p[order] * np.arange(len(order), 0, -1)).clip(max=1)
    return adjusted


def power(difference: float, seeds: int, seed_deviation: float, *, item_error: float = 0.0, items: int = 1000,
          alpha: float = 0.05) -> float:
    """Chance that the two-sided paired test finds a true `difference` with this many seeds.

    `seed_deviation`: standard deviation across seeds of the paired difference; `item_error`: the part of
    its standard error that comes from the choice of the `items` and that more seeds do not lower.
    Noncentral t with variance seed_deviation² / seeds + item_error², Satterthwaite's degrees of freedom and
    the paired test's own critical value.
    """
    if seeds < 2 or seed_deviation <= 0 or item_error < 0:
        raise ValueError("power needs at least two seeds, seed_deviation > 0 and item_error >= 0")
    parts = np.array([seed_deviation**2 / seeds, item_error**2])
    freedom = parts.sum() ** 2 / (parts**2 / [seeds - 1, max(items - 1, 1)]).sum()
    limit = critical_value(alpha / 2, parts[0] / parts.sum(), seeds, items)
    shift = difference / np.sqrt(parts.sum())
    return float(stats.nct.sf(limit, freedom, shift) + stats.nct.cdf(-limit, freedom, shift))


def seeds_needed(difference: float, seed_deviation: float, *, item_error: float = 0.0, items: int = 1000,
                 alpha: float = 0.05, target: float = 0.8, most: int = 1000) -> int | None:
    """Fewest seeds with which `power` reaches the target; None where not even `most` seeds would do."""
    for seeds in range(2, most + 1):
        found = power(difference, seeds, seed_deviation, item_error=item_error, items=items, alpha=alpha)
        if found >= target:
            return seeds
    return None
