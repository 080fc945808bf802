"""Train one cell: the trainer of its method on its start, validated on the way, kept with its history."""
from __future__ import annotations

import gc
import json
import math
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from transformers import PrinterCallback, TrainerCallback, TrainingArguments

from carma_lib.collate import Collator, encode
from carma_lib.files import RunError, check_folder, read_json, sha256_of, whole_file, whole_folder, write_json, write_checksums
from carma_lib.lab.cell import TRAINING_RULES, Cell, cell_folder, checksums_of, finished_facts, is_trained, training_mark, write_facts
from carma_lib.lab.evaluate import asked_rows, clean_answers, test_splits
from carma_lib.lab.start import answer_column, one_gpu, prompt_of, start_model, steps_of, tokenizer_of, training_rows, weights_of
from carma_lib.models import add_adapter, load_model, save_adapter
from carma_lib.methods import make_trainer
from carma_lib.tasks import task_named
from carma_lib.trainer import checkpointing


@dataclass
class Trained:
    """A trained model in evaluation mode, the tables of its tests on the way, and its facts."""

    model: Any
    tables: list[pd.DataFrame]
    measures: list[dict[str, Any]]
    facts: dict[str, Any]


def measure(name: str, value: float, *, split: str = "", budget: int = 0, layer: int = -2) -> dict[str, Any]:
    """A row of the measures' table; layer −2: of the whole model."""
    return {"measure": name, "split": split, "budget": budget, "layer": layer, "value": float(value)}


def trained(folder: Path, cell: Cell) -> Trained:
    """The cell's trained model: from its folder if it is kept there, else trained now (an untuned one is its start)."""
    own, steps = cell_folder(folder, cell), steps_of(folder, cell)
    if cell.untuned:
        model = start_model(folder, cell)
        return Trained(_on_device(model.eval()), [], [], {"budget": 0, "training_seconds": 0.0})
    if is_trained(folder, cell):
        model = load_model(str(own / "model"), **weights_of(cell.recipe))[0]
        on_the_way = [pd.read_parquet(own / "on_the_way.parquet")] if (own / "on_the_way.parquet").is_file() else []
        facts = finished_facts(own / "trained.json")
        return Trained(_on_device(model.eval()), on_the_way, facts["measures"], facts)
    if cell.recipe.processes > 1 and not torch.distributed.is_initialized() and "LOCAL_RANK" not in os.environ:
        _in_processes(folder, cell)
        found = trained(folder, cell)
        if not cell.recipe.keep_model:
            shutil.rmtree(own / "model", ignore_errors=True)  # in which the processes handed it over
        return found
    torch.set_num_threads(cell.recipe.threads)
    return _train(folder, cell, own, steps)


def _train(folder: Path, cell: Cell, own: Path, steps: int) -> Trained:
    recipe, tokenizer, work = cell.recipe, tokenizer_of(folder, cell), own / "work"
    model = start_model(folder, cell)
    if recipe.adapter != "none":
        model = add_adapter(model, rank=recipe.lora_rank, seed=cell.seed)
    best = recipe.keep == "best"
    resumes = best and _open_work(folder, cell, work)
    on_the_way = _Tests(folder, cell, steps, work)
    if resumes and not on_the_way.restored():
        shutil.rmtree(work)
        resumes, on_the_way = _open_work(folder, cell, work), _Tests(folder, cell, steps, work)
    trainer = make_trainer(
        cell.method, model, _arguments(work, cell, steps), carma=recipe.carma, strength=cell.strength,
        train_dataset=training_rows(folder, cell), eval_dataset=_validation_rows(folder, cell) if best else None,
        data_collator=Collator(tokenizer), callbacks=[on_the_way])
    trainer.remove_callback(PrinterCallback)
    started = time.monotonic()
    trainer.train(resume_from_checkpoint=resumes)
    seconds = math.nan if resumes else round(time.monotonic() - started, 1)
    facts = {"mark": training_mark(folder, cell), "rules": TRAINING_RULES, "budget": steps, "training_seconds": seconds, "bf16": recipe.bf16,
             "measures": on_the_way.measures}
    history = _tidy(trainer.state.log_history, on_the_way.history)
    weights = trainer.accelerator.get_state_dict(trainer.model_wrapped) if recipe.processes > 1 else None
    if trainer.is_world_process_zero():
        own.mkdir(parents=True, exist_ok=True)
        with whole_file(own / "history.csv") as temporary:
            history.to_csv(temporary, index=False)
        (own / "on_the_way.parquet").unlink(missing_ok=True)
        if on_the_way.tables:
            with whole_file(own / "on_the_way.parquet") as temporary:
                pd.concat(on_the_way.tables).to_parquet(temporary, index=False)
        if recipe.keep_model:
            inner = trainer.accelerator.unwrap_model(trainer.model)
            with whole_folder(own / "model") as temporary:
                if recipe.adapter != "none":
                    save_adapter(inner, temporary, start=recipe.start, home=own / "model", weights=weights)
                else:
                    inner.save_pretrained(temporary, state_dict=weights)
                tokenizer.save_pretrained(temporary)
                write_checksums(temporary)
            write_facts(own / "trained.json", {**cell.facts(), **facts, "recipe": dict(recipe), "sha256": checksums_of(
                own, ("history.csv", "on_the_way.parquet", "model/checksums.json"))})
    trainer.accelerator.wait_for_everyone()
    if trainer.is_world_process_zero():
        shutil.rmtree(work, ignore_errors=True)
    model = trainer.model.eval()
    del trainer
    gc.collect()  # the optimizer's state, which the trainer's circles of references keep from the tests
    return Trained(model, on_the_way.tables, on_the_way.measures, facts)


