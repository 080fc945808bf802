"""The one function that schedules trainings: `run(cells, folder, client)`."""
from __future__ import annotations

import contextlib
import errno
import math
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal

from distributed import CancelledError, Client, Future, wait
from distributed.scheduler import KilledWorker
from tqdm import tqdm

from carma_lib.files import RunError, locked, remove_partial, write_json
from carma_lib.lab.cell import Cell, cell_folder
from carma_lib.lab.cluster import LOST_WORKERS, default_workers, end_if_worker, gpu_groups, local_client
from carma_lib.lab.recipe import EXAMPLES
from carma_lib.lab.study import Study, best_trials, chosen
from carma_lib.lab.tables import in_archive, pack, read_cells
from carma_lib.lab.worker import Stage, attempts, is_done, one_line, prepare, prepare_base, run_cell
from carma_lib.tasks import DataNotFound, build_task, read_card
from carma_lib.tasks.file import PREFIX as OWN

COLLECT_SECONDS = 30
GIVEN_UP = 20  # so often a cell may be given up by Dask that no worker was lost to
FULL = 2**20  # bytes free of a disk on which not every write says by itself that it is full


class CellFailed(RuntimeError):
    """A cell could not be trained or tested; the message names it and why."""


def run(cells: Iterable[Cell], folder: Path, client: Client | None = None, *, workers: int | None = None,
        stage: Stage = "tested", retries: int = 0, errors: Literal["stop", "collect"] = "stop",
        data: Mapping[str, Mapping[str, Any]] | None = None, done: Callable[[Cell], bool] | None = None,
        collect: Callable[[], Any] | None = None) -> dict[Cell, str]:
    """Train and test every cell that is not done; the cells that have no result, each with one line why.

    client: of Dask, else `workers` processes of this machine are started. stage: "trained" stops before the tests.
    retries: further attempts of a cell that failed; one whose worker is lost runs again beside these. errors: "stop"
    at the first cell that fails for good (`CellFailed`), or "collect" them. data: a task → parameters of `build_task`;
    of tasks that it does not name, data are taken as they were built. done: of a cell that has its result elsewhere.
    collect: called now and then, and at the end, to gather results so far.

    `folder/cells/status.json` says how far every cell is. `RunError` if the folder is in use, a disk is full, or the
    connection to the workers is lost; what is done stays done, and the same call goes on from there.
    """
    cells = list(dict.fromkeys(cells))
    check_retries(retries)
    if stage == "trained" and (lost := [cell for cell in cells if not cell.recipe.keep_model and not cell.untuned]):
        raise ValueError(f"{lost[0].name} has keep_model=False, so nothing would be left to test later: train and test it in one run, "
                         "or keep its model")
    end_if_worker()
    with locked(folder / "cells" / "lock", busy=f"{folder} is in use by another run; wait for it, or give another folder"):
        for task in dict.fromkeys(name for cell in cells for name in (
                cell.task, *cell.recipe.tokenizer_tasks, *(text for text in cell.recipe.plain_texts if text != EXAMPLES))):
            _build(folder / "data" / task, task, (data or {}).get(task))
        for part in ("cells", "data", "starts"):
            remove_partial(folder / part)
        book = _Book(folder, cells, stage, done or (lambda cell: False))
        if book.open:
            gpus = max(cell.recipe.processes for cell in book.open)
            if client is None and workers is None:
                workers = default_workers(gpus)
            sharing = 1 if client else math.ceil(workers / max(1, len(gpu_groups(gpus))))
            with contextlib.nullcontext(client) if client else local_client(workers, gpus_each=gpus) as own:
                _drive(own, book, retries=retries, stop=errors == "stop", sharing=sharing, collect=collect)
        if collect:
            collect()
        return book.failed


def check_retries(retries: int) -> None:
    """`ValueError` for a number below 0."""
    if retries < 0:
        raise ValueError(f"retries is {retries}; it must be at least 0")


def names_of(cells: Iterable[Cell]) -> dict[Cell, str]:
    """What people read of each cell; where several share a name, as trials of learning rates do, with its key."""
    cells = list(cells)
    shared = Counter(cell.name for cell in cells)
    return {cell: cell.name if shared[cell.name] == 1 else f"{cell.name}-{cell.key}" for cell in cells}


