"""One's own file, from a sweep on the command line and from `run`, to answers of several tokens and a report."""

import pandas as pd
import pytest
import yaml
from lab_cells import SMALL, cell_of, states

from carma_lib.__main__ import main
from carma_lib.lab.cell import cell_folder
from carma_lib.lab.plan import read_sweep
from carma_lib.lab.run import run
from carma_lib.stats.table import read_results
from carma_lib.tasks import DataNotFound, read_card

SETTINGS = {**{name: list(value) if isinstance(value, tuple) else value for name, value in SMALL.items()}, "test_splits": [], "training_items": 0}


def write_rows(path):
    rows = [{"text": f"the small bird number {number} sings a happy song", "target": ("a long answer", "short")[number % 2]} for number in range(60)]
    pd.DataFrame(rows).to_csv(path, index=False)
    return path


def test_a_file_goes_through_a_sweep_to_a_report_and_through_run(tmp_path, client, wordnet_database, monkeypatch, capsys):
    write_rows(tmp_path / "birds.csv")
    plan = {"run_dir": "out", "tasks": ["birds.csv"], "models": ["random"], "methods": ["fine_tuning", "carma"], "seeds": [1, 2, 3], "settings": SETTINGS}
    (tmp_path / "birds.yml").write_text(yaml.safe_dump(plan))
    monkeypatch.chdir(tmp_path)  # where the file's relative names count from
    assert main(["sweep", "birds.yml", "--scheduler", client.scheduler.address]) == 0
    told = capsys.readouterr().out
    assert "6 of 6 cells done" in told and told.splitlines()[-1] == str(tmp_path / "out" / "report.html")
    folder = tmp_path / "out"
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "own_birds" in page and "CARMA" in page
    results = read_results(folder / "results.parquet")
    assert set(results.task.astype(str)) == {"own_birds"} and set(results.seed) == {1, 2, 3} and set(results.condition.astype(str)) == {"clean", "replaced"}
    assert set(results.target.astype(str)) <= {"a long answer", "short"} and set(results.split.astype(str)) == {"test"}
    assert (folder / "tables" / "paper_table.csv").is_file() and (folder / "tables" / "primary_comparisons.csv").is_file(), "three seeds can claim"
    sweep = read_sweep("birds.yml")
    assert sweep.run_dir == folder and sweep.tasks == ("own_birds",) and read_card(folder / "data" / "own_birds")["source"] == "birds.csv"
    assert run(sweep.cells, folder, client, data=sweep.data) == {} and all(states(folder, cell) == ["begun", "done"] for cell in sweep.cells)


def test_run_builds_a_task_of_ones_own_from_its_file(tmp_path, client, wordnet_database):
    cells = [cell_of("fine_tuning", seed=seed, task="own_birds", test_splits=(), training_items=0, rates=(), depth_shares=()) for seed in (1, 2, 3)]
    path = write_rows(tmp_path / "birds.csv")
    assert run(cells, tmp_path / "run", client, data={"own_birds": {"file": str(path)}}) == {}
    assert sum(len(read_results(cell_folder(tmp_path / "run", cell) / "answers.parquet")) for cell in cells) == 3 * 6
    with pytest.raises(DataNotFound, match="build them first") as error:
        run(cells[:1], tmp_path / "other", client)
    assert "\n" not in str(error.value)
