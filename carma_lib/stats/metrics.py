"""Metrics of the long result table, each with its interval. Knows tables only.

A metric that compares with the unchanged item takes an item that nothing was changed in (`changed` is 0: no synonym,
no token pooled away) as answered the same. Asked again it mostly is, but bf16 rounds otherwise in another batch.

Items are crossed with seeds: the same items are answered by every seed's model. A metric is, for each seed,
a ratio of sums over items; its estimate is the mean of the seeds' ratios, and its interval asks how far that
mean would move with other seeds *and* other items of the same kind (`intervals.crossed_interval`).
"""
from __future__ import annotations

from dataclasses import dataclass, field
from typing import Callable, Iterator

import numpy as np
import pandas as pd
from sklearn.metrics import f1_score

from carma_lib.stats.intervals import Interval, crossed_interval, cv_interval

RUN_COLUMNS = ["task", "split", "model", "start", "budget", "method"]
CONDITION_COLUMNS = ["condition", "source", "rate", "start_layer", "depth_share", "protocol", "level"]
CELL_COLUMNS = RUN_COLUMNS + CONDITION_COLUMNS

Terms = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Metric:
    """A ratio of sums over items: `terms(rows)` gives each row's numerator and denominator."""
    definition: str
    terms: Callable[[pd.DataFrame], Terms]
    conditions: tuple[str, ...] = ("clean", "replaced", "pooled")
    columns: tuple[str, ...] = ("correct",)
    bounds: tuple[float, float] = (0.0, 1.0)
    against_clean: bool = False
    lower_is_better: bool = False


def _share(column: Callable[[pd.DataFrame], np.ndarray]) -> Callable[[pd.DataFrame], Terms]:
    return lambda rows: (np.asarray(column(rows), dtype=float), np.ones(len(rows)))


def _kept(rows: pd.DataFrame) -> Terms:
    before = rows["clean_correct"].to_numpy(float)
    return before * rows["correct"].to_numpy(float), before


METRICS: dict[str, Metric] = {
    "accuracy": Metric("share of the items answered right", _share(lambda rows: rows["correct"])),
    "top_5": Metric("share of the items whose target is among the five most probable answers",
                    _share(lambda rows: rows["rank"] <= 5), columns=("rank",)),
    "mean_reciprocal_rank": Metric("mean of 1 / rank of the target; of ranks that it shares the worst",
                                   _share(lambda rows: 1 / rows["rank"]), columns=("rank",)),
    "mean_log_probability": Metric("mean natural logarithm of the target's probability",
                                   _share(lambda rows: rows["log_probability"]),
                                   columns=("log_probability",), bounds=(-np.inf, 0.0)),
    "consist_syn": Metric("share of the items answered right that are still answered right after synonym "
                          "replacement", _kept, ("replaced",), against_clean=True),
    "accuracy_kept": Metric("share of the items answered right that are still answered right under pooling",
                            _kept, ("pooled",), against_clean=True),
    "agreement": Metric("share of the items that get the same answer, right or wrong, as without the change",
                        _share(lambda rows: rows["same_prediction"] & (rows["clean_correct"] == rows["correct"])),
                        ("replaced", "pooled"), ("correct", "prediction"), against_clean=True),
    "pooling_drop": Metric("accuracy lost under pooling: clean accuracy minus pooled accuracy, in shares",
                           _share(lambda rows: rows["clean_correct"] - rows["correct"].to_numpy(float)),
                           ("pooled",), bounds=(-1.0, 1.0), against_clean=True, lower_is_better=True),
}


@dataclass
class Crossed:
    """Numerator and denominator of one cell of the design as matrices, seeds × items, with labels and key."""
    seeds: np.ndarray
    items: np.ndarray
    numerator: np.ndarray
    denominator: np.ndarray
    notes: list[str] = field(default_factory=list)
    key: dict = field(default_factory=dict)

    @property
    def values(self) -> np.ndarray:
        """Seeds × items: a row's mean is the seed's ratio, a row's spread is that of the ratio's linear form.

        With r = Σ numerator / Σ denominator of the seed and d its mean denominator, an item's value is
        r + (numerator - r · denominator) / d. For a plain share it is the item's 0 or 1.
        """
        mean = self.denominator.mean(axis=1, keepdims=True)
        ratio = self.numerator.mean(axis=1, keepdims=True) / mean
        return ratio + (self.numerator - ratio * self.denominator) / mean


def counted_items(*cells: Crossed) -> int:
    """How many items are in the denominator of any seed of any of the cells, which share their items."""
    return int(np.any([(cell.denominator > 0).any(axis=0) for cell in cells], axis=0).sum())


def require_columns(results: pd.DataFrame, columns: list[str]) -> None:
    """ValueError where a column is absent or has missing values (`depth_share` may), or there are no rows."""
    if missing := [name for name in columns if name not in results]:
        raise ValueError(f"the table lacks the columns {missing}")
    if results.empty:
        raise ValueError("the table has no rows; check the filter before this call")
    if holes := [name for name in columns if name != "depth_share" and results[name].isna().any()]:
        raise ValueError(f"missing values in the columns {holes}; read_results says in which rows")


