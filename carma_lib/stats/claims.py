"""The claims: a plan written down before looking, and its one table of answers."""
from __future__ import annotations

from numbers import Real
from typing import Any, Iterable, Sequence

import numpy as np
import pandas as pd

from carma_lib.stats.curves import still_rising
from carma_lib.stats.inference import (FEWEST_SEEDS, FILTER_COLUMNS, NotComparable, cv_ratio_test,
                                       effect_size, holm, pair, paired_test, power)
from carma_lib.stats.metrics import METRICS, counted_items
from carma_lib.stats.table import METHOD_LABELS, select, task_label

#: A claim of a difference in answers needs at least so many items that count (consistency and accuracy kept count right
#: ones alone). In 300 simulated studies without a difference, 3 to 10 seeds: 8 to 12 % errors of 5 % with 2 items, 2 to 8 % with 5.
FEWEST_ITEMS = 5
KINDS = ("difference", "non-inferiority", "cv ratio")
#: What `default_claims` asks, in this order.
QUESTIONS = ("new combinations", "longer texts", "synonyms", "pooling", "spread across seeds", "performance preserved")
_NEEDED = ("name", "kind", "metric", "method", "baseline")
_NUMBERS = ("estimate", "low", "high", "p", "holm_p", "effect_size",
            "method_estimate", "baseline_estimate", "standard_error", "seed_deviation")
_Question = tuple[str, str, str, dict]  # name, kind, metric and filters of a claim


def check_plan(plan: list[dict]) -> None:
    """ValueError with one line if a claim of the plan is incomplete, unknown, unclear or named twice."""
    if not plan:
        raise ValueError("the plan holds no claim: a comparison needs two trained methods")
    for claim in plan:
        name = claim.get("name", claim)
        if missing := [key for key in _NEEDED if not claim.get(key)]:
            raise ValueError(f"claim {name!r} lacks {missing}")
        if unknown := [key for key in claim if key not in (*_NEEDED, "margin", *FILTER_COLUMNS)]:
            raise ValueError(f"claim {name!r} has unknown keys {unknown}; filters are {FILTER_COLUMNS}")
        if claim["kind"] not in KINDS or claim["metric"] not in METRICS:
            raise ValueError(f"claim {name!r}: kind is one of {list(KINDS)}, metric one of {list(METRICS)}")
        if METRICS[claim["metric"]].bounds[0] < -1:
            raise ValueError(f"claim {name!r}: a claim compares shares, and {claim['metric']} is none; `summarise` has its interval")
        margin = claim.get("margin", 0.5)
        if (claim["kind"] == "non-inferiority") != ("margin" in claim) or isinstance(margin, bool) or not (
                isinstance(margin, Real) and 0 < margin < 1):
            raise ValueError(f"claim {name!r}: only non-inferiority has a margin, a share above 0 and below 1")
        if METRICS[claim["metric"]].lower_is_better and claim["kind"] != "difference":
            raise ValueError(f"claim {name!r}: lower {claim['metric']} is better; state it as a difference")
    names = [claim["name"] for claim in plan]
    if len(set(names)) < len(names):
        raise ValueError("two claims of the plan have the same name")


