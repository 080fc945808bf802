"""A sweep's parts → one result table, tables and a report, in the plan's order whatever ended first."""
from __future__ import annotations

from pathlib import Path

import pandas as pd

from carma_lib.report import plots as figures
from carma_lib.report import tables
from carma_lib.stats.claims import primary_comparisons
from carma_lib.report.page import write_report
from carma_lib.stats.table import METHOD_LABELS, read_results, write_results
from carma_lib.lab.sweep_plan import Sweep
from carma_lib.lab.sweep_worker import finished

FAILED_COLUMNS = ["model", "task", "method", "seed", "reason"]


def collect(sweep: Sweep) -> Path | None:
    """The finished cells' parts as `results.parquet`; None where no cell is finished.

    Models that share a name (as random ones of one shape, trained differently, or folders of one name) get the
    name of their folder in the sweep beside it.
    """
    parts: dict[str, list[Path]] = {}
    for job in sweep.jobs:
        if line := finished(job):
            parts.setdefault(job.model, []).append(sweep.run_dir / line["part"])
    if not parts:
        return None
    tables_of = {name: read_results(paths) for name, paths in parts.items()}
    called = {name: table["model"].iloc[0] for name, table in tables_of.items()}
    for name, model in called.items():
        if list(called.values()).count(model) > 1:
            tables_of[name] = tables_of[name].assign(model=f"{model} ({name})")
    results = pd.concat(tables_of.values(), ignore_index=True)
    return write_results(results, sweep.run_dir / "results.parquet")


def claims(sweep: Sweep, results: pd.DataFrame) -> list[dict]:
    """What a sweep asks, fixed by its file: for each task and model, each trained method against a baseline.

    The baseline is fine_tuning, or the first trained method. Asked are accuracy on new combinations (held-out
    ones where the task has such), ConsistSyn at 25 % (or the lowest rate), and accuracy kept under pooling of
    words by their mean from half of the depth on (or the nearest), as in notebook 04.
    """
    trained = [method for method in sweep.methods if method != "untuned"]
    baseline = "fine_tuning" if "fine_tuning" in trained else next(iter(trained), None)
    plan = []
    models = results[["task", "model"]].astype(str).drop_duplicates()
    names = {model: model.rpartition("/")[2] for model in models["model"]}
    if len(set(names.values())) < len(names):
        names = {model: model for model in names}
    for task, model in models.itertuples(index=False):
        rows = results[(results["task"] == task) & (results["model"] == model)]
        if baseline not in set(rows["method"]):
            continue
        who = f"{names[model]}, " if len(names) > 1 else ""
        where = {"task": task, **({"model": model} if len(names) > 1 else {})}
        for method in [name for name in trained if name != baseline and name in set(rows["method"])]:
            label = f"{who}{task.replace('_', ' ')}: {METHOD_LABELS[method]}"
            plan += [{"name": f"{label}, {name}", "method": method, "baseline": baseline, **where, **claim}
                     for name, claim in _questions(rows).items()]
    return plan


def _questions(rows: pd.DataFrame) -> dict[str, dict]:
    splits = list(rows["split"].astype(str).unique())
    held_out, seen = (next((split for split in splits if split.endswith(name)), splits[0])
                      for name in ("held_out", "seen"))
    asked = {"new combinations": {"kind": "difference", "metric": "accuracy", "split": held_out,
                                  "condition": "clean"}}
    rates = sorted(rows.loc[rows["condition"] == "replaced", "rate"].unique())
    if rates:
        asked["synonyms"] = {"kind": "difference", "metric": "consist_syn", "split": seen, "condition": "replaced",
                             "rate": 0.25 if 0.25 in rates else float(rates[0])}
    pooled = rows[(rows["condition"] == "pooled") & (rows["protocol"] == "mean") & (rows["level"] == "word")]
    if len(pooled):
        share = min(pooled["depth_share"].unique(), key=lambda value: (abs(value - 0.5), value))
        asked["pooling"] = {"kind": "difference", "metric": "accuracy_kept", "split": seen, "condition": "pooled",
                            "depth_share": float(share), "protocol": "mean", "level": "word"}
    return asked


def make_report(sweep: Sweep, failed: dict[str, str]) -> Path:
    """Tables, the picture of the claims and `report.html` from what is finished; the report's path.

    failed: a cell's name → one line why, for the cells that have no result; they stand in the report.
    """
    folder = sweep.run_dir
    for name in ("primary_comparisons", "paper_table", "paper_table_readable", "failed_cells"):
        (folder / "tables" / f"{name}.csv").unlink(missing_ok=True)
    (folder / "figures" / "primary_comparisons.png").unlink(missing_ok=True)
    if failed:
        rows = [(job.model, job.cell.task, job.cell.method, job.cell.seed, failed[job.name])
                for job in sweep.jobs if job.name in failed]
        tables.save_table(pd.DataFrame(rows, columns=FAILED_COLUMNS), folder / "tables", "failed_cells")
    if collect(sweep):
        results = read_results(folder / "results.parquet")
        paper = tables.paper_table(results)
        tables.save_table(paper, folder / "tables", "paper_table")
        tables.save_table(tables.readable(paper), folder / "tables", "paper_table_readable",
                          caption="Accuracy and ConsistSyn by method and rate, in %")
        if plan := claims(sweep, results):
            comparisons = primary_comparisons(results, plan)
            tables.save_table(comparisons, folder / "tables", "primary_comparisons", caption="Comparisons")
            if comparisons["estimate"].notna().any():  # else, as without a common seed, there is nothing to draw
                figures.save_figure(figures.forest_plot(comparisons), folder / "figures", "primary_comparisons",
                                    comparisons)
    return write_report(folder, notebooks=[], title=f"CARMA: sweep {sweep.file.stem}")
