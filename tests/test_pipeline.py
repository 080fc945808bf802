"""The runner: the manifest against the notebooks, what is refused before a cell runs, and how a run can stop.

Small notebooks written here run through the real papermill; the project's own run in test_notebooks.py.
"""
import json
import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import nbformat
import pytest
import yaml

from carma_lib import manifest
from carma_lib import notebooks as pipeline
from carma_lib.__main__ import main
from carma_lib.files import read_json

ROOT = Path(__file__).resolve().parent.parent


def committed():
    return sorted((ROOT / "notebooks").glob("*.ipynb"))


def test_manifest_lists_every_notebook_in_order():
    notebooks, profiles = manifest.read_manifest(ROOT)
    assert [notebook.path for notebook in notebooks] == committed()
    assert {"ci", "default", "sst"} <= set(profiles)


@pytest.mark.parametrize("profile", list(manifest.read_manifest(ROOT)[1]))
def test_every_profile_makes_a_plan(profile, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("my.csv").write_text("text,target\n" + "".join(f"the number {each},word{each % 2}\n" for each in range(20)))
    plan = manifest.make_plan(profile, root=ROOT)
    assert profile != "own" or plan.parameters["02_finetune"]["tasks"] == [str(tmp_path / "my.csv")]  # notebooks run in the root
    assert plan.notebooks and "will run" in pipeline.describe(plan, resume=False)


@pytest.mark.parametrize("path", committed(), ids=lambda path: path.stem)
def test_committed_notebook(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1)), "one run, from top to bottom"
    assert not any(output.output_type == "error" or output.get("name") == "stderr" for cell in code for output in cell.outputs)
    assert "widgets" not in notebook.metadata
    assert sum("parameters" in cell.metadata.get("tags", []) for cell in code) == 1
    assert not any("injected-parameters" in cell.metadata.get("tags", []) for cell in code)
    classes = [line for cell in code for line in cell.source.split("\n") if line.startswith("class ")]
    assert all("Trainer" in line or "CarmaMixin" in line for line in classes), "what a notebook defines belongs in the package, but for a reader's own trainer"
    repository = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["Repository"]
    address = repository.removeprefix("https://github.com/")
    sources = "\n".join(cell.source for cell in notebook.cells)
    assert f"colab.research.google.com/github/{address}/blob/main/notebooks/{path.name}" in sources
    assert f"git clone --quiet --depth 1 {repository}\n" in sources


@pytest.mark.parametrize("path", committed()[:4], ids=lambda path: path.stem)
def test_main_road_reads_as_intent_short_cell_reading(path):
    cells = nbformat.read(path, as_version=4).cells
    code = [cell.source for cell in cells if cell.cell_type == "code"]
    assert max(source.count("\n") + 1 for source in code) <= 25
    assert not any(word in source for source in code for word in ("matplotlib", "seaborn")), "the report draws figures"
    parameters = next(cell.source for cell in cells if "parameters" in cell.metadata.get("tags", []))
    names = [line for line in parameters.split("\n") if not line.startswith(" ")]
    assert len(names) <= 8 and all(": " in line.partition("=")[0] for line in names)
    for place, cell in enumerate(cells):
        told = cells[place + 1].source if place + 1 < len(cells) else ""
        if cell.cell_type == "code" and "save_figure(" in cell.source:
            assert told.startswith("**Figure") and "*Takeaway.*" in told, f"nothing reads the figure of cell {place}"
        elif cell.cell_type == "code" and any(word in cell.source for word in ("print(", "display(", "style")):
            assert cells[place + 1].cell_type == "markdown", f"cell {place} has an output that nothing reads"
    numbers = [int(found) for cell in cells if cell.cell_type == "markdown"
               for found in re.findall(r"^\*\*Table (\d+)\.", cell.source, flags=re.MULTILINE)]
    assert numbers == list(range(1, len(numbers) + 1)), "tables are numbered in order"
    end = cells[-1].source
    assert "## Exercises" in end and end.count("*Expect*") in (2, 3) and "**Next.**" in end


