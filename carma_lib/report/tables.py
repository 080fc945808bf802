"""Tables for readers: the paper's arrangement, published figures, claims in words, CSV and LaTeX."""
from __future__ import annotations

import math
import os
import re
from importlib import resources
from pathlib import Path
from typing import Any

import pandas as pd

from carma_lib.files import whole_file
from carma_lib.stats.table import METHOD_LABELS, sides, task_label
from carma_lib.stats.metrics import RUN_COLUMNS, coefficient_of_variation, summarise

_TASK_NAME = re.compile(r"(controlled|wordnet|own)_|sst\d$")
#: Headings that are no words of a table's own.
_WORDS = {"n_seeds": "seeds", "n_items": "items", "holm_p": "p (Holm)", "effect_size": "d_z", "method_estimate": "with the method",
          "baseline_estimate": "without"}
#: The values of `paper_table` and their headings.
_HEADINGS = {"accuracy": "accuracy", "cv_accuracy": "CV of accuracy", "consist_syn": "ConsistSyn",
             "cv_consist_syn": "CV of ConsistSyn"}


def paper_table(results: pd.DataFrame) -> pd.DataFrame:
    """Model × method × rate: accuracy and ConsistSyn with their CVs across seeds, as the paper arranges them.

    One row a run (task, split, model, start, budget, method), source of synonyms and rate; rate 0 is the
    clean text and has no ConsistSyn. Each value with `_low`, `_high`; n_seeds, n_items; note says why a
    value is empty.
    """
    keys = [*RUN_COLUMNS, "source", "rate"]
    unpooled = results[results["condition"] != "pooled"]
    parts = {}
    for metric in ("accuracy", "consist_syn") if (unpooled["condition"] == "replaced").any() else ("accuracy",):
        parts[metric] = summarise(unpooled, metric)
        parts[f"cv_{metric}"] = coefficient_of_variation(unpooled, metric)
    table = parts["accuracy"][[*keys, "n_items", "n_seeds"]]
    for name, part in parts.items():
        names = {"estimate": name, "low": f"{name}_low", "high": f"{name}_high", "note": f"{name}_note"}
        table = table.merge(part[[*keys, *names]].rename(columns=names), on=keys, how="left")
    notes = table[[f"{name}_note" for name in parts]].fillna("")
    table["note"] = ["; ".join(dict.fromkeys(filter(None, row))) for row in notes.itertuples(index=False)]
    return table.drop(columns=list(notes))


def readable(table: pd.DataFrame) -> pd.DataFrame:
    """`paper_table` for print: method names in words, values in per cent with their interval in brackets."""
    shown = table[["task", "split", "model", "start", "budget"]]
    shown = shown.loc[:, shown.nunique() > 1].assign(method=table["method"].map(lambda name: METHOD_LABELS.get(name, name)),
                                                     rate=(100 * table["rate"]).map("{:g} %".format))
    sources = table["source"].astype(str)
    if sources[table["rate"] > 0].nunique() > 1:
        shown = shown.assign(source=sources)
    for name, heading in _HEADINGS.items():
        if name in table:
            values = table[[name, f"{name}_low", f"{name}_high"]].itertuples(index=False, name=None)
            shown[heading] = [_with_interval(*row, plus="") for row in values]
    return shown


def published() -> pd.DataFrame:
    """The published figures that could be found, as numbers: task, model, method, metric, value, of, source.

    Facts of arXiv 2502.11066 and its repository: correct test items (`of` is empty where the size of the test
    set is not given), items kept under synonyms, and accuracy kept under pooling, read off a plot to ± 0.005.
    """
    return pd.read_csv(resources.files("carma_lib") / "published.csv")


def _beside_published(rows: pd.DataFrame, metric: str, keys: list[str], **options: Any) -> pd.DataFrame:
    """The rows with `published_task` (NaN for a task of this project), and `published` figures with the same keys."""
    kind = {"wordnet_inverse_dictionary": "inverse_dictionary", "sst3": "sentiment"}
    ours = rows.assign(published_task=rows["task"].astype(str).map(kind),
                       published_model=rows["model"].astype(str).str.lower().str.split("/").str[-1])
    theirs = published().query("metric == @metric").rename(columns={
        "task": "published_task", "model": "published_model", "value": f"published_{metric}"})
    keys = ["published_task", "published_model", "method", *keys]
    joined = ours.merge(theirs[[*keys, f"published_{metric}", "of"]], on=keys, **options)
    return joined.drop(columns="published_model")


