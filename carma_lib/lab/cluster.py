"""Where cells run, always through `dask.distributed`: workers of this machine, of a running scheduler, or SLURM jobs."""
from __future__ import annotations

import contextlib
import multiprocessing
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dask
import torch
from distributed import Client, Nanny, Scheduler, SpecCluster
from tqdm import tqdm

from carma_lib.files import RunError, ignore_in_children, parse_yaml, reading, user_path

ANSWER_SECONDS = 10  # a scheduler that has not answered by then is not there
LOST_WORKERS = 3  # so many workers may be lost to a cell before it counts as what kills them
#: Of every local worker, set before it starts: threads that do not spin, and large buffers that are kept.
WORKER_ENVIRONMENT = {"OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1",
                      "MALLOC_MMAP_THRESHOLD_": "1073741824", "MALLOC_TRIM_THRESHOLD_": "4294967296"}
SETTINGS = {"distributed.scheduler.allowed-failures": LOST_WORKERS, "distributed.worker.daemon": True,
            "distributed.logging": {"distributed": "critical"}, "distributed.comm.timeouts.connect": "60s",
            "distributed.admin.log-format": "%(message)s", "distributed.nanny.pre-spawn-environ": WORKER_ENVIRONMENT}


def gpu_groups(size: int = 1) -> list[str]:
    """`CUDA_VISIBLE_DEVICES` of each worker: `size` GPUs each; none without a GPU. `RunError` for fewer than `size`."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = [str(number) for number in range(torch.cuda.device_count())] if named is None else [
        device for device in named.split(",") if device and device != "-1"]
    if 0 < len(devices) < size:
        raise RunError(f"a training with processes={size} needs a GPU for each, but {len(devices)} can be used here; "
                       "lower processes, or run where there are more GPUs")
    return [",".join(devices[first:first + size]) for first in range(0, len(devices) - size + 1, size)]


def default_workers(gpus_each: int = 1) -> int:
    """One worker a GPU, or a group of them; two without a GPU."""
    return len(gpu_groups(gpus_each)) or 2


@contextlib.contextmanager
def local_client(workers: int, *, gpus_each: int = 1) -> Iterator[Client]:
    """A client of `workers` processes of this machine, each with GPUs of its own if there are some.

    A lost worker is replaced; all end with this process. `ValueError` for fewer than one worker, `RunError` if they do
    not start.
    """
    end_if_worker()
    groups = gpu_groups(gpus_each)
    if workers < 1:
        raise ValueError(f"workers is {workers}; it must be at least 1")
    environments = [{"CUDA_VISIBLE_DEVICES": groups[number % len(groups)]} if groups else {} for number in range(workers)]
    spec = {number: {"cls": Nanny, "options": {"nthreads": 1, "memory_limit": 0, "env": own, "silence_logs": "CRITICAL"}}
            for number, own in enumerate(environments)}
    scheduler = {"cls": Scheduler, "options": {"dashboard": False, "dashboard_address": "127.0.0.1:0", "host": "127.0.0.1", "port": 0}}
    with dask.config.set(SETTINGS):
        # Workers that are killed leave semaphores behind, which Python would report after everything else.
        ignore_in_children("ignore:resource_tracker:UserWarning")
        try:
            cluster = SpecCluster(workers=spec, scheduler=scheduler, silence_logs="CRITICAL")
        except RuntimeError as error:  # of Dask, which has not seen what ended the workers
            raise RunError(f"the workers end as they start ({' '.join(str(error).split())[:80]}); if a script was run by its file, its "
                           "calls must be under 'if __name__ == \"__main__\":', since every worker reads it again") from None
        client = Client(cluster, set_as_default=False)
        try:
            yield client
        except BaseException:
            _kill(cluster)
            raise
        finally:
            with contextlib.suppress(Exception):
                client.close(timeout=1)
            with contextlib.suppress(Exception):
                cluster.close(timeout=3)


def end_if_worker() -> None:
    """End a worker that, as it starts, comes here by reading its parent's script again: its parent tells why."""
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        os._exit(1)


def _kill(cluster: SpecCluster) -> None:
    """End the workers at once, also in the middle of a training, which closing would wait for."""
    for nanny in cluster.workers.values():
        if pid := getattr(nanny, "pid", None):  # None: it has ended, or the next is not there yet
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)


@contextlib.contextmanager
def scheduler_client(address: str) -> Iterator[Client]:
    """A client of a running Dask scheduler. `RunError` if none answers."""
    try:
        client = Client(address, timeout=ANSWER_SECONDS, set_as_default=False)
    except (OSError, ValueError, TypeError) as error:
        raise RunError(f"no Dask scheduler answers at {address}; start one with 'dask scheduler' and workers with "
                       f"'dask worker {address} --nthreads 1', or leave --scheduler out") from error
    with client, _lookout(client):
        yield client


def read_slurm(file: Path) -> tuple[int, dict[str, Any]]:
    """The number of jobs and the other keys of a SLURM file, which are `dask_jobqueue.SLURMCluster`'s. `RunError`."""
    with reading(file, "correct it"):
        keys = parse_yaml(user_path(file).read_text(encoding="utf-8"))
    if not isinstance(keys, dict) or type(keys.get("jobs")) is not int or keys["jobs"] < 1:
        raise RunError(f"{file} must hold 'jobs: <number>' beside the keys of dask_jobqueue.SLURMCluster")
    return keys.pop("jobs"), keys


def slurm_cluster(file: Path) -> tuple[int, Any]:
    """The number of jobs and the cluster that would submit them; `job_script()` shows what. `RunError`."""
    from dask_jobqueue import SLURMCluster  # takes a second, and few need it

    jobs, keys = read_slurm(file)
    try:
        return jobs, SLURMCluster(**keys)
    except (TypeError, ValueError, ArithmeticError, RuntimeError) as error:  # the last from Dask, as for an unknown interface
        raise RunError(f"{file}: {' '.join(str(error).split())}") from error


@contextlib.contextmanager
def slurm_client(file: Path) -> Iterator[Client]:
    """A client of workers that are SLURM jobs; a job that has ended or was cancelled is replaced."""
    if shutil.which("sbatch") is None:
        raise RunError("--slurm submits jobs with sbatch, which is not on this machine; use a SLURM login node")
    with dask.config.set(SETTINGS):
        jobs, cluster = slurm_cluster(file)
        with cluster:
            cluster.adapt(minimum_jobs=jobs, maximum_jobs=jobs)  # as scale(), but with replacement
            with Client(cluster, set_as_default=False) as client, _lookout(client):
                yield client


@contextlib.contextmanager
def _lookout(client: Client) -> Iterator[None]:
    """Meanwhile say that no worker is connected: at first, and each time that the last one has gone."""
    ended = threading.Event()

    def watch() -> None:
        told, when = False, float("-inf")
        while not ended.wait(20):
            try:
                alone = not client.nthreads()
            except Exception:  # the connection is lost, which the run's own calls notice
                continue
            if not alone:
                told = False
            elif not told and time.monotonic() - when >= 300:
                tqdm.write(f"no worker is connected to {client.scheduler.address}; waiting for one (start workers, or "
                           "see what the queue does with their jobs)")
                told, when = True, time.monotonic()

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        ended.set()
