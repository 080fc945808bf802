"""A study's trainings: one folder a cell (task × method × seed), trained once, skipped when done.

All methods of a seed start from the same weights, the `untuned` cell of that seed. A cell's folder appears
when its training has ended: model, tokenizer, `history.csv` and `cell.json`; what is unfinished lies in `work/`.
"""
from __future__ import annotations

import multiprocessing
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass
from multiprocessing.connection import wait as wait_for_process
from pathlib import Path
from typing import Any, TypeVar

import datasets
import pandas as pd
import torch
from tqdm import tqdm
from transformers import AutoConfig, PreTrainedTokenizerFast

from carma_lib.collation import Collator, encode
from carma_lib.files import fingerprint, read_json, whole_folder, write_json
from carma_lib.losses import CarmaConfig
from carma_lib.methods import METHODS, check_method, make_trainer
from carma_lib.models import Prompt, load_model, load_tokenizer, prompt_for, small_model, train_tokenizer
from carma_lib.perturbation import replaced_rows
from carma_lib.tasks import load_task, read_card, task_named

Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How every cell of a study is trained; the notebook's parameters, checked.

    start: "random" for small models made from `family`, `layers`, `width`, `heads` with a tokenizer trained
    on the task's own text, else a hub id or a folder. training_items: 0 for all. Learning rate with linear
    decay after `warmup_steps`; gradient norm 1.0. The checkpoint with the best validation accuracy of
    `evaluations` is kept.
    """

    carma: CarmaConfig
    start: str = "random"
    family: str = "gpt2"
    layers: int = 4
    width: int = 128
    heads: int = 4
    vocabulary_size: int = 800
    steps: int = 1000
    batch_size: int = 32
    learning_rate: float = 1e-3
    warmup_steps: int = 100
    evaluations: int = 8
    training_items: int = 0
    validation_items: int = 500

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "evaluations", "validation_items", "layers", "width", "heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.learning_rate <= 0 or self.warmup_steps < 0 or self.training_items < 0:
            raise ValueError("learning_rate must be above 0; warmup_steps and training_items at least 0")
        if self.start == "random":
            self.carma.check_depth(self.layers)


@dataclass(frozen=True, order=True)
class Cell:
    """One training: which task, by which method, from which seed."""

    task: str
    method: str
    seed: int

    def __post_init__(self) -> None:
        task_named(self.task)
        check_method(self.method)

    @property
    def place(self) -> Path:
        return Path(self.task) / self.method / f"seed-{self.seed}"


def encode_task(run_dir: Path, task: str, model_type: str, settings: Settings, *,
                augmented: bool = False) -> dict[str, datasets.Dataset]:
    """The encoded training and validation rows; `training_items` of a seeded shuffle where they are limited.

    augmented: each training item stands there a second time, with synonyms (`synonym_augmentation`).
    For a pretrained start, rows whose answer is not one token of its tokenizer are left out (as published).
    """
    rows = load_task(run_dir / "data" / task)
    tokenizer = load_tokenizer(str(run_dir / "tokenizers" / task))  # one folder a task, so that `datasets` caches
    prompt = task_prompt(task, model_type, settings.start)
    if settings.training_items:
        kept = min(settings.training_items, len(rows["train"]))
        rows["train"] = rows["train"].shuffle(seed=0).select(range(kept))
    if augmented:
        copies, _ = replaced_rows(rows["train"], task, rate=METHODS["synonym_augmentation"].default, seed=0,
                                  cache_dir=run_dir / "cache")
        rows["train"] = datasets.concatenate_datasets([rows["train"], copies.select_columns(rows["train"].column_names)])
    rows["validation"] = rows["validation"].select(range(min(settings.validation_items, len(rows["validation"]))))
    return {split: encode(rows[split], tokenizer, prefix=prompt.prefix, suffix=prompt.suffix,
                          drop=settings.start != "random") for split in ("train", "validation")}


def task_prompt(task: str, model_type: str, start: str) -> Prompt:
    """The prompt of a task: the family's published wording for a pretrained start, GPT-2's otherwise."""
    return prompt_for(task_named(task).kind, model_type, pretrained=start != "random")


def _mark(run_dir: Path, cell: Cell, settings: Settings) -> str:
    """What a finished cell is known by: its settings, and the content of its data."""
    return fingerprint(asdict(cell), asdict(settings), read_card(run_dir / "data" / cell.task)["content"])


def is_done(run_dir: Path, cell: Cell, settings: Settings) -> bool:
    """Whether the cell's folder holds a finished training from these settings and data."""
    facts = read_json(run_dir / "models" / cell.place / "cell.json")
    return facts is not None and facts["mark"] == _mark(run_dir, cell, settings)


