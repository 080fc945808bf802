"""Finished cells' tables as three files: `results.parquet`, `measures.parquet` and `cells.parquet`."""
from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.dataset as arrow
import pyarrow.parquet as parquet

from carma_lib.files import RunError, locked, reading, whole_file
from carma_lib.lab.cell import FACTS, RULES, Cell, cell_folder, finished_facts, is_tested, testing_mark
from carma_lib.lab.start import model_name
from carma_lib.stats.table import RESULT_COLUMNS, ResultsError

NAMES = ("cells", "measures", "results")
_TEXT = [name for name, (kind, _) in RESULT_COLUMNS.items() if kind == "category"] + ["cell"]


def pack(folder: Path, cells: Iterable[Cell], archive: Path) -> pd.DataFrame:
    """Put the finished cells of a run folder into an archive's three files, in the order of `cells`; the facts of all.

    What the archive holds of other cells stays, unless it is the run folder itself, which has them in their own folders.
    Of several runs that pack into one archive, each waits for the other. `RunError` for cells of one start
    whose `precision: auto` came to bf16 on one machine and to float32 on another.
    """
    ready = [cell for cell in dict.fromkeys(cells) if is_tested(folder, cell)]
    if not ready:
        return read_facts(archive)
    with locked(archive / ".lock", wait=-1):
        return _packed(folder, ready, archive)


def _packed(folder: Path, ready: list[Cell], archive: Path) -> pd.DataFrame:
    facts = pd.DataFrame([{**cell.facts(), **finished_facts(cell_folder(folder, cell) / "tested.json")} for cell in ready])
    facts = facts.drop(columns="sha256", errors="ignore").astype({"strength": float, "change": str, "value": str, "trial": bool})
    known = read_facts(archive if archive != folder else archive / "none")
    stays = known[~known["cell"].isin(facts["cell"])] if len(known) else known
    auto = facts[[cell.recipe.precision == "auto" for cell in ready]]
    _check_precision(pd.concat([part for part in (stays[stays["start"].isin(auto["start"])], auto) if len(part)] or [auto], ignore_index=True))
    tables = {"cells": [pa.Table.from_pandas(part, preserve_index=False) for part in (stays, facts) if len(part)]}
    for name, file in (("measures", "measures.parquet"), ("results", "answers.parquet")):
        old = []
        if len(stays) and (archive / f"{name}.parquet").is_file():
            with reading(archive / f"{name}.parquet"):
                old = [arrow.dataset(archive / f"{name}.parquet").to_table(filter=arrow.field("cell").isin(list(stays["cell"])))]
        tables[name] = old + [_part(cell_folder(folder, cell) / file, cell) for cell in ready
                              if (cell_folder(folder, cell) / file).is_file()]
    for name in reversed(NAMES):  # the list of cells last: what it names is there
        if not tables[name]:
            continue
        whole = pa.concat_tables(tables[name], promote_options="permissive")
        with whole_file(archive / f"{name}.parquet") as temporary:
            parquet.write_table(whole, temporary, compression="zstd", compression_level=15, row_group_size=200_000)
    return read_facts(archive)


def _check_precision(facts: pd.DataFrame) -> None:
    for start, mixed in facts[facts["change"] != "precision"].groupby("start")["bf16"] if "bf16" in facts else ():
        if mixed.nunique() > 1:
            rarer = facts.loc[mixed.index[mixed.notna() & (mixed != mixed.mode()[0])], "cell"]
            raise RunError(f"of the cells from {start}, {int(mixed.eq(True).sum())} were computed in bf16 and {int(mixed.eq(False).sum())} in "
                           "float32, as machines do by themselves: delete the folders of one kind under cells/ (the rarer end in "
                           f"{', '.join(rarer[:3])}{', …' if len(rarer) > 3 else ''}), and go on on machines of one kind")


def _part(file: Path, cell: Cell) -> pa.Table:
    with reading(file):
        table = parquet.read_table(file).replace_schema_metadata(None)
    return table if "cell" in table.column_names else table.append_column("cell", pa.array([cell.key] * len(table)))


def read_facts(archive: Path) -> pd.DataFrame:
    """The finished cells of an archive, a row each: `FACTS`, mark, rules, budget, seconds; empty if there is none."""
    file = Path(archive) / "cells.parquet"
    if not file.is_file():
        return pd.DataFrame(columns=[*FACTS, "mark", "rules", "budget", "seconds"])
    with reading(file):
        return pd.read_parquet(file)


