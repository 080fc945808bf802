"""What cells share and begin from: data, tokenizers, base models, prompts, encoded rows."""
from __future__ import annotations

import shutil
from functools import lru_cache
from pathlib import Path
from typing import Any

import datasets
import torch
from transformers import PretrainedConfig, PreTrainedTokenizerFast, PrinterCallback, TrainingArguments

from carma_lib.collate import Collator, encode, encode_text
from carma_lib.files import check_folder, fingerprint, locked, whole_folder, write_checksums
from carma_lib.lab.cell import TRAINING_RULES, Cell
from carma_lib.lab.recipe import Recipe
from carma_lib.losses import CarmaConfig
from carma_lib.methods import METHODS
from carma_lib.models.table import find_model
from carma_lib.models import Prompt, load_config, load_model, load_tokenizer, prompt_for, random_model, small_model, train_tokenizer
from carma_lib.synonyms.replacement import replaced_rows
from carma_lib.tasks import load_task, read_card, task_named
from carma_lib.trainer import CarmaTrainer


def model_name(recipe: Recipe) -> str:
    """What a start is called in tables: its id or folder, with its depth if the model table knows another one."""
    if recipe.small:
        return f"{recipe.family}, {recipe.layers} layers, width {recipe.width}"
    start = recipe.pretrained
    name = Path(start).resolve().name if Path(start).is_dir() else start
    known, blocks = find_model(name), depth_of(recipe)
    name = name if known is None or known["blocks"] == blocks else f"{name} with {blocks} blocks"
    return name if start == recipe.start else f"{name}, random weights"


@lru_cache(maxsize=None)
def depth_of(recipe: Recipe) -> int:
    """Decoder blocks of the start."""
    return recipe.layers if recipe.small else load_config(recipe.pretrained).get_text_config().num_hidden_layers


@lru_cache(maxsize=None)
def prompt_of(task: str, recipe: Recipe) -> Prompt:
    """The prompt of a task: the family's published wording for a pretrained start, GPT-2's otherwise."""
    family = "default" if recipe.small else load_config(recipe.pretrained).model_type
    return prompt_for(task_named(task).kind, family, pretrained=not recipe.small)


def content_of(folder: Path, task: str) -> str:
    """The checksum of a task's rows in a run folder: part of the key of whatever is kept of them in memory."""
    return read_card(folder / "data" / task)["content"]


def rows_of(folder: Path, task: str) -> datasets.DatasetDict:
    """The rows of a task of a run folder."""
    return _rows_of(folder, task, content_of(folder, task))


@lru_cache(maxsize=32)
def _rows_of(folder: Path, task: str, content: str) -> datasets.DatasetDict:
    return load_task(folder / "data" / task)


def tokenizer_of(folder: Path, cell: Cell) -> PreTrainedTokenizerFast:
    """The start's tokenizer; that of a small one is trained here at first use."""
    recipe, tasks = cell.recipe, cell.recipe.tokenizer_tasks or (cell.task,)
    return _pretrained_tokenizer(recipe.pretrained) if not recipe.small else _small_tokenizer(
        folder, tasks, recipe.vocabulary_size, _contents(folder, tasks))


_pretrained_tokenizer = lru_cache(maxsize=8)(load_tokenizer)