def default_claims(results: pd.DataFrame, *, baseline: str = "fine_tuning", methods: Sequence[str] | None = None,
                   questions: Sequence[str] = QUESTIONS, margin: float = 0.02) -> list[dict]:
    """The project's questions as a plan for `primary_comparisons`: each method against the baseline, by task and model.

    methods: those compared, all trained ones by default. If the baseline was not trained, the first trained method of
    `METHOD_LABELS` is the baseline. `questions` of `QUESTIONS`; their rows:

    - new combinations: accuracy on held-out combinations; called "accuracy" if the task has no such split
    - longer texts: accuracy on longer texts, if the task has such a split
    - synonyms: ConsistSyn on seen combinations (or the first split that has it) at 25 % replaced, or the lowest rate
    - pooling: accuracy kept on seen combinations (or the first split that has it), words pooled by their mean, start nearest to half of the depth
    - spread across seeds: ratio of the CVs of accuracy on held-out combinations
    - performance preserved: accuracy on seen combinations, non-inferior by `margin` (in shares)

    A task without one of these splits is asked on "test", or on its first split. What was not measured is not asked.
    The list is empty if fewer than two methods were trained.
    """
    if unknown := [name for name in questions if name not in QUESTIONS]:
        raise ValueError(f"unknown questions {unknown}; known are {list(QUESTIONS)}")
    trained = results[results["budget"] > 0]
    present = sorted(trained["method"].astype(str).unique(), key=lambda name: ([*METHOD_LABELS, name].index(name), name))
    baseline = baseline if baseline in present or not present else present[0]
    others = [name for name in (methods or present) if name != baseline]
    names = {model: model.rpartition("/")[2] for model in map(str, results["model"].unique())}
    if len(set(names.values())) < len(names):
        names = {model: model for model in names}
    several, plan = len(names) > 1, []
    for task, model in results[["task", "model"]].astype(str).drop_duplicates().itertuples(index=False):
        rows = trained[(trained["task"] == task) & (trained["model"] == model)]
        here = set(rows["method"].astype(str))
        where = {"task": task, **({"model": model} if several else {})}
        label = f"{names[model]}, {task_label(task)}" if several else task_label(task)
        for method in others if baseline in here else ():
            if not methods and method not in here:
                continue
            who = f"{METHOD_LABELS.get(method, method)}, " if len(others) > 1 else ""
            plan += [{"name": f"{label}: {who}{name}", "kind": kind, "metric": metric, **where, "method": method,
                      "baseline": baseline, **more} for name, kind, metric, more in _asked(rows, questions, margin)]
    return plan


def claims_for(claims: Iterable[dict], tasks: Iterable[str], **where: Any) -> list[dict]:
    """A study's claims, written without a task, as a plan: each of CARMA against plain fine-tuning, for each task.

    where: further filters of all of them, such as the start.
    """
    return [{"method": "carma", "baseline": "fine_tuning", **claim, "name": f"{task_label(task)}: {claim['name']}",
             "task": task, **where} for task in tasks for claim in claims]


def _asked(rows: pd.DataFrame, questions: Sequence[str], margin: float) -> list[_Question]:
    """The questions that the rows of one task and model can answer."""
    splits = list(rows["split"].astype(str).unique())
    seen, held_out, longer = (f"test_{name}" if f"test_{name}" in splits else "test" if "test" in splits else splits[0]
                              for name in ("seen", "held_out", "longer"))
    clean = {"condition": "clean"}
    asked: dict[str, _Question] = {
        "new combinations": ("new combinations" if held_out == "test_held_out" else "accuracy", "difference", "accuracy",
                             {"split": held_out, **clean}),
        "spread across seeds": ("spread across seeds", "cv ratio", "accuracy", {"split": held_out, **clean}),
        "performance preserved": ("performance preserved", "non-inferiority", "accuracy",
                                  {"split": seen, **clean, "margin": margin})}
    if longer == "test_longer":
        asked["longer texts"] = ("longer texts", "difference", "accuracy", {"split": longer, **clean})
    def changed_split(changed: pd.DataFrame) -> str:
        """Not every split needs to have been asked in changed texts."""
        has = list(changed["split"].astype(str).unique())
        return seen if seen in has else has[0]

    replaced = select(rows, condition="replaced")
    drawn = replaced[replaced["source"] != "adversary"]
    if rates := sorted(drawn["rate"].unique()):
        asked["synonyms"] = ("synonyms", "difference", "consist_syn", {
            "split": changed_split(drawn), "condition": "replaced", "rate": 0.25 if 0.25 in rates else float(rates[0]),
            **({"source": str(drawn["source"].iloc[0])} if len(drawn) < len(replaced) else {})})
    pooled = select(rows, condition="pooled", protocol="mean", level="word")
    if len(pooled):
        asked["pooling"] = ("pooling", "difference", "accuracy_kept", {
            "split": changed_split(pooled), "condition": "pooled",
            "depth_share": float(min(sorted(pooled["depth_share"].unique()), key=lambda share: abs(share - 0.5))),
            "protocol": "mean", "level": "word"})
    return [asked[name] for name in questions if name in asked]


