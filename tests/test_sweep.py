"""Sweeps on one machine: what a file may say, what a plan tells, and what happens to cells and workers that fail."""
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pandas as pd
import pytest
import yaml
from transformers import Gemma3Config

from carma_lib.__main__ import SWEEP_EPILOG, build_parser, main
from carma_lib.files import read_json
from carma_lib.manifest import RunError
from carma_lib.models import small_model, train_tokenizer
from carma_lib.stats.table import read_results
from carma_lib.lab.sweep import SweepEnd, plan_text, run_sweep
from carma_lib.lab.sweep_estimate import check_disk, estimate, weights_of
from carma_lib.lab.sweep_executors import (LocalExecutor, WorkerLost, default_workers, gpu_groups, gpus, open_executor,
                                       sharing, slurm_cluster)
from carma_lib.lab.sweep_plan import read_sweep
from carma_lib.lab.sweep_worker import Outcome, finished, locked, log_path, read_log
from carma_lib.tasks import build_task, read_card

ROOT = Path(__file__).resolve().parent.parent
SENTIMENT = "controlled_sentiment"


def sweep_text(run_dir):
    """A sweep of one small model in the smallest real sizes."""
    return {"run_dir": str(run_dir), "tasks": [SENTIMENT], "models": ["random"], "methods": ["fine_tuning"],
            "seeds": [1],
            "settings": {"layers": 2, "width": 32, "heads": 2, "vocabulary_size": 400, "steps": 4, "batch_size": 8,
                         "warmup_steps": 1, "evaluations": 2, "training_items": 64, "validation_items": 20,
                         "mi_layers": [0, 1], "stability_layers": [0, 1]},
            "conditions": {"rates": [0.25], "depth_shares": [0.5], "protocols": ["mean"], "levels": ["word"],
                           "splits": ["test_seen"], "test_items": 12, "pooled_items": 6}}


def sweep_of(folder, name="small", **changes):
    file = folder / f"{name}.yml"
    file.write_text(yaml.safe_dump({**sweep_text(folder / name), **changes}))
    return read_sweep(file)


# -- the file --------------------------------------------------------------------------------------

def test_the_example_is_a_sweep_of_every_combination_in_order():
    sweep = read_sweep(ROOT / "sweeps" / "example.yml")
    assert len(sweep.jobs) == 2 * 2 * 3 * 3 == len({job.name for job in sweep.jobs}) and len(sweep.groups()) == 4
    first, second = sweep.jobs[:2]
    assert (first.cell.seed, first.cell.method, second.cell.method) == (1, "fine_tuning", "carma")
    steps = {job.cell.task: job.settings.steps for job in sweep.jobs}
    assert steps == {"controlled_inverse_dictionary": 300, SENTIMENT: 150}
    assert {job.settings.family for job in sweep.jobs} == {"llama", "gpt2"} and first.settings.carma.mi_layers == (0, 1)
    assert first.conditions.rates == (0.25,) and first.run_dir.parent == Path.cwd() / "runs" / "example-sweep"


@pytest.mark.parametrize(("changes", "message"), [
    (dict(speed=3), "the file has the unknown key 'speed'; known are run_dir, tasks"),
    (dict(tasks=[]), "tasks is a list of at least one"), (dict(tasks="sst3"), "tasks is a list"),
    (dict(tasks=["sst4"]), "unknown task 'sst4'; the tasks are"), (dict(tasks=[[1]]), "tasks holds names"),
    (dict(methods=["cramming"]), "unknown method 'cramming'; the methods are untuned"),
    (dict(seeds=[1, 1]), "seeds names something twice"), (dict(seeds=[0.5]), "seeds are whole numbers"),
    (dict(seeds=[True]), "seeds are whole numbers"), (dict(run_dir=3), "run_dir is a folder's name"),
    (dict(settings={"stepz": 3}), "settings has the unknown key 'stepz'"),
    (dict(settings={"steps": "3"}), "'steps' takes int, such as 1000, not '3'"),
    (dict(settings={"steps": {"inverse_dictionary": 3}}), "steps has no number for 'sentiment'"),
    (dict(settings={"layers": 2}), "lower mi_layers and stability_layers"),
    (dict(settings={"mi_layers": 3}), "'mi_layers' takes list"), (dict(settings=[3]), "settings must hold names"),
    (dict(conditions={"rate": [0.1]}), "conditions has the unknown key 'rate'"),
    (dict(conditions={"rates": [2]}), "rates must lie in"), (dict(conditions={"rates": ["a"]}), "conditions: "),
    (dict(data=[3]), "data must hold names"), (dict(data={"sst3": {}}), "data has the unknown key 'sst3'"),
    (dict(data={SENTIMENT: {"split": "row"}}), "unknown key 'split'; known are seed, split_by, train_phrases"),
    (dict(data={SENTIMENT: {"seed": "7"}}), "'seed' takes int, such as 42, not '7'"),
    (dict(data={SENTIMENT: {"split_by": "rows"}}), "split_by is one of row, synset, headword, not 'rows'"),
    (dict(models=[3]), "must hold names and values"), (dict(models=[{"family": "llama"}]), "a mapping with 'start'"),
    (dict(models=["random", {"start": "random"}]), "the model 'random' stands twice"),
    (dict(models=["nowhere/no-model"]), "'nowhere/no-model'")])
