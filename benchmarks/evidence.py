"""Do the intervals cover, are the tests honest, what do they find? Made studies whose truth is known.

    python benchmarks/evidence.py [--studies 2000]     coverage, false positives, power as a curve
    python benchmarks/evidence.py --rows 10000000      time and memory of the summaries

A made study: every method answers the same items from the same seeds. The log-odds of a right answer are
level + item + seed + (method's own seed effect), each normal, minus a harm where words are replaced.
"""
from __future__ import annotations

import argparse
import contextlib
import resource
import time
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy.special import expit

from carma_lib.stats.inference import NotComparable, cv_ratio_test, paired_test, power
from carma_lib.stats.intervals import crossed_interval, cv_interval
from carma_lib.stats.metrics import Crossed, coefficient_of_variation, summarise


class Design(NamedTuple):
    """Size and spreads of a made study; spreads are standard deviations in log-odds."""
    seeds: int = 5
    items: int = 400
    level: float = 0.5
    effect: float = 0.3
    harm: float = 0.7
    item_spread: float = 1.5
    seed_spread: float = 0.2
    own_spread: float = 0.15


#: Few items, or hardly any right answer: what a small run looks like.
SMALL_DESIGNS = {f"3 seeds, {items} items, {right}": Design(seeds=3, items=items, level=level, effect=0.0)
                 for items in (10, 20, 40) for right, level in (("60 % right", 0.5), ("9 % right", -3.0), ("95 % right", 4.0))}
DESIGNS = {
    "5 seeds": Design(),
    "3 seeds": Design(seeds=3),
    "10 seeds": Design(seeds=10),
    "5 seeds, 2000 items": Design(items=2000),
    "5 seeds, seeds hardly differ": Design(seed_spread=0.02, own_spread=0.02),
    "5 seeds, seeds differ much": Design(seed_spread=0.5, own_spread=0.4),
    "5 seeds, 90 % right": Design(level=3.0),
}


def _normal(nodes: int) -> tuple[np.ndarray, np.ndarray]:
    points, weights = np.polynomial.hermite_e.hermegauss(nodes)
    return points, weights / weights.sum()


def truth(design: Design, level: float) -> tuple[float, float]:
    """Accuracy and ConsistSyn of a method at this level, over all seeds and items, by quadrature."""
    (seed, of_seed), (item, of_item) = _normal(41), _normal(61)
    odds = level + np.hypot(design.seed_spread, design.own_spread) * seed[:, None] + design.item_spread * item
    clean, kept = expit(odds) @ of_item, (expit(odds) * expit(odds - design.harm)) @ of_item
    return float(of_seed @ clean), float(of_seed @ (kept / clean))


def made_study(design: Design, generator: np.random.Generator,
               effect: float) -> list[tuple[Crossed, Crossed]]:
    """(accuracy, ConsistSyn) cells of the baseline and of a method better by `effect` in log-odds."""
    shape = (design.seeds, design.items)
    shared = generator.normal(0, design.item_spread, design.items)
    shared = design.level + shared + generator.normal(0, design.seed_spread, (design.seeds, 1))
    study, labels = [], (np.arange(design.seeds), np.arange(design.items))
    for shift in (0.0, effect):
        odds = shared + shift + generator.normal(0, design.own_spread, (design.seeds, 1))
        clean = (generator.random(shape) < expit(odds)).astype(float)
        replaced = generator.random(shape) < expit(odds - design.harm)
        study.append((Crossed(*labels, clean, np.ones(shape)), Crossed(*labels, clean * replaced, clean)))
    return study


def hierarchical_bootstrap(first: Crossed, second: Crossed, *, draws: int = 2000) -> np.ndarray:
    """Draws of the difference of two cells (mean of the seeds' ratios) over seeds and items, shape (draws,).

    Each draw resamples seeds with replacement, then items with replacement, the same items for every seed and
    both methods, as weights: multinomial counts. A draw in which a seed has no item in the denominator leaves that
    seed out; a draw without any is NaN. The generator's seed is 0.
    """
    generator = np.random.default_rng(0)
    seeds, items = first.numerator.shape
    of_seeds = generator.multinomial(seeds, np.full(seeds, 1 / seeds), draws)
    of_items = generator.multinomial(items, np.full(items, 1 / items), draws).astype(float)

    def means(cell: Crossed) -> np.ndarray:
        below = of_items @ cell.denominator.T
        ratio = np.divide(of_items @ cell.numerator.T, below, out=np.zeros_like(below), where=below > 0)
        weight = of_seeds * (below > 0)
        total = weight.sum(axis=1)
        return np.divide((weight * ratio).sum(axis=1), total, out=np.full(draws, np.nan), where=total > 0)

    return means(first) - means(second)


