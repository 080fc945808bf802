"""The primary comparisons: a plan written down before looking, and its one table of answers."""
from __future__ import annotations

from typing import Iterable

import numpy as np
import pandas as pd

from carma_lib.stats.inference import (FILTER_COLUMNS, NotComparable, bootstrap_interval, cv_ratio_test, hedges_g,
                                 holm, pair, paired_test, power)
from carma_lib.stats.table import METHOD_LABELS
from carma_lib.stats.metrics import METRICS

KINDS = ("difference", "non-inferiority", "cv ratio")
_NEEDED = ("name", "kind", "metric", "method", "baseline")
_NUMBERS = ("estimate", "low", "high", "p", "holm_p", "bootstrap_low", "bootstrap_high", "effect_size",
            "method_estimate", "baseline_estimate", "standard_error", "seed_deviation")


def check_plan(plan: list[dict]) -> None:
    """ValueError with one line where a claim of the plan is incomplete, unknown, unclear or stands twice."""
    if not plan:
        raise ValueError("the plan holds no claim")
    for claim in plan:
        name = claim.get("name", claim)
        if missing := [key for key in _NEEDED if not claim.get(key)]:
            raise ValueError(f"claim {name!r} lacks {missing}")
        if unknown := [key for key in claim if key not in (*_NEEDED, "margin", *FILTER_COLUMNS)]:
            raise ValueError(f"claim {name!r} has unknown keys {unknown}; filters are {FILTER_COLUMNS}")
        if claim["kind"] not in KINDS or claim["metric"] not in METRICS:
            raise ValueError(f"claim {name!r}: kind is one of {list(KINDS)}, metric one of {list(METRICS)}")
        if (claim["kind"] == "non-inferiority") != ("margin" in claim) or not claim.get("margin", 1) > 0:
            raise ValueError(f"claim {name!r}: only non-inferiority has a margin, above 0, in shares")
        if METRICS[claim["metric"]].lower_is_better and claim["kind"] != "difference":
            raise ValueError(f"claim {name!r}: lower {claim['metric']} is better; state it as a difference")
    names = [claim["name"] for claim in plan]
    if len(set(names)) < len(names):
        raise ValueError("two claims of the plan have the same name")


def primary_comparisons(results: pd.DataFrame, plan: list[dict], *, confidence: float = 0.95) -> pd.DataFrame:
    """One row a claim of the plan, in its order, corrected by Holm's method over the whole plan.

    A claim is a dict: name, kind ('difference', 'non-inferiority', 'cv ratio'), metric (of `METRICS`),
    method, baseline, for non-inferiority margin (in shares: 0.02 is two points), and filters (task, split,
    condition, rate …) that leave one cell a method.

    Columns: name, kind, metric, method, baseline, the filters, margin, method_estimate, baseline_estimate,
    estimate (method minus baseline in shares, or the ratio of the two CVs), low, high (`crossed_interval`;
    Pitman and Morgan's for a ratio), p, holm_p, bootstrap_low, bootstrap_high (`bootstrap_interval`),
    effect_size (`hedges_g`), standard_error, seed_deviation (of the paired differences), n_items (in either
    method's denominator), n_seeds,
    outcome ('shown', 'the opposite shown', 'open' or 'not tested', of the claim that the method is better, no
    worse or steadier), verdict (the same in words), note. A claim that cannot be tested has empty numbers and
    its reason in note.
    """
    check_plan(plan)
    lines = [_compare(results, claim, confidence) for claim in plan]
    table = pd.DataFrame(lines)
    table["holm_p"] = holm(table["p"])
    table["outcome"] = [_outcome(row, 1 - confidence) for row in table.to_dict("records")]
    table["verdict"] = [_verdict(row) for row in table.to_dict("records")]
    first = [*_NEEDED, *(name for name in FILTER_COLUMNS if name in table), "margin", "method_estimate",
             "baseline_estimate", "estimate", "low", "high", "p", "holm_p"]
    return table[[*first, *(name for name in table if name not in first)]]


