"""A sweep from its file to its report: what it would do, its cells through `run`, one result table, one report."""
from __future__ import annotations

import contextlib
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from carma_lib.lab.cell import Cell
from carma_lib.lab.cluster import default_workers, gpu_groups, scheduler_client, slurm_client, slurm_cluster
from carma_lib.lab.estimate import check_disk, describe, estimate
from carma_lib.lab.plan import Sweep
from carma_lib.lab.run import run
from carma_lib.lab.tables import pack
from carma_lib.report import plots, tables
from carma_lib.report.page import write_report
from carma_lib.stats.claims import default_claims, primary_comparisons
from carma_lib.stats.table import at_the_end, read_results


class Where(NamedTuple):
    """Where a sweep's cells run: `workers` of this machine, or a Dask scheduler's, or SLURM jobs of a file."""

    workers: int | None = None
    scheduler: str | None = None
    slurm: Path | None = None


def plan_text(sweep: Sweep, where: Where) -> str:
    """What the sweep would do and where, for a reader.

    Raises `RunError` if the disk is too small for it, or a training wants more GPUs than there are.
    """
    cpu_only = False
    _check_where(where)
    if where.slurm:
        count, cluster = slurm_cluster(where.slurm)
        with cluster:
            text = f"{count} SLURM jobs, each running\n{cluster.job_script()}"
    elif where.scheduler:
        count, text = 1, f"the workers of {where.scheduler}, whose number divides the time"
    else:
        cpu_only = not gpu_groups(sweep.gpus_each)
        count = default_workers(sweep.gpus_each) if where.workers is None else where.workers
        if count < 1:
            raise ValueError(f"workers is {count}; it must be at least 1")
        text = f"{count} local process{'es' if count > 1 else ''}"
    found = estimate(sweep, workers=count)
    check_disk(sweep, found)
    return describe(sweep, found, workers=count, where=text, cpu_only=cpu_only)


def _check_where(where: Where) -> None:
    for name, value in (("scheduler", where.scheduler), ("slurm", where.slurm)):
        if value is not None and not str(value).strip():
            raise ValueError(f"{name} is empty: give its address or file, or leave the option out for processes of this machine")


def run_sweep(sweep: Sweep, where: Where = Where(), *, retries: int = 1) -> tuple[Path, dict[Cell, str]]:
    """Run what is open of a sweep and make its report; its path, and each cell without a result with one line why.

    Raises as `run` does; cells that fail are tried `retries` times more, then left out.
    """
    _check_where(where)
    with (scheduler_client(where.scheduler) if where.scheduler else slurm_client(where.slurm) if where.slurm
          else contextlib.nullcontext()) as client:
        failed = run(sweep.cells, sweep.run_dir, client, workers=where.workers, retries=retries, errors="collect",
                     data=sweep.data, collect=lambda: pack(sweep.run_dir, sweep.cells, sweep.run_dir))
    return make_report(sweep, failed), failed


def _results(sweep: Sweep) -> pd.DataFrame:
    """The result table; models that share a name, as small ones trained differently, get their cell's recipe beside it."""
    results = read_results(sweep.run_dir / "results.parquet")
    mark_of = {cell.key: cell.recipe.training_mark()[:6] for cell in sweep.cells}
    results = results[results["cell"].isin(list(mark_of))]
    marks = results["cell"].astype(str).map(mark_of)
    several = pd.DataFrame({"model": results["model"].astype(str), "task": results["task"].astype(str), "mark": marks}
                           ).drop_duplicates().groupby(["model", "task"])["mark"].transform("size").gt(1).any()
    if several:
        results = results.assign(model=(results["model"].astype(str) + " (" + marks + ")").astype("category"))
    return results


def make_report(sweep: Sweep, failed: dict[Cell, str]) -> Path:
    """Tables, the picture of the claims and `report.html` from what is finished; the report's path."""
    folder = sweep.run_dir
    for name in ("primary_comparisons", "paper_table", "paper_table_readable", "failed_cells"):
        for path in (*folder.glob(f"tables/{name}.*"), *folder.glob(f"figures/{name}.*")):
            path.unlink()
    if failed:
        rows = [(cell.model, cell.task, cell.method, cell.seed, why) for cell, why in failed.items()]
        tables.save_table(pd.DataFrame(rows, columns=["model", "task", "method", "seed", "reason"]), folder / "tables", "failed_cells")
    if (folder / "results.parquet").is_file() and len(found := _results(sweep)):
        results = at_the_end(found)
        paper = tables.paper_table(results)
        tables.save_table(paper, folder / "tables", "paper_table")
        tables.save_table(tables.readable(paper), folder / "tables", "paper_table_readable",
                          caption="Accuracy and ConsistSyn by method and rate, in %")
        if plan := default_claims(results, questions=["new combinations", "synonyms", "pooling"]):
            comparisons = primary_comparisons(results, plan)
            tables.save_table(comparisons, folder / "tables", "primary_comparisons", caption="Comparisons")
            if comparisons["estimate"].notna().any():  # without a common seed there is nothing to draw
                plots.save_figure(plots.forest_plot(comparisons), folder / "figures", "primary_comparisons", comparisons)
    return write_report(folder, notebooks=[], title=f"CARMA: sweep {sweep.file.stem}")
