"""What a study's notebooks ask of its measures and answers: differences within seeds, curves, states, counted claims."""
from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy.integrate import trapezoid
from scipy.stats import spearmanr

from carma_lib.stats.curves import check_one_value, clustered_slope, paired_differences
from carma_lib.stats.inference import FILTER_COLUMNS
from carma_lib.stats.metrics import METRICS, per_seed
from carma_lib.stats.table import select

#: What tells the trainings of a learning curve apart, beside method and seed.
_SETUP = ["task", "start", "training_items", "split"]


def seed_differences(table: pd.DataFrame, value: str, *, by: Sequence[str]) -> pd.DataFrame:
    """Each row of another method with the column `difference`: its value minus fine-tuning's of the same seed and `by`."""
    plain = select(table, method="fine_tuning")
    check_one_value(plain, by)
    plain = plain[[*by, "seed", value]]
    pairs = table[table["method"] != "fine_tuning"].merge(plain, on=[*by, "seed"], suffixes=("", "_baseline"))
    return pairs.assign(difference=pairs[value] - pairs[f"{value}_baseline"])


def method_differences(answers: pd.DataFrame, questions: Iterable[dict]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Every method minus plain fine-tuning, for each question, by task and start.

    questions: claims as `primary_comparisons` takes them; name, metric and the filters are read. The first table is
    that of `paired_differences`, the second that of `seed_differences`, both with the column `question`.
    """
    found, dots = [], []
    for question in questions:
        where = {name: question[name] for name in FILTER_COLUMNS if name in question}
        of_split = select(answers, split=where["split"]) if "split" in where else answers
        values = select(per_seed(of_split, question["metric"]), **where)
        found.append(paired_differences(values, "value", by=["task", "start"], method="").assign(question=question["name"]))
        dots.append(seed_differences(values, "value", by=["task", "start"]).assign(question=question["name"]))
    return pd.concat(found, ignore_index=True), pd.concat(dots, ignore_index=True)


def forgetting(measures: pd.DataFrame) -> pd.DataFrame:
    """Perplexity of plain text after training over before, a row a task and method: the method's, plain fine-tuning's, and their ratio.

    measures: `perplexity_before` and `perplexity_after`, one value a task, method and seed. The interval (from, to) is
    Student's over seeds, on logarithms.
    """
    asked = select(measures, measure=["perplexity_before", "perplexity_after"])
    check_one_value(asked, ["task", "measure"])
    wide = asked.pivot(index=["task", "method", "seed"], columns="measure", values="measured").reset_index()
    wide = wide.assign(growth=np.log(wide["perplexity_after"] / wide["perplexity_before"]))
    found = paired_differences(wide, "growth", by=["task"], method="")
    names = {"method_estimate": "perplexity, after over before", "baseline_estimate": "fine-tuning", "estimate": "ratio",
             "low": "from", "high": "to"}
    return found[["task", "method"]].join(np.exp(found[list(names)]).rename(columns=names)).join(found["n_seeds"])


def curve_table(measures: pd.DataFrame, *, level: float) -> pd.DataFrame:
    """What learning curves say, a row a run and test split: area, steps_to_level, converged.

    `measures`: columns measure ("accuracy" is used), split, budget, measured (one value a budget), and those that name
    the run: all others but `layer`. area: mean accuracy over the logarithm of the steps, by the trapezoid rule between
    first and last budget. steps_to_level: steps until accuracy first reaches `level`, as a share of plain fine-tuning's
    mean accuracy at the last budget of the same task, start, training set and split; between budgets by a straight line
    over log steps; the first budget if it is there already, NaN if it never is. converged: the last accuracy.
    """
    keys = [name for name in measures.columns if name not in ("measure", "budget", "layer", "measured")]
    found, lines = measures[(measures["measure"] == "accuracy") & (measures["split"] != "validation")], []
    for _, of_setup in found.groupby(_SETUP, observed=True):
        goal = level * select(of_setup, method="fine_tuning", budget=of_setup["budget"].max())["measured"].mean()
        for key, rows in of_setup.groupby(keys, dropna=False, sort=False, observed=True):
            rows = rows.sort_values("budget")
            steps, values = np.log(rows["budget"].to_numpy(float)), rows["measured"].to_numpy(float)
            area = trapezoid(values, steps) / np.ptp(steps) if len(steps) > 1 else values[0]
            reached = np.nan
            if (values >= goal).any():
                place = int(np.argmax(values >= goal))
                around = slice(max(place - 1, 0), place + 1)
                reached = np.exp(np.interp(goal, values[around], steps[around]))
            lines.append(dict(zip(keys, key)) | {"area": area, "steps_to_level": reached, "converged": values[-1]})
    return pd.DataFrame(lines)


def speed_and_level(summary: pd.DataFrame) -> pd.DataFrame:
    """From `curve_table`: CARMA minus plain fine-tuning in points, of the area under the curve and of its end."""
    area, end = (paired_differences(summary, name, by=_SETUP) for name in ("area", "converged"))
    both = area.merge(end, on=[*_SETUP, "method", "baseline", "n_seeds"], suffixes=("_area", "_end"))
    names = {f"{column}_{part}": f"{part}{suffix}" for part in ("area", "end")
             for column, suffix in (("estimate", ""), ("low", "_low"), ("high", "_high"))}
    return both[[*_SETUP[:3], "n_seeds"]].join(100 * both[list(names)].rename(columns=names))


def steps_reached(summary: pd.DataFrame) -> pd.DataFrame:
    """From `curve_table`, by method: how many runs reached the level, of how many, and the median of their steps."""
    steps = summary.groupby([*_SETUP[:3], "method"], observed=True)["steps_to_level"].agg(
        reached="count", seeds="size", median_steps="median").reset_index()
    return steps.pivot(index=_SETUP[:3], columns="method", values=["reached", "seeds", "median_steps"])


def changed_settings(measures: pd.DataFrame, labels: Mapping[str, str]) -> pd.DataFrame:
    """Measures with the column `setting`: what a cell changed, by its label and value; "as tuned" if nothing."""
    return measures.assign(setting=[f"{labels[change]} {value}" if change else "as tuned"
                                    for change, value in zip(measures["change"], measures["value"])])


def setting_differences(measured: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """From `changed_settings`: CARMA at each setting minus plain fine-tuning, by task; intervals, and seeds."""
    order = list(dict.fromkeys(["as tuned", *measured["setting"]]))
    named = measured.assign(method=measured["setting"].where(measured["method"] != "fine_tuning", "fine_tuning"))
    found = paired_differences(named, "measured", by=["task"], method="").rename(columns={"method": "setting"})
    found = found.sort_values("setting", key=lambda each: each.map(order.index), kind="stable")
    return found.assign(method="carma"), seed_differences(measured, "measured", by=["task"])


def before_and_after(measures: pd.DataFrame, measure: str, methods: Sequence[str]) -> pd.DataFrame:
    """A measure of hidden states after training by these methods, and before it as the method "untuned"."""
    before = select(measures, measure=f"{measure}_before", method="fine_tuning")
    return pd.concat([before.assign(method="untuned"), select(measures, measure=f"{measure}_after", method=list(methods))])


def predictors(runs: pd.DataFrame, names: Mapping[str, str]) -> pd.DataFrame:
    """What a standard deviation more of a measure tells of accuracy in points, by task and start, the method held fixed.

    runs: columns task, start, method, seed, accuracy and the measures, a row a run. names: measure → its name in the
    table. Columns of `clustered_slope` by seeds, and Spearman's rank correlation.
    """
    lines = []
    for (task, start), rows in runs.groupby(["task", "start"], observed=True):
        for measure, name in names.items():
            known = rows.dropna(subset=[measure, "accuracy"])
            standard = known.assign(x=(known[measure] - known[measure].mean()) / known[measure].std(ddof=1))
            fit = clustered_slope(standard, "x", "accuracy", control="method")
            lines.append({"task": task, "start": start, "measure": name, "slope": 100 * fit.slope, "low": 100 * fit.low,
                          "high": 100 * fit.high, "p": fit.p, "spearman": spearmanr(known[measure], known["accuracy"]).statistic,
                          "runs": fit.runs, "seeds": fit.clusters})
    return pd.DataFrame(lines)


def counted_claims(families: pd.DataFrame) -> pd.DataFrame:
    """By start and question: how many claims of `primary_comparisons` there are, in favour, clear, and shown.

    In favour: the estimate is on the method's side (more, of some metrics less, or a smaller spread). Interval clear: of no difference, for
    non-inferiority of minus the margin. A claim's question is its name without the task and the rate.
    """
    ratio = families["kind"] == "cv ratio"
    edge = ratio.astype(float) - families["margin"].fillna(0)
    sign = [-1 if METRICS[metric].lower_is_better else 1 for metric in families["metric"]]
    counted: dict[str, Any] = {
        "in favour": np.where(ratio, families["estimate"] < 1, families["estimate"] * sign > 0),
        "interval clear": (families["low"] > edge) | (families["high"] < edge),
        "after correction": families["outcome"] == "shown"}
    question = families["name"].str.partition(": ")[2].str.replace(r" \d+ ?%", "", regex=True)
    table = families.assign(question=question, tests=1, **counted)
    return table.groupby(["start", "question"], sort=False)[["tests", *counted]].sum()