def read_cells(archive: Path, *, trials: bool = False) -> tuple[pd.DataFrame, pd.DataFrame]:
    """All finished cells of an archive, a row each, and their measures, a row a value in the column `measured`.

    trials: those that chose strengths instead. `ResultsError` if there is none.
    """
    cells = read_facts(archive)
    cells = cells[cells["trial"] == trials].reset_index(drop=True)
    if cells.empty:
        raise ResultsError(f"no finished cell in {archive}; run the notebook that trains them first")
    with reading(Path(archive) / "measures.parquet"):
        measures = pd.read_parquet(Path(archive) / "measures.parquet").rename(columns={"value": "measured"})
    return cells, cells[list(FACTS)].merge(measures, on="cell")


def in_archive(archive: Path, folder: Path) -> Callable[[Cell], bool]:
    """Whether an archive holds a cell made from these settings and data, by whatever version of the rules.

    folder: a run folder with the data. Cells of earlier rules are kept, and told of in one line.
    """
    known = read_facts(archive)
    marks = dict(zip(known["cell"], known["mark"]))
    if older := int((known["rules"] != RULES).sum()):
        print(f"{older} of {len(known)} cells in {archive} were made by earlier rules than {RULES} and are kept; "
              "without its .parquet files they are made again")
    return lambda cell: cell.key in marks and marks[cell.key] == testing_mark(folder, cell)


def cells_of(cells: pd.DataFrame, wanted: Iterable[Cell]) -> pd.DataFrame:
    """The rows of `read_cells` that belong to these cells; a cell that is not done is left out."""
    return cells[cells["cell"].isin({cell.key for cell in wanted})]


def whole_seeds(cells: pd.DataFrame, methods: Iterable[str]) -> pd.DataFrame:
    """The rows of the seeds of which every one of these methods is done, for each task, start and changed setting."""
    asked = set(methods)
    done = cells.groupby(["task", "start", "change", "seed"])["method"].transform(lambda of_seed: asked <= set(of_seed))
    return cells[done.astype(bool)]


def read_answers(archive: Path, cells: pd.DataFrame, *, conditions: Sequence[str] = ("clean", "replaced", "pooled"),
                 budgets: Sequence[int] = (), as_tested: bool = False) -> pd.DataFrame:
    """The answers of some rows of `read_cells` as one result table, with the cells' facts beside.

    conditions, budgets: only these; no budgets for all. Rules of different versions replace other words, so answers
    under synonyms are given of one version only, that of the most cells of a task; one line tells of the others. Answers
    of cells that were tested before rules 6 are judged anew by `judged_greedily`, unless `as_tested`.
    """
    keep = arrow.field("cell").isin(list(cells["cell"])) & arrow.field("condition").isin(list(conditions))
    rules = cells["rules"].str.partition(".")[2].astype(int)  # of testing
    words = rules.replace({6: 5})  # which replace the same words
    most = words.groupby(cells["task"]).agg(lambda of_task: of_task.mode()[0])
    if "replaced" in conditions and len(others := cells[words != cells["task"].map(most)]):
        print(f"{len(others)} of {len(cells)} cells were tested under other rules, which replace other words: they are left out under synonyms")
        keep &= ~(arrow.field("cell").isin(list(others["cell"])) & (arrow.field("condition") == "replaced"))
    if len(budgets):
        keep &= arrow.field("budget").isin([int(budget) for budget in budgets])
    with reading(Path(archive) / "results.parquet"):
        table = arrow.dataset(Path(archive) / "results.parquet").to_table(filter=keep)
    for name in _TEXT:
        place = table.column_names.index(name)
        table = table.set_column(place, name, table.column(name).cast(pa.string()).combine_chunks().dictionary_encode())
    answers = table.to_pandas().astype({name: kind for name, (kind, _) in RESULT_COLUMNS.items() if kind != "category"})
    more = ["training_items", "strength", "change", "value"]
    answers = answers.merge(cells[["cell", *more]].astype({"cell": answers["cell"].dtype}), on="cell", how="left")
    older = cells.loc[rules < 6, "cell"]
    return answers if as_tested else judged_greedily(answers, answers["cell"].isin(older))


