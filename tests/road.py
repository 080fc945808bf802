"""Some of the project's notebooks through papermill at CI scale, by the command a user types, in a project folder of their own."""
import os
import subprocess
import sys
from pathlib import Path

import yaml

from carma_lib.files import read_json
from carma_lib.manifest import read_manifest

ROOT = Path(__file__).resolve().parent.parent


def project(folder, keep, **parameters):
    """A project folder with the real notebooks, data and manifest, whose profile `ci` has these notebooks alone; the folder.

    keep: which of the manifest's names. parameters: a notebook's name → some of its parameters in this profile.
    """
    road = yaml.safe_load((ROOT / "nbs_ci.yml").read_text(encoding="utf-8"))
    names = [each["name"] for each in road["notebooks"]]
    road["profiles"] = {"ci": road["profiles"]["ci"] | {name: False for name in names if not keep(name)}}
    for name, changed in parameters.items():
        road["profiles"]["ci"][name] = road["profiles"]["ci"][name] | changed
    (folder / "nbs_ci.yml").write_text(yaml.safe_dump(road), encoding="utf-8")
    for name in ("notebooks", "data", "benchmarks"):
        (folder / name).symlink_to(ROOT / name)
    return folder


def command(run_dir, *more):
    return [sys.executable, "-m", "carma_lib", "run", "--profile", "ci", "--run-dir", str(run_dir), *more]


def environment():
    """A user's: the tests' own choice of a backend would leave the notebooks without pictures."""
    return {**{name: value for name, value in os.environ.items() if name != "MPLBACKEND"}, "PYTHONPATH": str(ROOT)}


def ran(folder):
    """The run folder of a whole run of a project folder; the checkout is as clean as before."""
    run_dir = folder / "run"
    before = subprocess.run(["git", "status", "--porcelain"], cwd=ROOT, capture_output=True, text=True).stdout
    done = subprocess.run(command(run_dir), cwd=folder, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
    after = subprocess.run(["git", "status", "--porcelain"], cwd=ROOT, capture_output=True, text=True).stdout
    assert before == after, "the checkout stays clean"
    assert done.stdout.strip().split("\n")[-1] == str(run_dir / "report.html")
    return run_dir


def check_made(run_dir, keep):
    """Every one of these notebooks is done; nothing is in the run folder that a run would not know for its own."""
    from carma_lib import notebooks

    status = read_json(run_dir / "status.json")["notebooks"]
    asked = [each for each in read_manifest(ROOT)[0] if keep(each.name)]
    assert {name for name, entry in status.items() if entry["state"] == "done"} == {each.name for each in asked}
    assert {path.stem for path in (run_dir / "notebooks").glob("*.ipynb")} == {each.name for each in asked}
    made = {Path(pattern).parts[0] for each in read_manifest(ROOT)[0] for pattern in each.makes}
    assert {path.name for path in run_dir.iterdir()} <= notebooks._OURS | made, "else a damaged status.json makes them somebody else's"
    for png in (run_dir / "figures").glob("*.png"):
        assert png.stat().st_size > 3000 and png.with_suffix(".svg").is_file() and png.with_suffix(".csv").is_file()
    page = (run_dir / "report.html").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") >= len(asked) and "<script src=" not in page and 'src="http' not in page.replace(
        'src="https://colab.research.google.com/assets/colab-badge.svg', "")