def _compare(results: pd.DataFrame, claim: dict, confidence: float) -> dict:
    line = {**claim, "margin": claim.get("margin", np.nan), **dict.fromkeys(_NUMBERS, np.nan), "n_items": 0,
            "n_seeds": 0, "note": ""}
    where = {name: claim[name] for name in FILTER_COLUMNS if name in claim}
    try:
        first, second, notes = pair(results, claim["metric"], claim["method"], claim["baseline"], where)
        counted = (first.denominator > 0) | (second.denominator > 0)
        line |= {"n_items": int(counted.any(axis=0).sum()), "n_seeds": len(first.seeds)}
        values = first.values.mean(axis=1), second.values.mean(axis=1)
        if claim["kind"] == "cv ratio":
            found = cv_ratio_test(*values, confidence=confidence)
            estimates = [value.std(ddof=1) / value.mean() for value in values]
        else:
            found = paired_test(first, second, margin=claim.get("margin"), confidence=confidence)
            estimates = [value.mean() for value in values]
            low, high = bootstrap_interval(first, second, confidence=confidence)
            difference = values[0] - values[1]
            line |= {"bootstrap_low": low, "bootstrap_high": high, "effect_size": hedges_g(difference),
                     "seed_deviation": difference.std(ddof=1) if len(difference) > 1 else np.nan}
    except NotComparable as reason:
        return line | {"note": str(reason)}
    return line | found._asdict() | {
        "method_estimate": estimates[0], "baseline_estimate": estimates[1],
        "note": "; ".join(filter(None, [*notes, found.note]))}


def _outcome(row: dict, alpha: float) -> str:
    if np.isnan(row["holm_p"]):
        return "not tested"
    if row["holm_p"] >= alpha:
        return "open"
    if row["kind"] == "non-inferiority":
        return "shown"
    if row["kind"] == "cv ratio":
        good = row["estimate"] < 1
    else:
        good = (row["estimate"] < 0) == METRICS[row["metric"]].lower_is_better
    return "shown" if good else "the opposite shown"


def _verdict(row: dict) -> str:
    method, baseline = (METHOD_LABELS.get(row[key], row[key]) for key in ("method", "baseline"))
    if row["outcome"] == "not tested":
        return "not tested"
    if row["kind"] == "non-inferiority":
        bounded = f"{method} is at most {100 * row['margin']:g} points worse than {baseline}"
        return bounded if row["outcome"] == "shown" else f"not shown that {bounded}"
    spread = row["kind"] == "cv ratio"
    if row["outcome"] == "open":
        return "no difference in spread across seeds shown" if spread else "no difference shown"
    good = row["outcome"] == "shown"
    if spread:
        return f"{method} varies {'less' if good else 'more'} across seeds than {baseline}"
    return f"{method} is {'better' if good else 'worse'} than {baseline}"


def power_table(comparisons: pd.DataFrame, *, difference: float = 0.02, seeds: Iterable[int] = range(2, 31),
                alpha: float = 0.05) -> pd.DataFrame:
    """Power to find a true difference (in shares) by number of seeds: columns name, n_seeds, power.

    For each claim but CV ratios, from the spread that the comparisons found: `seed_deviation`, and the rest
    of `standard_error` as the items' part. Uncorrected alpha: one claim alone.
    """
    rows = comparisons[(comparisons["kind"] != "cv ratio") & (comparisons["seed_deviation"] > 0)]
    lines = []
    for row in rows.to_dict("records"):
        items = max(row["standard_error"] ** 2 - row["seed_deviation"] ** 2 / row["n_seeds"], 0.0) ** 0.5
        lines += [{"name": row["name"], "n_seeds": number, "power": power(
            difference, number, row["seed_deviation"], item_error=items, items=row["n_items"], alpha=alpha)}
            for number in seeds]
    return pd.DataFrame(lines, columns=["name", "n_seeds", "power"])
