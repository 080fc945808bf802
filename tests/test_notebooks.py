"""Notebooks 1 to 4, which hand files on to one another, at CI scale: a whole run, and one broken off twice and gone on with."""
import os
import signal
import subprocess
import time

import pandas as pd
import pytest
from road import check_made, command, environment, project, ran

from carma_lib.files import read_json
from carma_lib.stats.metrics import CONDITION_COLUMNS
from carma_lib.stats.table import at_the_end, read_results

PATIENCE = 900  # seconds until something must have happened


def keep(name):
    return name < "05"


def start(run_dir, *more, root):
    return subprocess.Popen(command(run_dir, *more), cwd=root, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                            text=True, start_new_session=True)


def wait_for(condition, process):
    end = time.monotonic() + PATIENCE
    while not condition():
        assert process.poll() is None, process.communicate()[0][-3000:]
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.3)


def children(process):
    import psutil

    return psutil.Process(process.pid).children(recursive=True)


def all_gone(processes):
    import psutil

    return not psutil.wait_procs(processes, timeout=60)[1]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    return ran(project(tmp_path_factory.mktemp("unbroken"), keep))


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_an_interrupted_and_killed_run_gives_the_same_answers_when_resumed(unbroken, tmp_path):
    """Notebooks 1 to 3 of one task and two seeds: what a cell's model answers does not depend on other cells."""
    folder = project(tmp_path, lambda name: name < "04", **{"02_finetune": {"seeds": [1, 2], "tasks": ["controlled_sentiment"]}})
    run_dir = folder / "run"
    process = start(run_dir, root=folder)
    wait_for(lambda: any(run_dir.glob("cells/*/*/carma/seed-*/trained.json")), process)
    helpers = children(process)
    process.send_signal(signal.SIGINT)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 130, output[-2000:]
    assert helpers and all_gone(helpers)
    assert "carma_lib: interrupted; what is done is kept, --resume goes on from there" in output
    assert read_json(run_dir / "status.json")["notebooks"]["02_finetune"]["state"] == "interrupted"
    assert not (run_dir / "report.html").exists() and not (run_dir / "notebooks" / "02_finetune.ipynb").exists()

    process = start(run_dir, "--resume", root=folder)
    wait_for(lambda: any(run_dir.glob("cells/*/*/*/seed-*/tested.json")), process)
    helpers = children(process)
    process.kill()
    process.wait()
    assert helpers and all_gone(helpers)
    assert not (run_dir / "results.parquet").exists()

    done = subprocess.run(command(run_dir, "--resume"), cwd=folder, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
    assert "01_data_construction: done before, skipped" in done.stdout
    found, whole = (read_results(of / "results.parquet") for of in (run_dir, unbroken))
    whole = whole[whole.seed.isin([1, 2]) & (whole.task == "controlled_sentiment")]
    rows = [table.astype({name: str for name in table.select_dtypes("category")}).sort_values(
        ["cell", "budget", *CONDITION_COLUMNS, "split", "item_id"], kind="stable").reset_index(drop=True) for table in (found, whole)]
    assert set(found.seed) == {1, 2}
    pd.testing.assert_frame_equal(*rows)


def test_every_notebook_ran_and_made_what_it_says(unbroken):
    check_made(unbroken, keep)


def test_results_cover_the_design(unbroken):
    everything = read_results(unbroken / "results.parquet")
    results = at_the_end(everything)
    assert set(results.task.unique()) == {"controlled_inverse_dictionary", "controlled_sentiment"}
    assert set(results.method.unique()) == {"untuned", "fine_tuning", "carma"}
    assert set(results.split.unique()) == {"test_seen", "test_held_out", "test_longer"}
    cells = results.groupby("cell", observed=True)[["task", "method", "seed"]].nunique()
    assert len(cells) == 2 * 3 * 3 and cells.eq(1).all().all(), "a training is one task, method and seed"
    assert set(everything.budget) == {0, 20, 40} and set(everything[everything.budget == 20].condition) == {"clean"}
    sizes = results.groupby("method", observed=True).size()
    assert sizes["carma"] == sizes["fine_tuning"] > sizes["untuned"], "untuned random models are asked clean items only"


def test_tables_come_in_every_format(unbroken):
    comparisons = pd.read_csv(unbroken / "tables" / "primary_comparisons.csv")
    assert (comparisons.steps == 40).all() and comparisons.curve.notna().all(), "an answer says how long training was"
    assert len(pd.read_csv(unbroken / "tables" / "training_lengths.csv")) == 2 * 2 * 2, "tasks, claims and lengths"
    assert (unbroken / "tables" / "primary_comparisons.tex").read_text().count("\\\\") > 10
