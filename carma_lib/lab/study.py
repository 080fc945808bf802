"""The controlled study's cells: trained once, tested at every budget, one table each, whole or absent.

A cell's answers go to `<place>.parquet` and its facts and measures to `<place>.json`, written last: a cell
is done when that file is there. Nothing is made again unless the file is taken away. Data, tokenizer and base
models lie in `work_dir` and are made where they are missing.
"""
from __future__ import annotations

import shutil
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
from transformers import PrinterCallback, TrainerCallback, TrainingArguments

from carma_lib.collate import Collator, encode, encode_text
from carma_lib.lab.drift import hidden_state_drift, perplexity
from carma_lib.lab.evaluate import Prompts, answers, prompts_of, shares_by_layer
from carma_lib.lab.experiment import one_gpu, run_parallel
from carma_lib.files import fingerprint, read_json, whole_file, whole_folder, write_json
from carma_lib.lab.mechanism import (additive_structure, final_states, part_matrix, read_out_accuracy,
                                 token_mutual_information)
from carma_lib.methods import make_trainer
from carma_lib.models import load_model, load_tokenizer, prompt_for, small_model, train_tokenizer
from carma_lib.synonyms.replacement import replaced_rows, with_synonym_copies, worst_replacements
from carma_lib.lab.study_plan import TASKS, Recipe, StudyCell, carma_of, strength_of
from carma_lib.tasks import build_task, load_task, read_card, task_named
from carma_lib.tasks.controlled.lexicon import controlled_synonyms

TESTED = ("test_seen", "test_held_out", "test_longer")


def prepare(work_dir: Path, recipe: Recipe) -> None:
    """The two tasks' data and the one tokenizer of both, as every cell reads them."""
    rows = {task: build_task(task, work_dir / "data" / task) for task in TASKS}
    mark = fingerprint(recipe.vocabulary_size, [read_card(work_dir / "data" / task)["content"] for task in TASKS])
    if read_json(work_dir / "tokenizer" / "mark.json") != mark:
        texts = [text for task in TASKS for text in _prompted(task, rows[task]["train"]["text"])]
        targets = sorted({target for task in TASKS for split in rows[task].values() for target in split.unique("target")})
        tokenizer = train_tokenizer(texts, vocabulary_size=recipe.vocabulary_size, whole_tokens=targets)
        with whole_folder(work_dir / "tokenizer") as temporary:
            tokenizer.save_pretrained(temporary)
            write_json(temporary / "mark.json", mark)


def make_base(work_dir: Path, seed: int, layers: int, width: int, recipe: Recipe) -> Path:
    """The base model of a seed: a language model of the training texts of both tasks, without their answers.

    Trained once; its folder lies in `work_dir / "bases"`.
    """
    from carma_lib.losses import CarmaConfig
    from carma_lib.trainer import CarmaTrainer

    folder, mark = _base(work_dir, seed, layers, width, recipe)
    if read_json(folder / "mark.json") == mark:
        return folder
    tokenizer = _tokenizer(work_dir)
    model = small_model(recipe.family, tokenizer, layers=layers, width=width, heads=recipe.heads, seed=seed)
    rows = _text_rows(work_dir, "train")
    work = work_dir / "trainer" / f"base-{layers}x{width}-{seed}"
    trainer = CarmaTrainer(model, _arguments(work, recipe, seed, recipe.base_steps, recipe.base_learning_rate),
                           carma=CarmaConfig(carma_weight=0), train_dataset=rows, data_collator=Collator(tokenizer))
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    with whole_folder(folder) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        write_json(temporary / "mark.json", mark)
    shutil.rmtree(work, ignore_errors=True)
    return folder


def _base(work_dir: Path, seed: int, layers: int, width: int, recipe: Recipe) -> tuple[Path, str]:
    """Where a base model lies, and what it is known by: all that it was made from."""
    return work_dir / "bases" / f"{layers}x{width}" / f"seed-{seed}", fingerprint(
        recipe.base_steps, recipe.base_learning_rate, recipe.batch_size, recipe.family, recipe.heads,
        read_json(work_dir / "tokenizer" / "mark.json"))