def test_readme_badges_use_the_one_address():
    repository = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["Repository"]
    readme, address = (ROOT / "README.md").read_text(), repository.removeprefix("https://github.com/")
    for path in committed():
        assert f"colab.research.google.com/github/{address}/blob/main/notebooks/{path.name}" in readme


# --- a small project of two notebooks -------------------------------------------------------------------------

FIRST = ["steps: int = 2  # how many\nrate: float = 0.5  # of words\narchive: str = 'kept'  # tables\nrun_dir: str = 'runs/default'  # where",
         "from pathlib import Path\nrun = Path(run_dir)",
         "print('made', steps, 'of', rate)\n(run / 'made.txt').write_text(str(steps))"]
SECOND = ["run_dir: str = 'runs/default'  # where\nfail: bool = False  # raise\nseconds: int = 0  # to sleep",
          "import time\nfrom pathlib import Path\nrun = Path(run_dir)\ntime.sleep(seconds)",
          "if fail:\n    raise ValueError('no such thing; use another')\n(run / 'end.txt').write_text('end')"]


@pytest.fixture
def project(tmp_path, monkeypatch):
    (tmp_path / "notebooks").mkdir()
    for name, sources in (("01_first", FIRST), ("02_second", SECOND)):
        cells = [nbformat.v4.new_code_cell(source) for source in sources]
        cells[0].metadata["tags"] = ["parameters"]
        kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
        nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), tmp_path / "notebooks" / f"{name}.ipynb")
    write_manifest(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_manifest(root, cell_seconds=60, total_seconds=60, **profiles):
    entries = [{"name": "01_first", "needs": [], "makes": ["made.txt"]},
               {"name": "02_second", "needs": ["made.txt"], "makes": ["end.txt"]}]
    entries[0].update(cell_seconds=60, total_seconds=60)
    entries[1].update(cell_seconds=cell_seconds, total_seconds=total_seconds)
    (root / "nbs_ci.yml").write_text(yaml.safe_dump({"notebooks": entries, "profiles": {"default": None, **profiles}}))


def test_run_resume_and_publish(project, capsys):
    before = {path.name: path.read_bytes() for path in (project / "notebooks").iterdir()}
    assert main(["run"]) == 0
    report = capsys.readouterr().out.strip().split("\n")[-1]
    assert report == str(project / "runs" / "default" / "report.html") and Path(report).stat().st_size > 1000
    run = project / "runs" / "default"
    assert (run / "made.txt").read_text() == "2"
    assert {path.name: path.read_bytes() for path in (project / "notebooks").iterdir()} == before, "checkout is clean"
    states = {name: entry["state"] for name, entry in read_json(run / "status.json")["notebooks"].items()}
    assert states == {"01_first": "done", "02_second": "done"}

    assert main(["run"]) == 1
    assert "already holds a run; add --resume" in capsys.readouterr().err
    (run / "end.txt").unlink()
    assert main(["run", "--resume"]) == 0
    out = capsys.readouterr().out
    assert "01_first: done before, skipped" in out and "02_second: done in" in out
    (run / "made.txt").unlink()
    assert main(["run", "--resume", "--dry-run"]) == 0
    assert capsys.readouterr().out.count("will run") == 2, "what is lost, and what needs it"
    assert main(["run", "--resume"]) == 0
    assert "02_second: done in" in capsys.readouterr().out, "what is made from another file is made again with it"

    table = project / "kept" / "cells.parquet"
    table.parent.mkdir()
    for content in ("new", None):
        table.write_text(content) if content else table.unlink()
        assert main(["run", "--resume"]) == 0
        out = capsys.readouterr().out
        assert f"{table} is not as it was read: its notebook runs again" in out and "01_first: done in" in out
        assert main(["run", "--resume"]) == 0
        assert "01_first: done before, skipped" in capsys.readouterr().out

    assert main(["publish"]) == 0
    published = nbformat.read(project / "notebooks" / "01_first.ipynb", as_version=4)
    assert published.cells[2].outputs[0].text == "made 2 of 0.5\n"
    assert [cell.execution_count for cell in published.cells] == [1, 2, 3]
    assert set(published.metadata) <= {"kernelspec", "language_info"}


@pytest.mark.parametrize(("arguments", "message"), [
    (["--profile", "nowhere"], "unknown profile 'nowhere'; nbs_ci.yml has default"),
    (["--set", "stepps=3"], "no notebook has the parameter 'stepps'; there are archive, fail, rate, run_dir, seconds, steps"),
    (["--set", "02_second.steps=3"], "no notebook has the parameter '02_second.steps'"),
    (["--set", "steps=many"], "01_first: 'steps' takes int, such as 2, not 'many'"),
    (["--set", "fail=1"], "02_second: 'fail' takes bool, such as False, not 1"),
    (["--set", "steps"], "--set takes NAME=VALUE, not 'steps'"),
    (["--set", "run_dir=x"], "use --run-dir"),
])
def test_refused_before_a_cell_runs(project, capsys, arguments, message):
    assert main(["run", *arguments]) == 1
    error = capsys.readouterr().err.strip()
    assert message in error and error.count("\n") == 0
    assert not (project / "runs").exists()


def test_an_integer_will_do_for_a_float(project):
    plan = manifest.make_plan("default", settings={"rate": "1"}, root=project)
    assert plan.parameters["01_first"]["rate"] == 1


def test_dry_run_does_nothing(project, capsys):
    assert main(["run", "--dry-run", "--set", "steps=7"]) == 0
    out = capsys.readouterr().out
    assert "steps = 7" in out and "needs made.txt; makes end.txt" in out and not (project / "runs").exists()


def test_first_failure_stops_with_cell_and_error_then_resumes(project, capsys):
    write_manifest(project, broken={"02_second": {"fail": True}})
    assert main(["run", "--profile", "broken"]) == 1
    error = capsys.readouterr().err
    assert "02_second, cell [4]: ValueError: no such thing; use another" in error
    run = project / "runs" / "broken"
    assert (run / "notebooks" / "02_second.failed.ipynb").is_file()
    assert not (run / "notebooks" / "02_second.ipynb").exists() and not (run / "report.html").exists()
    assert read_json(run / "status.json")["notebooks"]["02_second"]["state"] == "failed"
    assert main(["run", "--profile", "broken", "--resume", "--set", "steps=3"]) == 1
    assert "other parameters (01_first: steps)" in capsys.readouterr().err
    assert main(["run", "--profile", "broken", "--resume", "--set", "fail=False"]) == 0, "what failed may be mended"
    assert "01_first: done before, skipped" in capsys.readouterr().out
    assert not (run / "notebooks" / "02_second.failed.ipynb").exists()


def test_time_limits(project, capsys):
    write_manifest(project, cell_seconds=2, slow={"02_second": {"seconds": 90}})
    assert main(["run", "--profile", "slow"]) == 1
    assert "02_second, cell time: a cell ran longer than 2 s" in capsys.readouterr().err
    write_manifest(project, total_seconds=6, slow={"02_second": {"seconds": 90}})
    assert main(["run", "--profile", "slow", "--fresh"]) == 1
    assert "02_second, total time: not done after 6 s" in capsys.readouterr().err


def test_a_notebook_must_make_what_it_says(project, capsys):
    content = yaml.safe_load((project / "nbs_ci.yml").read_text())
    content["notebooks"][0]["makes"] = ["something_else.txt"]
    (project / "nbs_ci.yml").write_text(yaml.safe_dump(content))
    assert main(["run"]) == 1
    assert "01_first ran, but did not make something_else.txt" in capsys.readouterr().err


def test_changed_code_is_not_taken_for_the_same(project, capsys):
    assert main(["run"]) == 0
    path = project / "notebooks" / "01_first.ipynb"
    path.write_text(path.read_text().replace("'made'", "'built'"))
    assert main(["run", "--resume"]) == 1
    assert "another state of the code or notebooks (first: 01_first)" in capsys.readouterr().err
    assert main(["publish"]) == 1
    assert "has changed since the run" in capsys.readouterr().err


@pytest.mark.skipif(os.name != "posix", reason="the lock is the system's")
def test_a_folder_in_use_is_left_alone(project, capsys):
    import fcntl

    run = project / "runs" / "default"
    run.mkdir(parents=True)
    with open(run / "lock", "a+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert main(["run"]) == 1
    assert "is in use by another run" in capsys.readouterr().err
    assert main(["run"]) == 0, "a lock file that nobody holds is nothing"


@pytest.mark.parametrize("how", [[], ["--fresh"], ["--resume"], ["--dry-run"]])
def test_files_that_are_no_run_are_never_thrown_away(project, capsys, how):
    (project / "thesis").mkdir()
    (project / "thesis" / "chapter.txt").write_text("years of work")
    assert main(["run", "--run-dir", "thesis", *how]) == 1
    assert "holds files but no run of this runner" in capsys.readouterr().err
    assert (project / "thesis" / "chapter.txt").read_text() == "years of work"


def test_half_written_files_are_not_taken_for_whole(project, capsys):
    assert main(["run"]) == 0
    run = project / "runs" / "default"
    (run / "end.txt").rename(run / ".end-x1.txt")
    assert main(["run", "--resume"]) == 0
    assert "02_second: done in" in capsys.readouterr().out


def test_every_command_that_the_readme_and_help_show_makes_a_plan(tmp_path, monkeypatch):
    import shlex

    from carma_lib.__main__ import EPILOG, build_parser

    pages = "".join(path.read_text(encoding="utf-8") for path in [ROOT / "README.md", *(ROOT / "book").glob("*.md")]
                    if path.stem != "extending")  # whose task is not there until the page is applied
    monkeypatch.chdir(tmp_path)
    Path("my.csv").write_text("text,target\n" + "".join(f"the number {each},word{each % 2}\n" for each in range(20)))
    shown = re.findall(r"-m carma_lib (run[^\n#`]*)", EPILOG + pages)
    assert len(shown) >= 6
    for line in shown:
        words = shlex.split(re.split(r"  +", line.strip())[0])
        if "--help" in words:
            continue
        options = build_parser().parse_args(words)
        settings = dict(setting.split("=", 1) for setting in options.settings)
        assert manifest.make_plan(options.profile, run_dir=options.run_dir, settings=settings, root=ROOT).notebooks


def test_progress_bars_and_widgets_are_tidied_away(tmp_path):
    cell = nbformat.v4.new_code_cell("x", execution_count=1, outputs=[
        nbformat.v4.new_output("stream", name="stderr", text="\r 10%"),
        nbformat.v4.new_output("display_data", {"application/vnd.jupyter.widget-view+json": {"model_id": "1"}, "text/plain": "bar"}),
        nbformat.v4.new_output("stream", name="stderr", text="TqdmWarning: IProgress not found."),
        nbformat.v4.new_output("stream", name="stdout", text="a"),
        nbformat.v4.new_output("stream", name="stdout", text="b\n"),
        nbformat.v4.new_output("stream", name="stderr", text="a warning\n")])
    cell.metadata.update(tags=["kept"], papermill={"duration": 1})
    notebook = nbformat.v4.new_notebook(cells=[cell], metadata={"widgets": {}, "papermill": {}})
    nbformat.write(notebook, tmp_path / "a.ipynb")
    pipeline.tidy_notebook(tmp_path / "a.ipynb")
    tidied = json.loads((tmp_path / "a.ipynb").read_text())
    assert tidied["metadata"] == {} and tidied["cells"][0]["metadata"] == {"tags": ["kept"]}
    assert ["".join(output["text"]) for output in tidied["cells"][0]["outputs"]] == ["ab\n", "a warning\n"]


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 200 kB; skipped where this process may not mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = shutil.which("mount") and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(folder)], capture_output=True).returncode == 0
    if not mounted:
        pytest.skip("no right to mount a small disk")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_full_disk_is_told_in_one_line(project, small_disk, capsys):
    path = project / "notebooks" / "01_first.ipynb"
    notebook = nbformat.read(path, as_version=4)
    notebook.cells[2].source = "(run / 'made.txt').write_bytes(b'x' * 1_000_000)"
    nbformat.write(notebook, path)
    assert main(["run", "--run-dir", str(small_disk / "run")]) == 1
    error = capsys.readouterr().err.strip().split("\n")
    said = [line for line in error if line.startswith("carma_lib:")]
    assert len(said) == 1 and "No space left on device" in said[0] and "free space and go on with --resume" in said[0]
