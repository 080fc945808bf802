"""What cells will take, told before they begin: time and disk, measured where a cell has ended.

What is not measured goes by rules for a decoder of N ≈ vocabulary · width + 12 · blocks · width² weights:

- time of a cell: steps × the longer of 0.03 s and 6 · N · tokens of a batch (24 a row) ÷ 3·10¹⁰ operations a second, a
  CPU core's; half as much again for its tests. An untuned cell is its tests only.
- disk: 4 T bytes for each model that is kept and 24 T for the checkpoints of each cell in work, T = N, or with adapters
  the rank · 22 · blocks · width weights that are trained.
"""
from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterable
from pathlib import Path
from statistics import median
from typing import NamedTuple

from carma_lib.files import RunError
from carma_lib.lab.cell import Cell, cell_folder, finished_facts
from carma_lib.lab.plan import Sweep
from carma_lib.lab.worker import is_done
from carma_lib.models import load_config
from carma_lib.tasks import is_built, read_card

OPERATIONS_A_SECOND, SHORTEST_STEP, TOKENS_A_ROW = 3e10, 0.03, 24


class Estimate(NamedTuple):
    """Cells open, seconds of all of them one after another, whether measured, bytes still needed and bytes free."""

    open: tuple[Cell, ...]
    seconds: float
    measured: bool
    disk: int
    free: int


def _weights(cell: Cell) -> tuple[int, int]:
    """About how many weights the model has, and how many its training changes and saves."""
    recipe = cell.recipe
    vocabulary, width, blocks = recipe.vocabulary_size, recipe.width, recipe.layers
    if not recipe.small:
        config = load_config(recipe.pretrained).get_text_config()
        vocabulary, width, blocks = config.vocab_size, config.hidden_size, config.num_hidden_layers
    every = vocabulary * width + 12 * blocks * width**2
    return every, every if recipe.adapter == "none" else recipe.lora_rank * 22 * blocks * width


def _steps(folder: Path, cell: Cell) -> int:
    """Steps of a training; for `epochs` of data that are not built yet, as if they had 10,000 rows."""
    try:
        rows = read_card(folder / "data" / cell.task)["counts"]["train"]
    except RunError:
        rows = 10_000
    return cell.recipe.training_steps(min(rows, cell.recipe.training_items or rows))


def open_cells(sweep: Sweep) -> tuple[Cell, ...]:
    """The cells that still need work, on data as the sweep's file asks for them."""
    current = {task for task in sweep.tasks
               if is_built(task, sweep.run_dir / "data" / task, **sweep.data.get(task, {}))}

    def needs_work(cell: Cell) -> bool:
        try:
            return cell.task not in current or not is_done(sweep.run_dir, cell, "tested")
        except RunError:  # absent or damaged data are built again
            return True

    return tuple(cell for cell in sweep.cells if needs_work(cell))


def estimate(sweep: Sweep, *, workers: int = 1) -> Estimate:
    """The estimate of a sweep's open cells; `workers` counts for the checkpoints on disk only."""
    waiting, seconds, disk, largest, trainings, measured = open_cells(sweep), 0.0, 0, 0, 0, True
    took = {cell: facts["seconds"] for cell in sweep.cells
            if isinstance((facts := finished_facts(cell_folder(sweep.run_dir, cell) / "tested.json")).get("seconds"), float)}
    for cell in waiting:
        alike = [value for other, value in took.items() if (other.model, other.task, other.untuned) == (
            cell.model, cell.task, cell.untuned)]
        weights, trained = _weights(cell)
        training = _steps(sweep.run_dir, cell) * max(
            SHORTEST_STEP, 6 * weights * TOKENS_A_ROW * cell.recipe.batch_size / OPERATIONS_A_SECOND)
        seconds += median(alike) if alike else training / 2 if cell.untuned else 1.5 * training
        measured &= bool(alike)
        if not cell.untuned:
            disk += 4 * trained * cell.recipe.keep_model
            trainings, largest = trainings + 1, max(largest, trained * (cell.recipe.keep == "best"))
    disk += 24 * largest * min(workers, trainings)
    there = next(path for path in (sweep.run_dir, *sweep.run_dir.parents) if path.exists())
    if not there.is_dir():
        raise RunError(f"{there} is a file, so {sweep.run_dir} can be no folder; give another run_dir")
    return Estimate(waiting, seconds, measured and bool(waiting), disk, shutil.disk_usage(there).free)


def check_disk(sweep: Sweep, found: Estimate) -> None:
    """`RunError` if what is still to be written will not fit."""
    if found.disk > found.free:
        raise RunError(f"{sweep.run_dir} needs about {_size(found.disk)} more and its disk has {_size(found.free)} "
                       "free; free some, or set run_dir to another disk")


def describe(sweep: Sweep, found: Estimate, *, workers: int, where: str, cpu_only: bool) -> str:
    """What the sweep would do, for `--dry-run`. cpu_only: it is known to run without a GPU, as the time's rule does."""
    lines, waiting = [f"{sweep.file} → {sweep.run_dir}", ""], set(found.open)
    for (model, task), group in itertools.groupby(sweep.cells, lambda cell: (cell.model, cell.task)):  # in the file's order
        cells = list(group)
        recipe, count = cells[0].recipe, sum(cell not in waiting for cell in cells)
        lines.append(f"{model} ({recipe.start}), {task}: {len(cells)} cells, {count} done\n"
                     f"    {_names(cell.method for cell in cells)}; seeds {_names(cell.seed for cell in cells)}; "
                     f"{_steps(sweep.run_dir, cells[0])} steps of {recipe.batch_size} rows; "
                     f"terms read blocks {recipe.mi_layers} and {recipe.stability_layers}")
    how = ("from the cells that have ended" if found.measured else "by a rule, until cells have ended" if cpu_only else
           "by a rule for CPU cores, until cells have ended; a GPU is much faster")
    lines += ["", f"{len(sweep.cells)} cells: {len(sweep.cells) - len(waiting)} done, {len(waiting)} open; {where}"]
    if waiting:
        lines.append(f"time: about {_time(found.seconds)} of work, {_time(found.seconds / min(workers, len(waiting)))} "
                     f"with {workers} at a time ({how})")
        lines.append(f"disk: about {_size(found.disk)} more, {_size(found.free)} free")
    return "\n".join([*lines, f"at the end: {sweep.run_dir / 'report.html'}"])


def _names(values: Iterable) -> str:
    return ", ".join(map(str, dict.fromkeys(values)))


def _time(seconds: float) -> str:
    return (f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min" if seconds < 7200
            else f"{seconds / 3600:.1f} h")


def _size(count: int) -> str:
    return f"{count / 2**20:,.0f} MiB" if count < 2**30 else f"{count / 2**30:,.1f} GiB"
