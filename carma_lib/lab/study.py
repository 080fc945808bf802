"""A study read from its plan: trials that choose strengths on validation rows, then blocks of tested cells.

    tasks: [controlled_sentiment]
    settings: {steps: 480, test_at: [60, 120, 240], keep: last, batch_size: 16}     # fields of Recipe, for every cell
    starts:                                  # what cells begin from: a name, and the settings in which it differs
      base: {start: base}
    trials:
      seeds: [101, 102]                      # used nowhere else
      strengths:                             # as many for every method; for fine_tuning the learning rate of all
        fine_tuning: [0.0005, 0.001, 0.002]
        carma: [0.1, 0.3, 0.6]
    blocks:
      primary: {starts: [base], methods: [fine_tuning, carma], seeds: [1, 2, 3]}
      sizes: {starts: [base], methods: [carma], seeds: [1, 2, 3], training_items: [300, 4500]}
      sensitivity: {starts: [base], methods: [carma], seeds: [1, 2], change: {temperature: [0.05, 0.5]}}
"""
from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cached_property, lru_cache
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
from pydantic import BeforeValidator, Field

from carma_lib.files import RunError, parse_yaml, reading
from carma_lib.lab.cell import Cell
from carma_lib.lab.recipe import Recipe, _Strict, _tuple, recipe_for
from carma_lib.methods import check_method
from carma_lib.tasks import task_named

Names, Numbers = tuple[str, ...], tuple[int, ...]
#: Changes that set two settings at once.
_PAIRS = {"term_weights": ("mi_weight", "stability_weight"), "layer_range": ("mi_layers", "stability_layers")}


class Block(_Strict):
    """Some tested cells: starts × methods × seeds, × training_items or × one changed setting of the recipe at a time.

    learning_rate: instead of the trials' choice, for starts that had no trials. tuned: False takes each method's
    strength from the recipe (for CARMA the published settings) instead of the trials.
    """

    starts: Names
    methods: Names
    seeds: Numbers
    training_items: Numbers = ()
    change: dict[str, Any] = {}
    learning_rate: float | None = None
    tuned: bool = True


class Trials(_Strict):
    """The strengths tried for each method, and the seeds of the trials."""

    seeds: Numbers
    strengths: dict[str, Annotated[tuple[float, ...], BeforeValidator(_tuple)]]


class Study(_Strict):
    """A study's plan, checked. `ValueError` in one line for what is unknown or wrong."""

    tasks: Names
    settings: dict[str, Any]
    starts: dict[str, dict[str, Any]]
    trials: Trials
    blocks: dict[str, Block]
    margin: Annotated[float, Field(gt=0, lt=1)] = 0.02
    claims: tuple[dict[str, Any], ...] = ()

    def model_post_init(self, _: Any) -> None:
        for task in self.tasks:
            task_named(task)
        for name, block in self.blocks.items():
            if unknown := [start for start in block.starts if start not in self.starts]:
                raise ValueError(f"block '{name}' names the start '{unknown[0]}', which the plan does not have")
        for method in (*self.trials.strengths, *(method for block in self.blocks.values() for method in block.methods)):
            check_method(method)
        if self.settings.get("keep") != "last":
            raise ValueError("settings need 'keep: last': every tested step is the model of that step")
        if len({len(values) for values in self.trials.strengths.values()}) != 1:
            raise ValueError("every method needs the same number of trials")
        of = [self.start_of(start) for start in self._tried]
        if alike := [start for start in of if of.count(start) > 1]:
            raise ValueError(f"trials choose a learning rate for {of.count(alike[0])} starts that all begin from '{alike[0]}': give the "
                             "blocks of all but one a learning_rate")

    @cached_property
    def first_start(self) -> str:
        """The start from which strengths are chosen."""
        return next(iter(self.starts))

    def recipe(self, task: str, start: str, **changes: Any) -> Recipe:
        """The recipe of a task and start, with changes."""
        return _recipe(self.model_dump_json(include={"settings", "starts"}), task, start,
                       tuple(sorted((name, _tuple(value)) for name, value in changes.items())))

    @cached_property
    def own(self) -> dict[str, Any]:
        """The facts that the cells of the study's own size, training set and settings share, as filters of tables."""
        recipe = self.recipe(self.tasks[0], self.first_start, learning_rate=1e-3)
        return {"change": "", "training_items": recipe.training_items, "layers": recipe.layers, "width": recipe.width}

    def test_steps(self, task: str) -> tuple[int, ...]:
        """The training lengths at which a task's cells are tested."""
        recipe = self.recipe(task, self.first_start, learning_rate=1e-3)
        return (*recipe.test_at, recipe.steps)

    @property
    def _tried(self) -> list[str]:
        """The starts for which a block takes the trials' learning rate."""
        return [start for start in self.starts if any(
            start in block.starts and block.learning_rate is None for block in self.blocks.values())]

    def learning_rate_trials(self) -> list[Cell]:
        """Plain fine-tuning at each learning rate, for each task and start that a block takes the choice for."""
        return [Cell(task, "fine_tuning", seed, self.recipe(task, start, learning_rate=rate), trial=True)
                for task, start, rate, seed in product(self.tasks, self._tried, self.trials.strengths["fine_tuning"], self.trials.seeds)]

    def strength_trials(self, rates: Mapping[tuple[str, str], float]) -> list[Cell]:
        """Each other method at each strength, from the first start. rates: (task, start) → learning rate."""
        start = self.first_start
        return [Cell(task, method, seed, self.recipe(task, start, learning_rate=rates[task, self.start_of(start)]), strength, trial=True)
                for task in self.tasks for method, strengths in self.trials.strengths.items() if method != "fine_tuning"
                for strength in strengths for seed in self.trials.seeds]

    def cells(self, rates: Mapping[tuple[str, str], float], strengths: Mapping[tuple[str, str], float]) -> dict[str, list[Cell]]:
        """The tested cells by block; a cell may be in several. strengths: (task, method) → strength.

        Seed by seed, so that a study that is stopped has all methods of the seeds that it has.
        """
        found: dict[str, list[Cell]] = {}
        for name, block in self.blocks.items():
            changes = [(setting, value) for setting, values in block.change.items() for value in values] or [None]
            sizes = block.training_items or (None,)
            found[name] = [self._cell(block, rates, strengths, *of, seed, items, change) for seed in block.seeds
                           for *of, items, change in product(self.tasks, block.starts, block.methods, sizes, changes)]
        return found

    def start_of(self, name: str) -> str:
        return self.starts[name].get("start", "random")

    def _cell(self, block: Block, rates: Mapping, strengths: Mapping, task: str, start: str, method: str, seed: int,
              items: int | None, change: tuple[str, Any] | None) -> Cell:
        settings: dict[str, Any] = {"learning_rate": block.learning_rate or rates[task, self.start_of(start)]}
        strength = strengths.get((task, method)) if block.tuned else None
        label = ("", "") if block.tuned else ("settings", "published")
        if items is not None:
            settings["training_items"] = items
        if change is not None:
            setting, value = change
            label = (setting, "-".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value))
            if setting == "carma_weight":
                strength = value
            elif setting == "layer_range":
                settings |= {name: value for name in _PAIRS[setting]}
            elif setting in _PAIRS:
                settings |= dict(zip(_PAIRS[setting], value))
            else:
                settings[setting] = None if value == "all" else value
        return Cell(task, method, seed, self.recipe(task, start, **settings), strength, label)