def make_start(run_dir: Path, cell: Cell, settings: Settings) -> Path:
    """The untuned model of a seed: random weights and a tokenizer of the task's text, or a copy of a model."""
    folder = run_dir / "models" / cell.place
    if is_done(run_dir, cell, settings):
        return folder
    if settings.start == "random":
        tokenizer = _small_tokenizer(run_dir, cell.task, settings)
        model = small_model(settings.family, tokenizer, layers=settings.layers, width=settings.width,
                            heads=settings.heads, seed=cell.seed)
    else:
        model, tokenizer = load_model(settings.start)
        settings.carma.check_depth(model.config.num_hidden_layers)
    with whole_folder(run_dir / "tokenizers" / cell.task) as temporary:
        tokenizer.save_pretrained(temporary)
    with whole_folder(folder) as temporary:
        _save(temporary, model, tokenizer, run_dir, cell, settings, budget=0)
    return folder


def make_starts(run_dir: Path, cells: Iterable[Cell], settings: Settings) -> list[Path]:
    """`make_start` for each untuned cell, with a progress bar."""
    _quiet()
    return [make_start(run_dir, cell, settings)
            for cell in tqdm(list(cells), desc="starting models", unit="model", mininterval=1, delay=2)]


def _small_tokenizer(run_dir: Path, task: str, settings: Settings) -> PreTrainedTokenizerFast:
    rows = load_task(run_dir / "data" / task)
    prompt = task_prompt(task, settings.family, settings.start)
    texts = (f"{prompt.prefix}{text}{prompt.suffix}" for text in rows["train"]["text"])
    targets = sorted({target for split in rows.values() for target in split.unique("target")})
    return train_tokenizer(texts, vocabulary_size=settings.vocabulary_size, whole_tokens=targets)


def _save(folder: Path, model: Any, tokenizer: Any, run_dir: Path, cell: Cell, settings: Settings, *,
          budget: int, **facts: Any) -> None:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_json(folder / "cell.json", {
        **asdict(cell), "budget": budget, "start": settings.start, "mark": _mark(run_dir, cell, settings),
        "model": f"{settings.family}, {settings.layers} layers, width {settings.width}"
        if settings.start == "random" else settings.start, "settings": asdict(settings), **facts})


