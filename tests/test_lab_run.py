"""`run` and sweeps on real local workers: failures, lost workers, interruptions, and the same tables however it went."""
import os
import re
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import pytest
import yaml
from lab_cells import DICTIONARY, RECIPE, SENTIMENT, SMALL, block, cell_of, kill_one_at_work, states, wait_for

from carma_lib.__main__ import SWEEP_EPILOG, build_parser, main
from carma_lib.files import RunError, read_json
from carma_lib.lab.cell import cell_folder, read_plan, save_plan
from carma_lib.lab import cluster, memory, run as runs, tables, worker
from carma_lib.lab.cluster import local_client, read_slurm
from carma_lib.lab.estimate import estimate
from carma_lib.lab.evaluate import asked_rows, split_prompts
from carma_lib.lab.measure import _before
from carma_lib.lab.plan import read_sweep
from carma_lib.lab.memory import estimate_memory
from carma_lib.lab.run import CellFailed, _Book, _share, run
from carma_lib.lab.start import config_of, rows_of, tokenizer_of, training_rows
from carma_lib.lab.sweep import Where, plan_text, run_sweep
from carma_lib.lab.tables import pack, read_cells, trained_again
from carma_lib.lab.worker import attempts
from carma_lib.stats.table import read_results
from carma_lib.tasks import build_task

ROOT = Path(__file__).resolve().parent.parent
COLUMNS = ["cell", "split", "item_id", "budget", "condition", "rate", "start_layer", "protocol", "level", "prediction", "correct",
           "rank", "log_probability"]


def sweep_file(tmp_path, name="small.yml", **changes):
    """A sweep of tiny cells; None takes a key away."""
    conditions = {key: SMALL[key] for key in ("rates", "depth_shares", "protocols", "levels", "test_splits", "test_items",
                                              "pooled_items", "measures")}
    settings = {key: value for key, value in SMALL.items() if key not in conditions}
    text = {"run_dir": str(tmp_path / "run"), "tasks": [SENTIMENT], "models": ["random"], "methods": ["fine_tuning", "carma"],
            "seeds": [1, 2], "settings": settings, "conditions": conditions} | changes
    plain = yaml.safe_load(yaml.dump({key: value for key, value in text.items() if value is not None}).replace("!!python/tuple", ""))
    (tmp_path / name).write_text(yaml.safe_dump(plain))
    return tmp_path / name


def table_of(folder):
    rows = pd.read_parquet(folder / "results.parquet")[COLUMNS]
    return rows.astype(str).sort_values(COLUMNS).reset_index(drop=True)


# -- what a sweep file may not say -----------------------------------------------------------------

@pytest.mark.parametrize(("changes", "message"), [
    (dict(speed=3), "unknown setting 'speed'; did you mean 'seeds'?"),
    (dict(tasks=[]), "tasks is a list of at least one"), (dict(tasks="sst3"), "'tasks' must be a list, not 'sst3'"),
    (dict(tasks=["sst4"]), "unknown task 'sst4'; the tasks are"), (dict(tasks=[[1]]), "'tasks.0' must be a valid string"),
    (dict(methods=["cramming"]), "unknown method 'cramming'; the methods are untuned"),
    (dict(seeds=[1, 1]), "seeds names something twice"), (dict(seeds=[0.5]), "'seeds.0' must be a valid integer"),
    (dict(seeds=[True]), "'seeds.0' must be a valid integer"), (dict(seeds=[2**32]), "seed must be a whole number"),
    (dict(run_dir=3), "'run_dir' must be a valid string"), (dict(run_dir=" "), "'run_dir' must be a name, not ' '"), (dict(self=3), "unknown setting 'self'"),
    (dict(seeds=None, sedes=[1]), "unknown setting 'sedes'; did you mean 'seeds'?"), (dict(run_dir=None), "'run_dir' is missing"),
    (dict(settings={"stepz": 3}), "unknown setting 'stepz'"), (dict(settings={"steps": "3"}), "'steps' must be a valid integer"),
    (dict(settings={"steps": {"inverse_dictionary": 3}}), "steps has no number for 'sentiment'"),
    (dict(settings={"layers": 2, "mi_layers": [0, 2], "steps": 9, "warmup_steps": 1}), "mi_layers"),
    (dict(settings={"mi_layers": 3}), "'mi_layers' must be"), (dict(settings=[3]), "'settings' must be names with values"),
    (dict(conditions={"rate": [0.1]}), "conditions has the unknown key 'rate'"),
    (dict(conditions={"rates": [2]}), "'rates.0' must be"), (dict(conditions={"rates": ["a"]}), "'rates.0' must be"),
    (dict(data=[3]), "'data' must be names with values"), (dict(data={"sst3": {}}), "data names 'sst3', which is no task of the sweep"),
    (dict(data={SENTIMENT: {"split": "row"}}), "unknown setting 'split'; did you mean 'split_by'?"),
    (dict(data={SENTIMENT: {"seed": "7"}}), f"data of {SENTIMENT}: 'seed' must be a valid integer, not '7'"),
    (dict(models=[3]), "a mapping with 'start'"), (dict(models=[{"family": "llama"}]), "a mapping with 'start'"),
    (dict(models=["random", {"start": "random"}]), "two models of the file are trained alike"),
    (dict(models=[{"start": "random", "rates": [0.25]}, {"start": "random", "rates": [0.4]}]), "two models of the file are trained alike"),
    (dict(models=["nowhere/no-model"]), "'nowhere/no-model'")])
