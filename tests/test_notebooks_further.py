"""Notebooks 5 to 12, which need nothing of the first four, at CI scale."""
from road import check_made, project, ran


def keep(name):
    return name >= "05"


def test_every_notebook_runs_and_makes_what_it_says(tmp_path):
    run_dir = ran(project(tmp_path, keep))
    check_made(run_dir, keep)
    assert len(list((run_dir / "figures").glob("*.png"))) >= 10
