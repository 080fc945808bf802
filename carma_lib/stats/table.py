"""The long result table: its columns, its checks, and Parquet on disk.

A row is one item under one condition, answered by one model trained by one method from one seed.
Accuracy and all claims come from this table; measures of hidden states and times have tables of their own.
"""
from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as parquet

#: Column → (type, meaning). Text columns are read as categories, because their values repeat.
RESULT_COLUMNS: dict[str, tuple[str, str]] = {
    "task": ("category", "name of the task, e.g. controlled_inverse_dictionary"),
    "split": ("category", "name of the split the item is from"),
    "item_id": ("category", "unique and stable name of the item"),
    "target": ("category", "the right answer"),
    "model": ("category", "name of the model"),
    "method": ("category", "untuned, fine_tuning, carma, …"),
    "seed": ("int64", "seed of weights, data order and sampling"),
    "budget": ("int64", "training steps; 0 for an untuned model"),
    "start": ("category", "'random' or the name of the starting model"),
    "condition": ("category", "clean, replaced or pooled"),
    "source": ("category", "source of the synonyms; empty if not replaced"),
    "rate": ("float64", "share of words to replace; 0 if not replaced"),
    "start_layer": ("int64", "first block that reads pooled states; -1 if not pooled"),
    "depth_share": ("float64", "the share s that was asked for, where start_layer = ⌈s · blocks⌉ − 1 (at least 1 of more than 8 blocks); NaN if not pooled"),
    "protocol": ("category", "sum, mean or max; empty if not pooled"),
    "level": ("category", "word or phrase; empty if not pooled"),
    "changed": ("int64", "words replaced or tokens pooled away"),
    "prediction": ("category", "the answer given"),
    "correct": ("bool", "prediction is the target"),
    "rank": ("int64", "rank of the target, 1 is best"),
    "log_probability": ("float64", "natural logarithm of the target's probability"),
}
#: Known methods and how figures, tables and sentences call them, in this order.
METHOD_LABELS = {
    "untuned": "untuned", "fine_tuning": "fine-tuning", "carma": "CARMA",
    "mutual_information_only": "MI only", "stability_only": "stability only", "r_drop": "R-Drop",
    "neftune": "NEFTune", "label_smoothing": "label smoothing",
    "synonym_augmentation": "synonym augmentation", "l2_sp": "L2-SP",
}
#: Splits of the controlled tasks as figures call them.
SPLIT_LABELS = {"test_seen": "seen combinations", "test_held_out": "new combinations", "test_longer": "longer texts"}
#: What identifies a row; two rows that agree in all of these are duplicates.
_KEY = [name for name in RESULT_COLUMNS if name not in
        ("target", "changed", "prediction", "correct", "rank", "log_probability")]
_TEXT = [name for name, (kind, _) in RESULT_COLUMNS.items() if kind == "category"]


def sides(comparisons: pd.DataFrame) -> list[str]:
    """How a table of claims calls what it compares: two methods by their labels, or "method" and "baseline" if there are more."""
    return [METHOD_LABELS.get(names[0], names[0]) if len(names := comparisons[side].unique()) == 1 else side
            for side in ("method", "baseline")]


class ResultsError(ValueError):
    """A result table that cannot be used; the message says what to do."""


def task_label(task: str) -> str:
    """A task's name as figures, tables and sentences call it."""
    return task.removeprefix("controlled_").replace("_", " ").replace("wordnet", "WordNet").replace("sst3", "SST sentiment")


def matches(table: pd.DataFrame, **values: Any) -> np.ndarray:
    """Which rows have these values in their columns: one value, or any of a list; a float up to rounding."""
    chosen = np.ones(len(table), bool)
    for name, value in values.items():
        several = list(value) if isinstance(value, (list, tuple, dict)) else [value]
        if any(isinstance(each, float) for each in several):
            column = table[name].to_numpy(float)
            if name in ("rate", "depth_share"):  # of which cells keep four digits
                column, several = np.round(column, 4), np.round(several, 4)
            chosen &= np.isclose(column[:, None], several).any(axis=1)
        else:
            chosen &= table[name].isin(several).to_numpy()
    return chosen


def select(table: pd.DataFrame, **values: Any) -> pd.DataFrame:
    """The rows that have these values in their columns, as `matches` says."""
    return table[matches(table, **values)]


def check_results(frame: pd.DataFrame) -> pd.DataFrame:
    """The frame with the types of `RESULT_COLUMNS` (further columns stay), or a `ResultsError`.

    Errors: no rows, a missing column, a missing value (allowed only in `depth_share` of rows that are not
    pooled), an unknown condition, a rank below 1, a type that does not fit, duplicate rows.
    """
    if missing := [name for name in RESULT_COLUMNS if name not in frame]:
        raise ResultsError(f"result table lacks the columns {missing}; see carma_lib.stats.table.RESULT_COLUMNS")
    if frame.empty:
        raise ResultsError("result table has no rows; evaluate at least one method first")
    typed, pooled = frame.copy(deep=False), frame["condition"].astype(str) == "pooled"
    for name, (kind, _) in RESULT_COLUMNS.items():
        holes = frame[name].isna() & (pooled | (name != "depth_share"))
        if holes.any():
            raise ResultsError(f"result table: {int(holes.sum())} missing values in {name!r}, first in row "
                               f"{holes.to_numpy().argmax()}; evaluate those items again or drop the rows")
        try:
            typed[name] = frame[name].astype(kind)
        except (TypeError, ValueError) as error:
            raise ResultsError(f"result table: column {name!r} cannot be read as {kind} ({error})") from error
        if kind in ("bool", "int64") and not (typed[name] == frame[name]).all():
            raise ResultsError(f"result table: column {name!r} holds values that are not of type {kind}")
    if unknown := sorted(set(typed["condition"].unique()) - {"clean", "replaced", "pooled"}):
        raise ResultsError(f"result table: unknown conditions {unknown}; known are clean, replaced and pooled")
    if (typed["rank"] < 1).any():
        raise ResultsError("result table: a rank below 1; ranks start at 1 for the best answer")
    twice = typed.duplicated(_KEY).to_numpy()
    if twice.any():
        raise ResultsError(f"result table: {twice.sum()} duplicate rows, first {typed.loc[twice, _KEY].iloc[0].to_dict()}; "
                           "read each run once, or drop the older one")
    return typed


def at_the_end(results: pd.DataFrame) -> pd.DataFrame:
    """The rows of a table at the end of each task's and model's training, and those of untuned models."""
    last = results.groupby(["task", "model", "start"], observed=True)["budget"].transform("max")
    return results[(results["budget"] == last) | (results["budget"] == 0)]


def read_results(file: Path | str) -> pd.DataFrame:
    """One long table from a Parquet file, text as categories. `ResultsError` where there is none, or no result table."""
    if not (file := Path(file)).is_file():
        raise ResultsError(f"no result table at {file}; run the evaluation first")
    table = parquet.read_table(file, read_dictionary=_TEXT).replace_schema_metadata(None)
    if lacking := [name for name in RESULT_COLUMNS if name not in table.column_names]:
        raise ResultsError(f"{file} is no result table: it lacks the columns {lacking}")
    return check_results(table.unify_dictionaries().to_pandas())