def fine_tune(run_dir: Path, cell: Cell, settings: Settings) -> Path:
    """Train one cell from its seed's start; goes on from the last checkpoint where a run was broken off."""
    from transformers import PrinterCallback, TrainingArguments

    folder, work = run_dir / "models" / cell.place, run_dir / "work" / cell.place
    if is_done(run_dir, cell, settings):
        return folder
    start = run_dir / "models" / Cell(cell.task, "untuned", cell.seed).place
    model, tokenizer = load_model(str(start))
    rows = {split: encoded.select_columns(["input_ids", "constituent_ids", "target_id"]).to_list()
            for split, encoded in encode_task(run_dir, cell.task, model.config.model_type, settings,
                                           augmented=cell.method == "synonym_augmentation").items()}
    mark = _mark(run_dir, cell, settings)
    if read_json(work / "mark.json") != mark:
        shutil.rmtree(work, ignore_errors=True)
        write_json(work / "mark.json", mark)
    every = max(1, settings.steps // settings.evaluations)
    arguments = TrainingArguments(
        output_dir=str(work), max_steps=settings.steps, per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=64, learning_rate=settings.learning_rate, warmup_steps=settings.warmup_steps,
        lr_scheduler_type="linear", max_grad_norm=1.0, seed=cell.seed, eval_strategy="steps", eval_steps=every,
        save_strategy="steps", save_steps=every, save_total_limit=1, load_best_model_at_end=True,
        metric_for_best_model="eval_accuracy", greater_is_better=True, logging_steps=min(every, 25),
        train_sampling_strategy="group_by_length", report_to="none",
        disable_tqdm=True, bf16=torch.cuda.is_available(), dataloader_pin_memory=torch.cuda.is_available())
    trainer = make_trainer(cell.method, model, arguments, carma=settings.carma, train_dataset=rows["train"],
                           eval_dataset=rows["validation"], data_collator=Collator(tokenizer),
                           callbacks=[_progress_callback(work / "steps")])
    trainer.remove_callback(PrinterCallback)
    started = time.monotonic()
    resumes = _whole_checkpoints(work)
    trainer.train(resume_from_checkpoint=resumes)
    seconds = float("nan") if resumes else round(time.monotonic() - started, 1)
    history = tidy_history(trainer.state.log_history).assign(**asdict(cell))
    with whole_folder(folder) as temporary:
        history.to_csv(temporary / "history.csv", index=False)
        _save(temporary, trainer.model, tokenizer, run_dir, cell, settings, budget=settings.steps,
              training_rows=len(rows["train"]), seconds=seconds, best_accuracy=trainer.state.best_metric)
    shutil.rmtree(work)
    return folder


def _whole_checkpoints(work: Path) -> bool:
    """Whether there is a checkpoint to go on from; one cut short while it was written is thrown away first."""
    for checkpoint in work.glob("checkpoint-*"):
        if not (checkpoint / "trainer_state.json").is_file():  # what the trainer writes last
            shutil.rmtree(checkpoint)
    return any(work.glob("checkpoint-*"))


def tidy_history(log: list[dict[str, float]]) -> pd.DataFrame:
    """The trainer's log as a table: one row a step that logged; evaluation columns start with `validation_`."""
    rows: dict[int, dict[str, float]] = {}
    for entry in log[:-1]:  # the last one sums up the whole training
        row = rows.setdefault(entry["step"], {})
        row.update({name.replace("eval_", "validation_"): value for name, value in entry.items()
                    if not name.endswith(("_runtime", "_per_second"))})
    return pd.DataFrame(list(rows.values()))


def _progress_callback(path: Path) -> Any:
    from transformers import TrainerCallback

    class WriteStep(TrainerCallback):
        def on_step_end(self, args, state, control, **unused):
            if state.global_step % 10 == 0:
                path.write_text(str(state.global_step), encoding="utf-8")

    return WriteStep()


def train_cells(run_dir: Path, cells: Iterable[Cell], settings: Settings, *, workers: int = 1) -> list[Path]:
    """Make the starts, then train every cell that is not done, in `workers` processes; a progress bar in steps.

    Raises the first error of a cell; the cells that are done stay done.
    """
    cells = list(cells)
    starts = sorted({Cell(cell.task, "untuned", cell.seed) for cell in cells})
    make_starts(run_dir, starts, settings)
    open_cells = [cell for cell in cells if cell not in starts and not is_done(run_dir, cell, settings)]
    for task in dict.fromkeys(cell.task for cell in open_cells):  # once, so that workers find it in the cache
        start = next(cell for cell in starts if cell.task == task)
        model_type = AutoConfig.from_pretrained(run_dir / "models" / start.place).model_type
        encode_task(run_dir, task, model_type, settings)
    work = [run_dir / "work" / cell.place for cell in open_cells]
    models = [run_dir / "models" / cell.place for cell in open_cells]

    def steps_done() -> int:
        return sum(settings.steps if (model / "cell.json").is_file() else _steps_in(folder)
                   for folder, model in zip(work, models))

    run_parallel(fine_tune, [(run_dir, cell, settings) for cell in open_cells], workers=workers,
                 description=f"training {len(open_cells)} models", total=settings.steps * len(open_cells),
                 unit="step", done=steps_done)
    return [run_dir / "models" / cell.place for cell in cells]


def _steps_in(work: Path) -> int:
    try:
        return int((work / "steps").read_text(encoding="utf-8") or 0)
    except (OSError, ValueError):
        return 0


def run_parallel(function: Callable[..., Result], arguments: Sequence[tuple], *, workers: int, description: str,
                 total: int | None = None, unit: str = "cell", done: Callable[[], int] | None = None) -> list[Result]:
    """`function(*arguments)` for each, in fresh processes of one thread each, with a progress bar.

    workers: processes at a time, at least 1. done: how much of `total` is done, where that is finer than calls.
    The first error stops what has not begun and is raised. Workers end with their parent.
    """
    if workers < 1:
        raise ValueError(f"workers is {workers}; it must be at least 1")
    if not arguments:
        return []
    threads = max(1, (os.cpu_count() or 1) // workers)
    context = multiprocessing.get_context("spawn")
    with (ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=(threads,)) as pool,
          tqdm(total=total or len(arguments), desc=description, unit=unit, mininterval=2) as bar):
        futures = [pool.submit(function, *each) for each in arguments]
        try:
            pending: set = set(futures)
            while pending:
                finished, pending = wait(pending, timeout=1, return_when=FIRST_EXCEPTION)
                bar.update((done() if done else len(futures) - len(pending)) - bar.n)
                for future in finished:
                    future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in list(multiprocessing.active_children()):
                process.terminate()
            raise
    return [future.result() for future in futures]


def _start_worker(threads: int) -> None:
    torch.set_num_threads(threads)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _quiet()
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (wait_for_process([parent.sentinel]), os._exit(1)), daemon=True).start()


def _quiet() -> None:
    """No progress bars from inside a training: `run_parallel` shows one for all."""
    import transformers

    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()


def read_histories(run_dir: Path) -> pd.DataFrame:
    """The training histories of all finished cells of a run in one table; plain fine-tuning's loss is its task loss."""
    files = sorted((run_dir / "models").glob("*/*/seed-*/history.csv"))
    if not files:
        raise FileNotFoundError(f"no trained model in {run_dir}: run notebook 02 first")
    history = pd.concat([pd.read_csv(file) for file in files], ignore_index=True)
    for name in ("task_loss", "weighted_task_loss"):
        history[name] = history[name].fillna(history["loss"]) if name in history else history["loss"]
    return history
