"""What a sweep will take, told before it begins: cells, time and disk. Figures are measured where a cell has ended.

Rules for what is not measured, both for a decoder of N ≈ vocabulary · width + 12 · blocks · width² weights:

- time of a cell: steps × the longer of 0.03 s and 6 · N · tokens of a batch (24 a row) ÷ 3·10¹⁰ operations a
  second, a CPU core's; half as much again for its evaluation. An untuned cell is its evaluation only.
- disk: 4 T bytes for each trained model and 24 T for the checkpoints of each cell in work, where T = N, or with
  adapters the rank · 22 · blocks · width weights that are trained and saved. A start has 4 N bytes, with adapters 2 N
  in bf16 and N in 4 bits; seeds of a pretrained one share it, as linked files, so that it counts once a task.
"""
from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from carma_lib.files import RunError, read_json
from carma_lib.models import load_config
from carma_lib.lab.sweep_plan import Job, Sweep
from carma_lib.lab.sweep_worker import finished, log_path, read_log
from carma_lib.tasks import is_built

CPU_RULE = "by a rule for CPU cores, until cells have ended; a GPU is much faster"
OPERATIONS_A_SECOND, SHORTEST_STEP, TOKENS_A_ROW = 3e10, 0.03, 24


@dataclass(frozen=True)
class Estimate:
    """Cells done and open, seconds of all open cells one after another, bytes still needed and bytes free."""

    done: int
    open: int
    seconds: float
    measured: bool
    disk: int
    free: int


def weights_of(job: Job) -> int:
    """About how many weights the job's model has (N above)."""
    vocabulary, width, blocks = _shape(job)
    return vocabulary * width + 12 * blocks * width**2


def trained_weights_of(job: Job) -> int:
    """About how many weights the job's training changes and saves (T above)."""
    if job.settings.adapter == "none":
        return weights_of(job)
    _, width, blocks = _shape(job)
    return job.settings.lora_rank * 22 * blocks * width


def _shape(job: Job) -> tuple[int, int, int]:
    """Vocabulary, width and blocks."""
    settings = job.settings
    if settings.start == "random":
        return settings.vocabulary_size, settings.width, settings.layers
    config = load_config(settings.start).get_text_config()
    return config.vocab_size, config.hidden_size, config.num_hidden_layers


def _start_bytes(jobs: list[Job]) -> int:
    """Bytes of the starts that these jobs of one model and task still lack."""
    settings = jobs[0].settings
    lacking = len({job.start for job in jobs
                   if not (job.run_dir / "models" / job.start.place / "cell.json").is_file()})
    each = 1 if settings.adapter == "qlora" else settings.start_dtype.itemsize
    return each * weights_of(jobs[0]) * (lacking if settings.start == "random" else min(lacking, 1))


def done_cells(sweep: Sweep) -> set[str]:
    """Names of the cells that need no work: finished, and on data that will not be made anew."""
    stale = set()
    for task in sweep.tasks:
        folder = sweep.run_dir / "data" / task
        if (folder / "card.json").exists() and not is_built(task, folder, **sweep.data[task]):
            stale.add(task)
    return {job.name for job in sweep.jobs if job.cell.task not in stale and finished(job)}


def steps_of(job: Job) -> int:
    """Steps of a cell's training; for `epochs` of data that are not built yet, as if they had 10,000 rows."""
    card = read_json(job.sweep_dir / "data" / job.cell.task / "card.json")
    rows = card["counts"]["train"] if card else 10_000
    return job.settings.training_steps(min(rows, job.settings.training_items or rows))


def rule_seconds(job: Job, weights: int) -> float:
    """Seconds of a cell by the rule above."""
    operations = 6 * weights * TOKENS_A_ROW * job.settings.batch_size
    training = steps_of(job) * max(SHORTEST_STEP, operations / OPERATIONS_A_SECOND)
    return training / 2 if job.cell.method == "untuned" else 1.5 * training


def estimate(sweep: Sweep, *, workers: int = 1) -> Estimate:
    """The estimate of a sweep's open cells; `workers` counts for the checkpoints on disk only."""
    open_names = {job.name for job in sweep.jobs} - done_cells(sweep)
    seconds, measured, disk, largest, trainings = 0.0, bool(open_names), 0, 0, 0
    for jobs in sweep.groups().values():
        mine = [job for job in jobs if job.name in open_names]
        if not mine:
            continue
        weights = weights_of(mine[0])
        disk += _start_bytes(mine)
        if trained := sum(job.cell.method != "untuned" for job in mine):
            saved = trained_weights_of(mine[0])
            disk += 4 * saved * trained
            largest, trainings = max(largest, saved), trainings + trained
        took = {untuned: [line["seconds"] for job in jobs if (job.cell.method == "untuned") == untuned
                          for line in read_log(log_path(job)) if line.get("state") == "done"]
                for untuned in (False, True)}
        for job in mine:
            known = took[job.cell.method == "untuned"]
            measured &= bool(known)
            seconds += median(known) if known else rule_seconds(job, weights)
    disk += 24 * largest * min(workers, trainings)
    return Estimate(len(sweep.jobs) - len(open_names), len(open_names), seconds, measured, disk,
                    shutil.disk_usage(_existing(sweep.run_dir)).free)


def check_disk(sweep: Sweep, found: Estimate) -> None:
    """`RunError` where what is still to be written will not fit."""
    if found.disk > found.free:
        raise RunError(f"{sweep.run_dir} needs about {_size(found.disk)} more and its disk has {_size(found.free)} "
                       "free; free some, or set run_dir to another disk")


def describe(sweep: Sweep, found: Estimate, *, workers: int, where: str, cpu_only: bool) -> str:
    """What the sweep would do, for `--dry-run`. cpu_only: it is known to run without a GPU, as the time's rule does."""
    lines, done_names = [f"{sweep.file} → {sweep.run_dir}", ""], done_cells(sweep)
    for (model, task), jobs in sweep.groups().items():
        settings = jobs[0].settings
        done = sum(job.name in done_names for job in jobs)
        methods = ", ".join(dict.fromkeys(job.cell.method for job in jobs))
        seeds = ", ".join(map(str, dict.fromkeys(job.cell.seed for job in jobs)))
        lines.append(f"{model} ({settings.start}), {task}: {len(jobs)} cells, {done} done\n"
                     f"    {methods}; seeds {seeds}; {steps_of(jobs[0])} steps of {settings.batch_size} rows; "
                     f"terms read blocks {settings.carma.mi_layers} and {settings.carma.stability_layers}")
    how = ("from the cells that have ended" if found.measured else
           "by a rule, until cells have ended" if cpu_only else CPU_RULE)
    lines += ["", f"{found.done + found.open} cells: {found.done} done, {found.open} open; {where}"]
    if found.open:
        lines.append(f"time: about {_time(found.seconds)} of work, {_time(found.seconds / min(workers, found.open))} "
                     f"with {workers} at a time ({how})")
        lines.append(f"disk: about {_size(found.disk)} more, {_size(found.free)} free")
    return "\n".join([*lines, f"at the end: {sweep.run_dir / 'report.html'}"])


def _existing(folder: Path) -> Path:
    return next(path for path in (folder, *folder.parents) if path.is_dir())


def _time(seconds: float) -> str:
    return (f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min" if seconds < 7200
            else f"{seconds / 3600:.1f} h")


def _size(count: int) -> str:
    return f"{count / 2**20:,.0f} MiB" if count < 2**30 else f"{count / 2**30:,.1f} GiB"
