"""Runs and sweeps under attack: bad inputs by every door, damaged finished things, interrupts. `make attack` does more."""
import dataclasses
import importlib
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
import bad_inputs
import psutil

from carma_lib import manifest, notebooks
from carma_lib.__main__ import end_children, main
from carma_lib.files import RunError, write_json
from carma_lib.lab.cell import Cell, cell_folder, is_tested, is_trained
from carma_lib.lab.plan import read_sweep
from carma_lib.lab.recipe import recipe_for
from carma_lib.lab.run import _build
from carma_lib.lab.worker import attempts, run_cell
from carma_lib.synonyms.reader import WordNetNotFound
from carma_lib.tasks import build_task, read_card


@pytest.mark.parametrize("door", bad_inputs.DOORS)
def test_every_bad_input_gives_one_clear_line(door, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    number, wrong = bad_inputs.faults(door, tmp_path)
    assert number >= 10 and wrong == {}


def test_a_refusal_names_one_notebook():
    with pytest.raises(RunError, match="^03_evaluate: rates is empty"):
        manifest.make_plan("ci", root=ROOT, settings={"03_evaluate.rates": "[]"})


@pytest.mark.parametrize(("key", "notebooks"), [("batch_size", {"02_finetune", "05_how_carma_works"}), ("layers", {"02_finetune", "05_how_carma_works"}),
                                                ("02_finetune.batch_size", {"02_finetune"}), ("05_how_carma_works.batch_size", {"05_how_carma_works"}),
                                                ("lora_rank", {"02_finetune"})])
def test_a_setting_reaches_every_notebook_that_has_it(key, notebooks):
    plan, name = manifest.make_plan("default", root=ROOT, settings={key: "4"}), key.rpartition(".")[2]
    found = {notebook for notebook, values in plan.parameters.items() if 4 in (values.get(name), values.get("recipe", {}).get(name))}
    assert found == notebooks


def test_settings_beside_a_recipe_that_is_none():
    with pytest.raises(RunError, match="^02_finetune: 'recipe' takes settings by name"):
        manifest.make_plan("ci", root=ROOT, settings={"02_finetune.recipe": "abc", "learning_rate": "0.1"})


def test_rules_are_about_parameters_that_there_are():
    known = {name for notebook in manifest.read_manifest(ROOT)[0] for name in manifest._declared_parameters(notebook)}
    assert {*manifest._RULES} <= known


def test_a_relative_path_of_data_counts_from_where_one_stands(tmp_path, monkeypatch):
    """Even if the project has a file of the same name, which would be read without a word."""
    for place, folder in enumerate((tmp_path / "root", tmp_path / "here")):
        folder.mkdir()
        (folder / "my.csv").write_text("text,target\n" + "".join(f"the number {each},word{each % 2 + place}\n" for each in range(20)))
    monkeypatch.chdir(tmp_path / "here")
    assert manifest._checked_file("my.csv", tmp_path / "root") == str(tmp_path / "here" / "my.csv")
    monkeypatch.chdir(tmp_path / "root")
    assert manifest._checked_file("my.csv", tmp_path / "root") == "my.csv"
    monkeypatch.chdir(tmp_path)
    assert manifest._checked_file("my.csv", tmp_path / "root") == "my.csv", "else in the project"


def test_a_run_keeps_in_mind_which_files_of_sst_it_read(tmp_path, monkeypatch):
    """So that a treebank unpacked again, or found only later, is read when the run goes on."""
    (tmp_path / "sst" / "trees").mkdir(parents=True)
    files = [tmp_path / "sst" / name for name in ("trees/train.txt", "trees/dev.txt", "trees/test.txt", "sentence_scores.tsv")]
    for file in files:
        file.write_text("")
    monkeypatch.setenv("CARMA_DATA", str(tmp_path))
    read = {profile: set(manifest.make_plan(profile, root=ROOT, sources=False).reads["01_data_construction"]) for profile in ("sst", "ci")}
    assert set(files) <= read["sst"] and not set(files) & read["ci"], "CI's first notebook builds no SST"
    monkeypatch.delenv("CARMA_DATA")
    assert not set(files) & set(manifest.make_plan("sst", root=ROOT, sources=False).reads["01_data_construction"])


def test_wordnet_is_missed_before_the_trainings(monkeypatch):
    def absent():
        raise WordNetNotFound
    monkeypatch.setattr(manifest, "wordnet", absent)
    manifest.make_plan("ci", root=ROOT)
    manifest.make_plan("sst", root=ROOT, sources=False)
    with pytest.raises(RunError, match="^WordNet not found: run"):
        manifest.make_plan("sst", root=ROOT)


def test_a_sweep_may_leave_its_parts_empty(tmp_path):
    text = "run_dir: r\ntasks: [controlled_sentiment]\nmodels: [random]\nmethods: [carma]\nseeds: [1]\n"
    sweeps = []
    for number, more in enumerate(("", "settings:\nconditions:\ndata:\n", "settings: {}\nconditions: {}\ndata: {}\n")):
        file = tmp_path / f"{number}.yml"
        file.write_text(text + more)
        sweeps.append(read_sweep(file))
    assert sweeps[0].cells == sweeps[1].cells == sweeps[2].cells and sweeps[0].data == sweeps[1].data == sweeps[2].data == {"controlled_sentiment": {}}


# --- run folders ------------------------------------------------------------------------------------------------

WAIT = "import time\nfrom pathlib import Path\ntime.sleep(seconds)\n(Path(run_dir) / 'end.txt').write_text('end')"


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A clone of one notebook that sleeps."""
    (tmp_path / "notebooks").mkdir()
    cells = [nbformat.v4.new_code_cell("run_dir: str = 'runs/default'\nseconds: int = 0"), nbformat.v4.new_code_cell(WAIT)]
    cells[0].metadata["tags"] = ["parameters"]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), tmp_path / "notebooks" / "01_wait.ipynb")
    entry = {"name": "01_wait", "needs": [], "makes": ["end.txt"], "cell_seconds": 100, "total_seconds": 100}
    (tmp_path / "nbs_ci.yml").write_text(yaml.safe_dump({"notebooks": [entry], "profiles": {"default": None}}))
    monkeypatch.chdir(tmp_path)
    return tmp_path


ODD_STATUS = ["", "\0\0\0", "[]", "{}", '{"notebooks": []}', '{"notebooks": {"01_wait": []}}', '{"notebooks": {"01_wait": {"state": "done"}}}',
              '{"notebooks": {"01_wait": {"state": "done", "fingerprint": 3, "parameters": [], "seconds": "long"}}}', '{"notebooks": {"01_wai']


def test_odd_marks_of_files_are_none(tmp_path):
    for odd in ({}, {"made": 3}, {"made": ["a"], "read": "b"}):
        assert notebooks._unchanged(tmp_path, odd, [])


@pytest.mark.parametrize("text", ODD_STATUS)
def test_an_odd_status_file_stops_neither_resume_nor_fresh(project, text):
    plan = manifest.make_plan("default", root=project)
    (plan.run_dir / "data").mkdir(parents=True)
    (plan.run_dir / "status.json").write_text(text)
    (plan.run_dir / ".lock").touch()  # which packing leaves
    for resume in (True, False):
        notebooks.check_run_folder(plan, resume=resume, fresh=not resume)
    assert "will run" in notebooks.describe(plan, resume=True)
    with pytest.raises(RunError, match="already holds a run"):
        notebooks.check_run_folder(plan, resume=False, fresh=False)
    (plan.run_dir / "thesis.txt").write_text("years of work")
    with pytest.raises(RunError, match="thesis.txt"):
        notebooks.check_run_folder(plan, resume=False, fresh=True)


def test_what_a_kill_leaves_of_a_first_status_is_no_foreign_file(project):
    plan = manifest.make_plan("default", root=project)
    plan.run_dir.mkdir(parents=True)
    (plan.run_dir / ".partial-a.json").write_text("{")
    notebooks.check_run_folder(plan, resume=False, fresh=False)


def test_a_damaged_product_of_a_done_notebook_is_made_again(project, capsys):
    run = project / "runs" / "default"
    assert main(["run"]) == 0 and main(["run", "--resume"]) == 0
    assert "done before, skipped" in capsys.readouterr().out
    (run / "end.txt").write_text("enx")
    (run / "status.json").write_text(json.dumps(json.loads((run / "status.json").read_text())))
    assert main(["run", "--resume"]) == 0
    assert "not as it was made: its notebook runs again" in capsys.readouterr().out and (run / "end.txt").read_text() == "end"


@pytest.mark.parametrize(("number", "times"), [(signal.SIGTERM, 1), (signal.SIGINT, 2)])
def test_an_interrupted_run_says_so_in_its_last_line(project, number, times):
    child = subprocess.Popen(
        [sys.executable, "-m", "carma_lib", "run", "--set", "seconds=90"], text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        start_new_session=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    for line in child.stdout:
        if "running" in line:
            break
    time.sleep(2)  # the kernel starts, or its cell sleeps
    sent = time.monotonic()
    for _ in range(times):
        child.send_signal(number)
        time.sleep(0.3)
    text = child.communicate(timeout=60)[0].replace("\r", "\n")
    assert child.returncode == 128 + number and time.monotonic() - sent < 10
    assert text.strip().splitlines()[-1].startswith("carma_lib: ") and "--resume goes on from there" in text and "Traceback" not in text


def test_children_of_the_caller_are_left_alone():
    own, others = (subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) for _ in range(2))
    try:
        end_children(spare={others.pid} | {child.pid for child in psutil.Process().children()} - {own.pid})
        own.wait(5)
        assert not psutil.pid_exists(own.pid) and others.poll() is None
    finally:
        others.kill()
        others.wait()


# --- cells ------------------------------------------------------------------------------------------------------

SMALL = {"layers": 2, "width": 16, "heads": 2, "steps": 6, "warmup_steps": 0, "batch_size": 4, "mi_layers": [0, 1], "stability_layers": [0, 1],
         "validation_items": 8, "evaluations": 2, "test_at": [3], "test_items": 8, "pooled_items": 8, "test_splits": ["test_seen"], "rates": [0.25],
         "depth_shares": [1.0], "protocols": ["mean"], "levels": ["word"], "measures": []}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    build_task("controlled_sentiment", folder / "data" / "controlled_sentiment")
    cell = Cell("controlled_sentiment", "carma", 1, recipe_for("sentiment", SMALL, seeds=(1,)).recipe)
    run_cell(folder, cell, "tested")
    own = cell_folder(folder, cell)
    return folder, cell, {name: (own / name).read_bytes() for name in ("answers.parquet", "measures.parquet")}


def cut(file):
    file.write_bytes(file.read_bytes()[:-20])


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("name", ["answers.parquet", "measures.parquet", "tested.json"])
def test_damaged_tables_are_made_again(finished, name):
    folder, cell, whole = finished
    file = cell_folder(folder, cell) / name
    content = file.read_bytes()
    for damage in (Path.unlink, flip, lambda file: file.write_bytes(b""), cut):
        file.write_bytes(content)
        assert is_tested(folder, cell)
        damage(file)
        assert not is_tested(folder, cell) and is_trained(folder, cell)
    run_cell(folder, cell, "tested")
    assert {file: (cell_folder(folder, cell) / file).read_bytes() for file in whole} == whole


def test_odd_facts_are_no_finished_cell(finished):
    folder, cell, whole = finished
    files = {cell_folder(folder, cell) / name: (cell_folder(folder, cell) / name).read_text() for name in ("tested.json", "trained.json")}
    for change in ("", '{"mark": ', "[]", "{}", '{"mark": 1}', "null", {"sha256": None}, {"sha256": {}}, {"budget": "x12"},
                   {"method": "cbrma"}, {"checksum": None}, {"measures": 3}):
        for file, text in files.items():
            file.write_text(change if isinstance(change, str) else json.dumps({**json.loads(text), **change}))
        assert not is_tested(folder, cell) and not is_trained(folder, cell), change
    run_cell(folder, cell, "tested")
    assert (cell_folder(folder, cell) / "answers.parquet").read_bytes() == whole["answers.parquet"]


@pytest.mark.parametrize(("name", "damage"), [("model/model.safetensors", cut), ("model/model.safetensors", flip), ("model/tokenizer.json", cut),
                                              ("model/checksums.json", Path.unlink), ("model/checksums.json", lambda file: file.write_text(file.read_text().replace('"bytes": ', '"bytes": "x", "b": '))), ("on_the_way.parquet", cut), ("history.csv", Path.unlink)])
def test_damaged_trainings_are_made_again(finished, name, damage):
    folder, cell, whole = finished
    own = cell_folder(folder, cell)
    damage(own / name)
    (own / "tested.json").unlink()
    assert not is_trained(folder, cell)
    run_cell(folder, cell, "tested")
    assert {file: (own / file).read_bytes() for file in whole} == whole and is_trained(folder, cell)


def test_the_model_of_another_cell_is_not_this_ones(finished):
    folder, cell, whole = finished
    other = dataclasses.replace(cell, method="fine_tuning")
    run_cell(folder, other, "trained")
    own = cell_folder(folder, cell)
    (own / "tested.json").unlink()
    shutil.rmtree(own / "model")
    shutil.copytree(cell_folder(folder, other) / "model", own / "model")
    assert is_trained(folder, other) and not is_trained(folder, cell)
    run_cell(folder, cell, "tested")
    assert {file: (own / file).read_bytes() for file in whole} == whole


@pytest.mark.parametrize("damage", [None, "tested-3.parquet", "checkpoint-3/model.safetensors", "mark.json"])
def test_a_training_that_goes_on_keeps_the_tests_of_its_first_steps(finished, tmp_path, monkeypatch, damage):
    from carma_lib.trainer import CarmaTrainer

    folder, cell, whole = finished
    new, steps, step = tmp_path / "run", [], CarmaTrainer.training_step
    shutil.copytree(folder / "data", new / "data")

    def breaks(self, *arguments, **more):
        steps.append(1)
        if len(steps) == 5:
            raise ValueError("broken off")
        return step(self, *arguments, **more)

    monkeypatch.setattr(CarmaTrainer, "training_step", breaks)
    with pytest.raises(ValueError, match="broken off"):
        run_cell(new, cell, "tested")
    own = cell_folder(new, cell)
    if damage == "mark.json":
        (own / "work" / damage).write_text('["0123", 0]')  # of other settings or data
    elif damage:
        cut(own / "work" / damage)
    run_cell(new, cell, "tested")
    assert len(steps) == 5 + (3 if damage is None else 6)
    assert {name: (own / name).read_bytes() for name in whole} == whole and not (own / "work").exists()


def test_log_lines_that_are_odd_are_left_out(tmp_path):
    (tmp_path / "attempts.jsonl").write_bytes(b'{"state": "begun"}\n[]\n"begun"\n3\n{"state": ["done"]}\n{}\n\xff\xfe\n{"sta\n{"state": "done"}\n')
    assert [line["state"] for line in attempts(tmp_path)] == ["begun", "done"]


def test_data_keep_the_parameters_they_were_built_with(tmp_path):
    place = tmp_path / "data"
    build_task("controlled_sentiment", place, seed=7)
    content = read_card(place)["content"]
    _build(place, "controlled_sentiment", None)
    assert read_card(place)["content"] == content
    cut(next(place.rglob("*.arrow")))
    _build(place, "controlled_sentiment", None)
    assert read_card(place)["content"] == content and read_card(place)["parameters"]["seed"] == 7
    _build(place, "controlled_sentiment", {"seed": 8})
    assert read_card(place)["content"] != content


# --- names ------------------------------------------------------------------------------------------------------

def test_a_tilde_is_the_home_folder(tmp_path):
    assert manifest.make_plan("ci", run_dir=Path("~/carma-run"), root=ROOT).run_dir == Path.home() / "carma-run"
    text = (ROOT / "sweeps" / "example.yml").read_text()
    (tmp_path / "s.yml").write_text(re.sub("(?m)^run_dir: .*", "run_dir: ~/carma-sweep", text))
    assert read_sweep(tmp_path / "s.yml").run_dir == Path.home() / "carma-sweep"


def test_files_and_names_that_are_cited_exist():
    cited = re.compile(r"\b(?:benchmarks|tests|docs|sweeps|data|notebooks)/[\w.-]+\.(?:py|yml|md|ipynb|json|csv)\b")
    for file in [*ROOT.glob("carma_lib/**/*.py"), *ROOT.glob("sweeps/*.yml"), *ROOT.glob("benchmarks/*.py")]:
        text = file.read_text(encoding="utf-8")
        missing = [name for name in cited.findall(text) if not (ROOT / name).is_file() and "benchmarks/results" not in name]
        assert not missing and "DESIGN" not in text.replace("DESIGNS", "").replace("DESIGN_", "").replace("SMALL_DESIGN", ""), (file, missing)
        for name in re.findall(r"\bcarma_lib(?:\.[A-Za-z_]\w*)+", text) if file.suffix == ".yml" else ():
            module, _, attribute = name.rpartition(".")
            assert hasattr(importlib.import_module(module), attribute) or importlib.util.find_spec(name), (file, name)


def test_tuples_on_the_command_line_are_lists():
    assert manifest._literal("(0, 1)") == [0, 1] and manifest._literal("{'a': ((0, 1), 2)}") == {"a": [[0, 1], 2]}


def test_fresh_takes_a_link_away_and_leaves_what_it_leads_to(project, tmp_path):
    run, elsewhere = project / "runs" / "default", tmp_path / "disk"
    run.mkdir(parents=True)
    elsewhere.mkdir()
    (elsewhere / "kept.txt").write_text("kept")
    (run / "end.txt").symlink_to(elsewhere)
    write_json(run / "status.json", {"notebooks": {}})
    notebooks._open_status(manifest.make_plan("default", root=project), resume=False, fresh=True)
    assert not (run / "end.txt").is_symlink() and (elsewhere / "kept.txt").read_text() == "kept"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_command_that_does_not_close_is_ended_after_seconds(number, code):
    script = """if True:
        import time
        import carma_lib.__main__ as command
        def slow(options):
            try:
                print("ready", flush=True)
                time.sleep(60)
            finally:
                time.sleep(60)
        command._command = slow
        command.main(["sweep", "any.yml"])"""
    process = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    begun = time.monotonic()
    process.send_signal(number)
    said = process.communicate(timeout=30)[1].strip().splitlines()
    assert process.returncode == code and time.monotonic() - begun < 10 and said[-1].startswith("carma_lib: ")
    assert len(said) == 1 and "the same command goes on from there" in said[0]
