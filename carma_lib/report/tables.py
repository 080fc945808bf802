"""Tables for readers: the paper's arrangement, published figures, claims in words, CSV and LaTeX."""
from __future__ import annotations

import os
from importlib import resources
from pathlib import Path

import pandas as pd

from carma_lib.files import whole_file
from carma_lib.stats.table import METHOD_LABELS
from carma_lib.stats.metrics import METRICS, RUN_COLUMNS, coefficient_of_variation, summarise

_VALUES = ("accuracy", "cv_accuracy", "consist_syn", "cv_consist_syn")
#: The subjects that the answer speaks of before all others.
_FIRST = ("accuracy", "non-inferiority", "consist_syn", "cv ratio")
_HEADINGS = {"accuracy": "accuracy", "cv_accuracy": "CV of accuracy", "consist_syn": "ConsistSyn",
             "cv_consist_syn": "CV of ConsistSyn"}


def paper_table(results: pd.DataFrame, *, confidence: float = 0.95) -> pd.DataFrame:
    """Model × method × rate: accuracy and ConsistSyn with their CVs across seeds, as the paper arranges them.

    One row a run (task, split, model, start, budget, method), source of synonyms and rate; rate 0 is the
    clean text and has no ConsistSyn. Each value with `_low`, `_high`; n_seeds, n_items; note says why a
    value is empty.
    """
    keys = [*RUN_COLUMNS, "source", "rate"]
    unpooled = results[results["condition"] != "pooled"]
    parts = {"accuracy": summarise(unpooled, "accuracy", confidence=confidence),
             "cv_accuracy": coefficient_of_variation(unpooled, "accuracy", confidence=confidence)}
    if (unpooled["condition"] == "replaced").any():
        parts |= {"consist_syn": summarise(unpooled, "consist_syn", confidence=confidence),
                  "cv_consist_syn": coefficient_of_variation(unpooled, "consist_syn", confidence=confidence)}
    table = parts["accuracy"][[*keys, "n_items", "n_seeds"]]
    for name, part in parts.items():
        part = part.rename(columns={"estimate": name, "low": f"{name}_low", "high": f"{name}_high",
                                    "note": f"{name}_note"})
        columns = [*keys, name, f"{name}_low", f"{name}_high", f"{name}_note"]
        table = table.merge(part[columns], on=keys, how="left")
    notes = table[[f"{name}_note" for name in parts]].fillna("")
    table["note"] = ["; ".join(dict.fromkeys(filter(None, row))) for row in notes.itertuples(index=False)]
    return table.drop(columns=list(notes))


def readable(table: pd.DataFrame) -> pd.DataFrame:
    """`paper_table` for print: method names in words, values in per cent with their interval in brackets."""
    shown = table[["task", "split", "model", "budget"]].copy()
    shown["method"] = table["method"].map(lambda name: METHOD_LABELS.get(name, name))
    shown["rate"] = (100 * table["rate"]).map("{:g} %".format)
    for name in filter(table.columns.__contains__, _VALUES):
        shown[_HEADINGS[name]] = [
            "–" if pd.isna(value) else f"{100 * value:.1f} [{100 * low:.1f}, {100 * high:.1f}]"
            for value, low, high in table[[name, f"{name}_low", f"{name}_high"]].itertuples(index=False)]
    varying = [name for name in ("task", "split", "model", "budget") if shown[name].nunique() > 1]
    return shown[[*varying, "method", "rate", *(name for name in _HEADINGS.values() if name in shown)]]


def published() -> pd.DataFrame:
    """The published figures that could be found, as numbers: task, model, method, metric, value, of, source.

    Facts of arXiv 2502.11066 and its repository: correct test items (`of` is empty where the size of the test
    set is not given), items kept under synonyms, and accuracy kept under pooling, read off a plot to ± 0.005.
    """
    return pd.read_csv(resources.files("carma_lib") / "published.csv")


