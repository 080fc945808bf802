"""What a worker of a sweep does: make the starts of a model and task, then train and evaluate single cells.

Each cell has a log in the sweep's folder, one line when an attempt begins and one when it ends; the log's lock is
held meanwhile, so that no cell is worked on twice at a time, however many schedulers believe it lost. A log with
a begin and no end is that of a lost worker.
"""
from __future__ import annotations

import contextlib
import errno
import gc
import json
import os
import shutil
import socket
import threading
import time
import traceback
from collections.abc import Iterator
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

try:
    import fcntl
except ImportError:  # no such lock on Windows
    fcntl = None

from carma_lib.lab.evaluate import evaluate_cell, make_replacements
from carma_lib.lab.experiment import encode_task, fine_tune, fine_tune_in_processes, is_done, make_start
from carma_lib.files import fingerprint, whole_folder
from carma_lib.lab.memory import check_memory
from carma_lib.models import load_config
from carma_lib.lab.parallel import quiet
from carma_lib.lab.sweep_plan import Job
from carma_lib.tasks import read_card

_ONE_AT_A_TIME = threading.Lock()  # seeds are a process's: two threads of one worker would mix theirs


class Outcome(NamedTuple):
    """How an attempt ended: state is "done" or "failed", with one line and the whole traceback of the reason."""

    state: str
    seconds: float = 0.0
    reason: str = ""
    traceback: str = ""
    disk_full: bool = False


@contextlib.contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[Any]:
    """Hold a file's lock, and yield the file open for appending; the system lets go when the process ends.

    wait: for whoever holds it; else `BlockingIOError`. A file system without locks is used without.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+", encoding="utf-8") as file:
        try:
            if fcntl:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise
        except OSError:
            pass
        yield file


def log_path(job: Job) -> Path:
    """The log of a cell's attempts."""
    return job.sweep_dir / "log" / f"{job.name}.jsonl"


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a log; one that was cut short is left out."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        with contextlib.suppress(ValueError):
            lines.append(json.loads(line))
    return lines


def _note(file: Any, **facts: Any) -> None:
    file.write(json.dumps({"time": datetime.now(timezone.utc).isoformat(timespec="milliseconds"), **facts}) + "\n")
    file.flush()


def mark_of(job: Job) -> str:
    """What a finished cell is known by: its settings, its conditions and the content of its data."""
    content = read_card(job.sweep_dir / "data" / job.cell.task)["content"]
    return fingerprint(asdict(job.cell), asdict(job.settings), asdict(job.conditions), content)


def finished(job: Job) -> dict[str, Any] | None:
    """The log's line of the attempt that finished this cell as it is asked for now (part, seconds), or None."""
    try:
        mark = mark_of(job)
    except FileNotFoundError:
        return None
    for line in reversed(read_log(log_path(job))):
        if line.get("state") == "done" and line["mark"] == mark and (job.sweep_dir / line["part"]).is_file():
            return line
    return None


def run_cell(job: Job) -> Outcome:
    """Train and evaluate one cell, unless it is finished; what goes wrong is an outcome, not an exception."""
    with _ONE_AT_A_TIME:
        quiet()
        started = time.monotonic()
        try:
            with locked(log_path(job)) as log:
                if line := finished(job):
                    return Outcome("done", line["seconds"])
                _note(log, state="begun", host=socket.gethostname(), pid=os.getpid())
                try:
                    part = _work(job)
                except Exception as error:
                    _note(log, state="failed", reason=one_line(error))
                    raise
                seconds = round(time.monotonic() - started, 2)
                _note(log, state="done", seconds=seconds, mark=mark_of(job),
                      part=part.relative_to(job.sweep_dir).as_posix())
                return Outcome("done", seconds)
        except Exception as error:
            return failure(error, time.monotonic() - started)
        finally:
            _free_memory()


def _work(job: Job) -> Path:
    if job.cell.method != "untuned":
        train = fine_tune if job.settings.processes == 1 else fine_tune_in_processes
        train(job.run_dir, job.cell, job.settings)
    return evaluate_cell(job.run_dir, job.cell, job.conditions)


def prepare(jobs: list[Job], sharing: int = 1) -> Outcome:
    """What the cells of one model and task share: their data, the starts of their seeds, and the caches.

    Fails where `sharing` trainings at a time will not fit this worker's memory, or no answer is one token of the
    start. Only one process does this for a model and task, before any of its cells is begun.
    """
    with _ONE_AT_A_TIME:
        quiet()
        started = time.monotonic()
        first = jobs[0]
        try:
            with locked(first.sweep_dir / "log" / first.model / first.cell.task / "starts.lock"):
                _give_data(first)
                for job in jobs:
                    if not is_done(job.run_dir, job.start, job.settings):
                        make_start(job.run_dir, job.start, job.settings)
                _encode(jobs, sharing)
                make_replacements(first.run_dir, first.start, first.conditions)
            return Outcome("done", time.monotonic() - started)
        except Exception as error:
            return failure(error, time.monotonic() - started)
        finally:
            _free_memory()


def _give_data(job: Job) -> None:
    """The sweep's rows of a task, copied into the model's run folder."""
    source, folder = (root / "data" / job.cell.task for root in (job.sweep_dir, job.run_dir))
    if not source.is_dir():
        raise FileNotFoundError(f"{source} is not there on {socket.gethostname()}; every worker must see the "
                                "sweep's folder under the same name")
    if not folder.is_dir() or read_card(folder) != read_card(source):
        with whole_folder(folder) as temporary:
            shutil.copytree(source, temporary, dirs_exist_ok=True, ignore=shutil.ignore_patterns("cache-*", "tmp*"))


def _encode(jobs: list[Job], sharing: int) -> None:
    """Encode the rows once, so that the cells find them in the cache, and see whether the trainings fit."""
    first = jobs[0]
    config = load_config(str(first.run_dir / "models" / first.start.place))
    for augmented in sorted({job.cell.method == "synonym_augmentation" for job in jobs}):
        rows = encode_task(first.run_dir, first.cell.task, config.model_type, first.settings, augmented=augmented)
    if not len(rows["train"]):
        raise ValueError("no training row's answer is one token of this tokenizer; take another start")
    if any(job.cell.method != "untuned" for job in jobs):
        check_memory(config, first.settings, tokens=max(rows["train"]["length"]), workers=sharing)


def failure(error: BaseException, seconds: float = 0.0) -> Outcome:
    """The outcome of an error."""
    text = "".join(traceback.format_exception(error))
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))
    return Outcome("failed", seconds, one_line(error), text, full or "No space left on device" in text)


def one_line(error: BaseException) -> str:
    """An error's type and message in one line of at most 300 characters."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= 300 else f"{text[:299]}…"


def _free_memory() -> None:
    import torch

    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
