"""A sweep read from its file and checked: tasks × models × methods × seeds, a cell each.

`sweeps/example.yml` explains every key. A model is "random", a name, hub id or folder of a pretrained one, or a mapping
with `start` and the settings in which it differs. For a pretrained model what is not given comes from the model table;
a small random one has the defaults.
"""
from __future__ import annotations

import inspect
import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


from carma_lib.files import RunError, parse_yaml, reading, user_path
from carma_lib.lab.cell import Cell
from carma_lib.lab.recipe import EXAMPLES, Testing, recipe_for
from carma_lib.methods import check_method
from carma_lib.tasks import TASKS, build_task, task_named, task_names
from carma_lib.tasks.wordnet import SPLIT_KEYS

NEEDED = ("run_dir", "tasks", "models", "methods", "seeds")
KEYS = (*NEEDED, "settings", "conditions", "data")
DEFAULT_STEPS = 1000  # of a small model, if the file says nothing


@dataclass(frozen=True)
class Sweep:
    """A checked sweep; `cells` come in the file's order: model, task, seed, method. data: a task → how to build it."""

    file: Path
    run_dir: Path
    tasks: tuple[str, ...]
    methods: tuple[str, ...]
    cells: tuple[Cell, ...]
    data: dict[str, dict[str, Any]]

    @property
    def gpus_each(self) -> int:
        """GPUs that a worker needs: the most processes of a training."""
        return max(cell.recipe.processes for cell in self.cells)


def read_sweep(file: Path | str) -> Sweep:
    """Read and check a sweep file. Touches nothing, and reads no model's weights.

    Raises `RunError`, one line each: a file that cannot be read, an unknown or missing key, task, method or
    setting, a value of another type, an absent model.
    """
    file = user_path(file)
    with reading(file, "correct it"):
        if not file.is_file():
            raise RunError(f"{file} is no file; give the path of a sweep file, such as sweeps/example.yml")
        text = parse_yaml(file.read_text(encoding="utf-8"))
    try:
        return _checked(file, text)
    except (ValueError, TypeError, OSError) as error:
        raise RunError(f"{file}: {' '.join(str(error).split())}") from error


def _checked(file: Path, text: Any) -> Sweep:
    _only_known("the file", text, KEYS)
    if missing := [key for key in NEEDED if key not in text]:
        raise ValueError(f"'{missing[0]}' is missing; a sweep has {', '.join(NEEDED)}, and may have settings, "
                         "conditions, data")
    if not isinstance(text["run_dir"], str) or not text["run_dir"].strip():
        raise ValueError(f"run_dir is a folder's name, not {text['run_dir']!r}")
    given, methods = (_names(text, key) for key in ("tasks", "methods"))
    for task in given:
        task_named(task)
    names = task_names(given)
    tasks = [names[task] for task in given]
    for method in methods:
        check_method(method)
    seeds = _listed(text, "seeds")
    if wrong := [seed for seed in seeds if type(seed) is not int]:
        raise ValueError(f"seeds are whole numbers from 0 on, not {wrong[0]!r}")
    text = {**text, **{key: {} for key in KEYS if key not in NEEDED and text.get(key) is None}}
    data = _data(text["data"], given)
    files = {task: {"file": str(user_path(task).resolve())} for task in given if names[task] != task}
    data = {names[task]: {**data.get(task, {}), **files.get(task, {})} for task in given}
    models = [_model(entry, text, tasks) for entry in _listed(text, "models")]
    cells = tuple(Cell(task, method, seed, recipes[task])
                  for recipes, task, seed, method in itertools.product(models, tasks, seeds, methods))
    for cell in cells:
        if unknown := [name for name in cell.recipe.plain_texts if name not in (*TASKS, *tasks, EXAMPLES)]:
            raise ValueError(f"plain_texts names '{unknown[0]}', which is no task of the sweep; there are {', '.join((*tasks, *TASKS, EXAMPLES))}")
    if len({cell.key for cell in cells}) < len(cells):
        raise ValueError("two models of the file are trained alike, and a folder holds one training: give each its own settings of "
                         "training, and write what is tested once, under conditions")
    run_dir = user_path(text["run_dir"])
    return Sweep(file, run_dir if run_dir.is_absolute() else Path.cwd() / run_dir, tuple(tasks), tuple(methods), cells, data)


