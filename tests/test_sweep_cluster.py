"""A sweep on a real Dask cluster of three worker processes, one killed in the middle, one cell damaged."""
import contextlib
import os
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pandas as pd
import psutil
import pytest
import yaml
from distributed import LocalCluster

from carma_lib.files import read_json, write_json
from carma_lib.stats.table import read_results
from carma_lib.lab.sweep import run_sweep
from carma_lib.lab.sweep_executors import open_executor
from carma_lib.lab.sweep_worker import log_path, read_log
from test_sweep import SENTIMENT, kill_one_at_work, sweep_of, wait_for

GRID = dict(tasks=[SENTIMENT], methods=["fine_tuning", "carma"], seeds=[1, 2, 3],
            models=[{"start": "random", "family": "llama"}, {"start": "random", "family": "gpt2"}])


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    """The same sweep, every cell one after another in this process."""
    sweep = sweep_of(tmp_path_factory.mktemp("one"), "grid", **GRID)
    with ThreadPoolExecutor(1) as executor:
        assert not run_sweep(sweep, executor).failed
    return sweep


def address_in(file):
    with contextlib.suppress(ValueError):  # half written
        return (read_json(file) or {}).get("address")


@pytest.fixture
def cluster(tmp_path):
    """Address of a Dask scheduler, and three workers as processes of their own, one thread each."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DASK_DISTRIBUTED__DIAGNOSTICS__NVML": "False"}
    with contextlib.ExitStack() as stack:
        def start(*command):
            log = stack.enter_context(open(tmp_path / f"{command[0]}.log", "a"))
            process = subprocess.Popen([sys.executable, "-m", f"distributed.cli.dask_{command[0]}", *command[1:]],
                                       env=environment, stdout=log, stderr=log, cwd=tmp_path)
            stack.callback(process.wait, 20)
            stack.callback(process.kill)
            return process

        start("scheduler", "--host", "127.0.0.1", "--port", "0", "--no-dashboard",
              "--scheduler-file", "scheduler.json")
        address = wait_for(lambda: address_in(tmp_path / "scheduler.json"))
        yield address, [start("worker", address, "--nthreads", "1", "--no-nanny", "--no-dashboard",
                              "--memory-limit", "0", "--local-directory", str(tmp_path / "dask")) for _ in range(3)]


def test_a_cluster_without_workers_is_waited_for_and_told_of(monkeypatch, capsys):
    monkeypatch.setattr("carma_lib.lab.sweep_executors.LOOK_SECONDS", 0.1)
    monkeypatch.setattr("carma_lib.lab.sweep_executors.QUIET_SECONDS", 2)
    heard = []

    def lines(count):
        heard.extend(line for line in capsys.readouterr().err.splitlines() if "no worker is connected" in line)
        return len(heard) >= count

    with LocalCluster(n_workers=0, processes=False, dashboard_address=None) as cluster:
        with open_executor(scheduler=cluster.scheduler_address) as executor:
            future = executor.submit(abs, -1)
            wait_for(lambda: lines(1), 30)
            cluster.scale(1)
            assert future.result(60) == 1
            time.sleep(1)  # so that the worker is seen
            cluster.scale(0)
            wait_for(lambda: lines(2), 60)
            time.sleep(3)
            assert not lines(3), "once each time"
    assert cluster.scheduler_address in heard[0]


def test_a_slurm_job_that_ends_is_replaced(tmp_path, monkeypatch):
    """A stand-in for SLURM that runs the job scripts here; the workers leave after some seconds."""
    commands, file = tmp_path / "bin", tmp_path / "slurm.yml"
    commands.mkdir()
    for name, line in (("sbatch", f'cp "$1" "$0.$$.sh"; setsid sh "$0.$$.sh" >>{tmp_path}/log 2>&1 & '
                                  'echo "Submitted batch job $!"'), ("scancel", 'kill -- "-$1"')):
        (commands / name).write_text(f"#!/bin/sh\n{line}\n")
        (commands / name).chmod(0o755)
    file.write_text(yaml.safe_dump({
        "jobs": 1, "cores": 1, "processes": 1, "memory": "2GB", "nanny": False, "local_directory": str(tmp_path),
        "scheduler_options": {"dashboard_address": None}, "worker_extra_args": ["--lifetime", "5s", "--no-dashboard"]}))
    monkeypatch.setenv("PATH", f"{commands}:{os.environ['PATH']}")
    with open_executor(slurm=file) as executor:
        first = executor.submit(os.getpid).result(120)
        wait_for(lambda: not psutil.pid_exists(first), 60)
        assert executor.submit(os.getpid).result(120) != first


def damage(sweep, job, one_process):
    """A checkpoint of this cell whose weights were cut short, as on a disk that was full."""
    twin = one_process.run_dir / job.model / "models" / job.cell.place
    work = job.run_dir / "work" / job.cell.place
    (work / "checkpoint-2").mkdir(parents=True)
    write_json(work / "mark.json", read_json(twin / "cell.json")["mark"])
    shutil.copy(twin / "config.json", work / "checkpoint-2")
    (work / "checkpoint-2" / "model.safetensors").write_bytes((twin / "model.safetensors").read_bytes()[:5000])
    (work / "checkpoint-2" / "trainer_state.json").write_text("{}")
    return work


def test_a_killed_worker_and_a_damaged_cell_cost_nothing_else(tmp_path, one_process, cluster):
    sweep = sweep_of(tmp_path, "grid", **GRID)
    address, workers = cluster
    bad = sweep.jobs[-1]
    work = damage(sweep, bad, one_process)
    lost = []
    killer = threading.Thread(target=lambda: lost.append(kill_one_at_work(sweep, done=4, other_than=bad.name)),
                              daemon=True)
    killer.start()
    with open_executor(scheduler=address) as executor:
        end = run_sweep(sweep, executor, retries=1)
    killer.join(10)
    assert list(end.failed) == [bad.name] and "safetensor" in end.failed[bad.name].lower()
    logs = {job.name: read_log(log_path(job)) for job in sweep.jobs}
    begun = {name: sum(line["state"] == "begun" for line in lines) for name, lines in logs.items()}
    assert {name: times for name, times in begun.items() if times != 1} == {lost[0]: 2, bad.name: 2}
    assert sum(worker.poll() is None for worker in workers) == 2
    assert len({line["pid"] for lines in logs.values() for line in lines if line["state"] == "begun"}) == 3
    assert read_json(sweep.run_dir / "status.json")["counts"] == {"done": 11, "open": 0, "failed": 1, "lost": 1}

    shutil.rmtree(work)  # repaired; the same command goes on
    with open_executor(scheduler=address) as executor:
        assert not run_sweep(sweep, executor).failed
    assert sum(len(read_log(log_path(job))) for job in sweep.jobs) == sum(map(len, logs.values())) + 2
    first, second = (read_results(each.run_dir / "results.parquet") for each in (one_process, sweep))
    pd.testing.assert_frame_equal(first, second, check_exact=True)
    for name in ("report.html", "tables/paper_table.csv", "tables/primary_comparisons.csv"):
        assert (one_process.run_dir / name).read_bytes() == (sweep.run_dir / name).read_bytes(), name