def _start_model(work_dir: Path, start: str, seed: int, layers: int, width: int, recipe: Recipe) -> Any:
    """What a cell begins from: the base model of its seed, or random weights."""
    if start == "base":
        return load_model(str(make_base(work_dir, seed, layers, width, recipe)))[0]
    return small_model(recipe.family, _tokenizer(work_dir), layers=layers, width=width, heads=recipe.heads, seed=seed)


def is_done(study_dir: Path, cell: StudyCell) -> bool:
    """Whether the cell's facts, which are written last, are there."""
    return (study_dir / f"{cell.place}.json").is_file()


def run_cell(study_dir: Path, work_dir: Path, cell: StudyCell, recipe: Recipe) -> Path:
    """Train a cell and test it at every budget; a tuning cell is tested on validation rows alone."""
    path = study_dir / f"{cell.place}.json"
    if is_done(study_dir, cell):
        return path
    started = time.monotonic()
    model = _start_model(work_dir, cell.start, cell.seed, cell.layers, cell.width, recipe)
    work = work_dir / "trainer" / cell.place
    tests = _Tests(work_dir, cell, recipe)
    trainer = make_trainer(
        cell.method, model, _arguments(work, recipe, cell.seed, recipe.budgets[-1], cell.learning_rate),
        carma=carma_of(cell, recipe), strength=strength_of(cell), train_dataset=_training_rows(work_dir, cell),
        data_collator=Collator(_tokenizer(work_dir)), callbacks=[tests])
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    model.eval()
    measures = tests.measures
    if not cell.tuning:
        tests.tables.append(_changed_answers(work_dir, cell, recipe, model).assign(budget=recipe.budgets[-1]))
        measures += _mechanism(work_dir, cell, recipe, model)
        _write_table(pd.concat(tests.tables, ignore_index=True), path.with_suffix(".parquet"))
    shutil.rmtree(work, ignore_errors=True)
    write_json(path, {**cell.facts(), "seconds": round(time.monotonic() - started, 1),
                      "recipe": fingerprint(asdict(recipe)), "measures": _columns(measures)})
    return path


def run_cells(study_dir: Path, work_dir: Path, cells: Iterable[StudyCell], recipe: Recipe, *,
              workers: int = 1) -> None:
    """Every cell that is not done, in `workers` processes with a progress bar; base models first.

    The first error stops what has not begun and is raised; what is done stays done. `ValueError` where done
    cells were made by another recipe.
    """
    cells = list(dict.fromkeys(cells))
    open_cells = [cell for cell in cells if not is_done(study_dir, cell)]
    mark = fingerprint(asdict(recipe))
    for cell in set(cells) - set(open_cells):
        if read_json(study_dir / f"{cell.place}.json")["recipe"] != mark:
            raise ValueError(f"{study_dir} holds cells made by another recipe, such as {cell.place}; give another "
                             "study_dir, or move that folder away")
    if not open_cells:
        return
    prepare(work_dir, recipe)
    bases = sorted({(cell.seed, cell.layers, cell.width) for cell in open_cells if cell.start == "base"})
    lacking = [base for base in bases for folder, mark in [_base(work_dir, *base, recipe)]
               if read_json(folder / "mark.json") != mark]
    run_parallel(make_base, [(work_dir, *base, recipe) for base in lacking], workers=workers,
                 description=f"{len(lacking)} base models", unit="model")
    for task in {cell.task: None for cell in open_cells}:  # once, so that workers find the texts in the cache
        _replacements(work_dir, task, recipe)
    run_parallel(run_cell, [(study_dir, work_dir, cell, recipe) for cell in open_cells], workers=workers,
                 description=f"{len(open_cells)} cells of the study", unit="cell")


