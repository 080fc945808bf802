"""A study's trainings: one folder a cell (task × method × seed), trained once, skipped when done.

All methods of a seed start from the same weights, the `untuned` cell of that seed. A cell's folder appears
when its training has ended: model, tokenizer, `history.csv` and `cell.json`; what is unfinished lies in `work/`.
"""
from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
import torch
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from carma_lib.collate import Collator, encode
from carma_lib.files import fingerprint, read_json, whole_folder, write_json
from carma_lib.lab.memory import check_loading, check_memory
from carma_lib.methods import METHODS, check_method, make_trainer
from carma_lib.model_table import find_model
from carma_lib.models import (Prompt, add_adapter, load_config, load_model, load_tokenizer, prompt_for, save_adapter,
                              small_model, train_tokenizer)
from carma_lib.lab.parallel import quiet, run_parallel
from carma_lib.synonyms.replacement import with_synonym_copies
from carma_lib.lab.settings import Settings
from carma_lib.tasks import load_task, read_card, task_named


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
        rows["train"] = with_synonym_copies(rows["train"], rate=METHODS["synonym_augmentation"].default,
                                            cache_dir=run_dir / "cache", **task_named(task).replacement(rows["train"]))
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
    """The untuned model of a seed: random weights and a tokenizer of the task's text, or a copy of a model.

    Seeds of one pretrained start share its files where the disk can link them.
    """
    folder = run_dir / "models" / cell.place
    if is_done(run_dir, cell, settings):
        return folder
    if settings.start == "random":
        tokenizer = _small_tokenizer(run_dir, cell.task, settings)
        model = small_model(settings.family, tokenizer, layers=settings.layers, width=settings.width,
                            heads=settings.heads, seed=cell.seed)
    else:
        if twin := _twin(run_dir, cell, settings):
            with whole_folder(folder) as temporary:
                shutil.copytree(twin, temporary, copy_function=_link_or_copy, dirs_exist_ok=True)
                _write_facts(temporary, run_dir, cell, settings, budget=0, model=model_name(settings))
            return folder
        config = load_config(settings.start)
        settings.carma.for_depth(config.get_text_config().num_hidden_layers)
        check_loading(settings.start, config, settings)
        model, tokenizer = load_model(settings.start, dtype=settings.start_dtype,
                                      four_bits=settings.adapter == "qlora")
    with whole_folder(run_dir / "tokenizers" / cell.task) as temporary:
        tokenizer.save_pretrained(temporary)
    with whole_folder(folder) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        _write_facts(temporary, run_dir, cell, settings, budget=0, model=model_name(settings))
    return folder


def _twin(run_dir: Path, cell: Cell, settings: Settings) -> Path | None:
    """The start of another seed, made from the same settings."""
    for folder in sorted((run_dir / "models" / cell.place).parent.glob("seed-*")):
        other = Cell(cell.task, cell.method, int(folder.name.removeprefix("seed-")))
        if is_done(run_dir, other, settings):
            return folder
    return None


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        shutil.copy2(source, target)


def make_starts(run_dir: Path, cells: Iterable[Cell], settings: Settings) -> list[Path]:
    """`make_start` for each untuned cell, with a progress bar."""
    quiet()
    return [make_start(run_dir, cell, settings)
            for cell in tqdm(list(cells), desc="starting models", unit="model", mininterval=1, delay=2)]


def _small_tokenizer(run_dir: Path, task: str, settings: Settings) -> PreTrainedTokenizerFast:
    rows = load_task(run_dir / "data" / task)
    prompt = task_prompt(task, settings.family, settings.start)
    texts = (f"{prompt.prefix}{text}{prompt.suffix}" for text in rows["train"]["text"])
    targets = sorted({target for split in rows.values() for target in split.unique("target")})
    return train_tokenizer(texts, vocabulary_size=settings.vocabulary_size, whole_tokens=targets)


def _write_facts(folder: Path, run_dir: Path, cell: Cell, settings: Settings, **facts: Any) -> None:
    write_json(folder / "cell.json", {
        **asdict(cell), "start": settings.start, "mark": _mark(run_dir, cell, settings),
        "settings": asdict(settings), **facts})