def pooling_beside_published(kept: pd.DataFrame) -> pd.DataFrame:
    """Rows of `summarise(…, "accuracy_kept")` for which the share kept under pooling was published, beside it.

    The same task, model, method, protocol and start layer; ours pools words. May be empty.
    """
    words = kept[kept["level"] == "word"].astype({"method": str, "protocol": str})
    return _beside_published(words, "accuracy_kept", ["protocol", "start_layer"]).drop(columns=["published_task", "of"])


def beside_published(table: pd.DataFrame) -> pd.DataFrame:
    """`paper_table`'s clean rows with the published accuracy of the same task, model and method beside ours.

    Adds published_accuracy, published_correct and published_note, which says how the settings differ or why
    there is nothing to compare with.
    """
    joined = _beside_published(table[table["rate"] == 0], "correct", [], how="left")
    joined["published_accuracy"] = joined["published_correct"] / joined["of"]
    joined["published_note"] = [_difference(row) for row in joined.to_dict("records")]
    return joined.drop(columns=["published_task", "of"])


def _difference(row: dict) -> str:
    if pd.isna(row["published_task"]):
        return "task of this project: nothing published"
    if pd.isna(row["published_correct"]):
        return "no published figure for this model and method"
    if row["published_task"] == "inverse_dictionary":
        return "published: split by row (leaks) and size of the test set not given, so counts only"
    return "published: number of runs not given, last epoch's model, mean over batches"


#: Greek letters and signs that LaTeX knows in formulas only.
_MATHS = str.maketrans({sign: f"${name}$" for sign, name in {
    "λ": r"\lambda", "γ": r"\gamma", "η": r"\eta", "τ": r"\tau", "Δ": r"\Delta", "≥": r"\geq", "≤": r"\leq", "→": r"\to",
    "−": "-"}.items()})
_LATEX = str.maketrans({**{mark: f"\\{mark}" for mark in "%&#$_{}"}, "\\": r"\textbackslash{}", "^": r"\textasciicircum{}",
                        "~": r"\textasciitilde{}"})


def save_table(table: pd.DataFrame, folder: str | os.PathLike, name: str, *, caption: str | None = None) -> Path:
    """Write name.csv and, with a caption, name.tex into the folder; the CSV's path."""
    folder = Path(folder)
    if caption is not None:
        with whole_file(folder / f"{name}.tex") as temporary:
            style = table.style.hide(axis="index").format(_four_digits, escape="latex", na_rep="–")
            text = style.format_index(escape="latex", axis="columns").to_latex(
                caption=caption.translate(_LATEX), label=f"tab:{name}", hrules=True, position_float="centering")
            text = re.sub(r"^(?=[\[*])", "{}", text, flags=re.MULTILINE)  # else \\ would take it
            temporary.write_text(text.translate(_MATHS), encoding="utf-8")
    with whole_file(folder / f"{name}.csv") as temporary:
        table.to_csv(temporary, index=False)
    return folder / f"{name}.csv"


def _four_digits(value: Any) -> Any:
    """A number with four significant digits, as 3e-05; one of 1,000 or more whole. Anything else as it is."""
    return value if not isinstance(value, float) else f"{value:.0f}" if abs(value) >= 1000 else f"{value + 0.0:.4g}"


