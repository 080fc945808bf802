"""What runs on a worker: the preparation of a task and start, and single cells, each attempt noted in its log."""
from __future__ import annotations

import functools
import gc
import json
import os
import socket
import time
import traceback
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal

import datasets
import pandas as pd
import torch
import transformers

from carma_lib.files import locked, whole_file
from carma_lib.lab.cell import RULES, Cell, cell_folder, checksums_of, is_tested, is_trained, testing_mark, write_facts
from carma_lib.lab.evaluate import changed_answers, finish, replacements, split_prompts, test_splits
from carma_lib.lab.measure import measured
from carma_lib.lab.memory import check_loading, check_memory
from carma_lib.lab.recipe import EXAMPLES
from carma_lib.lab.start import config_of, make_base, steps_of, tokenizer_of, training_rows
from carma_lib.lab.train import Trained, tested_clean, trained
from carma_lib.synonyms.wordnet import wordnet
from carma_lib.tasks import task_named

Stage = Literal["trained", "tested"]


def quiet() -> None:
    """No progress bars or warnings from inside a training: the run shows one bar for all."""
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()


@functools.cache
def _freeze() -> None:
    """Once a process: what is loaded by now is not searched by the garbage collections with which every training ends."""
    gc.collect()
    gc.freeze()


def prepare(folder: Path, cells: list[Cell], sharing: int, stage: Stage) -> None:
    """What cells of one task and start share: tokenizer, encoded rows, replaced texts; and whether a training fits.

    `NotEnoughMemory` if `sharing` trainings at a time do not.
    """
    quiet()
    first = cells[0]
    tokenizer_of(folder, first)
    if to_train := [cell for cell in cells if not cell.untuned]:
        steps_of(folder, to_train[0])  # tells if its epochs are too short
        rows, config = training_rows(folder, to_train[0]), config_of(first)
        if first.recipe.has_pretrained_weights:
            check_loading(first.recipe.start, config, first.recipe)
        longest = max(len(row["input_ids"]) for row in rows)
        check_memory(config, first.recipe, tokens=longest, workers=sharing,
                     predicted=1 if task_named(first.task).answer == "token" else longest,
                     l2_sp=any(cell.method == "l2_sp" for cell in to_train))
    if stage == "tested" and not all(cell.trial for cell in cells):
        if EXAMPLES in first.recipe.plain_texts:
            wordnet()  # else its lack would be told after the training
        for split in test_splits(folder, first):  # else a text that is too long would be told after the training
            split_prompts(folder, first, split)
        for split in first.recipe.changed_splits or test_splits(folder, first):
            for texts, _ in replacements(folder, first, split).values():
                split_prompts(folder, first, split, texts=texts)


def prepare_base(folder: Path, cell: Cell, *after: Any) -> None:
    """The base model of a cell."""
    quiet()
    torch.set_num_threads(cell.recipe.threads)
    make_base(folder, cell)


def run_cell(folder: Path, cell: Cell, stage: Stage, *after: Any) -> None:
    """Train a cell, and for the stage "tested" test it, unless that is done. after: what must have ended before."""
    quiet()
    _freeze()
    own, started = cell_folder(folder, cell), time.monotonic()
    with locked(own / "lock", wait=-1):  # a scheduler may believe lost who is still at work
        if is_done(folder, cell, stage):
            return
        _note(own, state="begun", host=socket.gethostname(), pid=os.getpid())
        try:
            model = trained(folder, cell)
            if stage == "tested":
                _test(folder, cell, model, started)
        except Exception as error:
            _note(own, state="failed", reason=one_line(error))
            (own / "failure.txt").write_text("".join(traceback.format_exception(error)), encoding="utf-8")
            raise
        (own / "failure.txt").unlink(missing_ok=True)
        _note(own, state="done", seconds=round(time.monotonic() - started, 2))
    del model
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def is_done(folder: Path, cell: Cell, stage: Stage) -> bool:
    """Whether nothing is left to do for a cell up to a stage."""
    return is_tested(folder, cell) if stage == "tested" else is_trained(folder, cell)


def _test(folder: Path, cell: Cell, model: Trained, started: float) -> None:
    own, recipe, budget = cell_folder(folder, cell), cell.recipe, steps_of(folder, cell)
    tables, measures = list(model.tables), list(model.measures)
    if not cell.trial:
        clean, accuracies = tested_clean(folder, cell, model.model, budget)
        tables, measures = tables + clean, measures + accuracies
        if not (cell.untuned and recipe.small):  # random weights know no answer that they could keep
            for split in recipe.changed_splits or test_splits(folder, cell):
                tables.append(changed_answers(folder, cell, model.model, split).assign(split=split, budget=budget))
            measures += measured(folder, cell, model.model)
    files = []
    for name, table in (("answers", finish(folder, cell, tables) if tables else None), ("measures", pd.DataFrame(measures))):
        if table is not None and len(table):
            with whole_file(own / f"{name}.parquet") as temporary:
                table.to_parquet(temporary, index=False, compression="zstd")
            files.append(f"{name}.parquet")
    facts = {name: value for name, value in model.facts.items() if name in ("training_seconds", "bf16")}
    write_facts(own / "tested.json", {**cell.facts(), "mark": testing_mark(folder, cell), "rules": RULES, "budget": budget, **facts,
                                      "seconds": round(time.monotonic() - started, 1), "sha256": checksums_of(own, files)})


def _note(own: Path, **facts: Any) -> None:
    own.mkdir(parents=True, exist_ok=True)
    with open(own / "attempts.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps({"time": datetime.now(timezone.utc).isoformat(timespec="milliseconds"), **facts}) + "\n")


def attempts(own: Path) -> list[dict[str, Any]]:
    """The lines of a cell's log; one that was cut short is left out."""
    lines = []
    for line in (own / "attempts.jsonl").read_text(encoding="utf-8", errors="replace").splitlines() if (own / "attempts.jsonl").is_file() else ():
        try:
            lines.append(json.loads(line))
        except (ValueError, RecursionError):
            continue
    return [line for line in lines if isinstance(line, dict) and isinstance(line.get("state"), str)]


def one_line(error: BaseException) -> str:
    """An error's type and message in one line of at most 300 characters."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= 300 else f"{text[:299]}…"
