"""A sweep read from its file and checked: tasks × models × methods × seeds, one job a cell.

    run_dir: runs/my-sweep                  # where it goes; a relative folder counts from the working directory
    tasks: [controlled_sentiment]
    models: [random, gpt2, {start: ../my-model, learning_rate: 0.0001}]
    methods: [fine_tuning, carma]
    seeds: [1, 2, 3]
    settings: {steps: {sentiment: 300}, batch_size: 32, carma_weight: 0.2}
    conditions: {rates: [0.25], pooled_items: 100}
    data: {controlled_sentiment: {seed: 7}}

`settings` takes the fields of `settings.Settings` and `losses.CarmaConfig`, `conditions` those of
`evaluation.Conditions`, `data` for each task the parameters of `tasks.build_task` (without: WordNet is split by
synset, SST trained on its phrases too); all three may be left out. A model is "random", a hub id or a folder, or a
mapping with `start` and the settings in which it differs. For a pretrained model what is not given comes from the
model table; a small random one has the defaults.
"""
from __future__ import annotations

import inspect
import itertools
import re
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from carma_lib.lab.evaluate import Conditions
from carma_lib.lab.experiment import Cell
from carma_lib.files import RunError, fingerprint
from carma_lib.losses import CarmaConfig
from carma_lib.methods import check_method
from carma_lib.models import load_config
from carma_lib.lab.settings import Settings, fill
from carma_lib.tasks import build_task, task_named
from carma_lib.tasks.wordnet import SPLIT_KEYS

KEYS = ("run_dir", "tasks", "models", "methods", "seeds", "settings", "conditions", "data")
NEEDED = ("run_dir", "tasks", "models", "methods", "seeds")


@dataclass(frozen=True)
class Job:
    """One cell of a sweep with all that a worker must know. `model` is its folder's name in the sweep's folder."""

    sweep_dir: Path
    model: str
    cell: Cell
    settings: Settings
    conditions: Conditions

    @property
    def name(self) -> str:
        """model/task/method/seed-N, unique in the sweep."""
        return f"{self.model}/{self.cell.place.as_posix()}"

    @property
    def run_dir(self) -> Path:
        """The model's run folder: data, models and results as a notebook's run has them."""
        return self.sweep_dir / self.model

    @property
    def start(self) -> Cell:
        """The untuned cell that this one begins from."""
        return Cell(self.cell.task, "untuned", self.cell.seed)


@dataclass(frozen=True)
class Sweep:
    """A checked sweep; `jobs` stand in the file's order: model, task, seed, method. data: a task → how to build it."""

    file: Path
    run_dir: Path
    tasks: tuple[str, ...]
    methods: tuple[str, ...]
    jobs: tuple[Job, ...]
    data: dict[str, dict[str, Any]]

    @property
    def gpus_each(self) -> int:
        """GPUs that a worker needs: the most processes of a training."""
        return max(job.settings.processes for job in self.jobs)

    def groups(self) -> dict[tuple[str, str], list[Job]]:
        """The jobs by (model, task): those of a group share a tokenizer and the start of each seed."""
        found: dict[tuple[str, str], list[Job]] = {}
        for job in self.jobs:
            found.setdefault((job.model, job.cell.task), []).append(job)
        return found


def read_sweep(file: Path | str) -> Sweep:
    """Read and check a sweep file. Touches nothing, and reads no model's weights.

    Raises `RunError`, one line each: a file that cannot be read, an unknown or missing key, task, method or
    setting, a value of another type, an absent model.
    """
    file = Path(file)
    try:
        text = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise RunError(f"{file} cannot be read: {' '.join(str(error).split())}") from error
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
    tasks, methods = (_names(text, key) for key in ("tasks", "methods"))
    for task in tasks:
        task_named(task)
    for method in methods:
        check_method(method)
    seeds = _listed(text, "seeds")
    if any(type(seed) is not int or seed < 0 for seed in seeds):
        raise ValueError(f"seeds are whole numbers from 0 on, not {seeds}")
    conditions, data = _conditions(text.get("conditions") or {}), _data(text.get("data") or {}, tasks)
    common = text.get("settings") or {}
    models = [_model(entry, common, tasks) for entry in _listed(text, "models")]
    names = [name for name, _ in models]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"the model '{twice[0]}' stands twice")
    run_dir = Path.cwd() / text["run_dir"]
    jobs = tuple(Job(run_dir, name, Cell(task, method, seed), settings[task], conditions)
                 for (name, settings), task, seed, method in itertools.product(models, tasks, seeds, methods))
    return Sweep(file, run_dir, tuple(tasks), tuple(methods), jobs, data)


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