def bootstrap_interval(first: Crossed, second: Crossed, *, draws: int = 2000) -> tuple[float, float]:
    """Percentile interval of `hierarchical_bootstrap`, widened by √(n / (n - 1)) for n seeds.

    A check beside `crossed_interval`, and not in its place: its coverage depends on how much seeds differ.
    """
    values = hierarchical_bootstrap(first, second, draws=draws)
    centre, seeds = first.values.mean() - second.values.mean(), len(first.seeds)
    widened = centre + (values - centre) * (np.sqrt(seeds / (seeds - 1)) if seeds > 1 else 1.0)
    low, high = np.nanquantile(widened, [0.025, 0.975])
    return float(low), float(high)


def coverage(design: Design, studies: int, *, bootstrap: bool = False, seed: int = 0) -> pd.Series:
    """Share of the studies whose 95 % interval holds the truth, by what is estimated."""
    generator = np.random.default_rng(seed)
    low, high = truth(design, design.level), truth(design, design.level + design.effect)
    hits: dict[str, list[bool]] = {}
    for _ in range(studies):
        baseline, method = made_study(design, generator, design.effect)
        for place, name in enumerate(("accuracy", "ConsistSyn")):
            first, second, gap = method[place], baseline[place], high[place] - low[place]
            one, two = crossed_interval(first.values), paired_test(first, second)
            hits.setdefault(name, []).append(one.low <= high[place] <= one.high)
            hits.setdefault(f"difference in {name}", []).append(two.low <= gap <= two.high)
            if bootstrap:
                lower, upper = bootstrap_interval(first, second, draws=400)
                hits.setdefault(f"difference in {name}, bootstrap", []).append(lower <= gap <= upper)
    return pd.DataFrame(hits).mean()


def small_studies(design: Design, studies: int, *, seed: int = 0) -> pd.Series:
    """Intervals and tests without a true difference where answers are few: coverage, and shares of wrong claims.

    wrong at 5 %, wrong at 0.5 %: how often p lies below 0.05 and below 0.005 (what a plan of ten asks of its first).
    """
    generator = np.random.default_rng(seed)
    true, lines = truth(design, design.level)[0], []
    for _ in range(studies):
        baseline, method = (cells[0] for cells in made_study(design, generator, 0.0))
        one, two = crossed_interval(method.values, bounds=(0, 1)), paired_test(method, baseline)
        lines.append({"accuracy covered": one.low <= true <= one.high, "difference covered": two.low <= 0 <= two.high,
                      "wrong at 5 %": two.p < 0.05, "wrong at 0.5 %": two.p < 0.005})
    return pd.DataFrame(lines).mean()


def cv_coverage(seeds: int, studies: int, *, ratio: float = 0.5, seed: int = 0) -> pd.Series:
    """Coverage of the intervals of a CV and of a CV ratio, and how often the permutation test rejects.

    The seeds' accuracies: 300 fixed items, method-specific seed spreads of 0.3 and about `ratio` times it.
    """
    generator = np.random.default_rng(seed)
    odds = 0.5 + np.random.default_rng(1).normal(0, 1.5, 300)
    spreads = (0.3 * ratio, 0.3)
    points, weights = _normal(61)
    true = []
    for spread in spreads:
        chance = expit(odds + spread * points[:, None])
        mean = weights @ chance.mean(axis=1)
        noise = weights @ (chance * (1 - chance)).mean(axis=1) / len(odds)
        true.append(np.sqrt(weights @ (chance.mean(axis=1) - mean) ** 2 + noise) / mean)
    hits = []
    for _ in range(studies):
        chances = [expit(odds + generator.normal(0, spread, (seeds, 1))) for spread in spreads]
        first, second = ((generator.random((seeds, 300)) < chance).mean(axis=1) for chance in chances)
        one, two = cv_interval(first), cv_ratio_test(first, second)
        hits.append((one.low <= true[0] <= one.high, two.low <= true[0] / true[1] <= two.high, two.p <= 0.05))
    return pd.DataFrame(hits, columns=["CV", "CV ratio", "permutation test rejects"]).mean()


def family_error(design: Design, studies: int, *, seed: int = 0) -> float:
    """Share of the studies without any true effect in which Holm's correction lets any claim through.

    Family: accuracy, its CV, ConsistSyn at two harms, and non-inferiority where the truth lies on the margin.
    """
    generator = np.random.default_rng(seed)
    margin = truth(design, design.level)[0] - truth(design, design.level - 0.15)[0]
    wrong = 0
    for _ in range(studies):
        baseline, method = made_study(design, generator, 0.0)
        again, worse = made_study(design._replace(harm=2 * design.harm), generator, -0.15)
        other, same = made_study(design._replace(harm=2 * design.harm), generator, 0.0)
        claims = [paired_test(method[0], baseline[0]), paired_test(method[1], baseline[1]),
                  paired_test(same[1], other[1]), paired_test(worse[0], again[0], margin=margin)]
        with contextlib.suppress(NotComparable):
            claims.append(cv_ratio_test(method[0].values.mean(axis=1), baseline[0].values.mean(axis=1)))
        tested = [claim.p for claim in claims if np.isfinite(claim.p)]
        wrong += bool(tested) and min(tested) * len(tested) < 0.05  # Holm's first step decides whether any gets through
    return wrong / studies


