"""The controlled study as data: what is compared, which trainings that takes, and how each is done."""
from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields, replace
from itertools import product
from pathlib import Path
from typing import Any

from carma_lib.files import read_json, write_json
from carma_lib.losses import CarmaConfig
from carma_lib.methods import METHODS, check_method
from carma_lib.tasks import task_named

TASKS = ("controlled_inverse_dictionary", "controlled_sentiment")
STARTS = ("base", "random")
#: The strengths tried for each method on the validation split, as many for all; for plain fine-tuning the
#: learning rate, which all methods then share.
TRIALS: dict[str, tuple[float, ...]] = {
    "fine_tuning": (0.0005, 0.001, 0.002),
    "carma": (0.1, 0.3, 0.6),
    "mutual_information_only": (0.1, 0.3, 0.6),
    "stability_only": (0.1, 0.3, 0.6),
    "r_drop": (0.5, 2.0, 5.0),
    "neftune": (2.0, 5.0, 10.0),
    "label_smoothing": (0.05, 0.1, 0.2),
    "synonym_augmentation": (0.1, 0.25, 0.5),
    "l2_sp": (0.0001, 0.001, 0.01),
}
ALTERNATIVES = tuple(name for name in TRIALS if name not in ("fine_tuning", "carma"))
#: CARMA's settings, one changed at a time. Layers as (first, last) blocks of the study's own four.
SENSITIVITY: dict[str, tuple] = {
    "carma_weight": (0.1, 0.3, 0.6, 0.9),
    "term_weights": ((0.1, 0.9), (0.9, 0.1)),
    "layer_range": ((0, 1), (2, 3)),
    "temperature": (0.05, 0.5),
    "num_negatives": (1, "all"),
    "level": ("phrase",),
}
MODEL_SIZES = ((2, 64), (4, 32), (4, 128))  # layers, width
SHARED_RATE = 0.001  # learning rate of model sizes other than the study's own


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How every cell is trained and tested.

    budgets: steps at which one and the same run is tested; the learning rate is constant after
    `warmup_steps`, so each is what a training of that length gives. base_steps: language modelling on the
    lexicon's text, before. test_items, pooled_items: the first so many of each split.
    """

    budgets: tuple[int, ...] = (60, 120, 240, 480)
    batch_size: int = 16
    warmup_steps: int = 50
    family: str = "llama"
    heads: int = 4
    vocabulary_size: int = 800
    base_steps: int = 1000
    base_learning_rate: float = 0.002
    validation_items: int = 200
    test_items: int = 300
    pooled_items: int = 100
    rates: tuple[float, ...] = (0.1, 0.25, 0.4)
    adversary_rate: float = 0.25
    adversary_tries: int = 8
    depth_shares: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0)
    carma: CarmaConfig = CarmaConfig(mi_layers=(0, 2), stability_layers=(0, 2))

    def __post_init__(self) -> None:
        if not self.budgets or list(self.budgets) != sorted(set(self.budgets)) or self.budgets[0] < 1:
            raise ValueError(f"budgets must be steps in ascending order, got {self.budgets}")
        for name in ("batch_size", "base_steps", "validation_items", "test_items", "pooled_items", "adversary_tries"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")


@dataclass(frozen=True, kw_only=True)
class StudyCell:
    """One training. `strength` None: the method's default; `change`: one setting of CARMA that differs."""

    task: str
    start: str
    training_items: int
    method: str
    seed: int
    learning_rate: float
    strength: float | None = None
    change: tuple[str, Any] | None = None
    layers: int = 4
    width: int = 64
    tuning: bool = False

    def __post_init__(self) -> None:
        task_named(self.task), check_method(self.method)
        if self.start not in STARTS:
            raise ValueError(f"unknown start '{self.start}'; the starts are {', '.join(STARTS)}")

    @property
    def place(self) -> Path:
        """Where its table stands in the study's folder, without suffix."""
        named = [self.method, f"learning_rate-{self.learning_rate:g}"]
        if self.strength is not None:
            named.append(f"{METHODS[self.method].strength}-{self.strength:g}")
        if self.change is not None:
            named.append(f"{self.change[0]}-{setting_text(self.change[1])}")
        return (Path("tuning" if self.tuning else "cells") / self.task / f"{self.start}-{self.layers}x{self.width}"
                / f"{self.training_items}-items" / "_".join(named) / f"seed-{self.seed}")

    def facts(self) -> dict[str, Any]:
        """The fields as plain values, the change as two columns."""
        name, value = self.change or ("", "")
        return {**asdict(self), "change": name, "value": setting_text(value)}


def setting_text(value: Any) -> str:
    """(0, 2) → "0-2"; everything else as it is written."""
    return "-".join(map(str, value)) if isinstance(value, (tuple, list)) else str(value)