def _defaults(kind: type) -> dict[str, Any]:
    return {field.name: None if field.default is MISSING else field.default for field in fields(kind)}


_KNOWN = {name: value for kind in (Settings, CarmaConfig) for name, value in _defaults(kind).items()
          if name != "carma"}
_OPEN = {"batch_size": -1, "learning_rate": -1, "warmup_steps": -1, "carma_weight": -1, "mi_weight": -1,
         "stability_weight": -1, "mi_layers": [], "stability_layers": []}  # what the model table fills


def _typed(what: str, given: Mapping, defaults: dict[str, Any]) -> dict[str, Any]:
    """The values with lists as tuples; `ValueError` for one whose type is not that of the default."""
    typed = {}
    for name, value in given.items():
        default = defaults[name]
        value = tuple(value) if isinstance(value, list) else value
        fits = default is None or type(value) is type(default) or (type(default) is float and type(value) is int)
        if not fits and not (name == "num_negatives" and value is None):
            wanted = "list" if isinstance(default, tuple) else type(default).__name__
            raise ValueError(f"{what}: '{name}' takes {wanted}, such as {default!r}, not {value!r}")
        typed[name] = float(value) if type(default) is float else value
    return typed


def _conditions(given: Any) -> Conditions:
    known = _defaults(Conditions)
    _only_known("conditions", given, known)
    try:
        return Conditions(**_typed("conditions", given, known))
    except TypeError as error:
        raise ValueError(f"conditions: {error}") from error


def _data(given: Any, tasks: list[str]) -> dict[str, dict[str, Any]]:
    """The parameters of `build_task` for each task, its own defaults where nothing is given."""
    known = {name: parameter.default for name, parameter in inspect.signature(build_task).parameters.items()
             if parameter.kind is parameter.KEYWORD_ONLY}
    _only_known("data", given, tasks)
    data = {task: dict(known) for task in tasks}
    for task, parameters in given.items():
        _only_known(f"data of {task}", parameters, known)
        data[task] |= _typed(f"data of {task}", parameters, known)
        if data[task]["split_by"] not in SPLIT_KEYS:
            raise ValueError(f"data of {task}: split_by is one of {', '.join(SPLIT_KEYS)}, not "
                             f"'{data[task]['split_by']}'")
    return data


def _model(entry: Any, common: Any, tasks: list[str]) -> tuple[str, dict[str, Settings]]:
    """A model's name in the sweep and its settings by task."""
    _only_known("settings", common, [name for name in _KNOWN if name != "start"])
    own = {"start": entry} if isinstance(entry, str) else entry
    _only_known(f"the model {entry!r}", own, _KNOWN)
    start = own.get("start")
    if not isinstance(start, str) or not start:
        raise ValueError(f"a model is 'random', a hub id, a folder, or a mapping with 'start', not {entry!r}")
    if start != "random" and Path(start).is_dir():
        start = str(Path(start).resolve())  # workers may run elsewhere
    own = {**own, "start": start}
    settings = {task: _settings({**common, **own}, task) for task in tasks}
    name = re.sub(r"[^\w.-]+", "-", start.rpartition("/")[2])
    plain = len(own) == 1 and "/" not in start
    return name if plain else f"{name}-{fingerprint(own)[:6]}", settings


def _settings(given: dict[str, Any], task: str) -> Settings:
    kind, steps = task_named(task).kind, given.get("steps") or {}
    if not isinstance(steps, Mapping):
        steps = {kind: steps}
    if steps and kind not in steps:
        raise ValueError(f"settings: steps has no number for '{kind}'; it has {', '.join(map(str, steps))}")
    for number in steps.values():
        _typed("settings", {"steps": number}, _KNOWN)
    typed = _typed("settings", {name: value for name, value in given.items() if name != "steps"}, _KNOWN)
    if given["start"] == "random":
        steps = steps or ({} if typed.get("epochs") else {kind: _KNOWN["steps"]})
        return fill(kind, {**typed, "steps": steps}).settings
    settings = fill(kind, {**_OPEN, **typed, "steps": steps}).settings
    settings.carma.for_depth(load_config(settings.start).get_text_config().num_hidden_layers)
    return settings
