"""A cell: one training and its tests, with its key, its folder, and the marks by which it is known to be done.

A run folder holds `data/<task>/`, `starts/` (tokenizers and base models of small starts) and `cells/<place>/`:
`model/`, `history.csv`, `trained.json` (written last by the training), `answers.parquet`, `measures.parquet`,
`tested.json` (written last by the tests), `attempts.jsonl`, and `work/` while it is trained.
"""
from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from carma_lib.files import RunError, check_folder, fingerprint, read_json, reading, sha256_of, write_json
from carma_lib.lab.recipe import EXAMPLES, Recipe, Testing
from carma_lib.methods import METHODS, check_method, check_strength
from carma_lib.tasks import TASKS, read_card, task_named

#: Raise one when a training, or the tests, come to something else with the same settings and data.
#: Training and testing 2: another draw of the negatives, from the same distribution. Testing 3 to 5: other words are replaced.
#: Training 3: phrases by the chunker where a task has none. Testing 6: of equally likely tokens the first is the answer.
TRAINING_RULES, TESTING_RULES = 3, 6
RULES = f"{TRAINING_RULES}.{TESTING_RULES}"
#: A cell's facts in tables.
FACTS = ("cell", "task", "model", "start", "training_items", "method", "seed", "learning_rate", "strength", "change",
         "value", "layers", "width", "trial")


@dataclass(frozen=True)
class Cell:
    """One training and its tests: task × model × method × strength × seed × recipe.

    strength: the method's main hyperparameter, None for its default (for CARMA, the recipe's λ). change: a setting
    that differs from the rest of a study, and its value, as tables name them. trial: tested on validation rows alone,
    to choose a strength. `ValueError` for an unknown task or method, or a seed outside 0 … 2³² − 1.
    """

    task: str
    method: str
    seed: int
    recipe: Recipe
    strength: float | None = None
    change: tuple[str, str] = ("", "")
    trial: bool = False

    def __post_init__(self) -> None:
        tests = task_named(self.task).tests
        if unknown := [name for name in self.recipe.test_splits + self.recipe.changed_splits if tests and name not in tests]:
            raise ValueError(f"{self.task} has no split '{unknown[0]}'; models are tested on {', '.join(tests)}")
        if unknown := [name for name in self.recipe.tokenizer_tasks if name not in TASKS]:
            raise ValueError(f"tokenizer_tasks: unknown task '{unknown[0]}'; there are {', '.join(TASKS)}")
        for name in self.recipe.plain_texts:
            if name != EXAMPLES:
                task_named(name)
        check_method(self.method)
        if self.method == "l2_sp" and self.recipe.processes > 1:
            raise ValueError("l2_sp needs whole weights in every process: take processes=1")
        if type(self.seed) is not int or not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must be a whole number from 0 to 2**32 - 1, not {self.seed!r}")
        if self.strength is not None:
            object.__setattr__(self, "strength", check_strength(self.method, self.strength))  # 1 and 1.0 are one cell

    @property
    def key(self) -> str:
        """Ten digits that differ between any two trainings."""
        return fingerprint(self.task, self.method, self.seed, self.strength, self.change, self.trial,
                           self.recipe.training_mark())[:10]

    @property
    def model(self) -> str:
        """A short name of the start and, for small models, the shape: "llama-4x128", "smollm2-135m"."""
        recipe = self.recipe
        if recipe.small:
            start = "" if recipe.start == "random" else f"{recipe.start}-"
            return f"{start}{recipe.family}-{recipe.layers}x{recipe.width}"
        return Path(recipe.pretrained).name + ("" if recipe.start == recipe.pretrained else "-random")

    @property
    def place(self) -> Path:
        """Its folder's place under `cells/`."""
        return Path(self.task) / self.model / self.method / f"seed-{self.seed}-{self.key}"

    @property
    def name(self) -> str:
        """What people read: model/task/method/seed."""
        strength = "" if self.strength is None else f" {METHODS[self.method].strength}={self.strength:g}"
        change = " {}={}".format(*self.change) if self.change[0] else ""
        return f"{self.model}/{self.task}/{self.method}{strength}{change}/seed-{self.seed}"

    @property
    def untuned(self) -> bool:
        return self.method == "untuned"

    def facts(self) -> dict[str, Any]:
        """Its columns in tables, by `FACTS`."""
        recipe = self.recipe
        return dict(zip(FACTS, (
            self.key, self.task, self.model, recipe.start, recipe.training_items, self.method, self.seed,
            recipe.learning_rate, self.strength, *self.change, recipe.layers, recipe.width, self.trial)))

    def as_json(self) -> dict[str, Any]:
        """The cell as values that JSON holds."""
        return {**vars(self), "recipe": dict(self.recipe)}

    @classmethod
    def of_json(cls, facts: dict[str, Any]) -> Cell:
        """The cell of what `as_json` gave."""
        return cls(**{**facts, "change": tuple(facts["change"]), "recipe": Recipe(**facts["recipe"])})


