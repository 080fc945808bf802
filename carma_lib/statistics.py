"""Metrics of the long result table, each with its interval. Knows tables only.

Items are crossed with seeds: the same items are answered by every seed's model. A metric is, for each seed,
a ratio of sums over items; its estimate is the mean of the seeds' ratios, and its interval asks how far that
mean would move with other seeds *and* other items of the same kind (see `crossed_interval`).

Why not the percentile of a two-level bootstrap: with 3 to 10 seeds it misses the truth too often when seeds
differ much, because resampling n seeds gives (n-1)/n of their variance, and too seldom when they differ
little, because item noise is counted twice. `benchmarks/statistics.py` measures both.
"""
from __future__ import annotations

from dataclasses import dataclass, field
from typing import Callable, Iterator, NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

RUN_COLUMNS = ["task", "split", "model", "start", "budget", "method"]
CONDITION_COLUMNS = ["condition", "source", "rate", "start_layer", "depth_share", "protocol", "level"]
CELL_COLUMNS = RUN_COLUMNS + CONDITION_COLUMNS
ESTIMATE_COLUMNS = ["estimate", "low", "high", "n_items", "n_seeds", "note"]

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


def _share(column: Callable[[pd.DataFrame], np.ndarray]) -> Callable[[pd.DataFrame], Terms]:
    return lambda rows: (np.asarray(column(rows), dtype=float), np.ones(len(rows)))


def _kept(rows: pd.DataFrame) -> Terms:
    before = rows["clean_correct"].to_numpy(float)
    return before * rows["correct"].to_numpy(float), before


METRICS: dict[str, Metric] = {
    "accuracy": Metric("share of the items answered right", _share(lambda rows: rows["correct"])),
    "top_5": Metric("share of the items whose target is among the five most probable answers",
                    _share(lambda rows: rows["rank"] <= 5), columns=("rank",)),
    "mean_reciprocal_rank": Metric("mean of 1 / rank of the target", _share(lambda rows: 1 / rows["rank"]),
                                   columns=("rank",)),
    "mean_log_probability": Metric("mean natural logarithm of the target's probability",
                                   _share(lambda rows: rows["log_probability"]),
                                   columns=("log_probability",), bounds=(-np.inf, 0.0)),
    "consist_syn": Metric("share of the items answered right that are still answered right after synonym "
                          "replacement", _kept, ("replaced",), against_clean=True),
    "accuracy_kept": Metric("share of the items answered right that are still answered right under pooling",
                            _kept, ("pooled",), against_clean=True),
    "agreement": Metric("share of the items that get the same answer, right or wrong, as without the change",
                        _share(lambda rows: rows["clean_prediction"] == rows["prediction_code"]),
                        ("replaced", "pooled"), ("correct", "prediction"), against_clean=True),
    "pooling_drop": Metric("accuracy lost under pooling: clean accuracy minus pooled accuracy, in shares",
                           _share(lambda rows: rows["clean_correct"] - rows["correct"].to_numpy(float)),
                           ("pooled",), bounds=(-1.0, 1.0), against_clean=True),
}


class Interval(NamedTuple):
    """An estimate with its confidence interval, standard error and degrees of freedom of Student's t."""
    estimate: float
    low: float
    high: float
    standard_error: float
    degrees_of_freedom: float
    note: str


@dataclass
class Cell:
    """Numerator and denominator of one cell of the design as matrices, seeds × items, with their labels."""
    seeds: np.ndarray
    items: np.ndarray
    numerator: np.ndarray
    denominator: np.ndarray
    notes: list[str] = field(default_factory=list)

    @property
    def values(self) -> np.ndarray:
        """Seeds × items: a row's mean is the seed's ratio, a row's spread is that of the ratio's linear form.

        With r = Σ numerator / Σ denominator of the seed and d its mean denominator, an item's value is
        r + (numerator - r · denominator) / d. For a plain share it is the item's 0 or 1.
        """
        mean = self.denominator.mean(axis=1, keepdims=True)
        ratio = self.numerator.mean(axis=1, keepdims=True) / mean
        return ratio + (self.numerator - ratio * self.denominator) / mean