@dataclass(frozen=True, kw_only=True)
class Design:
    """What is compared. `few`: training items of every block but `training_set_sizes`.

    `layers` and `width` are those of every block but `model_sizes`. seeds: of the primary comparison;
    further_seeds: of all else; tuning_seeds: of the trials, used nowhere else. trials: how many a method.
    """

    tasks: tuple[str, ...] = TASKS
    starts: tuple[str, ...] = STARTS
    few: int = 900
    other_sizes: tuple[int, ...] = (300, 4500)
    layers: int = 4
    width: int = 64
    seeds: tuple[int, ...] = tuple(range(1, 11))
    further_seeds: tuple[int, ...] = (1, 2, 3, 4, 5)
    tuning_seeds: tuple[int, ...] = (101, 102)
    trials: int = 3
    alternatives: tuple[str, ...] = ALTERNATIVES
    sensitivity: dict[str, tuple] = field(default_factory=lambda: dict(SENSITIVITY))
    model_sizes: tuple[tuple[int, int], ...] = MODEL_SIZES

    def learning_rate_trials(self) -> list[StudyCell]:
        """Plain fine-tuning at each learning rate, for each task and start."""
        return [StudyCell(task=task, start=start, training_items=self.few, method="fine_tuning", seed=seed,
                          learning_rate=rate, layers=self.layers, width=self.width, tuning=True)
                for task, start, rate, seed in product(self.tasks, self.starts, TRIALS["fine_tuning"][:self.trials],
                                                       self.tuning_seeds)]

    def strength_trials(self, rates: dict[tuple[str, str], float]) -> list[StudyCell]:
        """Each other method at each strength, from the first start. rates: (task, start) → learning rate."""
        start = self.starts[0]
        return [StudyCell(task=task, start=start, training_items=self.few, method=method, seed=seed, strength=strength,
                          learning_rate=rates[task, start], layers=self.layers, width=self.width, tuning=True)
                for task in self.tasks for method in ("carma", *self.alternatives)
                for strength in TRIALS[method][:self.trials] for seed in self.tuning_seeds]

    def blocks(self, rates: dict[tuple[str, str], float],
               strengths: dict[tuple[str, str], float]) -> dict[str, list[StudyCell]]:
        """The tested cells by block; a cell may stand in several. strengths: (task, method) → strength."""

        def cell(task: str, start: str, method: str, seed: int, items: int = self.few) -> StudyCell:
            return StudyCell(task=task, start=start, training_items=items, method=method, seed=seed,
                             learning_rate=rates[task, start], strength=strengths.get((task, method)),
                             layers=self.layers, width=self.width)

        both, first = ("fine_tuning", "carma"), self.starts[0]
        changes = [(name, value) for name, values in self.sensitivity.items() for value in values]
        return {
            "primary": [cell(*of) for of in product(self.tasks, self.starts, both, self.seeds)],
            "training_set_sizes": [cell(*of) for of in product(self.tasks, self.starts, both, self.further_seeds,
                                                               self.other_sizes)],
            "alternatives": [cell(*of) for of in product(self.tasks, [first], self.alternatives, self.further_seeds)],
            "sensitivity": [replace(cell(task, first, "carma", seed), change=change)
                            for task, change, seed in product(self.tasks, changes, self.further_seeds)],
            "model_sizes": [replace(cell(task, first, method, seed), start="random", layers=layers, width=width,
                                    learning_rate=SHARED_RATE)
                            for task, (layers, width), method, seed in product(
                                self.tasks, self.model_sizes, both, self.further_seeds)],
            "alternatives_from_other_starts": [cell(*of) for of in product(
                self.tasks, self.starts[1:], self.alternatives, self.further_seeds)],
        }


def write_plan(study_dir: Path, design: Design, recipe: Recipe) -> None:
    """What the cells of a study folder are, for those who read them: `plan.json`."""
    write_json(study_dir / "plan.json", {"design": asdict(design), "recipe": asdict(recipe)})


def design_from(changes: dict[str, Any]) -> Design:
    """The whole study's design with some fields changed; lists count as tuples. `ValueError` for an unknown one."""
    return _changed(Design, changes)


def recipe_from(changes: dict[str, Any]) -> Recipe:
    """The study's recipe with some fields changed; `carma` as a dict of CarmaConfig's. `ValueError` as above."""
    changes = dict(changes)
    if isinstance(changes.get("carma"), dict):
        changes["carma"] = _changed(CarmaConfig, changes["carma"])
    return _changed(Recipe, changes)


def _changed(kind: type, changes: dict[str, Any]) -> Any:
    known = [each.name for each in fields(kind)]
    if unknown := sorted(set(changes) - set(known)):
        raise ValueError(f"{kind.__name__} has no field '{unknown[0]}'; it has {', '.join(known)}")
    return kind(**_tuples(changes))


def read_plan(study_dir: Path) -> tuple[Design, Recipe]:
    """What `write_plan` wrote. `FileNotFoundError` where there is none."""
    plan = read_json(study_dir / "plan.json")
    if plan is None:
        raise FileNotFoundError(f"no study in {study_dir}: run notebook 07 first (profile study)")
    return design_from(plan["design"]), recipe_from(plan["recipe"])


def _tuples(value: Any) -> Any:
    """JSON's lists as the tuples that they were."""
    if isinstance(value, dict):
        return {name: _tuples(each) for name, each in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def carma_of(cell: StudyCell, recipe: Recipe) -> CarmaConfig:
    """The recipe's CARMA settings with the cell's change; layers in proportion where the depth differs."""
    own = Design().layers
    carma = recipe.carma
    if cell.layers != own:
        first, last = carma.mi_layers
        layers = (first * cell.layers // own, max(1, (last + 1) * cell.layers // own - 1))
        carma = replace(carma, mi_layers=layers, stability_layers=layers)
    if cell.change is None or cell.change[0] in ("level", "carma_weight"):  # λ comes as the strength
        return carma
    name, value = cell.change
    if name == "term_weights":
        return replace(carma, mi_weight=value[0], stability_weight=value[1])
    if name == "layer_range":
        return replace(carma, mi_layers=value, stability_layers=value)
    return replace(carma, **{name: None if value == "all" else value})


def strength_of(cell: StudyCell) -> float | None:
    """The strength a cell is trained with: its own, unless the change is one of λ."""
    return cell.change[1] if cell.change and cell.change[0] == "carma_weight" else cell.strength