def test_what_a_file_may_not_say_is_one_line(tmp_path, changes, message):
    with pytest.raises(RunError) as error:
        read_sweep(sweep_file(tmp_path, **changes))
    assert message in str(error.value) and "\n" not in str(error.value) and "small.yml" in str(error.value)


def test_the_example_is_a_sweep_and_help_shows_commands_that_are_understood():
    sweep = read_sweep(ROOT / "sweeps" / "example.yml")
    assert len(sweep.cells) == 36 == len({cell.key for cell in sweep.cells})
    assert {cell.recipe.steps for cell in sweep.cells if cell.task == SENTIMENT} == {150}
    for command in re.findall(r"-m carma_lib (sweep [^\n#]*)", SWEEP_EPILOG):
        options = build_parser().parse_args(re.split(r" {3,}", command)[0].split())
        assert not str(options.file).startswith("sweeps/") or (ROOT / options.file).is_file()


def test_slurm_files(tmp_path):
    jobs, keys = read_slurm(ROOT / "sweeps" / "slurm.example.yml")
    assert jobs == 4 and keys["processes"] == 1
    (tmp_path / "no.yml").write_text("queue: gpu")
    with pytest.raises(RunError, match="must hold 'jobs: <number>'"):
        read_slurm(tmp_path / "no.yml")


# -- run -------------------------------------------------------------------------------------------

def test_plans_go_from_one_notebook_to_the_next(tmp_path):
    cells = [cell_of("fine_tuning"), cell_of("carma", strength=0.3, seed=2)]
    save_plan(tmp_path, cells)
    assert read_plan(tmp_path) == cells
    assert [cell.recipe.rates for cell in read_plan(tmp_path, rates=[0.4])] == [(0.4,), (0.4,)]
    with pytest.raises(ValueError, match="'steps' is no setting of the tests"):
        read_plan(tmp_path, steps=3)
    with pytest.raises(FileNotFoundError, match="run notebook 02 first"):
        read_plan(tmp_path / "empty")


def test_the_first_failure_stops_or_is_collected_and_is_tried_again(folder, client):
    good, bad = cell_of("fine_tuning"), cell_of("carma", seed=3)
    stone = block(folder, bad)
    with pytest.raises(CellFailed, match="carma/seed-3: "):
        run([bad], folder, client)
    failed = run([good, bad], folder, client, retries=1, errors="collect")
    assert list(failed) == [bad] and "\n" not in failed[bad]
    assert states(folder, bad) == ["begun", "failed"] * 3 and states(folder, good) == ["begun", "done"]
    status = read_json(folder / "cells" / "status.json")
    assert status["counts"] == {"done": 1, "open": 0, "failed": 1, "lost": 0}
    assert "Traceback" in (cell_folder(folder, bad) / "failure.txt").read_text()
    stone.unlink()
    assert run([good, bad], folder, client) == {} and states(folder, good) == ["begun", "done"]
    assert not (cell_folder(folder, bad) / "failure.txt").exists()