def _contents(folder: Path, tasks: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(content_of(folder, task) for task in tasks)


@lru_cache(maxsize=None)
def _small_tokenizer(folder: Path, tasks: tuple[str, ...], vocabulary_size: int, contents: tuple[str, ...]) -> PreTrainedTokenizerFast:
    """Byte-level BPE of the tasks' training prompts, with each of their answers as one token."""
    own = folder / "starts" / f"tokenizer-{fingerprint(tasks, vocabulary_size, contents, TRAINING_RULES)}"
    with locked(own.with_suffix(".lock"), wait=-1):
        if check_folder(own):
            texts, targets = [], set()
            for task in tasks:
                rows, prompt = rows_of(folder, task), prompt_for(task_named(task).kind)
                texts += [f"{prompt.prefix}{text}{prompt.suffix}" for text in rows["train"]["text"]]
                if task_named(task).answer == "token":
                    targets |= {target for split in rows.values() for target in split.unique("target")}
            with whole_folder(own) as temporary:
                train_tokenizer(texts, vocabulary_size=vocabulary_size, whole_tokens=sorted(targets)).save_pretrained(temporary)
                write_checksums(temporary)
    return load_tokenizer(str(own))


def config_of(cell: Cell) -> PretrainedConfig:
    """The configuration of a cell's start; nothing is loaded."""
    recipe = cell.recipe
    if not recipe.small:
        return load_config(recipe.pretrained)
    with torch.device("meta"):
        tokens = _Vocabulary(recipe.vocabulary_size)
        return small_model(recipe.family, tokens, layers=recipe.layers, width=recipe.width, heads=recipe.heads).config


class _Vocabulary(int):
    """As much of a tokenizer as a configuration needs, of so many tokens."""

    bos_token_id = eos_token_id = pad_token_id = 0
    __len__ = int.__int__


def start_model(folder: Path, cell: Cell) -> Any:
    """The untuned model of a cell: random weights of its seed, its base model, or the pretrained one."""
    recipe = cell.recipe
    if recipe.start == "random":
        return small_model(recipe.family, tokenizer_of(folder, cell), layers=recipe.layers, width=recipe.width,
                           heads=recipe.heads, seed=cell.seed)
    if recipe.start == "base":
        return load_model(str(make_base(folder, cell)))[0]
    if not recipe.has_pretrained_weights:
        return random_model(recipe.pretrained, seed=cell.seed)
    return load_model(recipe.start, **weights_of(recipe))[0]


def weights_of(recipe: Recipe) -> dict[str, Any]:
    """How `load_model` loads a pretrained start, and what was trained from it: frozen weights in bf16 or in four bits."""
    frozen = recipe.adapter != "none" and recipe.has_pretrained_weights
    return {"dtype": torch.bfloat16 if recipe.bf16 and frozen else torch.float32, "four_bits": recipe.adapter == "qlora"}


def make_base(folder: Path, cell: Cell) -> Path:
    """The base model of a seed: a language model of the training texts of `tokenizer_tasks`, without their answers.

    Trained once; its folder lies in `starts/`.
    """
    recipe, tasks = cell.recipe, cell.recipe.tokenizer_tasks or (cell.task,)
    mark = fingerprint(recipe.base_steps, recipe.base_learning_rate, recipe.batch_size, recipe.family, recipe.heads,
                       recipe.warmup_steps, recipe.vocabulary_size, tasks, _contents(folder, tasks), TRAINING_RULES)
    own = folder / "starts" / f"base-{recipe.layers}x{recipe.width}-seed-{cell.seed}-{mark}"
    with locked(own.with_name(own.name + ".lock"), wait=-1):
        if not check_folder(own):
            return own
        tokenizer = tokenizer_of(folder, cell)
        model = small_model(recipe.family, tokenizer, layers=recipe.layers, width=recipe.width, heads=recipe.heads, seed=cell.seed)
        work = own.with_name(own.name + "-work")
        arguments = TrainingArguments(
            output_dir=str(work), max_steps=recipe.base_steps, per_device_train_batch_size=recipe.batch_size,
            learning_rate=recipe.base_learning_rate, warmup_steps=recipe.warmup_steps,
            lr_scheduler_type="constant_with_warmup", max_grad_norm=1.0, seed=cell.seed, save_strategy="no",
            eval_strategy="no", logging_steps=100, train_sampling_strategy="group_by_length", report_to="none",
            disable_tqdm=True, dataloader_pin_memory=False, use_cpu=not torch.cuda.is_available())
        trainer = CarmaTrainer(model, one_gpu(arguments), carma=CarmaConfig(carma_weight=0),
                               train_dataset=text_rows(folder, tasks, cell, "train"), data_collator=Collator(tokenizer))
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        with whole_folder(own) as temporary:
            model.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
            write_checksums(temporary)
        shutil.rmtree(work, ignore_errors=True)
    return own


def one_gpu(arguments: TrainingArguments) -> TrainingArguments:
    """The arguments for one GPU a process: over all that it sees, the trainer would multiply the batch."""
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1
    return arguments


def text_rows(folder: Path, tasks: tuple[str, ...], cell: Cell, split: str) -> list[dict[str, Any]]:
    """The plain texts of a split of several tasks, encoded for language modelling."""
    rows = datasets.concatenate_datasets([rows_of(folder, task)[split].select_columns(["text"]) for task in tasks])
    return encode_text(rows, tokenizer_of(folder, cell)).select_columns(["input_ids", "constituent_ids", "labels"]).to_list()


def training_rows(folder: Path, cell: Cell) -> list[dict[str, Any]]:
    """The encoded training rows: the first `training_items` of one shuffle for all cells.

    With synonym augmentation each comes a second time, with synonyms. If the task's answers are single tokens, a
    pretrained start leaves out rows whose answer is not one of its own (as published); `ValueError` if none is left.
    """
    rate = (cell.strength or METHODS[cell.method].default) if cell.method == "synonym_augmentation" else None
    return _training_rows(folder, cell.task, cell.recipe.training_items, cell.recipe.level, rate,
                          prompt_of(cell.task, cell.recipe), tokenizer_of(folder, cell), not cell.recipe.small,
                          content_of(folder, cell.task))


@lru_cache(maxsize=8)
def _training_rows(folder: Path, task: str, number: int, level: str, rate: float | None, prompt: Prompt,
                   tokenizer: PreTrainedTokenizerFast, drop: bool, content: str) -> list[dict[str, Any]]:
    rows = rows_of(folder, task)["train"]
    if number:
        rows = rows.shuffle(seed=0).select(range(min(number, len(rows))))
    if rate is not None:
        copies, _ = replaced_rows(rows, rate=rate, seed=0, cache_dir=folder / "cache", **task_named(task).replacement(rows))
        rows = datasets.concatenate_datasets([rows, copies])
    encoded = encode(rows, tokenizer, prefix=prompt.prefix, suffix=prompt.suffix, level=level, drop=drop,
                     answer=task_named(task).answer)
    return encoded.select_columns(["input_ids", "constituent_ids", answer_column(task)]).to_list()


def answer_column(task: str) -> str:
    """The column of encoded rows that holds the answer: one token, or labels for a text of several."""
    return "target_id" if task_named(task).answer == "token" else "labels"


def steps_of(folder: Path, cell: Cell) -> int:
    """Steps of a cell's training, as many for every method. `ValueError` if epochs of its rows are too short for it."""
    if cell.untuned or cell.recipe.steps:
        return 0 if cell.untuned else cell.recipe.steps
    rows = len(training_rows(folder, cell)) // (2 if cell.method == "synonym_augmentation" else 1)
    steps = cell.recipe.training_steps(rows)
    cell.recipe.check_length(steps, f": {rows:,} training rows, epochs={cell.recipe.epochs}; raise epochs, or lower what does not fit")
    return steps
