"""The project's own notebooks through papermill at CI scale, by the command a user types, broken off and gone on with."""
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import yaml

from carma_lib import notebooks
from carma_lib.files import read_json
from carma_lib.manifest import read_manifest
from carma_lib.stats.table import at_the_end, read_results

ROOT = Path(__file__).resolve().parent.parent
PATIENCE = 900  # seconds until something must have happened


def command(run_dir, *more):
    return [sys.executable, "-m", "carma_lib", "run", "--profile", "ci", "--run-dir", str(run_dir), *more]


def start(run_dir, *more, root=ROOT):
    return subprocess.Popen(command(run_dir, *more), cwd=root, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
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
    run_dir = tmp_path_factory.mktemp("unbroken") / "run"
    before = subprocess.run(["git", "status", "--porcelain"], cwd=ROOT, capture_output=True, text=True).stdout
    done = subprocess.run(command(run_dir), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
    after = subprocess.run(["git", "status", "--porcelain"], cwd=ROOT, capture_output=True, text=True).stdout
    assert before == after, "the checkout stays clean"
    assert done.stdout.strip().split("\n")[-1] == str(run_dir / "report.html")
    return run_dir


def test_every_notebook_ran_and_made_what_it_says(unbroken):
    status = read_json(unbroken / "status.json")["notebooks"]
    for notebook in read_manifest(ROOT)[0]:
        assert status[notebook.name]["state"] == "done"
        assert all(any(unbroken.glob(pattern)) for pattern in notebook.makes)
        assert (unbroken / "notebooks" / f"{notebook.name}.ipynb").is_file()
    made = {Path(pattern).parts[0] for notebook in read_manifest(ROOT)[0] for pattern in notebook.makes}
    assert {path.name for path in unbroken.iterdir()} <= notebooks._OURS | made, "else a damaged status.json makes them somebody else's"


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


def test_figures_and_tables_come_in_every_format(unbroken):
    for png in (unbroken / "figures").glob("*.png"):
        assert png.stat().st_size > 3000 and png.with_suffix(".svg").is_file() and png.with_suffix(".csv").is_file()
    assert len(list((unbroken / "figures").glob("*.png"))) >= 10
    comparisons = pd.read_csv(unbroken / "tables" / "primary_comparisons.csv")
    assert (comparisons.steps == 40).all() and comparisons.curve.notna().all(), "an answer says how long training was"
    assert len(pd.read_csv(unbroken / "tables" / "training_lengths.csv")) == 2 * 2 * 2, "tasks, claims and lengths"
    assert (unbroken / "tables" / "primary_comparisons.tex").read_text().count("\\\\") > 10


def test_report_stands_alone(unbroken):
    page = (unbroken / "report.html").read_text(encoding="utf-8")
    assert "data:image/png;base64," in page and "<script src=" not in page and 'src="http' not in page.replace(
        'src="https://colab.research.google.com/assets/colab-badge.svg', "")


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_interrupted_and_killed_run_resumed_gives_the_same_tables(unbroken, tmp_path):
    """Notebooks 1 to 4, which hand files on to one another, under the same parameters."""
    road = yaml.safe_load((ROOT / "nbs_ci.yml").read_text(encoding="utf-8"))
    road["profiles"] = {"ci": road["profiles"]["ci"] | {each["name"]: False for each in road["notebooks"][4:]}}
    (tmp_path / "nbs_ci.yml").write_text(yaml.safe_dump(road), encoding="utf-8")
    (tmp_path / "notebooks").symlink_to(ROOT / "notebooks")
    run_dir = tmp_path / "run"
    process = start(run_dir, root=tmp_path)
    wait_for(lambda: any(run_dir.glob("cells/*/*/carma/seed-*/trained.json")), process)
    helpers = children(process)
    process.send_signal(signal.SIGINT)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 130, output[-2000:]
    assert helpers and all_gone(helpers)
    assert "carma_lib: interrupted; what is done is kept, --resume goes on from there" in output
    assert read_json(run_dir / "status.json")["notebooks"]["02_finetune"]["state"] == "interrupted"
    assert not (run_dir / "report.html").exists() and not (run_dir / "notebooks" / "02_finetune.ipynb").exists()

    process = start(run_dir, "--resume", root=tmp_path)
    wait_for(lambda: any(run_dir.glob("cells/*/*/*/seed-*/tested.json")), process)
    helpers = children(process)
    process.kill()
    process.wait()
    assert helpers and all_gone(helpers)
    assert not (run_dir / "results.parquet").exists()

    done = subprocess.run(command(run_dir, "--resume"), cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          text=True)
    assert done.returncode == 0, done.stdout[-3000:]
    assert "01_data_construction: done before, skipped" in done.stdout
    pd.testing.assert_frame_equal(*(read_results(folder / "results.parquet") for folder in (run_dir, unbroken)))
    tables = sorted((run_dir / "tables").glob("*.csv"))
    assert {"primary_comparisons.csv", "paper_table.csv", "training_lengths.csv"} <= {table.name for table in tables}
    for table in tables:
        assert (unbroken / "tables" / table.name).read_bytes() == table.read_bytes(), table.name
