"""Where a sweep's cells run: processes of this machine, a Dask cluster, or SLURM jobs.

Each is a `concurrent.futures.Executor`; the driver knows nothing else of it. Nothing here loads torch or Dask before
it must.
"""
from __future__ import annotations

import contextlib
import importlib
import math
import multiprocessing
import os
import queue
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import yaml
from tqdm import tqdm

from carma_lib.files import RunError

CONNECT_SECONDS = 10
LOOK_SECONDS, QUIET_SECONDS = 20, 300  # how often to look for workers, and to say that there are none at most
INSTALL = "pip install '.[sweep]' in the repository's folder"


class WorkerLost(RuntimeError):
    """The process that worked on a cell is gone (killed, or out of memory)."""


class LocalExecutor(Executor):
    """One process a worker, each in a pool of its own: where one is lost, the others do not notice.

    devices: `CUDA_VISIBLE_DEVICES` of each worker in turn, set before it loads torch; none: left as it is.
    A lost worker's future raises `WorkerLost`, and another process takes its place. Workers end with this process.

    Raises `ValueError` for fewer than one worker.
    """

    def __init__(self, workers: int, *, devices: list[str] | None = None) -> None:
        if workers < 1:
            raise ValueError(f"workers is {workers}; it must be at least 1")
        self._queue: queue.SimpleQueue = queue.SimpleQueue()
        self._closed = False
        threads = max(1, (os.cpu_count() or 1) // workers)
        devices = devices or []
        self._hands = [threading.Thread(target=self._serve, daemon=True, args=(
            devices[number % len(devices)] if devices else None, threads)) for number in range(workers)]
        for hand in self._hands:
            hand.start()

    def submit(self, function: Callable, /, *arguments: Any) -> Future:
        """A future of `function(*arguments)`; both must be picklable."""
        if self._closed:
            raise RuntimeError("this executor is shut down")
        future: Future = Future()
        self._queue.put((future, function, arguments))
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """End the workers; cancel_futures: at once, and drop what has not begun."""
        self._closed = True
        if cancel_futures:
            with contextlib.suppress(queue.Empty):
                while True:
                    if item := self._queue.get_nowait():
                        item[0].cancel()
            for process in multiprocessing.active_children():
                process.terminate()
        for _ in self._hands:
            self._queue.put(None)
        for hand in self._hands if wait else ():
            hand.join()

    def _serve(self, device: str | None, threads: int) -> None:
        pool = None
        while (item := self._queue.get()) is not None:
            future, function, arguments = item
            if not future.set_running_or_notify_cancel():
                continue
            pool = pool or ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"),
                                               initializer=_start_worker, initargs=(device, threads))
            try:
                future.set_result(pool.submit(function, *arguments).result())
            except BrokenProcessPool:
                pool = None
                future.set_exception(WorkerLost("its worker process ended abruptly (killed, or out of memory)"))
            except BaseException as error:
                future.set_exception(error)
        if pool:
            pool.shutdown()