def model_name(settings: Settings) -> str:
    """What a start is called in tables: its id or folder, with its depth where the model table knows another one."""
    if settings.start == "random":
        return f"{settings.family}, {settings.layers} layers, width {settings.width}"
    name = Path(settings.start).resolve().name if Path(settings.start).is_dir() else settings.start
    known, blocks = find_model(name), load_config(settings.start).get_text_config().num_hidden_layers
    return name if known is None or known["blocks"] == blocks else f"{name} with {blocks} blocks"


def fine_tune(run_dir: Path, cell: Cell, settings: Settings) -> Path:
    """Train one cell from its seed's start; goes on from the last checkpoint where a run was broken off.

    Under torchrun every process calls it; the first one writes.
    """
    folder, work = run_dir / "models" / cell.place, run_dir / "work" / cell.place
    if is_done(run_dir, cell, settings):
        return folder
    start = run_dir / "models" / Cell(cell.task, "untuned", cell.seed).place
    model, tokenizer = load_model(str(start))
    if settings.adapter != "none":
        model = add_adapter(model, rank=settings.lora_rank, seed=cell.seed)
    augmented = cell.method == "synonym_augmentation"
    rows = {split: encoded.select_columns(["input_ids", "constituent_ids", "target_id"]).to_list()
            for split, encoded in encode_task(run_dir, cell.task, model.config.model_type, settings,
                                              augmented=augmented).items()}
    steps = settings.training_steps(len(rows["train"]) // (2 if augmented else 1))  # as many for every method
    resumes = _open_work(run_dir, cell, settings)
    trainer = make_trainer(cell.method, model, _training_arguments(work, cell, settings, steps), carma=settings.carma,
                           train_dataset=rows["train"], eval_dataset=rows["validation"],
                           data_collator=Collator(tokenizer), callbacks=[_progress_callback(work / "steps")])
    trainer.remove_callback(_printer())
    started = time.monotonic()
    trainer.train(resume_from_checkpoint=resumes)
    seconds = float("nan") if resumes else round(time.monotonic() - started, 1)
    weights = trainer.accelerator.get_state_dict(trainer.model_wrapped) if settings.processes > 1 else None
    if trainer.is_world_process_zero():
        history = tidy_history(trainer.state.log_history).assign(**asdict(cell))
        with whole_folder(folder) as temporary:
            history.to_csv(temporary / "history.csv", index=False)
            if settings.adapter != "none":
                save_adapter(trainer.accelerator.unwrap_model(trainer.model), temporary, start=start, weights=weights)
            else:
                trainer.accelerator.unwrap_model(trainer.model).save_pretrained(temporary, state_dict=weights)
            tokenizer.save_pretrained(temporary)
            _write_facts(temporary, run_dir, cell, settings, budget=steps, training_rows=len(rows["train"]),
                         seconds=seconds, best_accuracy=trainer.state.best_metric,
                         model=read_json(start / "cell.json")["model"])
    trainer.accelerator.wait_for_everyone()
    if trainer.is_world_process_zero():
        shutil.rmtree(work)
    return folder


def _training_arguments(work: Path, cell: Cell, settings: Settings, steps: int) -> Any:
    from transformers import TrainingArguments

    every, cuda = max(1, steps // settings.evaluations), torch.cuda.is_available()
    more = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}
            } if settings.gradient_checkpointing else {}
    if settings.processes > 1:
        more |= {"fsdp": "full_shard auto_wrap", **({} if cuda else {"ddp_backend": "gloo"})}
    return one_gpu(TrainingArguments(
        output_dir=str(work), max_steps=steps, per_device_train_batch_size=settings.rows_a_pass,
        gradient_accumulation_steps=settings.accumulation, per_device_eval_batch_size=64,
        learning_rate=settings.learning_rate, warmup_steps=settings.warmup_steps, lr_scheduler_type="linear",
        max_grad_norm=1.0, seed=cell.seed, eval_strategy="steps", eval_steps=every, save_strategy="steps",
        save_steps=every, save_total_limit=1, load_best_model_at_end=True, metric_for_best_model="eval_accuracy",
        greater_is_better=True, logging_steps=min(every, 25), train_sampling_strategy="group_by_length",
        report_to="none", disable_tqdm=True, bf16=settings.bf16, use_cpu=not cuda and (settings.bf16 or settings.processes > 1),
        dataloader_pin_memory=cuda, **more))


def one_gpu(arguments: Any) -> Any:
    """The arguments for one GPU a process: over all that it sees, the trainer would multiply the batch."""
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1
    return arguments