def run_trials(study: Study, folder: Path, archive: Path, *, workers: int | None = None) -> None:
    """Make the trials of a study that its archive lacks: those of the learning rates, then, at the best, of the strengths."""
    done = in_archive(archive, folder)
    for others in (False, True):
        rates = chosen(best_trials(read_cells(archive, trials=True)[1]))[0] if others else {}
        trials = study.strength_trials(rates) if others else study.learning_rate_trials()
        run(trials, folder, workers=workers, done=done, collect=lambda: pack(folder, trials, archive))


def _build(place: Path, task: str, parameters: Mapping[str, Any] | None) -> None:
    """The data of a task: as asked for, else as they were built before, else as `build_task` does by itself."""
    if parameters is None and task.startswith(OWN):  # whose file only notebook 1 or a sweep knows
        read_card(place)
        return
    if parameters is None:
        try:
            before = read_card(place)["parameters"]
        except DataNotFound:
            before = {}
        parameters = {name: before[name] for name in ("seed", "split_by", "train_phrases") if name in before}
    build_task(task, place, **parameters)


class _Book:
    """What is known of every cell, as `status.json` and the progress bar show it."""

    def __init__(self, folder: Path, cells: list[Cell], stage: Stage, elsewhere: Callable[[Cell], bool]) -> None:
        self.folder, self.stage = folder, stage
        self.states = {cell: "done" if elsewhere(cell) or is_done(folder, cell, stage) else "open" for cell in cells}
        self.names, self.failed = names_of(cells), dict[Cell, str]()
        self.given_up = Counter[Cell]()
        self._lost_before = {cell: self._counts(cell)[1] for cell in self.open}
        for cell in self.open:  # what an attempt of an earlier run said
            for file in ("failure.txt", "work/step"):
                with contextlib.suppress(OSError):
                    (cell_folder(folder, cell) / file).unlink()
        self.save()

    @property
    def open(self) -> list[Cell]:
        return [cell for cell, state in self.states.items() if state == "open"]

    def put(self, cell: Cell, state: str, reason: str = "") -> None:
        self.states[cell] = state
        if state == "failed":
            self.failed[cell], more = reason, cell_folder(self.folder, cell) / "failure.txt"
            tqdm.write(f"{self.names[cell]} failed: {reason}" + (f"\n  {more}" if more.is_file() else ""))

    def _counts(self, cell: Cell) -> tuple[int, int]:
        """How often a cell was begun, and how often it did not come to an end, which may be that it is at work."""
        counts = Counter(line["state"] for line in attempts(cell_folder(self.folder, cell)))
        return counts["begun"], counts["begun"] - counts["done"] - counts["failed"]

    def lost(self, cell: Cell) -> int:
        """How many workers were lost to a cell in this run."""
        return max(0, self._counts(cell)[1] - self._lost_before[cell])

    def save(self) -> None:
        cells = {}
        for cell, state in self.states.items():
            begun, lost = self._counts(cell)
            cells[self.names[cell]] = {"state": state, "attempts": begun, "lost": lost if state != "open" else 0,
                                       "place": cell.place.as_posix(),
                                       **({"reason": self.failed[cell]} if cell in self.failed else {})}
        states = Counter(self.states.values())
        write_json(self.folder / "cells" / "status.json", {
            "updated": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "counts": {**{name: states[name] for name in ("done", "open", "failed")},
                       "lost": sum(cell["lost"] for cell in cells.values())}, "cells": cells})


def _drive(client: Client, book: _Book, *, retries: int, stop: bool, sharing: int, collect: Callable[[], Any] | None) -> None:
    cells = book.open
    flight = _submit(client, book, cells, retries=retries, sharing=sharing)
    collected, pause, reached = time.monotonic(), COLLECT_SECONDS, dict.fromkeys(cells, 0.0)
    with tqdm(total=len(cells), unit="cell", desc=f"{len(cells)} cells", mininterval=1) as bar:
        try:
            while flight:
                with client.as_current(), contextlib.suppress(TimeoutError):
                    wait(list(flight), timeout=1, return_when="FIRST_COMPLETED")
                ended = [future for future in flight if future.done()]
                for future in ended:
                    cell = flight.pop(future)
                    if _lost_beside_others(book, cell, future):
                        flight |= _submit(client, book, [cell], retries=retries, sharing=sharing)
                    else:
                        _settle(book, cell, future, stop=stop)
                reached |= {cell: max(reached[cell], _share(book.folder, cell)) for cell in flight.values()}
                bar.n = round(len(cells) - len(flight) + sum(reached[cell] for cell in flight.values()), 1)
                failed = f"{len(book.failed)} failed" if book.failed else ""
                bar.set_postfix_str(failed, refresh=False)
                bar.refresh()
                if ended:
                    book.save()
                if collect and time.monotonic() - collected > pause:
                    begun = time.monotonic()
                    collect()
                    collected = time.monotonic()
                    pause = max(COLLECT_SECONDS, 20 * (collected - begun))
        except BaseException:
            with contextlib.suppress(Exception):
                client.cancel(list(flight), force=True)
            with contextlib.suppress(OSError):  # of a full disk: the error that is raised here tells of it
                book.save()
            raise