def power_curve(design: Design, studies: int, seeds: tuple[int, ...], *, seed: int = 0) -> pd.DataFrame:
    """How often a true difference is found, by number of seeds: simulated, and by `inference.power`."""
    difference = truth(design, design.level + design.effect)[0] - truth(design, design.level)[0]
    lines = []
    for number in seeds:
        generator, found = np.random.default_rng(seed), []
        for _ in range(studies):
            baseline, method = made_study(design._replace(seeds=number), generator, design.effect)
            gaps = (method[0].values - baseline[0].values).mean(axis=1)
            test = paired_test(method[0], baseline[0])
            found.append((test.p < 0.05, gaps.var(ddof=1), test.standard_error**2))
        rejected, seed_variance, variance = np.mean(found, axis=0)
        item_error = np.sqrt(max(variance - seed_variance / number, 0.0))
        expected = power(difference, number, seed_variance**0.5, item_error=item_error, items=design.items)
        lines.append({"seeds": number, "difference": difference, "simulated": rejected, "formula": expected})
    return pd.DataFrame(lines)


def large_table(rows: int) -> pd.DataFrame:
    """A long table of about that many rows: 10 methods × 10 seeds × 50 conditions × items to fill it."""
    conditions, methods, seeds = 50, 10, 10
    items = max(rows // (conditions * methods * seeds), 1)
    place = np.arange(items * conditions * methods * seeds)
    condition = place // (items * seeds * methods)
    names = [f"item{number}" for number in range(items)]
    item = pd.Categorical.from_codes((place % items).astype(np.int32), names)
    pooled, replaced = condition >= 10, (condition > 0) & (condition < 10)

    def category(codes: np.ndarray, names: list[str]) -> pd.Categorical:
        return pd.Categorical.from_codes(codes.astype(np.int8), names)

    same = {name: category(np.zeros(len(place)), [value]) for name, value in
            (("task", "made"), ("split", "test"), ("model", "made"), ("start", "random"))}
    right = np.random.default_rng(0).random(len(place)) < 0.6
    return pd.DataFrame(same | {
        "item_id": item, "target": item, "prediction": item, "correct": right, "budget": 100,
        "method": category(place // (items * seeds) % methods, [f"method{each}" for each in range(methods)]),
        "seed": place // items % seeds, "changed": 1, "rank": 2 - right.astype(int), "log_probability": -1.0,
        "condition": category(replaced + 2 * pooled, ["clean", "replaced", "pooled"]),
        "source": category(replaced, ["", "wordnet"]), "rate": np.where(replaced, condition / 10, 0.0),
        "start_layer": np.where(pooled, condition - 10, -1),
        "depth_share": np.where(pooled, (condition - 10) / 40, np.nan),
        "protocol": category(pooled, ["", "mean"]), "level": category(pooled, ["", "word"])})


def time_summaries(rows: int) -> None:
    """Print seconds and peak memory of accuracy, ConsistSyn, ΔA and CV over a table of that many rows."""
    table = large_table(rows)
    begin = time.perf_counter()
    for summary, metric in ((summarise, "accuracy"), (summarise, "consist_syn"), (summarise, "pooling_drop"),
                            (coefficient_of_variation, "accuracy")):
        start = time.perf_counter()
        lines = len(summary(table, metric))
        print(f"{summary.__name__:25} {metric:13} {lines:4} cells {time.perf_counter() - start:6.1f} s")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{len(table):,} rows: {time.perf_counter() - begin:.1f} s, peak memory {peak:.2f} GiB")


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    arguments.add_argument("--studies", type=int, default=2000, help="made studies a design")
    arguments.add_argument("--rows", type=int, help="time the summaries over this many rows instead")
    options = arguments.parse_args()
    if options.rows:
        return time_summaries(options.rows)
    pd.set_option("display.width", 200, "display.max_columns", 20, "display.precision", 3)
    covered = {name: coverage(design, options.studies, bootstrap=True) for name, design in DESIGNS.items()}
    print("coverage of 95 % intervals\n", pd.DataFrame(covered).T, sep="")
    small = {name: small_studies(design, options.studies) for name, design in SMALL_DESIGNS.items()}
    print("\nsmall studies without a true difference\n", pd.DataFrame(small).T, sep="")
    spread = {f"{seeds} seeds, ratio {ratio}": cv_coverage(seeds, options.studies, ratio=ratio)
              for seeds in (5, 10, 20) for ratio in (1.0, 0.5)}
    print("\ncoefficient of variation\n", pd.DataFrame(spread).T, sep="")
    errors = {name: family_error(design, options.studies) for name, design in (DESIGNS | SMALL_DESIGNS).items()}
    print("\nfalse positives of a family of five after Holm\n", pd.Series(errors), sep="")
    curve = power_curve(Design(effect=0.12), options.studies // 2, (3, 5, 8, 12, 20, 30))
    print("\npower to find a small difference in accuracy\n", curve, sep="")


if __name__ == "__main__":
    main()