def _printer() -> type:
    from transformers import PrinterCallback

    return PrinterCallback


def _open_work(run_dir: Path, cell: Cell, settings: Settings) -> bool:
    """Make the folder of an unfinished training; whether it holds a checkpoint of these settings to go on from."""
    work, mark = run_dir / "work" / cell.place, _mark(run_dir, cell, settings)
    if read_json(work / "mark.json") != mark:
        shutil.rmtree(work, ignore_errors=True)
        write_json(work / "mark.json", mark)
    return _whole_checkpoints(work)


def fine_tune_in_processes(run_dir: Path, cell: Cell, settings: Settings) -> Path:
    """`fine_tune` in `settings.processes` processes through torchrun (`carma_lib.lab.distributed`), one GPU each.

    Raises `RuntimeError` with the first process's error.
    """
    if is_done(run_dir, cell, settings):
        return run_dir / "models" / cell.place
    _open_work(run_dir, cell, settings)  # before there are several who could throw it away
    job = run_dir / "work" / cell.place / "job.json"
    error = job.with_name("error.txt")
    error.unlink(missing_ok=True)
    write_json(job, {"run_dir": str(run_dir), "cell": asdict(cell), "settings": asdict(settings),
                     "parent": os.getpid()})
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
               f"--nproc-per-node={settings.processes}", "-m", "carma_lib.lab.distributed", str(job)]
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        why = error.read_text(encoding="utf-8") if error.is_file() else done.stderr.strip()[-300:]
        raise RuntimeError(f"training {cell.place} in {settings.processes} processes failed: {why}")
    return run_dir / "models" / cell.place


def _whole_checkpoints(work: Path) -> bool:
    """Whether there is a checkpoint to go on from; one cut short while it was written is thrown away first."""
    for checkpoint in work.glob("checkpoint-*"):
        try:
            json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))  # what the trainer writes last
        except (OSError, ValueError):
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

    Raises `NotEnoughMemory` before the first step where it will not fit, `ValueError` where the start's
    tokenizer has no answer as one token, else the first error of a cell; the cells that are done stay done.
    """
    cells = list(cells)
    starts = sorted({Cell(cell.task, "untuned", cell.seed) for cell in cells})
    make_starts(run_dir, starts, settings)
    open_cells = [cell for cell in cells if cell not in starts and not is_done(run_dir, cell, settings)]
    steps = {}
    for task in dict.fromkeys(cell.task for cell in open_cells):  # once, so that workers find it in the cache
        start = next(cell for cell in starts if cell.task == task)
        config = load_config(str(run_dir / "models" / start.place))
        encoded = encode_task(run_dir, task, config.model_type, settings)["train"]
        if not len(encoded):
            raise ValueError(f"{task}: no training row's answer is one token of this tokenizer; take another start")
        steps[task] = settings.training_steps(len(encoded))
        check_memory(config, settings, tokens=max(encoded["length"]), workers=workers)
    work = [run_dir / "work" / cell.place for cell in open_cells]
    models = [run_dir / "models" / cell.place for cell in open_cells]

    def steps_done() -> int:
        return sum(steps[cell.task] if (model / "cell.json").is_file() else _steps_in(folder)
                   for cell, folder, model in zip(open_cells, work, models))

    function = fine_tune if settings.processes == 1 else fine_tune_in_processes
    run_parallel(function, [(run_dir, cell, settings) for cell in open_cells], workers=workers,
                 description=f"training {len(open_cells)} models",
                 total=sum(steps[cell.task] for cell in open_cells), unit="step", done=steps_done)
    return [run_dir / "models" / cell.place for cell in cells]


def _steps_in(work: Path) -> int:
    try:
        return int((work / "steps").read_text(encoding="utf-8") or 0)
    except (OSError, ValueError):
        return 0


def read_histories(run_dir: Path) -> pd.DataFrame:
    """The training histories of all finished cells of a run in one table; plain fine-tuning's loss is its task loss."""
    files = sorted((run_dir / "models").glob("*/*/seed-*/history.csv"))
    if not files:
        raise FileNotFoundError(f"no trained model in {run_dir}: run notebook 02 first")
    history = pd.concat([pd.read_csv(file) for file in files], ignore_index=True)
    for name in ("task_loss", "weighted_task_loss"):
        history[name] = history[name].fillna(history["loss"]) if name in history else history["loss"]
    return history