def _with_clean(results: pd.DataFrame, metric: Metric) -> pd.DataFrame:
    """Rows of the metric's conditions, with the same run's, seed's and item's clean answer beside each."""
    wanted = results["condition"].isin(metric.conditions).to_numpy()
    if not wanted.any():
        raise ValueError(f"no row with condition {' or '.join(metric.conditions)}; evaluate that first")
    if not metric.against_clean:
        return results[wanted]
    asked = results.groupby([*RUN_COLUMNS, "seed", "item_id"], observed=True, sort=False).ngroup().to_numpy()
    clean = (results["condition"] == "clean").to_numpy()
    if np.bincount(asked[clean], minlength=1).max() > 1:
        raise ValueError("duplicate rows: an item twice for one seed among clean answers; read each run once")

    def before(values: np.ndarray) -> np.ndarray:
        found = np.full(asked.max() + 1, np.nan)
        found[asked[clean]] = values[clean]
        return found[asked[wanted]]

    rows = results[wanted].assign(clean_correct=before(results["correct"].to_numpy(float)))
    if rows["clean_correct"].isna().all():
        raise ValueError("no changed item has its clean answer; keep the rows of condition 'clean'")
    untouched = (rows["changed"] == 0).to_numpy()
    rows = rows.assign(correct=np.where(untouched, rows["clean_correct"], rows["correct"].astype(float)))
    if "prediction" in metric.columns:
        code = pd.factorize(results["prediction"])[0]
        rows = rows.assign(same_prediction=untouched | (before(code) == code[wanted]))
    return rows


def cells(results: pd.DataFrame, metric: str) -> Iterator[tuple[dict, Crossed]]:
    """Each cell of the design (task, split, model, start, budget, method, condition …) with its matrices.

    Items that some seed of the cell did not answer are left out with a note, and so are seeds without any
    item in the denominator. Two rows for one seed and item are an error.
    """
    if metric not in METRICS:
        raise ValueError(f"unknown metric {metric!r}; known are {list(METRICS)}")
    chosen = METRICS[metric]
    columns = [*CELL_COLUMNS, "seed", "item_id", *chosen.columns, *(["changed"] if chosen.against_clean else [])]
    require_columns(results, columns)
    rows = _with_clean(results[columns], chosen)
    numerator, denominator = chosen.terms(rows)
    if chosen.against_clean:
        denominator = np.where(rows["clean_correct"].isna(), np.nan, denominator)
    group = rows.groupby(CELL_COLUMNS, observed=True, dropna=False, sort=False).ngroup().to_numpy()
    seed, (item, names) = rows["seed"].to_numpy(), pd.factorize(rows["item_id"])
    order = np.argsort(group, kind="stable")
    for index in np.split(order, np.flatnonzero(np.diff(group[order])) + 1):
        key = rows.iloc[index[0]][CELL_COLUMNS].to_dict()
        seeds, row = np.unique(seed[index], return_inverse=True)
        items, column = np.unique(item[index], return_inverse=True)
        filled = np.zeros((2, len(seeds), len(items))) * np.nan
        filled[:, row, column] = numerator[index], denominator[index]
        if np.bincount(row * len(items) + column).max() > 1:
            raise ValueError(f"duplicate rows: an item twice for one seed in {key}; read each run once")
        yield key, _complete(Crossed(seeds, names[items], *filled, key=key))


def _complete(cell: Crossed) -> Crossed:
    """The cell without items that a seed lacks and seeds whose denominator is zero, and notes on both."""
    whole = np.isfinite(cell.denominator).all(axis=0)
    if not whole.all():
        cell.notes.append(f"{int((~whole).sum())} items not answered by every seed (or not clean) left out")
    some = (cell.denominator[:, whole] > 0).any(axis=1)
    if not some.any():
        cell.notes.append("no item answered right before the change" if whole.any() else
                          "no item answered by every seed")
    elif not some.all():
        cell.notes.append(f"seeds {', '.join(map(str, cell.seeds[~some]))} without a right item left out")
    return Crossed(cell.seeds[some], cell.items[whole], cell.numerator[some][:, whole],
                   cell.denominator[some][:, whole], cell.notes, cell.key)


def summarise(results: pd.DataFrame, metric: str) -> pd.DataFrame:
    """One row a cell of the design: `CELL_COLUMNS`, metric, estimate, low, high, n_items, n_seeds, note.

    `metric` is a key of `METRICS`, the interval is `crossed_interval`. The note says why an estimate is empty.
    """
    return _lines(results, metric, metric, lambda cell: crossed_interval(
        cell.values, counted=counted_items(cell), bounds=METRICS[metric].bounds))


