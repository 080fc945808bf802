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
from typing import Annotated, Any

from pydantic import Field, create_model

from carma_lib.files import RunError, parse_yaml, reading, user_path
from carma_lib.lab.cell import Cell
from carma_lib.lab.recipe import EXAMPLES, Testing, _Strict, recipe_for
from carma_lib.lab.study import Names, Numbers
from carma_lib.tasks import TASKS, build_task, task_named, task_names
from carma_lib.tasks.file import check_file, is_file_name
from carma_lib.tasks.wordnet import SPLIT_KEYS

DEFAULT_STEPS = 1000  # of a small model, if the file says nothing


@dataclass(frozen=True)
class Sweep:
    """A checked sweep; `cells` come in the file's order: model, task, seed, method. data: a task → how to build it."""

    file: Path
    run_dir: Path
    tasks: tuple[str, ...]
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


class _File(_Strict):
    """What a sweep's file holds, before its parts are looked at together."""

    run_dir: Annotated[str, Field(pattern=r"\S")]
    tasks: Names
    models: tuple[Any, ...]
    methods: Names
    seeds: Numbers
    settings: dict[str, Any] = {}
    conditions: dict[str, Any] = {}
    data: dict[str, dict[str, Any]] = {}

    def model_post_init(self, _: Any) -> None:
        for name in ("tasks", "models", "methods", "seeds"):
            values = getattr(self, name)
            if not values or any(value in values[:place] for place, value in enumerate(values)):
                raise ValueError(f"{name} {'names something twice' if values else 'is a list of at least one, such as [a, b]'}: {list(values)}")


#: The parameters of `build_task`, with their types.
_Data = create_model("_Data", __base__=_Strict, **{
    name: (Any if parameter.default is None else type(parameter.default), parameter.default)
    for name, parameter in inspect.signature(build_task).parameters.items() if parameter.kind is parameter.KEYWORD_ONLY})


def _checked(file: Path, text: Any) -> Sweep:
    if not isinstance(text, Mapping):
        raise ValueError(f"the file must hold names and values, not {text!r}")
    given = _File(**{str(key): value for key, value in text.items() if value is not None})
    names = task_names(given.tasks)
    tasks = [names[task] for task in given.tasks]
    for task in given.tasks:
        if is_file_name(task):
            check_file(task)
    if unknown := [task for task in given.data if task not in names]:
        raise ValueError(f"data names '{unknown[0]}', which is no task of the sweep; there are {', '.join(names)}")
    data = {}
    for task in given.tasks:
        try:
            parameters = _Data(**given.data.get(task, {})).model_dump(exclude_unset=True)
        except ValueError as error:
            raise ValueError(f"data of {task}: {error}") from None
        data[names[task]] = {**parameters, **({"file": str(user_path(task).resolve())} if names[task] != task else {})}
        if parameters.get("split_by", "synset") not in SPLIT_KEYS:
            raise ValueError(f"data of {task}: split_by is one of {', '.join(SPLIT_KEYS)}, not {parameters['split_by']!r}")
    models = [_model(entry, given.settings, given.conditions, tasks) for entry in given.models]
    cells = tuple(Cell(task, method, seed, recipes[task])
                  for recipes, task, seed, method in itertools.product(models, tasks, given.seeds, given.methods))
    for cell in cells:
        if unknown := [name for name in cell.recipe.plain_texts if name not in (*TASKS, *tasks, EXAMPLES)]:
            raise ValueError(f"plain_texts names '{unknown[0]}', which is no task of the sweep; there are {', '.join((*tasks, *TASKS, EXAMPLES))}")
    if len({cell.key for cell in cells}) < len(cells):
        raise ValueError("two models of the file are trained alike, and a folder holds one training: give each its own settings of "
                         "training, and write what is tested once, under conditions")
    return Sweep(file, Path.cwd() / user_path(given.run_dir), tuple(tasks), cells, data)


def _model(entry: Any, settings: dict[str, Any], conditions: dict[str, Any], tasks: list[str]) -> dict[str, Any]:
    """The recipes of a model by task."""
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
