"""Cells of the smallest real sizes, and helpers to wait for and interfere with a run, shared by the laboratory's tests."""
import os
import signal
import time

import torch
from safetensors.torch import load_file

from carma_lib.lab.cell import Cell, cell_folder
from carma_lib.lab.recipe import Recipe
from carma_lib.lab.worker import attempts

SENTIMENT, DICTIONARY = "controlled_sentiment", "controlled_inverse_dictionary"
SMALL = dict(layers=2, width=16, heads=2, vocabulary_size=400, steps=6, batch_size=8, learning_rate=0.01, warmup_steps=1,
             evaluations=2, training_items=64, validation_items=20, mi_layers=(0, 1), stability_layers=(0, 1),
             carma_weight=0.2, mi_weight=0.2, stability_weight=0.3, rates=(0.25,), depth_shares=(0.5,), protocols=("mean",),
             levels=("word",), test_splits=("test_seen",), test_items=12, pooled_items=6, measures=())
RECIPE = Recipe(**SMALL)


def cell_of(method="carma", seed=1, task=SENTIMENT, strength=None, trial=False, **changes):
    """A cell of the small recipe with some settings changed."""
    return Cell(task, method, seed, RECIPE.but(**changes), strength, trial=trial)


def weights(folder, cell):
    return load_file(cell_folder(folder, cell) / "model" / "model.safetensors")


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def states(folder, cell):
    """What the log of a cell's attempts says, in order."""
    return [line["state"] for line in attempts(cell_folder(folder, cell))]


def block(folder, cell):
    """Make a cell fail at run time, by a file where its training needs a folder; the file, to be removed."""
    work = cell_folder(folder, cell) / "work"
    work.parent.mkdir(parents=True, exist_ok=True)
    work.write_text("a file where a folder must be")
    return work


def wait_for(found, seconds=120):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if value := found():
            return value
        time.sleep(0.02)
    raise TimeoutError(f"not after {seconds} s")


def kill_one_at_work(folder, cells, done=0, but=None):
    """Kill a worker with SIGKILL in the middle of a training, once so many cells are done; the cell."""
    def last_lines():
        found = {cell: attempts(cell_folder(folder, cell)) for cell in cells if cell is not but}
        return {cell: lines[-1] for cell, lines in found.items() if lines}

    wait_for(lambda: sum(line["state"] == "done" for line in last_lines().values()) >= done)

    def kill():
        for cell, line in last_lines().items():
            if line["state"] == "begun":
                os.kill(line["pid"], signal.SIGSTOP)  # so that it cannot end the cell between look and kill
                if last_lines()[cell] == line:
                    os.kill(line["pid"], signal.SIGKILL)
                    return cell
                os.kill(line["pid"], signal.SIGCONT)
        return None

    return wait_for(kill)