def save_plan(folder: Path, cells: Iterable[Cell]) -> None:
    """Write a run folder's cells, so that a later notebook goes on with the same ones (`read_plan`)."""
    write_json(folder / "cells" / "plan.json", [cell.as_json() for cell in cells])


def read_plan(folder: Path, **tests: Any) -> list[Cell]:
    """The cells that `save_plan` wrote, with some settings of their tests changed.

    `FileNotFoundError` if there are none, `RunError` if the file is damaged, `ValueError` for a wrong setting.
    """
    plan = read_json(folder / "cells" / "plan.json")
    if plan is None:
        raise FileNotFoundError(f"no cells in {folder}: run notebook 02 first")
    if training := [name for name in tests if name not in Testing.model_fields]:
        raise ValueError(f"'{training[0]}' is no setting of the tests; there are {', '.join(Testing.model_fields)}")
    with reading(folder / "cells" / "plan.json", "run notebook 02 again"):
        if not isinstance(plan, list):
            raise ValueError("it holds no list of cells")
        cells = [Cell.of_json(facts) for facts in plan]
    return [replace(cell, recipe=cell.recipe.but(**tests)) for cell in cells]


def cell_folder(folder: Path, cell: Cell) -> Path:
    """Where a cell lies in a run folder."""
    return folder / "cells" / cell.place


def training_mark(folder: Path, cell: Cell) -> str:
    """What a finished training is known by, beside the version of its rules: the cell and the content of its data."""
    tasks = (cell.task, *(cell.recipe.tokenizer_tasks if cell.recipe.small else ()))
    return fingerprint(cell.key, [read_card(folder / "data" / task)["content"] for task in tasks])


def testing_mark(folder: Path, cell: Cell) -> str:
    """What finished tests are known by, beside the versions of the rules: the training's mark and the tests' settings."""
    return fingerprint(training_mark(folder, cell), cell.recipe.testing_mark())


def write_facts(file: Path, facts: dict[str, Any]) -> None:
    """Write facts as JSON with a checksum of what they say."""
    write_json(file, {**facts, "checksum": fingerprint(facts)})


def finished_facts(file: Path) -> dict[str, Any]:
    """What `write_facts` wrote; {} if it is absent or damaged, so that it is made again."""
    try:
        facts = read_json(file, keys=("checksum",)) or {}
    except RunError:
        return {}
    return facts if facts.pop("checksum", None) == fingerprint(facts) else {}


def checksums_of(own: Path, names: Iterable[str]) -> dict[str, str]:
    """The sha256 of those of these files that there are in a cell's folder."""
    return {name: sha256_of(own / name) for name in names if (own / name).is_file()}


def _holds(folder: Path, cell: Cell, name: str, mark: Callable[[Path, Cell], str], rules: Any) -> bool:
    """Whether a cell's facts of that name are of these rules, settings and data, and the files that they name whole."""
    own = cell_folder(folder, cell)
    facts = finished_facts(own / name)
    return (bool(facts) and (facts["mark"], facts["rules"]) == (mark(folder, cell), rules)
            and checksums_of(own, facts["sha256"]) == facts["sha256"])


def is_trained(folder: Path, cell: Cell) -> bool:
    """Whether the cell's model, made from these settings and data by these rules, is whole (an untuned one always).

    The weights are read, a second a gigabyte; once the cell is tested, nobody asks any more.
    """
    return cell.untuned or (_holds(folder, cell, "trained.json", training_mark, TRAINING_RULES)
                            and not check_folder(cell_folder(folder, cell) / "model"))


def is_tested(folder: Path, cell: Cell) -> bool:
    """Whether the cell's tables, made from these settings and data by these rules, are whole in its folder."""
    return _holds(folder, cell, "tested.json", testing_mark, RULES)