class _Tests(TrainerCallback):
    """Tests the model at the steps of `budgets`: accuracy on validation rows, and answers to the test splits."""

    def __init__(self, work_dir: Path, cell: StudyCell, recipe: Recipe) -> None:
        self._of, self._budgets = (work_dir, cell, recipe), recipe.budgets
        self.tables: list[pd.DataFrame] = []
        self.measures: list[dict[str, Any]] = []

    def on_step_end(self, args, state, control, *, model, **unused):
        if state.global_step not in self._budgets:
            return
        work_dir, cell, recipe = self._of
        for split in ("validation", *(() if cell.tuning else TESTED)):
            asked = answers(model, _tokenizer(work_dir), _prompts(work_dir, cell.task, split, recipe))
            self.measures.append(_measure("accuracy", asked["correct"].mean(), split=split, budget=state.global_step))
            if split in TESTED:
                self.tables.append(asked.assign(split=split, budget=state.global_step))


def _measure(name: str, value: float, *, split: str = "", budget: int = 0, layer: int = -2) -> dict[str, Any]:
    return {"measure": name, "split": split, "budget": budget, "layer": layer, "value": float(value)}


def _columns(measures: list[dict[str, Any]]) -> dict[str, str]:
    """Measures as one line of CSV a column, which keeps the file short."""
    table = pd.DataFrame(measures)
    table["value"] = table["value"].map("{:.6g}".format)
    return {name: ",".join(map(str, table[name])) for name in table}


def _changed_answers(work_dir: Path, cell: StudyCell, recipe: Recipe, model: Any) -> pd.DataFrame:
    """Answers to the seen test items with synonyms, to the adversary's choice of them, and under pooling."""
    tokenizer, task = _tokenizer(work_dir), cell.task
    rows, parts = _rows(work_dir, task, "test_seen", recipe), []
    for rate, (texts, changed) in _replacements(work_dir, task, recipe).items():
        asked = answers(model, tokenizer, _text_prompts(work_dir, task, recipe, tuple(texts["text"])))
        parts.append(asked.assign(condition="replaced", source="controlled", rate=rate, changed=changed))
    some = rows.select(range(min(recipe.pooled_items, len(rows))))

    def loss(texts: Sequence[str]) -> np.ndarray:
        return -answers(model, tokenizer, _text_prompts(work_dir, task, recipe, tuple(texts)))[
            "log_probability"].to_numpy()

    worst = worst_replacements(
        some["text"], rate=recipe.adversary_rate, seeds=range(1, recipe.adversary_tries + 1), score=loss,
        item_ids=some["item_id"], source=controlled_synonyms(), cache_dir=work_dir / "cache",
        forbidden=some["target"] if task_named(task).kind == "inverse_dictionary" else None)
    asked = answers(model, tokenizer, _text_prompts(work_dir, task, recipe, tuple(each.text for each in worst)))
    parts.append(asked.assign(condition="replaced", source="adversary", rate=recipe.adversary_rate,
                              changed=[each.made for each in worst]))
    shares = shares_by_layer(cell.layers, recipe.depth_shares)
    prompts = _text_prompts(work_dir, task, recipe, tuple(some["text"]))
    parts.append(answers(model, tokenizer, prompts, shares=shares).assign(source=""))
    return pd.concat(parts, ignore_index=True).assign(split="test_seen")


def _mechanism(work_dir: Path, cell: StudyCell, recipe: Recipe, model: Any) -> list[dict[str, Any]]:
    """Structure of hidden states by layer before and after training, drift, and perplexity of plain texts."""
    origin = (work_dir, cell.start, cell.seed, cell.layers, cell.width, recipe)
    measures = [*_start_measures(cell.task, *origin), *_model_measures(work_dir, cell.task, recipe, model, "after")]
    drift = hidden_state_drift(model, _start_model(*origin), _prompts(work_dir, cell.task, "test_seen", recipe).batches)
    return measures + [_measure(name, value, layer=layer) for name in ("drift", "cosine", "cka")
                       for layer, value in zip(drift["layer"], drift[name])]