def _start_worker(device: str | None, threads: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interruption reaches the parent too, which ends its workers
    if device is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = device
    from carma_lib.lab.parallel import start_worker  # from here on torch is loaded

    start_worker(threads)


def gpus() -> list[str]:
    """The GPUs that this process may use, as `CUDA_VISIBLE_DEVICES` names them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [device for device in named.split(",") if device and device != "-1"]
    import torch

    return [str(number) for number in range(torch.cuda.device_count())]


def gpu_groups(size: int = 1) -> list[str]:
    """`CUDA_VISIBLE_DEVICES` of each worker: `size` GPUs each, those left over with none; no group without any GPU.

    Raises `RunError` where there are GPUs, but fewer than `size`.
    """
    devices = gpus()
    if 0 < len(devices) < size:
        raise RunError(f"a training of this sweep has processes: {size} and wants a GPU for each, but {len(devices)} "
                       "can be used here; lower processes, or run where there are more GPUs")
    return [",".join(devices[first:first + size]) for first in range(0, len(devices) - size + 1, size)]


def default_workers(gpus_each: int = 1) -> int:
    """One process a GPU, or a group of them; two where there is none."""
    return len(gpu_groups(gpus_each)) or 2


def sharing(*, workers: int | None = None, scheduler: str | None = None, slurm: Path | None = None,
            gpus_each: int = 1) -> int:
    """How many trainings at a time share a GPU, or a machine without one, in the executor that these open.

    A cluster's worker is taken to have its device alone. Raises `RunError` as `gpu_groups` does.
    """
    if scheduler or slurm:
        return 1
    groups = len(gpu_groups(gpus_each))
    return math.ceil((workers or default_workers(gpus_each)) / max(1, groups))


@contextlib.contextmanager
def open_executor(*, workers: int | None = None, scheduler: str | None = None,
                  slurm: Path | None = None, gpus_each: int = 1) -> Iterator[Executor]:
    """The executor of a sweep: `scheduler` of a Dask cluster, or `slurm` file, else `workers` local processes.

    gpus_each: GPUs of a local worker.

    A cluster without workers is waited for, with a line on stderr. Raises `RunError` where Dask is not installed,
    the scheduler does not answer, SLURM is not here, or the GPUs are fewer than `gpus_each`.
    """
    if scheduler or slurm:
        with (_dask_client(scheduler) if scheduler else _slurm_client(slurm)) as client, _lookout(client):
            yield client.get_executor(pure=False)
        return
    local = LocalExecutor(default_workers(gpus_each) if workers is None else workers, devices=gpu_groups(gpus_each))
    try:
        yield local
    except BaseException:
        local.shutdown(cancel_futures=True)
        raise
    local.shutdown()


@contextlib.contextmanager
def _lookout(client: Any) -> Iterator[None]:
    """Meanwhile say where no worker is connected: at first, and each time that the last one has gone."""
    ended = threading.Event()

    def look() -> None:
        told, when = False, -math.inf
        while not ended.wait(LOOK_SECONDS):
            try:
                alone = not client.nthreads()
            except Exception:  # the connection is lost, which the sweep's own calls notice
                continue
            if not alone:
                told = False
            elif not told and time.monotonic() - when >= QUIET_SECONDS:
                tqdm.write(f"no worker is connected to {client.scheduler.address}; waiting for one (start workers, or "
                           "see what the queue does with their jobs)", file=sys.stderr)
                told, when = True, time.monotonic()

    threading.Thread(target=look, daemon=True).start()
    try:
        yield
    finally:
        ended.set()


def _need(module: str, option: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise RunError(f"{option} needs {module.replace('_', '-')}, which is not installed: {INSTALL}") from error


def _dask_client(address: str) -> Any:
    distributed = _need("distributed", "--scheduler")
    try:
        return distributed.Client(address, timeout=CONNECT_SECONDS, set_as_default=False)
    except (OSError, ValueError, TypeError) as error:
        raise RunError(f"no Dask scheduler answers at {address}; start one with 'dask scheduler' and workers with "
                       f"'dask worker {address} --nthreads 1', or leave --scheduler out") from error


def read_slurm(file: Path) -> tuple[int, dict[str, Any]]:
    """The number of jobs and the other keys of a SLURM file, which are `dask_jobqueue.SLURMCluster`'s. `RunError`."""
    try:
        keys = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise RunError(f"{file} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(keys, dict) or type(keys.get("jobs")) is not int or keys["jobs"] < 1:
        raise RunError(f"{file} must hold 'jobs: <number>' beside the keys of dask_jobqueue.SLURMCluster")
    return keys.pop("jobs"), keys


def slurm_cluster(file: Path) -> tuple[int, Any]:
    """The number of jobs and the cluster that would submit them; `job_script()` shows what. Raises `RunError`."""
    jobs, keys = read_slurm(file)
    jobqueue = _need("dask_jobqueue", "--slurm")
    try:
        return jobs, jobqueue.SLURMCluster(**keys)
    except (TypeError, ValueError, RuntimeError) as error:  # the last from Dask, as for an unknown interface
        raise RunError(f"{file}: {' '.join(str(error).split())}") from error


@contextlib.contextmanager
def _slurm_client(file: Path) -> Iterator[Any]:
    if shutil.which("sbatch") is None:
        raise RunError("--slurm submits jobs with sbatch, which is not on this machine; use a SLURM login node")
    jobs, cluster = slurm_cluster(file)
    with cluster:
        cluster.adapt(minimum_jobs=jobs, maximum_jobs=jobs)  # as scale(), but a job that has ended is replaced
        with _need("distributed", "--slurm").Client(cluster, set_as_default=False) as client:
            yield client