class _Tests(TrainerCallback):
    """Notes how far a training is, validates it where the trainer does not, and tests it at the steps of `test_at`."""

    def __init__(self, folder: Path, cell: Cell, steps: int, work: Path) -> None:
        self._of, self._steps, self._work = (folder, cell), steps, work
        every = max(1, steps // cell.recipe.evaluations)
        self._looks = set() if cell.recipe.keep == "best" else {*range(every, steps + 1, every), *cell.recipe.test_at, steps}
        self._tested = set(cell.recipe.test_at) - {steps}
        self.tables: list[pd.DataFrame] = []
        self.measures: list[dict[str, Any]] = []
        self.history: list[dict[str, Any]] = []

    def on_step_end(self, args, state, control, *, model, **unused):
        step = state.global_step
        if (step % 10 == 0 or step == self._steps) and state.is_world_process_zero:
            with whole_file(self._work / "step") as temporary:
                temporary.write_text(f"{step} {self._steps}", encoding="utf-8")
        folder, cell = self._of
        if step in self._looks:
            accuracy = clean_answers(folder, cell, model, "validation")["correct"].mean()
            self.history.append({"step": step, "validation_accuracy": accuracy})
        if step in self._tested or (step in self._looks and step == self._steps):
            self.measures += [measure("accuracy", row["validation_accuracy"], split="validation", budget=step)
                              for row in self.history[-1:] if row["step"] == step]
        if step in self._tested and not cell.trial:
            tables, measures = tested_clean(folder, cell, model, step)
            self.tables += tables
            self.measures += measures
            if cell.recipe.keep == "best" and state.is_world_process_zero:  # which goes on from a checkpoint
                with whole_file(self._work / f"tested-{step}.parquet") as temporary:
                    pd.concat(tables).to_parquet(temporary, index=False)
                write_facts(self._work / f"tested-{step}.json", {"measures": measures, "sha256": sha256_of(
                    self._work / f"tested-{step}.parquet")})

    def restored(self) -> bool:
        """Take up the tests of the steps before the checkpoint; whether they are whole."""
        last = max(int(place.name.rpartition("-")[2]) for place in self._work.glob("checkpoint-*"))
        for step in sorted(self._tested if not self._of[1].trial else ()):
            if step <= last:
                try:
                    facts = finished_facts(self._work / f"tested-{step}.json")
                    file = self._work / f"tested-{step}.parquet"
                    if not facts or sha256_of(file) != facts["sha256"]:
                        return False
                    self.tables.append(pd.read_parquet(file))
                except (OSError, RunError):
                    return False
                self.measures += facts["measures"]
        return True

    def on_save(self, args, state, control, **unused):
        if args.world_size == 1:  # several processes write their shards by themselves
            write_checksums(Path(args.output_dir) / f"checkpoint-{state.global_step}")


def tested_clean(folder: Path, cell: Cell, model: Any, budget: int) -> tuple[list[pd.DataFrame], list[dict[str, Any]]]:
    """Clean answers to every test split, and their accuracies as measures."""
    tables, measures = [], []
    for split in test_splits(folder, cell):
        asked = clean_answers(folder, cell, model, split)
        tables.append(asked.assign(split=split, budget=budget))
        measures.append(measure("accuracy", asked["correct"].mean(), split=split, budget=budget))
    return tables, measures


def _validation_rows(folder: Path, cell: Cell) -> list[dict[str, Any]]:
    prompt, rows = prompt_of(cell.task, cell.recipe), asked_rows(folder, cell, "validation")
    encoded = encode(rows, tokenizer_of(folder, cell), prefix=prompt.prefix, suffix=prompt.suffix, answer=task_named(cell.task).answer)
    return encoded.select_columns(["input_ids", "constituent_ids", answer_column(cell.task)]).to_list()


def _arguments(work: Path, cell: Cell, steps: int) -> TrainingArguments:
    recipe, cuda = cell.recipe, torch.cuda.is_available()
    every, best = max(1, steps // recipe.evaluations), recipe.keep == "best"
    more: dict[str, Any] = checkpointing() if recipe.activation_checkpointing else {}
    if recipe.processes > 1:
        more |= {"fsdp": "full_shard auto_wrap", **({} if cuda else {"ddp_backend": "gloo"})}
    if best:
        more |= {"eval_steps": every, "save_steps": every, "save_total_limit": 1, "load_best_model_at_end": True,
                 **({"metric_for_best_model": "eval_accuracy", "greater_is_better": True}
                    if task_named(cell.task).answer == "token" else {"metric_for_best_model": "eval_loss", "greater_is_better": False})}
    return one_gpu(TrainingArguments(
        output_dir=str(work), max_steps=steps, per_device_train_batch_size=recipe.rows_a_pass,
        gradient_accumulation_steps=recipe.accumulation, per_device_eval_batch_size=recipe.evaluation_batch,
        learning_rate=recipe.learning_rate, warmup_steps=recipe.warmup_steps,
        lr_scheduler_type={"linear": "linear", "constant": "constant_with_warmup"}[recipe.schedule], max_grad_norm=1.0,
        seed=cell.seed, eval_strategy="steps" if best else "no", save_strategy="steps" if best else "no",
        logging_steps=min(every, 25), train_sampling_strategy="group_by_length", report_to="none", disable_tqdm=True,
        bf16=recipe.bf16, use_cpu=not cuda, dataloader_pin_memory=cuda, **more))


def _open_work(folder: Path, cell: Cell, work: Path) -> bool:
    """Make the folder of an unfinished training; whether it holds a whole checkpoint of this cell to go on from."""
    mark = [training_mark(folder, cell), TRAINING_RULES]
    try:
        same = read_json(work / "mark.json") == mark
    except RunError:
        same = False
    if not same:
        shutil.rmtree(work, ignore_errors=True)
        write_json(work / "mark.json", mark)
    for checkpoint in work.glob("checkpoint-*"):
        try:
            json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))  # what the trainer writes last
            if cell.recipe.processes == 1 and (reason := check_folder(checkpoint)):
                raise ValueError(reason)
        except (OSError, ValueError):
            shutil.rmtree(checkpoint)
    return any(work.glob("checkpoint-*"))