def test_what_a_file_may_not_say_is_one_line(tmp_path, changes, message):
    with pytest.raises(RunError) as error:
        sweep_of(tmp_path, **changes)
    assert message in str(error.value) and "\n" not in str(error.value) and "small.yml" in str(error.value)


def test_missing_keys_and_files(tmp_path):
    file = tmp_path / "s.yml"
    file.write_text("tasks: [sst3]")
    with pytest.raises(RunError, match="'run_dir' is missing"):
        read_sweep(file)
    file.write_text("tasks: [sst3")
    with pytest.raises(RunError, match="s.yml cannot be read"):
        read_sweep(file)
    with pytest.raises(RunError, match="absent.yml cannot be read"):
        read_sweep(tmp_path / "absent.yml")


def test_a_model_whose_text_model_is_a_part_of_it_has_a_depth(tmp_path):
    part = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    Gemma3Config(text_config=part, vision_config=part).save_pretrained(tmp_path / "model")
    assert weights_of(sweep_of(tmp_path, models=[str(tmp_path / "model")]).jobs[0]) > 12 * 2 * 16**2
    with pytest.raises(RunError, match="lower mi_layers"):
        sweep_of(tmp_path, models=[{"start": str(tmp_path / "model"), "mi_layers": [0, 2]}])


def test_commands_in_the_help_and_the_readme_are_understood():
    shown = re.findall(r"-m carma_lib (sweep [^\n#]*)", SWEEP_EPILOG + (ROOT / "README.md").read_text())
    assert len(shown) >= 8
    for command in shown:
        words = re.split(r" {3,}", command)[0].split()
        options = build_parser().parse_args(words)
        assert not str(options.file).startswith("sweeps/") or (ROOT / options.file).is_file()


# -- the plan --------------------------------------------------------------------------------------

def test_the_plan_counts_weights_time_and_disk(tmp_path):
    sweep = sweep_of(tmp_path, methods=["untuned", "fine_tuning"], seeds=[1, 2])
    rows = build_task(SENTIMENT, tmp_path / "rows")["train"]
    tokenizer = train_tokenizer(rows["text"], vocabulary_size=400)
    model = small_model("gpt2", tokenizer, layers=2, width=32, heads=2)
    assert weights_of(sweep.jobs[0]) == pytest.approx(model.num_parameters(), rel=0.35)
    found = estimate(sweep, workers=2)
    assert (found.done, found.open, found.measured) == (0, 4, False)
    weights = 400 * 32 + 12 * 2 * 32**2
    assert found.disk == 4 * weights * (2 + 2) + 24 * weights * 2, "two starts, two trained models, two in work"
    assert found.seconds == pytest.approx(2 * 1.5 * 4 * 0.03 + 2 * 0.5 * 4 * 0.03)
    text = plan_text(sweep, workers=2)
    assert "4 cells: 0 done, 4 open; 2 local processes" in text and "by a rule" in text
    with pytest.raises(RunError, match="needs about 1.0 GiB more and its disk has 1 MiB free; free some"):
        check_disk(sweep, type(found)(0, 4, 1.0, False, 2**30, 2**20))
    assert not (tmp_path / "small").exists(), "a plan touches nothing"


