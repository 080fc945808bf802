"""Run a sweep through any executor: done cells are skipped, failed ones tried again, results collected meanwhile.

A sweep's folder holds `data/`, one run folder a model (with its models, parts and caches), `log/` (a file a cell:
its attempts), `failures/` (tracebacks), `status.json`, `results.parquet`, `tables/`, `figures/` and `report.html`.
"""
from __future__ import annotations

import errno
import sys
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, CancelledError, Executor, Future, wait
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from carma_lib.files import RunError, whole_file, write_json
from carma_lib.lab.sweep_estimate import check_disk, describe, estimate
from carma_lib.lab.sweep_executors import WorkerLost, default_workers, gpu_groups, slurm_cluster
from carma_lib.lab.sweep_plan import Job, Sweep
from carma_lib.lab.sweep_report import collect, make_report
from carma_lib.lab.sweep_worker import Outcome, failure, finished, locked, log_path, one_line, prepare, read_log, run_cell
from carma_lib.tasks import build_task

LOSSES = 3  # so often may a cell lose its worker before it counts as what kills it
COLLECT_SECONDS = 30


def plan_text(sweep: Sweep, *, workers: int | None = None, scheduler: str | None = None,
              slurm: Path | None = None) -> str:
    """What the sweep would do and where, for a reader.

    Raises `RunError` where the disk is too small for it, or a training wants more GPUs than there are.
    """
    cpu_only = False
    if slurm:
        count, cluster = slurm_cluster(slurm)
        with cluster:
            where = f"{count} SLURM jobs, each running\n{cluster.job_script()}"
    elif scheduler:
        count, where = 1, f"the workers of {scheduler}, whose number divides the time"
    else:
        cpu_only = not gpu_groups(sweep.gpus_each)
        count = default_workers(sweep.gpus_each) if workers is None else workers
        if count < 1:
            raise ValueError(f"workers is {count}; it must be at least 1")
        where = f"{count} local process{'es' if count > 1 else ''}"
    found = estimate(sweep, workers=count)
    check_disk(sweep, found)
    return describe(sweep, found, workers=count, where=where, cpu_only=cpu_only)


class SweepEnd(NamedTuple):
    """The report's path, and for each cell without a result one line why."""

    report: Path
    failed: dict[str, str]


@dataclass(frozen=True)
class _Task:
    """A call in flight: the starts of a group, or a single cell."""

    function: Callable[..., Outcome]
    arguments: tuple[Any, ...]
    jobs: tuple[Job, ...]
    attempt: int = 1
    losses: int = 0


class _Book:
    """What is known of every cell, as `status.json` and one progress bar show it."""

    def __init__(self, sweep: Sweep, bar: tqdm) -> None:
        self.sweep, self.bar = sweep, bar
        self.cells: dict[str, dict[str, Any]] = {}
        self._collected, self._pause = time.monotonic(), COLLECT_SECONDS
        for job in sweep.jobs:
            line = finished(job)
            self.put(job, "done" if line else "open", seconds=line["seconds"] if line else None)
        self.save()
        bar.initial = bar.n  # so that its rate is that of this run

    def put(self, job: Job, state: str, **facts: Any) -> None:
        attempts = Counter(line.get("state") for line in read_log(log_path(job)))
        lost = attempts["begun"] - attempts["done"] - attempts["failed"] if state != "open" else 0
        self.cells[job.name] = {"state": state, "attempts": attempts["begun"], "lost": lost, **facts}

    def save(self) -> None:
        counts = self.counts()
        self.bar.n = counts["done"] + counts["failed"]
        self.bar.set_postfix_str(", ".join(f"{counts[name]} {name}" for name in ("failed", "lost")
                                           if counts[name]))
        write_json(self.sweep.run_dir / "status.json", {
            "sweep": str(self.sweep.file), "updated": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "counts": counts, "cells": self.cells})

    def counts(self) -> dict[str, int]:
        states = Counter(cell["state"] for cell in self.cells.values())
        return {**{name: states[name] for name in ("done", "open", "failed")},
                "lost": sum(cell["lost"] for cell in self.cells.values())}

    def failed(self) -> dict[str, str]:
        return {name: cell["reason"] for name, cell in self.cells.items() if cell["state"] == "failed"}

    def collect_now_and_then(self) -> None:
        """Write the results so far; the longer that takes, the rarer."""
        started = time.monotonic()
        if started - self._collected > self._pause:
            collect(self.sweep)
            self._collected = time.monotonic()
            self._pause = max(COLLECT_SECONDS, 20 * (self._collected - started))