def crossed_interval(values: np.ndarray, *, confidence: float = 0.95,
                     bounds: tuple[float, float] = (-np.inf, np.inf)) -> Interval:
    """Mean of a seeds × items matrix with Student's t interval for crossed random seeds and items.

    variance = s²(seed means) / seeds + max(0, s²(item means) / items - s²(residuals) / (seeds · items)),
    degrees of freedom after Satterthwaite. The first term alone is the t interval over seeds; the second adds
    what the choice of items contributes. Cut at `bounds`. Where one seed or one item stands alone the interval
    covers the other factor only, and the note says so. Where all values are the same and equal to one of
    `bounds`, the other end is the exact binomial limit for as many items.
    """
    values = np.asarray(values, dtype=float)
    if values.ndim != 2 or values.size == 0 or not np.isfinite(values).all():
        raise ValueError("values must be a matrix, seeds × items, of finite numbers and not empty")
    seeds, items = values.shape
    by_seed, by_item, mean = values.mean(axis=1), values.mean(axis=0), values.mean()
    if seeds == items == 1:
        return Interval(mean, np.nan, np.nan, np.nan, np.nan, "one seed and one item: no interval")
    if np.ptp(values) == 0:
        edge = (1 - confidence) / 2
        if bounds == (0, 1) and mean in bounds:
            limit = edge ** (1 / items)
            low, high = (limit, 1.0) if mean == 1 else (0.0, 1 - limit)
            return Interval(mean, low, high, 0.0, np.nan, "all values the same: exact binomial limit over items")
        return Interval(mean, mean, mean, 0.0, np.nan, "all values the same: interval without width")
    seed_part = by_seed.var(ddof=1) / seeds if seeds > 1 else 0.0
    item_part = by_item.var(ddof=1) / items if items > 1 else 0.0
    if seeds > 1 and items > 1:
        residual = values - by_seed[:, None] - by_item + mean
        item_part -= np.square(residual).sum() / ((seeds - 1) * (items - 1)) / (seeds * items)
        item_part = max(item_part, 0.0)
    variance = seed_part + item_part
    if variance == 0:
        return Interval(mean, mean, mean, 0.0, np.nan, "seeds and items do not differ: interval without width")
    freedom = variance**2 / (seed_part**2 / max(seeds - 1, 1) + item_part**2 / max(items - 1, 1))
    half = stats.t.ppf((1 + confidence) / 2, freedom) * np.sqrt(variance)
    note = ("one seed: interval over items only" if seeds == 1 else
            "one item: interval over seeds only" if items == 1 else "")
    return Interval(mean, max(mean - half, bounds[0]), min(mean + half, bounds[1]), np.sqrt(variance), freedom, note)


def require_columns(results: pd.DataFrame, columns: list[str]) -> None:
    """ValueError where a column is absent or, `depth_share` aside, has missing values, or there are no rows."""
    missing = [name for name in columns if name not in results.columns]
    if missing:
        raise ValueError(f"the table lacks the columns {missing}")
    if results.empty:
        raise ValueError("the table has no rows; check the filter before this call")
    holes = [name for name in columns if name != "depth_share" and results[name].isna().any()]
    if holes:
        raise ValueError(f"missing values in the columns {holes}; read tables with read_results, which says where")


def _with_clean(results: pd.DataFrame, metric: Metric) -> pd.DataFrame:
    """Rows of the metric's conditions, with the same run's, seed's and item's clean answer beside each."""
    wanted = results["condition"].isin(metric.conditions).to_numpy()
    if not wanted.any():
        raise ValueError(f"no row with condition {' or '.join(metric.conditions)}; evaluate that condition first")
    if not metric.against_clean:
        return results if wanted.all() else results[wanted]
    run = results.groupby([*RUN_COLUMNS, "seed"], observed=True).ngroup().to_numpy()
    item, names = pd.factorize(results["item_id"])
    key = run * len(names) + item
    clean = (results["condition"] == "clean").to_numpy().nonzero()[0]
    clean = clean[np.argsort(key[clean])]
    rows = results[wanted]
    place = np.searchsorted(key[clean], key[wanted]).clip(max=max(len(clean) - 1, 0))
    found = key[clean][place] == key[wanted] if len(clean) else np.zeros(len(rows), bool)
    if not found.any():
        raise ValueError("no item has a clean answer beside the changed one; keep condition 'clean' in the table")
    added = {"clean_correct": np.where(found, results["correct"].to_numpy(float)[clean][place], np.nan)}
    if "prediction" in metric.columns:
        code = pd.factorize(results["prediction"])[0]
        added |= {"clean_prediction": np.where(found, code[clean][place], -1), "prediction_code": code[wanted]}
    return rows.assign(**added)


def cells(results: pd.DataFrame, metric: str) -> Iterator[tuple[dict, Cell]]:
    """Each cell of the design (task, split, model, start, budget, method, condition …) with its matrices.

    Items that some seed of the cell did not answer are left out with a note, and so are seeds without any
    item in the denominator. Two rows for one seed and item are an error.
    """
    if metric not in METRICS:
        raise ValueError(f"unknown metric {metric!r}; known are {list(METRICS)}")
    chosen = METRICS[metric]
    require_columns(results, [*CELL_COLUMNS, "seed", "item_id", *chosen.columns])
    rows = _with_clean(results, chosen)
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
        if len(np.unique(row * len(items) + column)) < len(index):
            raise ValueError(f"duplicate rows: an item stands twice for one seed in {key}; read each run once")
        yield key, _complete(Cell(seeds, names[items], *filled))


def _complete(cell: Cell) -> Cell:
    """The cell without items that a seed lacks and without seeds whose denominator is zero, and notes on both."""
    whole = np.isfinite(cell.denominator).all(axis=0)
    if not whole.all():
        cell.notes.append(f"{int((~whole).sum())} items not answered by every seed (or not clean) left out")
    some = (cell.denominator[:, whole] > 0).any(axis=1)
    if not some.any():
        cell.notes.append("no item answered right before the change" if whole.any() else "no item common to all seeds")
    elif not some.all():
        cell.notes.append(f"seeds {', '.join(map(str, cell.seeds[~some]))} without a right item left out")
    return Cell(cell.seeds[some], cell.items[whole], cell.numerator[some][:, whole],
                cell.denominator[some][:, whole], cell.notes)