def _only_known(what: str, given: Any, known: Any) -> None:
    if not isinstance(given, Mapping):
        raise ValueError(f"{what} must hold names and values, not {given!r}")
    if unknown := [key for key in given if key not in known]:
        raise ValueError(f"{what} has the unknown key '{unknown[0]}'; known are {', '.join(known)}")


def _listed(text: Mapping, key: str) -> list:
    values = text[key]
    if not isinstance(values, list) or not values:
        raise ValueError(f"{key} is a list of at least one, such as [a, b], not {values!r}")
    if any(value in values[:place] for place, value in enumerate(values)):
        raise ValueError(f"{key} names something twice: {values}")
    return values


def _names(text: Mapping, key: str) -> list[str]:
    values = _listed(text, key)
    if wrong := [value for value in values if not isinstance(value, str)]:
        raise ValueError(f"{key} holds names, not {wrong[0]!r}")
    return values


def _data(given: Any, tasks: list[str]) -> dict[str, dict[str, Any]]:
    """The parameters of `build_task` for each task."""
    known = {name: parameter.default for name, parameter in inspect.signature(build_task).parameters.items()
             if parameter.kind is parameter.KEYWORD_ONLY}
    _only_known("data", given, tasks)
    for task, parameters in given.items():
        _only_known(f"data of {task}", parameters, known)
        for name, value in parameters.items():
            if known[name] is not None and type(value) is not type(known[name]):
                raise ValueError(f"data of {task}: '{name}' takes {type(known[name]).__name__}, such as "
                                 f"{known[name]!r}, not {value!r}")
        if parameters.get("split_by", "synset") not in SPLIT_KEYS:
            raise ValueError(f"data of {task}: split_by is one of {', '.join(SPLIT_KEYS)}, not {parameters['split_by']!r}")
    return {task: dict(parameters) for task, parameters in given.items()}


def _model(entry: Any, text: Mapping, tasks: list[str]) -> dict[str, Any]:
    """The recipes of a model by task."""
    settings, conditions = text["settings"], text["conditions"]
    for name, part in (("settings", settings), ("conditions", conditions)):
        if not isinstance(part, Mapping):
            raise ValueError(f"{name} must hold names and values, not {part!r}")
    if wrong := [name for name in conditions if name not in Testing.model_fields]:
        raise ValueError(f"conditions has the unknown key '{wrong[0]}'; known are {', '.join(Testing.model_fields)}")
    own = {"start": entry} if isinstance(entry, str) else entry
    if not isinstance(own, Mapping) or not isinstance(own.get("start"), str) or not own["start"] or "start" in settings:
        raise ValueError(f"a model is 'random', a name, a hub id, a folder, or a mapping with 'start', not {entry!r}")
    if own["start"] != "random" and user_path(own["start"]).is_dir():
        own = {**own, "start": str(user_path(own["start"]).resolve())}  # workers may run elsewhere
    recipes = {}
    for task in tasks:
        given, kind = {**settings, **conditions, **own}, task_named(task).kind
        steps = given.get("steps")
        if isinstance(steps, Mapping) and kind not in steps and not given.get("epochs"):
            raise ValueError(f"settings: steps has no number for '{kind}'; it has {', '.join(map(str, steps))}")
        if own["start"] == "random" and not steps and not given.get("epochs"):
            given["steps"] = DEFAULT_STEPS
        recipes[task] = recipe_for(kind, given, seeds=(0,)).recipe
    return recipes
