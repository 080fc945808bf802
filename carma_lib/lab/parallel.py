"""Calls in fresh processes with one progress bar; workers end with their parent."""
from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from multiprocessing.connection import wait as wait_for_process
from typing import TypeVar

import datasets
import torch
from tqdm import tqdm

Result = TypeVar("Result")


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
    with (ProcessPoolExecutor(workers, mp_context=context, initializer=start_worker, initargs=(threads,)) as pool,
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


def start_worker(threads: int) -> None:
    """Set a fresh worker process up: its threads, no bars of its own, and an end with its parent."""
    torch.set_num_threads(threads)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    quiet()
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (wait_for_process([parent.sentinel]), os._exit(1)), daemon=True).start()


def quiet() -> None:
    """No progress bars from inside a training: `run_parallel` shows one for all."""
    import transformers

    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