def summarise(results: pd.DataFrame, metric: str, *, confidence: float = 0.95) -> pd.DataFrame:
    """One row a cell of the design: `CELL_COLUMNS`, metric, estimate, low, high, n_items, n_seeds, note.

    `metric` is a key of `METRICS`; the interval is `crossed_interval`. An empty estimate has its reason in `note`.
    """
    lines = []
    for key, cell in cells(results, metric):
        used = int((cell.denominator > 0).any(axis=0).sum()) if cell.denominator.size else 0
        line = key | {"metric": metric, "estimate": np.nan, "low": np.nan, "high": np.nan,
                      "n_items": used, "n_seeds": len(cell.seeds)}
        notes = cell.notes
        if used:
            found = crossed_interval(cell.values, confidence=confidence, bounds=METRICS[metric].bounds)
            line |= {"estimate": found.estimate, "low": found.low, "high": found.high}
            notes = [*notes, found.note]
        lines.append(line | {"note": "; ".join(filter(None, notes))})
    return pd.DataFrame(lines)


def per_seed(results: pd.DataFrame, metric: str) -> pd.DataFrame:
    """One row a cell and seed: `CELL_COLUMNS`, seed, metric, value, n_items (those in the denominator)."""
    parts = [pd.DataFrame({**key, "seed": cell.seeds, "metric": metric, "value": cell.values.mean(axis=1),
                           "n_items": (cell.denominator > 0).sum(axis=1)})
             for key, cell in cells(results, metric) if len(cell.seeds)]
    if not parts:
        raise ValueError(f"{metric} is empty in every cell; summarise() says why")
    return pd.concat(parts, ignore_index=True)


def accuracy(results: pd.DataFrame, *, confidence: float = 0.95) -> pd.DataFrame:
    """Share of the items answered right, per cell, with its interval (see `summarise`)."""
    return summarise(results, "accuracy", confidence=confidence)


def consist_syn(results: pd.DataFrame, *, confidence: float = 0.95) -> pd.DataFrame:
    """ConsistSyn: of the items a model got right, the share it still gets right after synonym replacement.

    Per cell of condition 'replaced', with its interval (see `summarise`). DESIGN, Decisions taken: the paper's
    own definition was not at hand; its code measures retention on the items right before the change.
    """
    return summarise(results, "consist_syn", confidence=confidence)


def pooling_drop(results: pd.DataFrame, *, confidence: float = 0.95) -> pd.DataFrame:
    """ΔA: clean accuracy minus accuracy under pooling, per start layer and protocol (see `summarise`)."""
    return summarise(results, "pooling_drop", confidence=confidence)


def _spread(values: np.ndarray, confidence: float) -> tuple[float, float, float, str]:
    """CV of the seeds' values, its interval and a note."""
    n, mean = len(values), values.mean()
    if n < 2:
        return np.nan, np.nan, np.nan, "one seed: no spread to measure"
    if mean <= 0:
        return np.nan, np.nan, np.nan, "mean is not above 0: CV undefined"
    ratio = values.std(ddof=1) / mean
    if ratio < 1e-12:
        return 0.0, 0.0, 0.0, "seeds do not differ"
    edges = stats.chi2.ppf([(1 + confidence) / 2, (1 - confidence) / 2], n - 1)
    below = ((edges + 2) / n - 1) * ratio**2 + edges / (n - 1)
    low = ratio / np.sqrt(below[0])
    if below[1] <= 0:
        return ratio, low, np.inf, "too few seeds for an upper limit at this spread"
    return ratio, low, ratio / np.sqrt(below[1]), ""


def coefficient_of_variation(results: pd.DataFrame, metric: str = "accuracy", *,
                             confidence: float = 0.95) -> pd.DataFrame:
    """CV = standard deviation (n - 1) over mean of a metric across seeds, per cell of the design.

    The interval is Vangel's modified McKay interval for the CV of normal values (The American Statistician
    50, 1996). It speaks of seeds on these items: the items are not resampled, so the seeds' spread holds what
    chance answers on finitely many items add. DESIGN, Decisions taken: the paper's own definition of CV was
    not at hand.
    """
    lines = []
    for key, cell in cells(results, metric):
        values = cell.values.mean(axis=1) if cell.denominator.any() else np.array([])
        found = _spread(values, confidence) if len(values) else (np.nan, np.nan, np.nan, "")
        lines.append(key | {"metric": f"cv_{metric}"} | dict(zip(("estimate", "low", "high"), found)) | {
            "n_items": len(cell.items), "n_seeds": len(values),
            "note": "; ".join(filter(None, [*cell.notes, found[3]]))})
    return pd.DataFrame(lines)
