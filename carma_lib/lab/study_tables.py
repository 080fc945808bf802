"""The controlled study's tables read back: answers, measures, and what the trials chose."""
from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as parquet

from carma_lib.stats.table import RESULT_COLUMNS, ResultsError
from carma_lib.lab.study_plan import StudyCell

CELL_FACTS = ["task", "start", "training_items", "method", "seed", "learning_rate", "strength", "change", "value",
              "layers", "width"]
_TEXT = [name for name, (kind, _) in RESULT_COLUMNS.items() if kind == "category"]


def read_cells(study_dir: str | Path, *, tuning: bool = False) -> tuple[pd.DataFrame, pd.DataFrame]:
    """All finished cells of a study, a row each (`CELL_FACTS`, seconds, file, place), and their measures, a row a value.

    tuning: the trials instead. `ResultsError` where there are none.
    """
    folder = Path(study_dir) / ("tuning" if tuning else "cells")
    files = sorted(folder.rglob("seed-*.json"))
    if not files:
        raise ResultsError(f"no finished cell of the study in {folder}; run notebook 07 first (profile study)")
    facts = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    cells = pd.DataFrame([{name: each[name] for name in [*CELL_FACTS, "seconds"]} for each in facts])
    cells["strength"] = cells["strength"].astype(float)
    cells["value"] = cells["value"].astype(str)
    cells["file"] = [file.with_suffix(".parquet") for file in files]
    cells["place"] = [file.relative_to(study_dir).with_suffix("").as_posix() for file in files]
    measures = pd.concat([pd.DataFrame({name: column.split(",") for name, column in each["measures"].items()}).assign(
        cell=number) for number, each in enumerate(facts)], ignore_index=True)
    measures = measures.astype({"budget": int, "layer": int, "value": float}).rename(columns={"value": "measured"})
    return cells, cells[CELL_FACTS].join(measures.set_index("cell"), how="right").reset_index(drop=True)


def cells_of(cells: pd.DataFrame, wanted: Iterable[StudyCell]) -> pd.DataFrame:
    """The rows of `read_cells` that belong to these cells of the plan; a cell that is not done is left out."""
    return cells[cells["place"].isin({cell.place.as_posix() for cell in wanted})]


def read_answers(cells: pd.DataFrame, *, conditions: Sequence[str] = ("clean", "replaced", "pooled"),
                 budgets: Sequence[int] = ()) -> pd.DataFrame:
    """The answers of cells as one table in the columns of `RESULT_COLUMNS`, with the cells' facts beside.

    conditions, budgets: only these; no budgets for all. The model is named by its size, "4x64".
    """
    tables = []
    for cell in cells.to_dict("records"):
        table = parquet.read_table(cell["file"], read_dictionary=["split", "target", "condition", "source", "protocol",
                                                                 "level", "prediction"])
        keep = pa.compute.is_in(table["condition"].cast(pa.string()), pa.array(list(conditions)))
        if len(budgets):
            keep = pa.compute.and_(keep, pa.compute.is_in(table["budget"], pa.array(list(budgets), pa.int32())))
        frame = table.filter(keep).to_pandas()
        facts = {name: cell[name] for name in ("task", "start", "training_items", "method", "seed", "strength", "change",
                                               "value")}
        tables.append(frame.assign(**facts, model=f"{cell['layers']}x{cell['width']}"))
    answers = pd.concat(tables, ignore_index=True)
    splits = answers["split"].astype(str)
    answers["item_id"] = answers["task"] + "/" + splits + "/" + answers["item"].astype(str).str.zfill(5)
    for name in _TEXT:
        answers[name] = answers[name].astype("category")
    answers["rate"] = answers["rate"].astype(float).round(4)
    answers["depth_share"] = answers["depth_share"].astype(float).round(4)
    return answers.drop(columns="item")


def best_trials(measures: pd.DataFrame) -> pd.DataFrame:
    """A row a task, start and method: the trial with the best mean validation accuracy at the last budget.

    Columns learning_rate, strength, accuracy, trials (how many values), seeds. Of equal ones the smaller
    value wins.
    """
    found = measures[(measures["measure"] == "accuracy") & (measures["split"] == "validation")]
    found = found[found["budget"] == found["budget"].max()]
    keys = ["task", "start", "method"]
    means = found.groupby([*keys, "learning_rate", "strength"], dropna=False)["measured"].agg(["mean", "count"]).reset_index()
    means["tried"] = means.groupby(keys)["mean"].transform("size")
    best = means.sort_values(["mean", "learning_rate", "strength"], ascending=[False, True, True]).drop_duplicates(keys)
    return best.rename(columns={"mean": "accuracy", "count": "seeds", "tried": "trials"}).sort_values(keys).reset_index(
        drop=True)


def chosen_rates(trials: pd.DataFrame) -> dict[tuple[str, str], float]:
    """(task, start) → learning rate, from `best_trials`."""
    plain = trials[trials["method"] == "fine_tuning"]
    return {(row.task, row.start): row.learning_rate for row in plain.itertuples()}


def chosen_strengths(trials: pd.DataFrame) -> dict[tuple[str, str], float]:
    """(task, method) → strength, from `best_trials`."""
    others = trials[trials["method"] != "fine_tuning"]
    return {(row.task, row.method): row.strength for row in others.itertuples()}