def test_a_training_that_does_not_fit_stops_no_other(folder, client, monkeypatch):
    small, large = cell_of(), cell_of(batch_size=2**24)
    for cells in ([small, large], [large, small]):
        failed = run(cells, folder, client, errors="collect")
        assert list(failed) == [large] and "GiB" in failed[large]
    small, large = cell_of("fine_tuning"), cell_of("l2_sp")  # which keeps the start
    longest = max(len(row["input_ids"]) for row in training_rows(folder, small))
    needed = [estimate_memory(config_of(small), RECIPE, tokens=longest, l2_sp=l2_sp).total for l2_sp in (False, True)]
    monkeypatch.setattr(memory, "available_memory", lambda: (sum(needed) // 2, "in memory"))
    assert list(run([small, large], folder, client, errors="collect")) == [large]


def test_a_model_that_is_not_kept_cannot_be_tested_later(folder, client):
    with pytest.raises(ValueError, match="carma/seed-1 has keep_model=False, so nothing would be left to test"):
        run([cell_of(keep_model=False)], folder, client, stage="trained")


def test_an_archive_in_the_run_folder_holds_the_cells_that_are_asked_for(trained_run, folder, client):
    for steps in (6, 4):
        cells = [cell_of("fine_tuning", steps=steps, seed=2**32 - 1)]
        run(cells, folder, client, collect=lambda: pack(folder, cells, folder))
    results = pd.read_parquet(folder / "results.parquet")
    assert set(results.cell) == {cells[0].key} and set(results.seed) == {2**32 - 1}


def test_memory_of_data_ends_with_the_data(folder, monkeypatch):
    """A worker, or a kernel, may live longer than the data of a run folder; a pretrained start's tokenizer stays."""
    tokenizer = tokenizer_of(folder, cell_of())
    for module in ("start", "evaluate"):
        monkeypatch.setattr(f"carma_lib.lab.{module}.tokenizer_of", lambda folder, cell: tokenizer)

    def read():
        return (training_rows(folder, cell_of()), rows_of(folder, SENTIMENT)["test_seen"]["text"][:],
                asked_rows(folder, cell_of(), "test_seen")["text"][:], [batch["input_ids"].tolist() for batch in split_prompts(folder, cell_of(), "test_seen").batches])

    before = read()
    build_task(SENTIMENT, folder / "data" / SENTIMENT, seed=7)
    assert all(old != new for old, new in zip(before, read()))


def test_small_starts_of_one_shape_and_two_vocabularies_are_measured_each(folder):
    measures = [_before(folder, cell_of(vocabulary_size=size, measures=("perplexity",)))[0]["value"] for size in (300, 400)]
    assert measures[0] != measures[1]


def test_cells_are_made_in_their_order(folder, client):
    """The first that a worker gets may be any, since all become ready at once."""
    cells = [cell_of("untuned", seed=seed) for seed in (7, 3, 9, 1, 8, 2, 6, 4)]
    assert run(cells, folder, client) == {}
    begun = sorted(cells, key=lambda cell: attempts(cell_folder(folder, cell))[0]["time"])
    assert [cell for cell in begun if cell != begun[0]] == [cell for cell in cells if cell != begun[0]]


def test_cells_of_one_name_are_told_apart(folder, client, capsys):
    cells = [cell_of(learning_rate=rate, trial=True) for rate in (0.01, 0.02)]
    assert cells[0].name == cells[1].name
    for cell in cells:
        block(folder, cell)
    assert set(run([*cells, cell_of("untuned")], folder, client, errors="collect", stage="trained")) == set(cells)
    listed = read_json(folder / "cells" / "status.json")["cells"]
    assert {name: facts["state"] for name, facts in listed.items()} == {
        **{f"{cell.name}-{cell.key}": "failed" for cell in cells}, cell_of("untuned").name: "done"}
    said = "".join(capsys.readouterr())
    assert all(f"{cell.name}-{cell.key} failed: " in said for cell in cells)


def test_an_archive_keeps_finished_cells_and_gives_them_back(trained_run, tmp_path):
    cells = [cell_of("fine_tuning"), cell_of("carma")]
    pack(trained_run, cells[:1], tmp_path)
    pack(trained_run, cells, tmp_path)
    facts, measures = read_cells(tmp_path)
    assert list(facts["cell"]) == [cell.key for cell in cells] and len(read_results(tmp_path / "results.parquet"))
    assert set(measures["cell"]) == set(facts["cell"])


def test_earlier_rules_counted_a_tie_as_wrong(trained_run, tmp_path):
    cell = cell_of("carma")
    pack(trained_run, [cell], tmp_path)
    table = pd.read_parquet(tmp_path / "results.parquet")
    right = table.index[table["correct"]][:4]
    assert len(right) == 4
    table["prediction"] = table["prediction"].astype(str)
    table.loc[right, ["correct", "rank"]] = False, 2
    table.loc[right, "prediction"] = [f"{table.target[right[0]]}#7", f"{table.target[right[1]]}#7", "else#7", table.target[right[3]]]
    table.loc[right[1], "prediction_probability"] *= 1.05  # another token of the same letters
    table.to_parquet(tmp_path / "results.parquet")
    facts = pd.read_parquet(tmp_path / "cells.parquet")
    for rules, judged in (("2.2", [True, False, False, False]), ("2.6", [False] * 4)):
        facts.assign(rules=rules).to_parquet(tmp_path / "cells.parquet")
        found = tables.read_answers(tmp_path, read_cells(tmp_path)[0])
        assert found.loc[right, "correct"].tolist() == judged and found.loc[right, "rank"].tolist() == [2 - each for each in judged]
        assert found["correct"].drop(right).equals(table["correct"].drop(right))
        assert tables.read_answers(tmp_path, read_cells(tmp_path)[0], as_tested=True)["correct"].equals(table["correct"])


def test_one_archive_holds_no_two_precisions_of_a_start(trained_run, tmp_path):
    cells = [cell_of("fine_tuning"), cell_of("carma")]
    pack(trained_run, cells[:1], tmp_path)
    facts = pd.read_parquet(tmp_path / "cells.parquet").assign(bf16=True)  # as on a machine that computes it natively
    facts.to_parquet(tmp_path / "cells.parquet")
    with pytest.raises(RunError, match="^of the cells from random, 1 were computed in bf16 and 1 in float32, .* end in [0-9a-f]{10}\\), and go on"):
        pack(trained_run, cells[1:], tmp_path)
    assert pd.read_parquet(tmp_path / "cells.parquet").equals(facts)
    facts.assign(change="precision", value="bf16").to_parquet(tmp_path / "cells.parquet")
    assert len(pack(trained_run, cells[1:], tmp_path)) == 2
    tables._check_precision(pd.DataFrame({"start": ["a", "b", "a"], "bf16": [True, False, None], "change": ""}))


def test_runs_that_pack_into_one_archive_at_once_lose_no_cell(trained_run, tmp_path, monkeypatch):
    read = tables.read_facts

    def read_slowly(archive):
        found = read(archive)
        time.sleep(0.3)
        return found

    monkeypatch.setattr(tables, "read_facts", read_slowly)
    cells = [cell_of("fine_tuning"), cell_of("carma")]
    with ThreadPoolExecutor(2) as threads:
        list(threads.map(lambda cell: pack(trained_run, [cell], tmp_path), cells))
    assert set(read_cells(tmp_path)[0]["cell"]) == {cell.key for cell in cells}


def test_cells_trained_again_are_set_beside_the_archive(trained_run, tmp_path):
    cells = [cell_of("fine_tuning"), cell_of("carma")]
    archive = tmp_path / "archive"
    pack(trained_run, cells, archive)
    table = trained_again(cells, trained_run, archive)
    assert list(table["method"]) == ["fine_tuning", "carma"] and (table["results"] > 10).all()
    differs = ["other predictions", "largest difference, log probability", "largest difference, value"]
    assert table[differs].eq(0).all(axis=None) and pd.read_csv(archive / "repeated.csv").equals(table)

    other = pd.read_parquet(archive / "results.parquet")
    other.loc[3, "log_probability"] += 0.25
    other.loc[4, "prediction"] += "x"
    other.loc[[5], "log_probability"] = np.nan
    other.to_parquet(archive / "results.parquet")
    table = trained_again(cells, trained_run, archive)
    assert list(table["other predictions"]) == [1, 0] and list(table["largest difference, log probability"]) == [np.inf, 0]
    other.drop(5).to_parquet(archive / "results.parquet")
    with pytest.raises(RunError, match="trained again it has other rows"):
        trained_again(cells, trained_run, archive)


def test_what_will_be_asked_is_encoded_before_a_training(folder, monkeypatch):
    """A text that is too long for a model is told then, not when hours of training are over."""
    asked = []
    monkeypatch.setattr(worker, "split_prompts", lambda folder, cell, split, texts=None: asked.append((split, texts)))
    cell = cell_of("carma", rates=(0.25, 0.4), test_splits=("test_seen", "test_held_out"), changed_splits=("test_seen",))
    worker.prepare(folder, [cell], 1, "tested")
    assert [(split, texts is None) for split, texts in asked] == [
        ("test_seen", True), ("test_held_out", True), ("test_seen", False), ("test_seen", False)]
    assert all(len(texts) == cell.recipe.test_items for _, texts in asked[2:])


def test_the_progress_of_a_cell_never_goes_back(trained_run, folder):
    cell = cell_of("carma")
    work = cell_folder(folder, cell) / "work"
    shown = [_share(folder, cell)]
    work.mkdir(parents=True)
    for step in ("", "3 6", "6 6"):
        (work / "step").write_text(step)
        shown.append(_share(folder, cell))
    assert shown == [0, 0, 0.45, 0.9] and _share(trained_run, cell) == 0, "tests are the last tenth"
    _Book(folder, [cell], "tested", lambda cell: False)
    assert _share(folder, cell) == 0, "what a killed run left there is not counted"


def test_the_second_run_in_a_folder_is_refused(folder):
    code = ("import sys, time; from pathlib import Path; from carma_lib.files import locked\n"
            f"with locked(Path({str(folder / 'cells' / 'lock')!r})): print('held', flush=True); time.sleep(60)")
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(RunError, match="is in use by another run"):
            run([cell_of()], folder)
    finally:
        holder.kill()
        holder.wait()


# -- a sweep on local workers ----------------------------------------------------------------------

def test_a_sweep_with_a_killed_worker_and_a_failing_cell_gives_what_an_undisturbed_one_gives(tmp_path, client):
    """Eight cells on two workers, one of them killed, one cell made to fail, then repaired; against an unbroken sweep of a scheduler."""
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    calm = read_sweep(sweep_file(tmp_path / "one", tasks=[SENTIMENT, DICTIONARY]))
    at_once = Where(scheduler=client.scheduler.address)
    report, failed = run_sweep(calm, at_once)
    assert not failed and report.is_file()
    sweep = read_sweep(sweep_file(tmp_path / "two", tasks=[SENTIMENT, DICTIONARY]))
    bad = sweep.cells[-1]
    stone = block(sweep.run_dir, bad)
    killed = []
    killer = threading.Thread(target=lambda: killed.append(kill_one_at_work(sweep.run_dir, sweep.cells, done=1, but=bad)))
    killer.start()
    _, failed = run_sweep(sweep, Where(workers=2), retries=1)
    killer.join(timeout=60)
    assert list(failed) == [bad] and killed
    attempts = {cell: states(sweep.run_dir, cell) for cell in sweep.cells}
    assert attempts[bad] == ["begun", "failed"] * 2 and attempts[killed[0]] == ["begun", "begun", "done"]
    assert all(line == ["begun", "done"] for cell, line in attempts.items() if cell not in (bad, killed[0]))
    assert read_json(sweep.run_dir / "cells" / "status.json")["counts"] == {"done": 7, "open": 0, "failed": 1, "lost": 1}
    done = table_of(sweep.run_dir)
    pd.testing.assert_frame_equal(done, table_of(calm.run_dir)[lambda rows: rows.cell != bad.key].reset_index(drop=True))
    assert (sweep.run_dir / "tables" / "failed_cells.csv").is_file()
    stone.unlink()
    _, failed = run_sweep(sweep, at_once)
    assert not failed and all(states(sweep.run_dir, cell) == attempts[cell] for cell in sweep.cells if cell != bad)
    pd.testing.assert_frame_equal(table_of(sweep.run_dir), table_of(calm.run_dir))
    assert (sweep.run_dir / "report.html").read_bytes() == (calm.run_dir / "report.html").read_bytes().replace(
        str(calm.run_dir).encode(), str(sweep.run_dir).encode())
    found = estimate(sweep)
    assert found.open == () and "8 cells: 8 done, 0 open" in plan_text(sweep, Where(workers=2))


def test_a_worker_that_is_lost_to_one_cell_is_lost_to_no_other(folder, monkeypatch):
    """Dask counts the loss for all cells that wait at that worker."""
    monkeypatch.setitem(cluster.SETTINGS, "distributed.scheduler.allowed-failures", 0)
    monkeypatch.setattr(runs, "LOST_WORKERS", 0)
    cells, killed = [cell_of(training_items=64 + number) for number in range(3)], []
    killer = threading.Thread(target=lambda: killed.append(kill_one_at_work(folder, cells)))
    killer.start()
    failed = run(cells, folder, workers=1, errors="collect")
    killer.join(timeout=60)
    assert list(failed) == killed and failed[killed[0]] == "its worker ended abruptly 1 times (killed, or out of memory)"
    assert all(states(folder, cell) == (["begun"] if cell in killed else ["begun", "done"]) for cell in cells)


def test_a_stopped_sweep_ends_soon_with_one_line_and_goes_on(tmp_path):
    file = sweep_file(tmp_path, methods=["carma"], settings={**{key: list(value) if isinstance(value, tuple) else value for key, value in SMALL.items()
                                                               if key not in ("rates", "depth_shares", "protocols", "levels", "test_splits", "test_items", "pooled_items", "measures")},
                                                             "steps": 100_000})
    process = subprocess.Popen([sys.executable, "-m", "carma_lib", "sweep", str(file), "--workers", "1"], cwd=ROOT, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "PYTHONWARNINGS": "ignore:own"})
    cells = read_sweep(file).cells
    try:
        wait_for(lambda: sum(states(tmp_path / "run", cell) == ["begun"] for cell in cells) == 1)
        children = psutil.Process(process.pid).children(recursive=True)
        began = time.monotonic()
        process.terminate()
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    last = errors.rstrip().splitlines()[-1]
    assert process.returncode == 143 and "what is done is kept, the same command goes on" in last
    assert "Traceback" not in errors and not psutil.wait_procs(children, timeout=20)[1]
    assert time.monotonic() - began < 40  # 5 s on a quiet machine


def test_workers_end_with_a_killed_parent(tmp_path):
    code = ("from carma_lib.lab.cluster import local_client\nimport time\n"
            "if __name__ == '__main__':\n    with local_client(2) as client:\n        client.wait_for_workers(2)\n        print('up', flush=True)\n        time.sleep(600)")
    (tmp_path / "parent.py").write_text(code)
    parent = subprocess.Popen([sys.executable, str(tmp_path / "parent.py")], stdout=subprocess.PIPE, text=True, cwd=ROOT,
                              env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert parent.stdout.readline() == "up\n"
    children = psutil.Process(parent.pid).children(recursive=True)
    assert len(children) >= 2
    parent.kill()
    parent.wait()
    assert not psutil.wait_procs(children, timeout=20)[1]


def test_a_script_without_a_guard_is_told_so_in_one_line(tmp_path):
    (tmp_path / "script.py").write_text("from carma_lib.lab.cluster import local_client\nwith local_client(2):\n    pass")
    ended = subprocess.run([sys.executable, str(tmp_path / "script.py")], capture_output=True, text=True, cwd=ROOT,
                           env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert ended.returncode == 1 and ended.stderr.count("Traceback") == 1
    assert re.fullmatch(r"carma_lib\.files\.RunError: the workers end as they start \(.+\); .*'if __name__ == \"__main__\":'.*",
                        ended.stderr.rstrip().splitlines()[-1])


def test_workers_have_their_own_settings_and_wrong_numbers_are_refused():
    with pytest.raises(ValueError, match="workers is 0"), local_client(0):
        pass
    with local_client(1) as client:
        assert client.submit(os.environ.get, "OMP_WAIT_POLICY").result() == "PASSIVE"


@pytest.mark.parametrize(("visible", "size", "groups"), [
    ("0,1,2,3", 1, ["0", "1", "2", "3"]), ("0,1,2,3", 2, ["0,1", "2,3"]), ("4,7,9", 2, ["4,7"]), ("", 2, []), ("-1", 1, [])])
def test_each_worker_has_gpus_of_its_own(monkeypatch, visible, size, groups):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert cluster.gpu_groups(size) == groups and cluster.default_workers(size) == (len(groups) or 2)


def test_fewer_gpus_than_a_training_takes_are_refused(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    with pytest.raises(RunError, match="needs a GPU for each, but 2 can be used here"):
        cluster.gpu_groups(4)


def test_a_dry_run_of_a_sweep_does_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cluster, "ANSWER_SECONDS", 0.5)
    assert main(["sweep", str(sweep_file(tmp_path)), "--dry-run"]) == 0
    assert "4 cells: 0 done, 4 open; 2 local processes" in capsys.readouterr().out and not (tmp_path / "run").exists()
    assert main(["sweep", str(sweep_file(tmp_path)), "--scheduler", "tcp://127.0.0.1:1"]) == 1
    assert "no Dask scheduler answers at tcp://127.0.0.1:1" in capsys.readouterr().err


def test_data_that_a_file_does_not_speak_of_are_the_usual_ones(tmp_path):
    """Also where an earlier form of the file asked for others, so that what it says is what is made."""
    assert read_sweep(sweep_file(tmp_path, data={SENTIMENT: {"seed": 7}})).data == {SENTIMENT: {"seed": 7}}
    assert read_sweep(sweep_file(tmp_path)).data == {SENTIMENT: {}}