@lru_cache(maxsize=64)
def _start_measures(task: str, work_dir: Path, start: str, seed: int, layers: int, width: int,
                    recipe: Recipe) -> list[dict[str, Any]]:
    """The measures before training, the same for every method."""
    return _model_measures(work_dir, task, recipe, _start_model(work_dir, start, seed, layers, width, recipe), "before")


def _model_measures(work_dir: Path, task: str, recipe: Recipe, model: Any, when: str) -> list[dict[str, Any]]:
    measures = [_measure(f"{name}_{when}", value, layer=layer)
                for name, values in _structure(work_dir, task, recipe, model).items()
                for layer, value in enumerate(values)]
    information = token_mutual_information(model, _prompts(work_dir, task, "test_seen", recipe).batches)
    measures += [_measure(f"token_mutual_information_{when}", value, layer=layer - 1)
                 for layer, value in enumerate(information)]
    return [*measures, _measure(f"perplexity_{when}", perplexity(model, _text_batches(work_dir)))]


def _structure(work_dir: Path, task: str, recipe: Recipe, model: Any) -> dict[str, list[float]]:
    """Additive structure over the test items, and a read-out fitted on validation rows and tested, by layer."""
    asked = {split: _prompts(work_dir, task, split, recipe) for split in ("validation", *TESTED[:2])}
    states = {split: final_states(model, prompts.batches, prompts.places) for split, prompts in asked.items()}
    parts = _parts(work_dir, task, recipe)
    found: dict[str, list[float]] = {name: [] for name in (
        "variance_explained", "angle", "read_out_seen", "read_out_held_out")}
    fitted = asked["validation"].targets + asked["test_seen"].targets[::2]
    for layer in range(len(states["validation"])):
        both = np.concatenate([states[split][layer] for split in TESTED[:2]])
        explained, cosine = additive_structure(both, parts)
        found["variance_explained"].append(explained)
        found["angle"].append(cosine)
        known = np.concatenate([states["validation"][layer], states["test_seen"][layer][::2]])
        for split, rest in (("test_seen", slice(1, None, 2)), ("test_held_out", slice(None))):
            found["read_out_" + split.removeprefix("test_")].append(read_out_accuracy(
                known, fitted, states[split][layer][rest], asked[split].targets[rest]))
    return found


def _write_table(table: pd.DataFrame, path: Path) -> None:
    """Only what differs within a cell; item numbers for names, and log-probabilities to two decimals."""
    columns = ["budget", "split", "item", "target", "condition", "source", "rate", "start_layer", "depth_share",
               "protocol", "level", "changed", "prediction", "correct", "rank", "log_probability"]
    table = table.assign(item=table["item_id"].str.rpartition("/")[2].astype("int16"),
                         source=table["source"].fillna(""), budget=table["budget"].astype("int32"),
                         changed=table["changed"].astype("int16"), start_layer=table["start_layer"].astype("int8"),
                         rank=table["rank"].astype("int16"), rate=table["rate"].astype("float32"),
                         depth_share=table["depth_share"].astype("float32"),
                         log_probability=table["log_probability"].round(2).astype("float32"))
    with whole_file(path) as temporary:
        table[columns].to_parquet(temporary, index=False, compression="zstd", compression_level=19)


def _arguments(folder: Path, recipe: Recipe, seed: int, steps: int, learning_rate: float) -> TrainingArguments:
    return one_gpu(TrainingArguments(
        output_dir=str(folder), max_steps=steps, per_device_train_batch_size=recipe.batch_size,
        learning_rate=learning_rate, warmup_steps=recipe.warmup_steps, lr_scheduler_type="constant_with_warmup",
        max_grad_norm=1.0, seed=seed, save_strategy="no", eval_strategy="no", logging_steps=100,
        train_sampling_strategy="group_by_length", report_to="none", disable_tqdm=True, dataloader_pin_memory=False))


def _prompted(task: str, texts: Iterable[str]) -> list[str]:
    prompt = prompt_for(task_named(task).kind)
    return [f"{prompt.prefix}{text}{prompt.suffix}" for text in texts]