def _tidy(log: list[dict[str, float]], looks: list[dict[str, float]]) -> pd.DataFrame:
    """The trainer's log as a table: one row a step that logged; evaluation columns start with `validation_`."""
    rows: dict[int, dict[str, float]] = {}
    for entry in [*log[:-1], *looks]:  # the last one of the trainer's sums up the whole training
        row = rows.setdefault(entry["step"], {})
        row.update({name.replace("eval_", "validation_"): value for name, value in entry.items()
                    if not name.endswith(("_runtime", "_per_second"))})
    return pd.DataFrame([rows[step] for step in sorted(rows)])


def _on_device(model: torch.nn.Module) -> torch.nn.Module:
    """On the GPU if there is one; a quantised model is there already."""
    if torch.cuda.is_available() and not getattr(model, "is_loaded_in_4bit", False):
        model.to("cuda")
    return model


def _in_processes(folder: Path, cell: Cell) -> None:
    """The training in `processes` processes through torchrun, one GPU each. `RuntimeError` with the first one's error."""
    own = cell_folder(folder, cell)
    if cell.recipe.keep == "best":
        _open_work(folder, cell, own / "work")  # before there are several that could throw it away
    job, error = own / "work" / "job.json", own / "work" / "error.txt"
    error.unlink(missing_ok=True)
    kept = replace(cell, recipe=cell.recipe.but(keep_model=True))
    write_json(job, {"folder": str(folder), "cell": kept.as_json(), "parent": os.getpid()})
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
               f"--nproc-per-node={cell.recipe.processes}", "-m", "carma_lib.lab.processes", str(job)]
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        why = error.read_text(encoding="utf-8") if error.is_file() else done.stderr.strip()[-300:]
        raise RuntimeError(f"training {cell.name} in {cell.recipe.processes} processes failed: {why}")