def run_sweep(sweep: Sweep, executor: Executor, *, retries: int = 1, sharing: int = 1) -> SweepEnd:
    """Run what is open of a sweep and make its report.

    retries: further attempts of a cell that failed. A cell whose worker is lost is run again beside these.
    sharing: how many of the executor's trainings at a time share a device; its memory must hold so many.

    Raises `RunError` where the folder is in use by another sweep, a disk is full, or the connection to the
    workers is lost; what is done stays done. `ValueError` for retries below 0.
    """
    if retries < 0:
        raise ValueError(f"retries is {retries}; it must be at least 0")
    try:
        with locked(sweep.run_dir / "lock", wait=False):
            for task in sweep.tasks:
                build_task(task, sweep.run_dir / "data" / task, **sweep.data[task])
            with tqdm(total=len(sweep.jobs), desc=f"sweep {sweep.file.stem}", unit="cell", mininterval=1) as bar:
                book = _Book(sweep, bar)
                _drive(sweep, executor, book, retries, sharing)
                book.save()
            return SweepEnd(make_report(sweep, book.failed()), book.failed())
    except BlockingIOError:
        raise RunError(f"{sweep.run_dir} is in use by another sweep; wait for it, or give another "
                       "run_dir") from None
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise _disk_full(sweep, one_line(error)) from error
        raise


def _drive(sweep: Sweep, executor: Executor, book: _Book, retries: int, sharing: int) -> None:
    flight: dict[Future, _Task] = {}

    def send(task: _Task) -> None:
        flight[executor.submit(task.function, *task.arguments)] = task

    trainings = sum(book.cells[job.name]["state"] == "open" and job.cell.method != "untuned" for job in sweep.jobs)
    for jobs in sweep.groups().values():
        if waiting := tuple(job for job in jobs if book.cells[job.name]["state"] == "open"):
            send(_Task(prepare, (list(waiting), max(1, min(sharing, trainings))), waiting))
    try:
        while flight:
            ended, _ = wait(flight, timeout=1, return_when=FIRST_COMPLETED)
            for future in ended:
                for following in _follow(sweep, book, flight.pop(future), future, retries):
                    send(following)
            if ended:
                book.save()
            book.collect_now_and_then()
    except BaseException:
        for future in flight:
            future.cancel()
        raise


def _follow(sweep: Sweep, book: _Book, task: _Task, future: Future, retries: int) -> list[_Task]:
    """Enter what a call came to; the calls to make now."""
    try:
        outcome = future.result()
    except WorkerLost as error:
        if task.losses < LOSSES:
            return [replace(task, losses=task.losses + 1)]
        outcome = failure(error)
    except CancelledError:
        raise RunError("the connection to the workers is lost; done cells are kept, the same command goes "
                       "on") from None
    except Exception as error:  # from the executor itself, such as a worker without this package
        outcome = failure(error)
    if outcome.disk_full:
        raise _disk_full(sweep, outcome.reason)
    if outcome.state == "done" and task.function is prepare:
        return [_Task(run_cell, (job,), (job,)) for job in task.jobs]
    if outcome.state == "failed" and task.attempt <= retries:
        return [replace(task, attempt=task.attempt + 1)]
    if outcome.state == "failed" and task.function is prepare:
        outcome = outcome._replace(reason=f"no start from '{task.jobs[0].settings.start}': {outcome.reason}")
    for job in task.jobs:
        if outcome.state == "done":
            book.put(job, "done", seconds=outcome.seconds)
            _traceback_path(job).unlink(missing_ok=True)
        else:
            book.put(job, "failed", reason=outcome.reason)
            with whole_file(_traceback_path(job)) as temporary:
                temporary.write_text(outcome.traceback, encoding="utf-8")
            tqdm.write(f"{job.name} failed: {outcome.reason}\n  {_traceback_path(job)}", file=sys.stderr)
    return []


def _traceback_path(job: Job) -> Path:
    return job.sweep_dir / "failures" / f"{job.name}.txt"


def _disk_full(sweep: Sweep, reason: str) -> RunError:
    return RunError(f"a disk is full, that of {sweep.run_dir} unless this names another: {reason}; free some, then "
                    "the same command goes on from what is done")