def test_adapters_and_shared_starts_take_little_disk(tmp_path, damaged):
    lora = {"start": str(damaged), "adapter": "lora", "lora_rank": 4, "precision": "float32"}
    found = {}
    for name, changes in (("none", {"adapter": "none"}), ("lora", {}), ("half", {"precision": "bf16"}),
                          ("qlora", {"adapter": "qlora"})):
        sweep = sweep_of(tmp_path, models=[{**lora, **changes}], methods=["untuned", "carma"], seeds=[1, 2, 3])
        found[name], weights = estimate(sweep, workers=2).disk, weights_of(sweep.jobs[0])
    trained = (3 * 4 + 2 * 24) * 4 * 22 * 2 * 16
    assert found == {"none": 4 * weights + (3 * 4 + 2 * 24) * weights, "lora": 4 * weights + trained,
                     "half": 2 * weights + trained, "qlora": weights + trained}
    start = sweep.jobs[0].run_dir / "models" / sweep.jobs[0].start.place
    start.mkdir(parents=True)
    (start / "cell.json").write_text("{}")
    done = sweep_of(tmp_path, models=[{**lora, "adapter": "qlora"}], methods=["carma"])
    assert estimate(done).disk == (4 + 24) * 4 * 22 * 2 * 16, "a start that is there takes no more"