def _keys_of_published(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows with the names that `published` has for their task and model; NaN for a task of this project."""
    kind = {"wordnet_inverse_dictionary": "inverse_dictionary", "sst3": "sentiment"}
    return rows.assign(published_task=rows["task"].astype(str).map(kind),
                       published_model=rows["model"].astype(str).str.lower().str.split("/").str[-1])


def pooling_beside_published(kept: pd.DataFrame) -> pd.DataFrame:
    """Rows of `summarise(…, "accuracy_kept")` for which the share kept under pooling was published, beside it.

    The same task, model, method, protocol and start layer; ours pools words. May be empty.
    """
    theirs = published().query("metric == 'accuracy_kept'").rename(columns={
        "task": "published_task", "model": "published_model", "value": "published_accuracy_kept"})
    keys = ["published_task", "published_model", "method", "protocol", "start_layer"]
    ours = _keys_of_published(kept[kept["level"] == "word"]).astype({"method": str, "protocol": str})
    joined = ours.merge(theirs[[*keys, "published_accuracy_kept"]], on=keys)
    return joined.drop(columns=["published_task", "published_model"])


def beside_published(table: pd.DataFrame) -> pd.DataFrame:
    """`paper_table`'s clean rows with the published accuracy of the same task, model and method beside ours.

    Adds published_accuracy, published_correct and published_note, which says how the settings differ or why
    there is nothing to compare with.
    """
    rows = _keys_of_published(table[table["rate"] == 0])
    theirs = published().query("metric == 'correct'").rename(columns={
        "task": "published_task", "model": "published_model", "value": "published_correct"})
    joined = rows.merge(theirs[["published_task", "published_model", "method", "published_correct", "of"]],
                        on=["published_task", "published_model", "method"], how="left")
    joined["published_accuracy"] = joined["published_correct"] / joined["of"]
    joined["published_note"] = [_difference(row) for row in joined.to_dict("records")]
    return joined.drop(columns=["published_task", "published_model", "of"])


def _difference(row: dict) -> str:
    if pd.isna(row["published_task"]):
        return "task of this project: nothing published"
    if pd.isna(row["published_correct"]):
        return "no published figure for this model and method"
    if row["published_task"] == "inverse_dictionary":
        return "published: split by row (leaks) and size of the test set not given, so counts only"
    return "published: number of runs not given, last epoch's model, mean over batches"


def save_table(table: pd.DataFrame, folder: str | os.PathLike, name: str, *,
               caption: str | None = None) -> Path:
    """Write name.csv and, with a caption, name.tex into the folder; the CSV's path."""
    folder = Path(folder)
    if caption is not None:
        with whole_file(folder / f"{name}.tex") as temporary:
            style = table.style.hide(axis="index").format(escape="latex", precision=4, na_rep="–")
            temporary.write_text(style.format_index(escape="latex", axis="columns").to_latex(
                caption=caption.replace("%", r"\%"), label=f"tab:{name}", hrules=True,
                position_float="centering"), encoding="utf-8")
    with whole_file(folder / f"{name}.csv") as temporary:
        table.to_csv(temporary, index=False)
    return folder / f"{name}.csv"


def disagreements(results: pd.DataFrame, method: str, baseline: str, *, rows: int = 10) -> pd.DataFrame:
    """Items whose answers differ most between two methods: item_id, target, and how often each was right.

    Over the common seeds of one condition (filter first): columns method_right, baseline_right (shares of the
    seeds) and the most frequent prediction of each; items with the largest gaps first, both signs in turn.
    """
    answers = {name: results[results["method"] == name] for name in (method, baseline)}
    if any(part.empty for part in answers.values()):
        raise ValueError(f"no rows of {method if answers[method].empty else baseline}; check the filter")
    if results["condition"].nunique() > 1 or results.duplicated(["method", "seed", "item_id"]).any():
        raise ValueError("disagreements take one condition; filter the table to one task, split, condition")
    seeds = set(answers[method]["seed"]) & set(answers[baseline]["seed"])
    columns = {}
    for name, label in ((method, "method"), (baseline, "baseline")):
        items = answers[name][answers[name]["seed"].isin(seeds)].astype({"item_id": str}).groupby("item_id")
        columns[f"{label}_right"] = items["correct"].mean()
        columns[f"{label}_prediction"] = items["prediction"].agg(lambda each: each.astype(str).mode().iloc[0])
    table = pd.DataFrame(columns).dropna()
    table.insert(0, "target", answers[method].astype({"item_id": str}).groupby("item_id")["target"].first())
    gap = table["method_right"] - table["baseline_right"]
    ahead, behind = gap[gap > 0].sort_values(ascending=False), gap[gap < 0].sort_values()
    chosen = [*ahead.index[:(rows + 1) // 2], *behind.index[:rows // 2]]
    return table.loc[chosen].reset_index()


def _number(row: dict, column: str, sign: bool = False) -> str:
    """A value of a claim in its unit: per cent or points of a share, a ratio, or the metric's own unit."""
    value = row[column]
    if pd.isna(value):
        return ""
    of_sides = column in ("method_estimate", "baseline_estimate")
    if row["kind"] == "cv ratio" and not of_sides:
        return f"{value:.2f}"
    if abs(METRICS[row["metric"]].bounds[0]) > 1 and row["kind"] != "cv ratio":
        return f"{value:{'+' if sign else ''}.3f}".replace("-", "−")
    return f"{100 * value:{'+' if sign else ''}.1f}".replace("-", "−") + (" %" if of_sides else "")


def _p(value: float) -> str:
    return "" if pd.isna(value) else "< 0.001" if value < 0.001 else f"{value:.3f}"


def with_interval(table: pd.DataFrame, *, scale: float = 100, digits: int = 1) -> pd.Series:
    """estimate, low and high of each row as one text: "+1.5 [-0.7, 3.6]", times `scale`."""
    return table.apply(lambda row: f"{scale * row.estimate:+.{digits}f} [{scale * row.low:.{digits}f}, "
                                   f"{scale * row.high:.{digits}f}]", axis=1)


def claims_in_short(comparisons: pd.DataFrame) -> pd.Series:
    """By name: estimate and interval of each claim, points or the ratio of CVs; a star if it holds after correction."""
    ratios = comparisons.apply("{0.estimate:.2f} [{0.low:.2f}, {0.high:.2f}]".format, axis=1)
    texts = with_interval(comparisons).where(comparisons["kind"] != "cv ratio", ratios)
    stars = comparisons["outcome"].isin(["shown", "the opposite shown"]).map({True: " *", False: ""})
    return (texts + stars).set_axis(comparisons["name"])


def claim_rows(comparisons: pd.DataFrame) -> tuple[list[str], list[list[str]]]:
    """Headings and one row of texts a claim of `primary_comparisons`, for a reader."""
    rows = []
    for row in comparisons.fillna({"note": ""}).to_dict("records"):
        known = pd.notna(row["estimate"])
        rows.append([
            row["name"], _number(row, "method_estimate"), _number(row, "baseline_estimate"),
            _number(row, "estimate", sign=True),
            f"{_number(row, 'low', sign=True)} to {_number(row, 'high', sign=True)}" if known else "",
            _p(row["holm_p"]), "" if pd.isna(row["effect_size"]) else f"{row['effect_size']:.2f}",
            f"{row['n_items']:,}", str(row["n_seeds"]), f"{row['steps']:,}",
            row["verdict"] + (f" ({row['note']})" if row["note"] else "")])
    return ["claim", "method", "baseline", "difference or ratio", "95 % interval", "p (Holm)", "effect size d_z",
            "items", "seeds", "steps", "verdict"], rows


def answer(comparisons: pd.DataFrame) -> list[tuple[str, int | None]]:
    """About five sentences and, for each, the row of the claim it rests on (None: the whole table).

    First how many claims were shown; then at least one claim of each task, the largest difference among them; then
    further ones up to four, each subject (a metric's difference, non-inferiority, spread) once before any again, those
    of `_FIRST` before others. The verdicts say what was shown, also if that is nothing, after how much training.
    """
    rows = comparisons.fillna({"note": "", "curve": ""}).to_dict("records")
    tested = [row for row in rows if row["outcome"] != "not tested"]
    counts = comparisons["outcome"].value_counts()
    parts = [f"{counts.get('shown', 0) or 'none'} shown", f"{counts.get('open', 0) or 'none'} left open"]
    if "the opposite shown" in counts:
        parts.insert(1, f"{counts['the opposite shown']} shown to be the other way round")
    if "not tested" in counts:
        parts.append(f"{counts['not tested']} not tested")
    seeds, items = (_range([row[name] for row in tested]) for name in ("n_seeds", "n_items"))
    extent = f", with {seeds} seeds and {items} items a claim" if tested else ""
    first = (f"Of {len(rows)} claims written down beforehand, after Holm's correction: "
             f"{', '.join(parts)}{extent}.")
    return [(first, None), *((_sentence(rows[place]), place) for place in sorted(_chosen(rows)))]


def _chosen(rows: list[dict], most: int = 4) -> list[int]:
    """Places of the claims that the answer tells: see `answer`."""
    subjects = [row["metric"] if row["kind"] == "difference" else row["kind"] for row in rows]
    tasks = [row.get("task", "") for row in rows]
    rank = sorted(range(len(rows)), key=lambda place: (rows[place]["outcome"] == "not tested",
                                                       [*_FIRST, subjects[place]].index(subjects[place]), place))
    sizes = {place: abs(row["estimate"]) for place, row in enumerate(rows) if row["kind"] == "difference"
             and abs(METRICS[row["metric"]].bounds[0]) <= 1 and pd.notna(row["estimate"])}
    chosen = [max(sizes, key=lambda place: (rows[place]["outcome"] != "not tested", sizes[place]))] if sizes else []
    for place in rank:
        if tasks[place] not in [tasks[other] for other in chosen]:
            chosen.append(place)
    while len(chosen) < min(most, len(rows)):
        told = [subjects[place] for place in chosen]
        chosen.append(min((place for place in rank if place not in chosen),
                          key=lambda place: (told.count(subjects[place]), rank.index(place))))
    return chosen


def _range(values: list) -> str:
    low, high = min(values, default=0), max(values, default=0)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _sentence(row: dict) -> str:
    if pd.isna(row["estimate"]):
        return f"{row['name']}: not tested, because {row['note'] or 'the data do not allow it'}."
    ratio = row["kind"] == "cv ratio"
    unit = " points" if not ratio and abs(METRICS[row["metric"]].bounds[0]) <= 1 else ""
    estimate, low, high = (_number(row, name, sign=not ratio) for name in ("estimate", "low", "high"))
    interval = f", 95 % interval {low} to {high}" if low and high else ""
    p = _p(row["holm_p"])
    p = f", p {p if p.startswith('<') else '= ' + p}" if p else ""
    length = f", after {row['steps']:,} training steps" if row["steps"] else ""
    return (f"{row['name']}: {row['verdict']}{length} ({_number(row, 'method_estimate')} against "
            f"{_number(row, 'baseline_estimate')}; {'ratio' if ratio else 'difference'} {estimate}{unit}{interval}{p})."
            + _of_curve(row["curve"]))


def _of_curve(curve: str) -> str:
    if not curve:
        return ""
    if ": " not in curve:
        return f" Whether validation accuracy still rises there {curve}." if curve.startswith("cannot") else \
            f" Validation accuracy {curve} there."
    return f" Validation accuracy there: {curve.replace(': ', ' ').replace(';', ',')}."