@lru_cache(maxsize=None)
def _tokenizer(work_dir: Path):
    return load_tokenizer(str(work_dir / "tokenizer"))


@lru_cache(maxsize=None)
def _task(work_dir: Path, task: str) -> datasets.DatasetDict:
    return load_task(work_dir / "data" / task)


def _rows(work_dir: Path, task: str, split: str, recipe: Recipe) -> datasets.Dataset:
    rows = _task(work_dir, task)[split]
    return rows.select(range(min(recipe.validation_items if split == "validation" else recipe.test_items, len(rows))))


@lru_cache(maxsize=None)
def _prompts(work_dir: Path, task: str, split: str, recipe: Recipe) -> Prompts:
    return prompts_of(_rows(work_dir, task, split, recipe), _tokenizer(work_dir), prompt_for(task_named(task).kind))


@lru_cache(maxsize=64)
def _text_prompts(work_dir: Path, task: str, recipe: Recipe, texts: tuple[str, ...]) -> Prompts:
    """The first seen test items, in these wordings."""
    rows = _rows(work_dir, task, "test_seen", recipe).select(range(len(texts)))
    changed = rows.remove_columns(["text", "phrases"]).add_column("text", list(texts))
    return prompts_of(changed, _tokenizer(work_dir), prompt_for(task_named(task).kind))


@lru_cache(maxsize=None)
def _replacements(work_dir: Path, task: str, recipe: Recipe) -> dict[float, tuple[datasets.Dataset, list[int]]]:
    rows = _rows(work_dir, task, "test_seen", recipe)
    words = task_named(task).replacement(rows)
    return {rate: replaced_rows(rows, rate=rate, seed=0, cache_dir=work_dir / "cache", **words) for rate in recipe.rates}


@lru_cache(maxsize=None)
def _parts(work_dir: Path, task: str, recipe: Recipe) -> np.ndarray:
    texts = [text for split in TESTED[:2] for text in _rows(work_dir, task, split, recipe)["text"]]
    return part_matrix(texts, controlled_synonyms())


@lru_cache(maxsize=4)
def _text_rows(work_dir: Path, split: str) -> list[dict[str, Any]]:
    """Plain texts of both tasks, for language modelling."""
    rows = datasets.concatenate_datasets([_task(work_dir, task)[split].select_columns(["text"]) for task in TASKS])
    return encode_text(rows, _tokenizer(work_dir)).select_columns(["input_ids", "constituent_ids", "labels"]).to_list()


@lru_cache(maxsize=1)
def _text_batches(work_dir: Path) -> list[dict[str, Any]]:
    rows = sorted(_text_rows(work_dir, "validation")[::5], key=lambda row: len(row["input_ids"]))
    collate = Collator(_tokenizer(work_dir))
    return [collate(rows[first:first + 64]) for first in range(0, len(rows), 64)]


def _training_rows(work_dir: Path, cell: StudyCell) -> list[dict[str, Any]]:
    level = cell.change[1] if cell.change and cell.change[0] == "level" else "word"
    rate = strength_of(cell) if cell.method == "synonym_augmentation" else None
    return _encoded_training(work_dir, cell.task, cell.training_items, level, rate)


@lru_cache(maxsize=32)
def _encoded_training(work_dir: Path, task: str, number: int, level: str, rate: float | None) -> list[dict[str, Any]]:
    """The first `number` rows of one shuffle for all; with a rate each a second time, with synonyms."""
    rows = _task(work_dir, task)["train"].shuffle(seed=0)
    rows = rows.select(range(min(number, len(rows))))
    if rate is not None:
        rows = with_synonym_copies(rows, rate=rate, cache_dir=work_dir / "cache", **task_named(task).replacement(rows))
    prompt = prompt_for(task_named(task).kind)
    encoded = encode(rows, _tokenizer(work_dir), prefix=prompt.prefix, suffix=prompt.suffix, level=level)
    return encoded.select_columns(["input_ids", "constituent_ids", "target_id"]).to_list()