def test_the_time_of_a_rule_for_cpu_cores_is_told_as_such(tmp_path, monkeypatch):
    sweep = sweep_of(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert "(by a rule, until cells have ended)" in plan_text(sweep)
    elsewhere = plan_text(sweep, scheduler="tcp://127.0.0.1:9")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    for text in (elsewhere, plan_text(sweep), plan_text(sweep, workers=3)):
        assert "by a rule for CPU cores, until cells have ended; a GPU is much faster" in text


# -- the run ---------------------------------------------------------------------------------------

def save_model(folder):
    tokenizer = train_tokenizer(["a small bird"], vocabulary_size=300, whole_tokens=["positive", "neutral", "negative"])
    for part in (small_model("llama", tokenizer, layers=2, width=16, heads=2), tokenizer):
        part.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    """A model folder whose weights were cut short, as by a broken copy."""
    folder = save_model(tmp_path_factory.mktemp("models") / "damaged")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    return folder


def test_a_damaged_model_fails_and_the_others_are_done_and_stay_done(tmp_path, damaged):
    sweep = sweep_of(tmp_path, models=[str(damaged), "random"], methods=["fine_tuning", "carma"])
    with ThreadPoolExecutor(1) as executor:
        end = run_sweep(sweep, executor, retries=1)
        broken = [job.name for job in sweep.jobs if job.model.startswith("damaged-")]
        assert list(end.failed) == broken and len(broken) == 2
        assert all("\n" not in reason and "damaged" in reason for reason in end.failed.values())
        assert "Traceback" in (sweep.run_dir / "failures" / f"{broken[0]}.txt").read_text()
        status = read_json(sweep.run_dir / "status.json")
        assert status["counts"] == {"done": 2, "open": 0, "failed": 2, "lost": 0}
        results = read_results(sweep.run_dir / "results.parquet")
        assert set(results.method) == {"fine_tuning", "carma"} and set(results.start) == {"random"}
        assert set(results.condition) == {"clean", "replaced", "pooled"}
        assert list(pd.read_csv(sweep.run_dir / "tables" / "failed_cells.csv").method) == ["fine_tuning", "carma"]
        assert "failed cells" in end.report.read_text() and "CARMA, new combinations" in end.report.read_text()
        text = plan_text(sweep, workers=1)
        assert "4 cells: 2 done, 2 open" in text
        again = run_sweep(sweep_of(tmp_path, models=["random"], methods=["fine_tuning", "carma"]), executor)
    assert not again.failed and "failed cells" not in again.report.read_text()
    logs = [[line["state"] for line in read_log(log_path(job))] for job in sweep.jobs]
    assert logs == [[], [], ["begun", "done"], ["begun", "done"]]


def test_a_cell_is_tried_again_as_often_as_asked_and_then_named(tmp_path):
    sweep = sweep_of(tmp_path, methods=["untuned", "fine_tuning"])
    work = sweep.jobs[1].run_dir / "work" / SENTIMENT / "fine_tuning"
    work.parent.mkdir(parents=True)
    work.write_text("a file where a folder must be")
    with ThreadPoolExecutor(1) as executor:
        end = run_sweep(sweep, executor, retries=2)
        assert list(end.failed) == [sweep.jobs[1].name] and "Error" in end.failed[sweep.jobs[1].name]
        assert [line["state"] for line in read_log(log_path(sweep.jobs[1]))] == ["begun", "failed"] * 3
        assert read_json(sweep.run_dir / "status.json")["cells"][sweep.jobs[1].name]["attempts"] == 3
        work.unlink()
        assert not run_sweep(sweep, executor, retries=0).failed
        assert not (sweep.run_dir / "failures" / f"{sweep.jobs[1].name}.txt").exists()
        with pytest.raises(ValueError, match="retries is -1"):
            run_sweep(sweep, executor, retries=-1)
    other = sweep_of(tmp_path, methods=["untuned", "fine_tuning"],
                     conditions={**sweep_text("")["conditions"], "rates": [0.4]})
    assert finished(sweep.jobs[1]) and not finished(other.jobs[1]), "other conditions are another cell"


def test_data_are_made_as_the_file_says_and_anew_where_it_says_otherwise(tmp_path, monkeypatch):
    seven = sweep_of(tmp_path, methods=["untuned"], data={SENTIMENT: {"seed": 7}})
    usual = sweep_of(tmp_path, methods=["untuned"])
    with ThreadPoolExecutor(1) as executor:
        for sweep, seed in ((seven, 7), (usual, 42)):
            assert "1 cells: 0 done, 1 open" in plan_text(sweep, workers=1)
            assert not run_sweep(sweep, executor).failed
            assert read_card(sweep.run_dir / "data" / SENTIMENT)["parameters"]["seed"] == seed
            assert "1 cells: 1 done, 0 open" in plan_text(sweep, workers=1)
    assert [line["state"] for line in read_log(log_path(usual.jobs[0]))] == ["begun", "done"] * 2
    monkeypatch.setattr("carma_lib.tasks.code_fingerprint", lambda *modules: "other rules")
    assert "1 cells: 0 done, 1 open" in plan_text(usual, workers=1), "data by other rules are made anew too"


def test_trainings_that_share_a_device_must_fit_together(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("carma_lib.lab.sweep_worker.check_memory", lambda *_, workers, **__: asked.append(workers))
    with ThreadPoolExecutor(1) as executor:
        run_sweep(sweep_of(tmp_path, "three", seeds=[1, 2, 3]), executor, sharing=2)
        run_sweep(sweep_of(tmp_path, "one"), executor, sharing=2)
    assert asked == [2, 1], "never more than there are trainings"
    for devices, found in (("", [4, 2, 1]), ("0,1", [2, 1, 1]), ("0,1,2", [2, 1, 1])):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", devices)
        assert [sharing(workers=4), sharing(), sharing(scheduler="tcp://127.0.0.1:9")] == found
    assert sharing(workers=3, gpus_each=2) == 3, "one group of two, and one GPU left over"
    monkeypatch.setattr("carma_lib.lab.sweep.run_sweep",
                        lambda *_, sharing, **__: asked.append(sharing) or SweepEnd(tmp_path, {}))
    assert main(["sweep", str(tmp_path / "one.yml"), "--workers", "9"]) == 0 and asked[-1] == 3


def test_models_that_differ_in_their_training_only_are_told_apart(tmp_path):
    sweep = sweep_of(tmp_path, methods=["untuned"], models=["random", {"start": "random", "batch_size": 4}])
    with ThreadPoolExecutor(1) as executor:
        assert not run_sweep(sweep, executor).failed
    models = set(read_results(sweep.run_dir / "results.parquet").model)
    assert models == {f"gpt2, 2 layers, width 32 ({job.model})" for job in sweep.jobs} and len(models) == 2


def test_folders_of_one_name_are_told_apart(tmp_path):
    folders = [str(save_model(tmp_path / name / "model")) for name in "ab"]
    sweep = sweep_of(tmp_path, models=folders, methods=["fine_tuning", "carma"])
    with ThreadPoolExecutor(1) as executor:
        assert not run_sweep(sweep, executor).failed
    assert set(read_results(sweep.run_dir / "results.parquet").model) == {f"model ({job.model})" for job in sweep.jobs}
    assert pd.read_csv(sweep.run_dir / "tables" / "primary_comparisons.csv").name.is_unique


def test_a_report_is_made_where_no_comparison_can_be(tmp_path):
    sweep = sweep_of(tmp_path, methods=["fine_tuning", "carma"], seeds=[1, 2])
    for job in (sweep.jobs[0], sweep.jobs[3]):
        work = job.run_dir / "work" / job.cell.place
        work.parent.mkdir(parents=True)
        work.write_text("a file where a folder must be")
    with ThreadPoolExecutor(1) as executor:
        end = run_sweep(sweep, executor, retries=0)
    assert len(end.failed) == 2 and "not tested" in end.report.read_text()


def test_a_full_disk_stops_the_sweep_in_one_line(tmp_path):
    sweep = sweep_of(tmp_path)
    log_path(sweep.jobs[0]).parent.mkdir(parents=True)
    log_path(sweep.jobs[0]).symlink_to("/dev/full")
    with ThreadPoolExecutor(1) as executor, pytest.raises(RunError, match="a disk is full, that of .*Errno 28"):
        run_sweep(sweep, executor)


def test_a_full_disk_elsewhere_is_named(tmp_path, monkeypatch):
    reason = "OSError: the disk is full while loading 'gpt2': free space, or set HF_HOME to a folder on another disk"
    monkeypatch.setattr("carma_lib.lab.sweep.prepare", lambda *_: Outcome("failed", 0.0, reason, "", disk_full=True))
    with ThreadPoolExecutor(1) as executor, pytest.raises(RunError, match="unless this names another: .* set HF_HOME"):
        run_sweep(sweep_of(tmp_path), executor)


def test_two_sweeps_do_not_share_a_folder(tmp_path):
    sweep = sweep_of(tmp_path)
    with locked(sweep.run_dir / "lock"), ThreadPoolExecutor(1) as executor:
        with pytest.raises(RunError, match="is in use by another sweep"):
            run_sweep(sweep, executor)


# -- where it runs ---------------------------------------------------------------------------------

def device_beside_another(folder, number):
    """Its GPU, once a second call runs beside it."""
    (folder / str(number)).touch()
    end = time.monotonic() + 200
    while len(list(folder.iterdir())) < 2 and time.monotonic() < end:
        time.sleep(0.05)
    return os.environ["CUDA_VISIBLE_DEVICES"]


def wait_for(found, seconds=600):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if value := found():
            return value
        time.sleep(0.02)
    raise TimeoutError(f"not after {seconds} s")


def kill_one_at_work(sweep, done=0, other_than=""):
    """Kill a worker in the middle of a cell, once so many cells are done; the cell's name."""
    def last_lines():
        found = {job.name: read_log(log_path(job)) for job in sweep.jobs}
        return {name: lines[-1] for name, lines in found.items() if lines and name != other_than}

    wait_for(lambda: sum(line["state"] == "done" for line in last_lines().values()) >= done)

    def kill():
        for name, line in last_lines().items():
            if line["state"] == "begun":
                os.kill(line["pid"], signal.SIGSTOP)  # so that it cannot end the cell between look and kill
                if last_lines()[name] == line:
                    os.kill(line["pid"], signal.SIGKILL)
                    return name
                os.kill(line["pid"], signal.SIGCONT)
        return None

    return wait_for(kill)


def test_local_workers_have_their_gpu_and_a_lost_one_is_replaced(tmp_path):
    sweep = sweep_of(tmp_path, seeds=[1, 2])
    lost = []
    killer = threading.Thread(target=lambda: lost.append(kill_one_at_work(sweep)), daemon=True)
    (tmp_path / "beside").mkdir()
    with LocalExecutor(2, devices=["5", "7"]) as executor:
        seen = [executor.submit(device_beside_another, tmp_path / "beside", number) for number in range(2)]
        assert {future.result(300) for future in seen} == {"5", "7"}
        killer.start()
        end = run_sweep(sweep, executor, retries=0)
        killer.join(10)
        with pytest.raises(WorkerLost, match="ended abruptly"):
            executor.submit(os._exit, 3).result(300)
    assert not end.failed and len(read_results(sweep.run_dir / "results.parquet").seed.unique()) == 2
    logs = {job.name: [line["state"] for line in read_log(log_path(job))] for job in sweep.jobs}
    assert logs.pop(lost[0]) == ["begun", "begun", "done"] and list(logs.values()) == [["begun", "done"]]
    assert read_json(sweep.run_dir / "status.json")["counts"] == {"done": 2, "open": 0, "failed": 0, "lost": 1}
    with pytest.raises(RuntimeError, match="is shut down"):
        executor.submit(abs, 1)
    with pytest.raises(ValueError, match="workers is 0"):
        LocalExecutor(0)


def test_gpus_are_those_that_are_visible(monkeypatch):
    for value, found in (("2,5", ["2", "5"]), ("", []), ("-1", [])):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
        assert gpus() == found
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3,4")
    assert gpu_groups() == ["0", "1", "2", "3", "4"] and gpu_groups(2) == ["0,1", "2,3"] and default_workers(2) == 2


def test_fewer_gpus_than_a_training_wants_are_refused(tmp_path, monkeypatch):
    sweep = sweep_of(tmp_path, settings={**sweep_text("")["settings"], "processes": 2})
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    for workers in (None, 1):
        with pytest.raises(RunError, match="processes: 2 and wants a GPU for each, but 1 can be used here; lower"):
            plan_text(sweep, workers=workers)
        with pytest.raises(RunError, match="wants a GPU for each"), open_executor(workers=workers, gpus_each=2):
            pass
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert "2 local processes" in plan_text(sweep) and gpu_groups(2) == [], "without any GPU, on the CPU"


def test_a_worker_chooses_its_gpu_before_torch_is_loaded():
    code = "import sys, carma_lib.lab.sweep_executors; sys.exit('torch' in sys.modules or 'distributed' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_scheduler_that_is_not_there_and_dask_that_is_not_installed(tmp_path, monkeypatch):
    monkeypatch.setattr("carma_lib.lab.sweep_executors.CONNECT_SECONDS", 1)
    for address in ("tcp://127.0.0.1:9", "nonsense://x"):
        with pytest.raises(RunError, match=f"no Dask scheduler answers at {address}; start one with"):
            with open_executor(scheduler=address):
                pass
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(RunError, match=r"--scheduler needs distributed, which is not installed: pip install"):
        with open_executor(scheduler="tcp://127.0.0.1:9"):
            pass


def test_slurm_jobs_are_what_the_file_says(tmp_path, monkeypatch):
    count, cluster = slurm_cluster(ROOT / "sweeps" / "slurm.example.yml")
    with cluster:
        script = cluster.job_script()
    assert count == 4 and "#SBATCH --gres=gpu:1" in script and "--nthreads 1" in script and "OMP_NUM_THREADS=8" in script
    assert "--lifetime 465m" in script and "-t 08:00:00" in script
    for text, message in (("queue: gpu", "must hold 'jobs: <number>'"), ("jobs: 1\nqueeue: x\ncores: 1\nmemory: 1GB", "queeue"),
                          ("jobs: [", "cannot be read"),
                          ("jobs: 1\ncores: 1\nmemory: 1GB\ninterface: none0", "'none0' is not a valid network")):
        (tmp_path / "slurm.yml").write_text(text)
        with pytest.raises(RunError, match=message):
            slurm_cluster(tmp_path / "slurm.yml")
    if shutil.which("sbatch") is None:
        with pytest.raises(RunError, match="sbatch, which is not on this machine"):
            with open_executor(slurm=ROOT / "sweeps" / "slurm.example.yml"):
                pass


def test_the_command_plans_and_refuses_in_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["sweep", str(ROOT / "sweeps" / "example.yml"), "--dry-run", "--workers", "2"]) == 0
    assert "36 cells: 0 done, 36 open; 2 local processes" in capsys.readouterr().out and not list(tmp_path.iterdir())
    assert main(["sweep", "absent.yml"]) == 1
    assert capsys.readouterr().err.startswith("carma_lib: absent.yml cannot be read")