def _submit(client: Client, book: _Book, cells: list[Cell], *, retries: int, sharing: int) -> dict[Future, Cell]:
    """Every cell as a call that begins when what it shares with others is prepared."""
    folder, stage = book.folder, book.stage
    shared: dict[tuple, list[Cell]] = {}
    for cell in cells:  # also with what a training's memory depends on, so that one that does not fit stops no other
        recipe = cell.recipe
        shared.setdefault((cell.task, recipe.start_mark(), recipe.testing_mark(), recipe.training_items, recipe.accumulation,
                           recipe.processes, recipe.activation_checkpointing, recipe.lora_rank, cell.method == "l2_sp"), []).append(cell)
    ready = {cell: one for group in shared.values() for one in [client.submit(
        prepare, folder, group, min(sharing, len(group)), stage, pure=False, retries=retries)] for cell in group}
    bases: dict[tuple, Future] = {}
    flight = {}
    for number, cell in enumerate(cells):  # in their order, which Dask would not keep by itself
        after = [ready[cell]]
        if cell.recipe.start == "base":
            key = (cell.seed, cell.recipe.start_mark(), cell.recipe.tokenizer_tasks or cell.task)
            if key not in bases:
                bases[key] = client.submit(prepare_base, folder, cell, ready[cell], pure=False, retries=retries)
            after.append(bases[key])
        flight[client.submit(run_cell, folder, cell, stage, *after, pure=False, retries=retries, priority=-number,
                             key=f"cell-{cell.key}-{time.monotonic_ns()}")] = cell
    return flight


def _lost_beside_others(book: _Book, cell: Cell, future: Future) -> bool:
    """Whether Dask gave a cell up for workers that were lost to others: it counts a loss for all that waited there."""
    error = future.exception() if future.status == "error" else None
    if not isinstance(error, KilledWorker) or error.task != future.key or book.lost(cell) > LOST_WORKERS:
        return False
    book.given_up[cell] += 1
    return book.given_up[cell] < GIVEN_UP  # else its workers write no log that can be read here


def _settle(book: _Book, cell: Cell, future: Future, *, stop: bool) -> None:
    """Enter how a cell ended. `RunError` if no other can go on, `CellFailed` to stop at the first failure."""
    if future.status == "finished":
        book.put(cell, "done")
        return
    error = None if future.status == "cancelled" else future.exception()
    if error is None or isinstance(error, CancelledError):
        raise RunError("the connection to the workers is lost; done cells are kept, the same command goes on")
    full = getattr(error, "errno", None) in (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))
    if full or "No space left on device" in str(error) or shutil.disk_usage(book.folder).free < FULL:
        raise RunError(f"a disk is full, that of {book.folder} unless this names another: {one_line(error)}; free some, "
                       "then the same command goes on from what is done") from error
    reason = (f"its worker ended abruptly {book.lost(cell) or error.allowed_failures + 1} times (killed, or out of memory)"
              if isinstance(error, KilledWorker) else one_line(error))
    book.put(cell, "failed", reason)
    if stop:
        raise CellFailed(f"{book.names[cell]}: {reason}") from error


def _share(folder: Path, cell: Cell) -> float:
    """How much of a cell in work its training has done: the steps are nine tenths, the tests the rest."""
    try:
        step, steps = (cell_folder(folder, cell) / "work" / "step").read_text(encoding="utf-8").split()
        return 0.9 * int(step) / int(steps)
    except (OSError, ValueError):
        return 0.0