def disagreements(results: pd.DataFrame, method: str, baseline: str, *, rows: int = 10) -> pd.DataFrame:
    """Items whose answers differ most between two methods: item_id, target, and how often each was right.

    Over the common seeds of one condition (filter first): columns method_right, baseline_right (shares of the
    seeds) and the most frequent prediction of each. Half of the rows are those where the method is furthest ahead, then
    come those where it is furthest behind; where one side has fewer, the other has more.
    """
    for name in (method, baseline):
        if not (results["method"] == name).any():
            raise ValueError(f"no rows of {name}; check the filter")
    if results["condition"].nunique() > 1 or results.duplicated(["method", "seed", "item_id"]).any():
        raise ValueError("disagreements take one condition; filter the table to one task, split, condition")
    ours, theirs = (results[results["method"] == name].astype({"item_id": str}) for name in (method, baseline))
    columns = {"target": ours.groupby("item_id")["target"].first()}
    for label, rows_of, others in (("method", ours, theirs), ("baseline", theirs, ours)):
        items = rows_of[rows_of["seed"].isin(others["seed"])].groupby("item_id")
        columns[f"{label}_right"] = items["correct"].mean()
        columns[f"{label}_prediction"] = items["prediction"].agg(lambda each: each.astype(str).mode().iloc[0])
    table = pd.DataFrame(columns).dropna()
    gap = table["method_right"] - table["baseline_right"]
    ahead, behind = gap[gap > 0].sort_values(ascending=False), gap[gap < 0].sort_values()
    chosen = [*ahead.index[:max((rows + 1) // 2, rows - len(behind))], *behind.index[:max(rows // 2, rows - len(ahead))]]
    return table.loc[chosen].reset_index()


def _number(row: dict, column: str, sign: str = "") -> str:
    """A value of a claim: per cent, percentage points, or a ratio."""
    value, of_sides = row[column], column in ("method_estimate", "baseline_estimate")
    if pd.isna(value):
        return ""
    if row["kind"] == "cv ratio" and not of_sides:
        return f"{value:.2f}"
    return _signed(100 * value, 1, sign) + " %" * of_sides


def _p(value: float) -> str:
    return "" if pd.isna(value) else "< 0.001" if value < 0.001 else f"{value:.3f}"


def with_interval(table: pd.DataFrame, *, scale: float = 100, digits: int = 1, fewest_seeds: int = 1) -> pd.Series:
    """estimate, low and high of each row as one text, times `scale`: "+1.5 [−0.7, 3.6]", without an interval "+1.5".

    fewest_seeds: a row of fewer `n_seeds` has no interval.
    """
    lows = table["low"] if fewest_seeds == 1 else table["low"].where(table["n_seeds"] >= fewest_seeds)
    return pd.Series([_with_interval(*row, scale=scale, digits=digits) for row in zip(table["estimate"], lows, table["high"])],
                     index=table.index, dtype=object)


def _with_interval(estimate: float, low: float, high: float, *, scale: float = 100, digits: int = 1, plus: str = "+") -> str:
    """One text of an estimate and its interval; "–" without an estimate, "[3.1 or more]" without an upper end."""
    if pd.isna(estimate):
        return "–"
    ends = [_signed(scale * end, digits, "") for end in (low, high)]
    interval = "" if pd.isna(low) else f" [{ends[0]} or more]" if high == math.inf else f" [{', '.join(ends)}]"
    return _signed(scale * estimate, digits, plus) + interval


def _signed(value: float, digits: int, plus: str = "+") -> str:
    """A number with a typographic minus; what rounds to zero has no sign."""
    text = f"{value:{plus}.{digits}f}"
    return text.lstrip("+-") if float(text) == 0 else text.replace("-", "−")


def labelled(table: pd.DataFrame) -> pd.DataFrame:
    """A table for readers: tasks and methods by their labels in index, headings and cells, other headings as words."""
    def word(name: Any) -> Any:
        if not isinstance(name, str):
            return name
        return METHOD_LABELS.get(name) or (task_label(name) if _TASK_NAME.match(name) else name)

    def heading(name: Any) -> Any:
        return _WORDS.get(name) or word(name).replace("_", " ") if isinstance(name, str) else name

    cells = {name: table[name].astype(object).map(word) for name in ("task", "method", "baseline") if name in table.columns}
    return table.assign(**cells).rename(index=word, columns=heading)


def claims_in_short(comparisons: pd.DataFrame) -> pd.Series:
    """By name: estimate and interval of each claim, points or the ratio of CVs; a star if it holds after correction."""
    ratio = {"scale": 1, "digits": 2, "plus": ""}
    texts = comparisons.apply(lambda row: _with_interval(row.estimate, row.low, row.high, **(
        ratio if row.kind == "cv ratio" else {})), axis=1)
    stars = comparisons["outcome"].isin(["shown", "the opposite shown"]).map({True: " *", False: ""})
    return (texts + stars).set_axis(comparisons["name"])


def claim_rows(comparisons: pd.DataFrame) -> tuple[list[str], list[list[str]]]:
    """Headings and one row of texts a claim of `primary_comparisons`, for a reader."""
    rows = []
    for row in comparisons.fillna({"note": ""}).to_dict("records"):
        known = pd.notna(row["low"])
        rows.append([
            row["name"], _number(row, "method_estimate"), _number(row, "baseline_estimate"),
            _number(row, "estimate", "+"), f"{_number(row, 'low', '+')} to {_number(row, 'high', '+')}" if known else "",
            _p(row["holm_p"]), "" if pd.isna(row["effect_size"]) else _signed(row["effect_size"], 2, ""),
            f"{row['n_items']:,}", str(row["n_seeds"]), f"{row['steps']:,}",
            row["verdict"] + (f" ({row['note']})" if row["note"] else "")])
    return ["claim", *sides(comparisons), "difference or ratio", "95 % interval", "p (Holm)", "effect size d_z",
            "items", "seeds", "steps", "verdict"], rows


def answer(comparisons: pd.DataFrame) -> list[tuple[str, int | None]]:
    """About five sentences and, for each, the row of the claim it rests on (None: the whole table).

    First how many claims were shown; then at least one claim of each task, the largest difference among them; then
    further ones up to four, each subject (a metric's difference, non-inferiority, spread) once before any again:
    accuracy, non-inferiority, ConsistSyn and spread before others. The verdicts say what was shown, also if that is
    nothing, after how much training.
    """
    rows = comparisons.fillna({"note": "", "curve": ""}).to_dict("records")
    tested = [row for row in rows if row["outcome"] != "not tested"]
    counts = comparisons["outcome"].value_counts()
    parts = [f"{counts.get(outcome) or 'none'} {told}" for outcome, told in (
        ("shown", "shown"), ("the opposite shown", "shown to be the other way round"), ("open", "left open"),
        ("not tested", "not tested")) if outcome in ("shown", "open") or outcome in counts]
    seeds, items = (_range([row[name] for row in tested]) for name in ("n_seeds", "n_items"))
    extent = f", with {seeds} seeds and {items} items for each claim" if tested else ""
    first = f"Of {len(rows)} claims written down beforehand, after Holm's correction: {', '.join(parts)}{extent}."
    return [(first, None), *((_sentence(rows[place]), place) for place in sorted(_chosen(rows)))]


def _chosen(rows: list[dict]) -> list[int]:
    """Places of the claims that the answer tells: see `answer`."""
    subjects = [row["metric"] if row["kind"] == "difference" else row["kind"] for row in rows]
    tasks, tested = [row.get("task", "") for row in rows], [row["outcome"] != "not tested" for row in rows]
    first = ["accuracy", "non-inferiority", "consist_syn", "cv ratio"]
    rank = sorted(range(len(rows)), key=lambda place: (not tested[place], [*first, subjects[place]].index(subjects[place]), place))
    sizes = {place: abs(row["estimate"]) for place, row in enumerate(rows)
             if row["kind"] == "difference" and pd.notna(row["estimate"])}
    chosen = [max(sizes, key=lambda place: (tested[place], sizes[place]))] if sizes else []
    for place in rank:
        if tasks[place] not in [tasks[other] for other in chosen]:
            chosen.append(place)
    while len(chosen) < min(4, len(rows)):
        told = [subjects[place] for place in chosen]
        left = [place for place in rank if place not in chosen]
        chosen.append(min(left, key=lambda place: told.count(subjects[place])))
    return chosen


def _range(values: list) -> str:
    low, high = min(values, default=0), max(values, default=0)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _sentence(row: dict) -> str:
    if pd.isna(row["estimate"]):
        return f"{row['name']}: {row['verdict']}{', because ' * bool(row['note'])}{row['note']}."
    kind, sign = ("ratio", "") if row["kind"] == "cv ratio" else ("difference", "+")
    estimate, low, high = (_number(row, name, sign) for name in ("estimate", "low", "high"))
    interval = f", 95 % interval {low} to {high}" if low and high else ""
    p = f", p = {_p(row['holm_p'])}".replace("= <", "<") if pd.notna(row["holm_p"]) else ""
    length = f", after {row['steps']:,} training steps" if row["steps"] else ""
    curve = row["curve"]
    if ": " in curve:
        curve = f" Validation accuracy there: {curve.replace(': ', ' ').replace(';', ',')}."
    elif curve:
        curve = f" Whether validation accuracy still rises there {curve}." if curve.startswith("cannot") else \
            f" Validation accuracy {curve} there."
    return (f"{row['name']}: {row['verdict']}{length} ({_number(row, 'method_estimate')} against "
            f"{_number(row, 'baseline_estimate')}; {kind} {estimate}{' points' * (kind == 'difference')}{interval}{p}).{curve}")