def judged_greedily(answers: pd.DataFrame, among: pd.Series) -> pd.DataFrame:
    """The answers with `correct` and `rank` 1 where the target was the greedy answer, but was not counted as right.

    Before rules 6 of testing a target was wrong wherever another token was exactly as likely. In bf16, which tells
    values apart in steps of 1/8 to 1/2 there, the best two often are (2 to 3 in 100 answers of SmolLM2). Such a row
    predicts the target's letters with the number of its token after them, with the target's probability.

    among: True for the rows of such cells. Own decision, taken when results were known: exact match of the greedy
    answer is what the paper and this project say that they measure.
    """
    if "prediction_probability" not in answers:  # of the first studies, in float32: no ties
        return answers
    marked = [text for text in answers["prediction"].cat.categories if re.search(r"#\d+$", text)]
    rows = answers[among & ~answers["correct"] & answers["prediction"].isin(marked)]
    letters = rows["prediction"].astype(str).str.replace(r"#\d+$", "", regex=True)
    as_likely = (np.log(rows["prediction_probability"].astype(float)) - rows["log_probability"]).abs() < 0.006  # kept to 0.01
    found = rows.index[(letters == rows["target"].astype(str)) & as_likely]
    answers.loc[found, "correct"], answers.loc[found, "rank"] = True, 1
    return answers


def trained_again(cells: Iterable[Cell], again: Path, archive: Path) -> pd.DataFrame:
    """Cells that were trained a second time in the run folder `again`, beside the archive: a row a cell.

    How many results and measures it has, how many results predict another text, and the largest differences of a
    log-probability (nats) and of a measure. The table is kept in the archive as `repeated.csv`. `RunError` if the two
    have other rows.
    """
    table = pd.DataFrame([{"task": cell.task, "method": cell.method, "seed": cell.seed, **_compared(cell, again, archive)} for cell in cells])
    with whole_file(archive / "repeated.csv") as temporary:
        table.to_csv(temporary, index=False)
    return table


def _compared(cell: Cell, again: Path, archive: Path) -> dict[str, float]:
    found = {}
    for name, file, value in (("results", "answers.parquet", "log_probability"), ("measures", "measures.parquet", "value")):
        new = _part(cell_folder(again, cell) / file, cell).to_pandas()
        with reading(archive / f"{name}.parquet"):
            old = pd.read_parquet(archive / f"{name}.parquet", filters=[("cell", "==", cell.key)])
        of_row = [column for column in ("split", "budget", "condition", "measure", "layer", "item_id") if column in new]
        if new[of_row].astype(str).to_numpy().tolist() != old[of_row].astype(str).to_numpy().tolist():
            raise RunError(f"{cell.name}: trained again it has other rows than in {archive}; were its data or tests changed?")
        found[name] = len(new)
        if "prediction" in new:
            found["other predictions"] = int((new["prediction"].to_numpy() != old["prediction"].to_numpy()).sum())
        found[f"largest difference, {value.replace('_', ' ')}"] = _largest(new[value], old[value])
    return found


def _largest(new: pd.Series, old: pd.Series) -> float:
    """The largest absolute difference; two missing values are alike, one is infinitely far from a number."""
    new, old = new.to_numpy(float), old.to_numpy(float)
    apart = np.where(np.isnan(new) & np.isnan(old), 0.0, np.nan_to_num(np.abs(new - old), nan=np.inf, posinf=np.inf))
    return float(np.where(new == old, 0.0, apart).max(initial=0.0))


def curves(folder: Path, cells: Iterable[Cell]) -> pd.DataFrame:
    """Training histories of finished trainings, a row a logged step: task, model (named as in results), start, method,
    seed, step, losses, `validation_accuracy`. `FileNotFoundError` if there is none."""
    parts = []
    for cell in cells:
        file = cell_folder(folder, cell) / "history.csv"
        if file.is_file():
            with reading(file):
                parts.append(pd.read_csv(file).assign(task=cell.task, model=model_name(cell.recipe),
                                                      start=cell.recipe.start, method=cell.method, seed=cell.seed))
    if not parts:
        raise FileNotFoundError(f"no trained model in {folder}: run notebook 02 first")
    history = pd.concat(parts, ignore_index=True)
    for name in ("task_loss", "weighted_task_loss"):  # plain fine-tuning's loss is its task loss
        history[name] = history[name].fillna(history["loss"]) if name in history else history["loss"]
    return history