def primary_comparisons(results: pd.DataFrame, plan: list[dict], *, curves: pd.DataFrame | None = None) -> pd.DataFrame:
    """One row a claim of the plan, in its order, corrected by Holm's method over the whole plan.

    A claim is a dict: name, kind ('difference', 'non-inferiority', 'cv ratio'), metric (of `METRICS`), method,
    baseline, for non-inferiority margin (in shares: 0.02 is two points), and filters (task, split, condition, rate …)
    that leave one cell a method. `curves`: learning curves as `still_rising` takes them, read up to a claim's budget.

    Columns: name, kind, metric, method, baseline, the filters, margin, method_estimate, baseline_estimate, estimate
    (method minus baseline in shares, or the ratio of the two CVs), low, high (`crossed_interval`; Pitman and Morgan's
    for a ratio), p, holm_p, effect_size (d_z), standard_error,
    seed_deviation (of the paired differences), n_items (in either method's denominator), n_seeds, steps (training
    steps of the method), curve (what `still_rising` says of both methods there; empty without curves), note,
    outcome ('shown', 'the opposite shown', 'open' or 'not tested', of the claim that the method is better, no worse or
    steadier) and verdict (the same in words).

    Intervals are of 95 %, tests of 5 %. Fewer than `FEWEST_SEEDS` seeds or `FEWEST_ITEMS` items that count: estimates and
    intervals, and outcome 'not tested' (a ratio of CVs is of seeds alone, and has no estimate below `FEWEST_SEEDS`). A claim that cannot be estimated has empty numbers and its reason in note.
    ValueError for an unclear plan, or a task, split, model or start that the table does not have.
    """
    check_plan(plan)
    return _judged([_compare(results, claim, curves) for claim in plan])


def _judged(lines: list[dict]) -> pd.DataFrame:
    """The lines of `_compare` as one family: corrected, with outcome and verdict."""
    table = pd.DataFrame(lines)
    table["holm_p"] = holm(table["p"])
    table["outcome"] = [_outcome(row) for row in table.to_dict("records")]
    table["verdict"] = [_verdict(row) for row in table.to_dict("records")]
    first = [*_NEEDED, *(name for name in FILTER_COLUMNS if name in table), "margin", "method_estimate",
             "baseline_estimate", "estimate", "low", "high", "p", "holm_p"]
    return table[[*first, *(name for name in table if name not in first)]]


def comparisons_so_far(results: pd.DataFrame | None, plan: list[dict], *, curves: pd.DataFrame | None = None) -> pd.DataFrame:
    """`primary_comparisons` of a study that is not whole yet; results: None if nothing is answered.

    A claim for which one of its methods has no answer yet comes last, with the outcome 'not tested' and the verdict
    'not yet measured'; Holm's correction runs over the others.
    """
    check_plan(plan)
    ready = [claim for claim in plan if results is not None and all(len(select(results, method=claim[side], **{
        name: value for name, value in _filters(claim).items() if (claim[side], name) != ("untuned", "budget")}))
        for side in ("method", "baseline"))]
    missing = [claim for claim in plan if claim not in ready]
    table = _judged([*(_compare(results, claim, curves) for claim in ready), *map(_empty_line, missing)])
    table.loc[len(ready):, "verdict"] = "not yet measured"
    return table


def _empty_line(claim: dict) -> dict:
    return {**claim, "margin": claim.get("margin", np.nan), **dict.fromkeys(_NUMBERS, np.nan), "n_items": 0,
            "n_seeds": 0, "steps": 0, "curve": "", "note": ""}


def _filters(claim: dict) -> dict:
    return {name: claim[name] for name in FILTER_COLUMNS if name in claim}


def _compare(results: pd.DataFrame, claim: dict, curves: pd.DataFrame | None) -> dict:
    line = _empty_line(claim)
    try:
        first, second, notes = pair(results, claim["metric"], claim["method"], claim["baseline"], _filters(claim))
        line |= {"n_items": counted_items(first, second), "n_seeds": len(first.seeds), "steps": int(first.key["budget"]),
                 "curve": _curve_verdict(curves, first.key, second.key)}
        values = first.values.mean(axis=1), second.values.mean(axis=1)
        if claim["kind"] == "cv ratio":
            found = cv_ratio_test(*values)
            estimates = [value.std(ddof=1) / value.mean() for value in values]
        else:
            found = paired_test(first, second, margin=claim.get("margin"))
            if line["n_items"] < FEWEST_ITEMS:
                found = found._replace(p=np.nan)
            estimates = [value.mean() for value in values]
            difference = values[0] - values[1]
            line |= {"effect_size": effect_size(difference),
                     "seed_deviation": difference.std(ddof=1) if len(difference) > 1 else np.nan}
    except NotComparable as reason:
        return line | {"note": str(reason)}
    return line | found._asdict() | {
        "method_estimate": estimates[0], "baseline_estimate": estimates[1],
        "note": "; ".join(filter(None, [*notes, found.note]))}