def coefficient_of_variation(results: pd.DataFrame, metric: str = "accuracy") -> pd.DataFrame:
    """CV = standard deviation (n - 1) over mean of a metric across seeds, in the columns of `summarise`.

    The interval is `intervals.cv_interval`. It speaks of seeds on these items: the items are not resampled, so the
    seeds' spread holds what chance answers on finitely many items add. The paper's own definition of CV was not at
    hand; this is the usual one.
    """
    return _lines(results, metric, f"cv_{metric}", lambda cell: cv_interval(cell.values.mean(axis=1)))


def _lines(results: pd.DataFrame, metric: str, name: str, interval: Callable[[Crossed], Interval]) -> pd.DataFrame:
    lines = []
    for key, cell in cells(results, metric):
        found = interval(cell) if counted_items(cell) else Interval(*[np.nan] * 5, "")
        lines.append(key | {"metric": name, "estimate": found.estimate, "low": found.low, "high": found.high,
                            "n_items": counted_items(cell), "n_seeds": len(cell.seeds),
                            "note": "; ".join(filter(None, [*cell.notes, found.note]))})
    return pd.DataFrame(lines)


def per_seed(results: pd.DataFrame, metric: str) -> pd.DataFrame:
    """One row a cell and seed: `CELL_COLUMNS`, seed, metric, value, n_items (those in the denominator).

    A cell that `summarise` leaves empty has no row.
    """
    columns = [*CELL_COLUMNS, "seed", "metric", "value", "n_items"]
    parts = [pd.DataFrame({**key, "seed": cell.seeds, "metric": metric, "value": cell.values.mean(axis=1),
                           "n_items": (cell.denominator > 0).sum(axis=1)})
             for key, cell in cells(results, metric) if len(cell.seeds)]
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=columns)


def _over_seeds(results: pd.DataFrame, metric: str, value: Callable[[pd.DataFrame], float]) -> pd.DataFrame:
    """A metric that is no sum over items: one value a seed, Student's t interval over seeds alone."""
    lines = []
    for _, rows in results.groupby(CELL_COLUMNS, observed=True, dropna=False, sort=False):
        if rows.duplicated(["seed", "item_id"]).any():
            raise ValueError("duplicate rows: an item twice for one seed; read each run once")
        key = rows.iloc[0][CELL_COLUMNS].to_dict()
        answered = rows.groupby("item_id", observed=True)["seed"].transform("nunique") == rows["seed"].nunique()
        left_out, rows = rows.loc[~answered, "item_id"].nunique(), rows[answered]
        if rows.empty:
            lines.append(key | {"metric": metric, "estimate": np.nan, "low": np.nan, "high": np.nan, "n_items": 0, "n_seeds": 0,
                                "note": "no item answered by every seed"})
            continue
        values = np.array([[value(of_seed)] for _, of_seed in rows.groupby("seed")])
        found = crossed_interval(values)
        low, high = np.clip(found[1:3], 0, 1)
        lines.append(key | {
            "metric": metric, "estimate": found.estimate, "low": low, "high": high,
            "n_items": rows["item_id"].nunique(), "n_seeds": len(values),
            "note": ("one seed: no interval" if len(values) == 1 else "all values the same: no interval" if np.isnan(low)
                     else "interval over seeds only") + f"; {left_out} items not answered by every seed left out" * (left_out > 0)})
    return pd.DataFrame(lines)


def macro_f1(results: pd.DataFrame) -> pd.DataFrame:
    """Mean over the targets' classes of F1 = 2 · hits / (targets + predictions), per cell.

    A class that is no item's target has no part in the mean; predicting one counts against the true class only. A hit
    is an answer that is `correct`: another token that reads like the target, as " good" beside "good", is none.
    """
    require_columns(results, [*CELL_COLUMNS, "seed", "item_id", "target", "prediction", "correct"])

    def score(rows: pd.DataFrame) -> float:
        target, classes = pd.factorize(rows["target"])
        prediction, right = classes.get_indexer(rows["prediction"]), rows["correct"].to_numpy(bool)
        prediction = np.where(right, target, np.where(prediction == target, -1, prediction))
        return float(f1_score(target, prediction, labels=range(len(classes)), average="macro", zero_division=0))

    return _over_seeds(results, "macro_f1", score)


def expected_calibration_error(results: pd.DataFrame) -> pd.DataFrame:
    """ECE: Σ over bins of share of items · |accuracy - mean probability of the prediction|, per cell.

    Needs the column `prediction_probability`, in [0, 1]; ten bins of equal width.
    """
    require_columns(results, [*CELL_COLUMNS, "seed", "item_id", "correct", "prediction_probability"])
    if not results["prediction_probability"].between(0, 1).all():
        raise ValueError("prediction_probability must lie in [0, 1]")

    def score(rows: pd.DataFrame) -> float:
        sure, right = rows["prediction_probability"].to_numpy(float), rows["correct"].to_numpy(float)
        place = np.minimum((sure * 10).astype(int), 9)
        return float(np.abs(np.bincount(place, right - sure)).sum() / len(rows))

    return _over_seeds(results, "expected_calibration_error", score)