@lru_cache(maxsize=4096)
def _recipe(study: str, task: str, start: str, changes: tuple) -> Recipe:
    plan = json.loads(study)
    settings = {**plan["settings"], **plan["starts"][start], **dict(changes)}
    return recipe_for(task_named(task).kind, settings, seeds=(0,)).recipe


def read_study(file: Path, changes: Mapping[str, Any] | None = None) -> Study:
    """A study's plan, with some of it changed: mappings are changed by key. `RunError` or `ValueError` in one line."""
    with reading(file, "correct it"):
        plan = parse_yaml(Path(file).read_text(encoding="utf-8")) if Path(file).is_file() else None
    if not isinstance(plan, dict):
        raise RunError(f"{file} holds no plan of a study; give the path of one")
    return Study(**merged(plan, changes or {}))


def merged(plan: Any, changes: Any) -> Any:
    """A plan or a recipe with some of it changed: mappings are changed by key, all else is put in its place."""
    if not isinstance(plan, dict) or not isinstance(changes, Mapping):
        return changes
    return {**plan, **{name: merged(plan.get(name), value) for name, value in changes.items()}}


def best_trials(measures: pd.DataFrame) -> pd.DataFrame:
    """A row a task, start and method: the trial with the best mean validation accuracy at the last step.

    measures: of `read_cells(…, trials=True)`. Columns learning_rate, strength, accuracy, trials (how many values), seeds.
    Of equal ones the smaller value wins. `ValueError` for trials of several plans: one value and seed trained twice, or
    trainings of several lengths.
    """
    found = measures[(measures["measure"] == "accuracy") & (measures["split"] == "validation")]
    trial = ["task", "start", "method", "learning_rate", "strength", "seed"]
    each = found.groupby(trial, dropna=False).agg({"cell": "nunique", "budget": "max"})
    if (each["cell"] > 1).any() or (each["budget"].groupby(["task", "start"]).nunique() > 1).any():
        raise ValueError("the table holds trials of several plans: give each plan an archive of its own")
    found = found[found["budget"] == found.groupby(["task", "start"])["budget"].transform("max")]
    keys = ["task", "start", "method"]
    means = found.groupby([*keys, "learning_rate", "strength"], dropna=False)["measured"].agg(["mean", "count"]).reset_index()
    means["tried"] = means.groupby(keys)["mean"].transform("size")
    best = means.sort_values(["mean", "learning_rate", "strength"], ascending=[False, True, True]).drop_duplicates(keys)
    return best.rename(columns={"mean": "accuracy", "count": "seeds", "tried": "trials"}).sort_values(keys).reset_index(drop=True)


def chosen(trials: pd.DataFrame) -> tuple[dict[tuple[str, str], float], dict[tuple[str, str], float]]:
    """From `best_trials`: (task, start) → learning rate, and (task, method) → strength."""
    plain, others = trials[trials["method"] == "fine_tuning"], trials[trials["method"] != "fine_tuning"]
    return ({(row.task, row.start): row.learning_rate for row in plain.itertuples()},
            {(row.task, row.method): row.strength for row in others.itertuples()})