def _curve_verdict(curves: pd.DataFrame | None, *keys: dict) -> str:
    """What the learning curves of the compared runs, up to their budgets, say; one verdict if both say the same."""
    said = {}
    for key in keys if curves is not None and "validation_accuracy" in curves else ():
        rows = curves[(curves["step"] <= key["budget"]) & curves["validation_accuracy"].notna()]
        for name in ("task", "method", "start", "model"):
            rows = rows[rows[name].astype(str) == str(key[name])] if name in rows else rows
        if len(rows):
            said[METHOD_LABELS.get(key["method"], key["method"])] = still_rising(rows)["verdict"].iloc[0]
    if len(set(said.values())) == 1:
        return said.popitem()[1]
    return "; ".join(f"{name}: {verdict}" for name, verdict in said.items())


def _outcome(row: dict) -> str:
    if np.isnan(row["holm_p"]):
        return "not tested"
    if row["holm_p"] >= 0.05:
        return "open"
    better = {"non-inferiority": True, "cv ratio": row["estimate"] < 1}.get(
        row["kind"], (row["estimate"] < 0) == METRICS[row["metric"]].lower_is_better)
    return "shown" if better else "the opposite shown"


def _verdict(row: dict) -> str:
    method, baseline = (METHOD_LABELS.get(row[key], row[key]) for key in ("method", "baseline"))
    if row["outcome"] == "not tested":
        estimated, seeds, items = pd.notna(row["estimate"]), row["n_seeds"], row["n_items"]
        if estimated and seeds < FEWEST_SEEDS:
            return f"not tested: {seeds} seed{'s' * (seeds > 1)}, a claim needs {FEWEST_SEEDS}"
        few = estimated and items < FEWEST_ITEMS and row["kind"] != "cv ratio"
        return "not tested" + few * f": {items} item{'s' * (items > 1)} counted, a claim needs {FEWEST_ITEMS}"
    if row["kind"] == "non-inferiority":
        bounded = f"{method} is at most {100 * row['margin']:g} points worse than {baseline}"
        return bounded if row["outcome"] == "shown" else f"not shown that {bounded}"
    good, spread = row["outcome"] == "shown", row["kind"] == "cv ratio"
    if row["outcome"] == "open":
        return f"no difference{' in spread across seeds' * spread} shown"
    if spread:
        return f"{method} varies {'less' if good else 'more'} across seeds than {baseline}"
    return f"{method} is {'better' if good else 'worse'} than {baseline}"


def power_table(comparisons: pd.DataFrame, *, difference: float = 0.02, level: float = 0.05) -> pd.DataFrame:
    """Power to find a true difference (in shares) at `level` by 2 to 30 seeds: columns name, n_seeds, power.

    For each claim but CV ratios, from the spread that the comparisons found: `seed_deviation`, and the rest
    of `standard_error` as the items' part. One claim alone; the first step of Holm's correction over n claims has
    the level 0.05 / n. Non-inferiority is asked against its margin: there
    `difference` counts from the margin, so that of the margin's own size is the power if the methods are equal.
    """
    lines = []
    for row in comparisons[(comparisons["kind"] != "cv ratio") & (comparisons["seed_deviation"] > 1e-12)].to_dict("records"):
        items = max(row["standard_error"] ** 2 - row["seed_deviation"] ** 2 / row["n_seeds"], 0.0) ** 0.5
        lines += [{"name": row["name"], "n_seeds": seeds, "power": power(
            difference, seeds, row["seed_deviation"], item_error=items, items=row["n_items"], level=level)} for seeds in range(2, 31)]
    return pd.DataFrame(lines, columns=["name", "n_seeds", "power"])
