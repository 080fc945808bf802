"""`nbs_ci.yml` read and checked: the notebooks in order, and what a run of a profile will do."""
from __future__ import annotations

import ast
import difflib
import json
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from carma_lib.collate import LEVELS
from carma_lib.files import RunError, code_fingerprint, fingerprint, parse_yaml, read_json, user_path
from carma_lib.lab.cell import Cell
from carma_lib.lab.recipe import SMALL_STARTS, Recipe, Testing, Training, recipe_for
from carma_lib.lab.study import merged, read_study
from carma_lib.methods import METHODS
from carma_lib.models import load_config, pretrained
from carma_lib.stats.claims import check_plan, claims_for
from carma_lib.synonyms.reader import wordnet
from carma_lib.tasks import task_named
from carma_lib.tasks import file as own
from carma_lib.tasks.controlled.lexicon import lexicon_file
from carma_lib.tasks.sst import source_files
from carma_lib.tasks.wordnet import SPLIT_KEYS

MANIFEST = "nbs_ci.yml"
#: What a parameter of any notebook must be, or each entry of a list, beside its type.
_RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "layers": (lambda value: 1 <= value <= 1000, "from 1 to 1000"),
    **dict.fromkeys(("workers", "batch_size", "threads", "quick_steps", "quality_items"),
                    (lambda value: value >= 1, "at least 1")),
    **dict.fromkeys(("test_items", "pooled_items", "item", "repeated_cells"), (lambda value: value >= 0, "at least 0")),
    **dict.fromkeys(("seed", "seeds"), (lambda value: type(value) is int and 0 <= value < 2**32, "a whole number from 0 to 2**32 - 1")),
    **dict.fromkeys(("rates", "depth_shares", "depth_share"), (lambda value: 0 < value <= 1, "above 0 and at most 1")),
    **dict.fromkeys(("margin",), (lambda value: 0 < value < 1, "between 0 and 1")),
    **dict.fromkeys(("methods", "baseline"), (lambda value: value in METHODS, f"one of {', '.join(METHODS)}")),
    **dict.fromkeys(("levels", "level"), (lambda value: value in LEVELS or 0 < value < 1, f"one of {', '.join(LEVELS)}")),
    "split_by": (lambda value: value in SPLIT_KEYS, f"one of {', '.join(SPLIT_KEYS)}"),
    "vocabulary_size": (lambda value: value >= 258, "at least 258"),
}
#: The parameters that name what a notebook reads beside the run folder.
_READ = ("plan", "archive", "trials_from", "tasks", "further_tasks")


@dataclass(frozen=True)
class Notebook:
    """One entry of the manifest."""

    name: str
    path: Path
    needs: tuple[str, ...]
    makes: tuple[str, ...]
    cell_seconds: int
    total_seconds: int


@dataclass(frozen=True)
class Plan:
    """What a run will do: the notebooks in order, each with the parameters that differ from its own."""

    profile: str
    run_dir: Path
    notebooks: tuple[Notebook, ...]
    parameters: dict[str, dict[str, Any]] = field(default_factory=dict)
    reads: dict[str, list[Path]] = field(default_factory=dict)  # files, and folders with tables, that parameters name

    @cached_property
    def fingerprints(self) -> dict[str, str]:
        """Per notebook: its parameters and code, the library's code and data, and all that of the notebooks before."""
        package = Path(__file__).parent
        modules = [".".join(path.relative_to(package.parent).with_suffix("").parts) for path in sorted(package.rglob("*.py"))
                   if path.name not in ("manifest.py", "notebooks.py", "__main__.py", "page.py", "sweep.py", "estimate.py")]
        tables = [path.read_text(encoding="utf-8") for path in (*sorted(package.rglob("*.csv")), *sorted(package.rglob("*.yml")),
                                                               lexicon_file())]
        before, result = fingerprint(code_fingerprint(*(name.removesuffix(".__init__") for name in modules)), tables), {}
        for notebook in self.notebooks:
            before = fingerprint(before, self.parameters[notebook.name], source_of(notebook.path))
            result[notebook.name] = before
        return result


def project_root() -> Path:
    """The nearest folder at or above the working directory, or this package, that holds `nbs_ci.yml`."""
    for folder in (Path.cwd(), *Path.cwd().parents, Path(__file__).resolve().parent.parent):
        if (folder / MANIFEST).is_file():
            return folder
    raise RunError(f"no {MANIFEST} here or above; run from a clone of the repository")


def read_manifest(root: Path) -> tuple[list[Notebook], dict[str, dict[str, dict[str, Any]]]]:
    """The notebooks and the profiles (profile → notebook → parameters) of `nbs_ci.yml`. `RunError` if malformed."""
    try:
        manifest = parse_yaml((root / MANIFEST).read_text(encoding="utf-8"))
        notebooks = [Notebook(entry["name"], root / "notebooks" / f"{entry['name']}.ipynb",
                              tuple(entry["needs"]), tuple(entry["makes"]), int(entry["cell_seconds"]),
                              int(entry["total_seconds"])) for entry in manifest["notebooks"]]
        for place, (entry, notebook) in enumerate(zip(manifest["notebooks"], notebooks)):
            if notebook in notebooks[:place] or not type(entry["needs"]) is type(entry["makes"]) is list or min(notebook.cell_seconds, notebook.total_seconds) < 1:
                raise TypeError(f"{notebook.name} is listed twice, its needs or makes are no list, or a time limit is below 1 second")
        profiles = {str(name): profile or {} for name, profile in manifest["profiles"].items()}
        if not all(isinstance(profile, dict) and all(isinstance(parameters, dict) or parameters is False
                                                     for parameters in profile.values())
                   for profile in profiles.values()):
            raise TypeError("a profile holds notebook: {parameter: value}, or notebook: false")
        return notebooks, profiles
    except (OSError, yaml.YAMLError, KeyError, TypeError, AttributeError, ValueError) as error:
        why = " ".join(f"{type(error).__name__}: {error}".split())
        raise RunError(f"{root / MANIFEST} cannot be read: {why}") from error


def make_plan(profile: str, *, run_dir: Path | None = None, settings: dict[str, str] | None = None,
              root: Path | None = None, sources: bool = True) -> Plan:
    """Check everything that can be checked before the first cell runs.

    settings: `name` or `notebook.name` → literal, over the profile's own parameters. sources: whether WordNet is asked for
    if its synonyms are wanted, which may fetch it.
    Raises `RunError` for an unknown profile, notebook or parameter, and for a value of another type.
    """
    root = root or project_root()
    notebooks, profiles = read_manifest(root)
    if profile not in profiles:
        raise RunError(f"unknown profile '{profile}'; {MANIFEST} has {', '.join(profiles)}")
    names = [notebook.name for notebook in notebooks]
    for name in profiles[profile]:
        if name not in names:
            raise RunError(f"profile '{profile}' names the notebook '{name}', which {MANIFEST} does not list")
    notebooks = [notebook for notebook in notebooks if profiles[profile].get(notebook.name, {}) is not False]
    known = {notebook.name: _declared_parameters(notebook) for notebook in notebooks}
    chosen = {notebook.name: dict(profiles[profile].get(notebook.name) or {}) for notebook in notebooks}
    run_dir = (Path.cwd() / user_path(run_dir)) if run_dir else root / "runs" / profile
    if run_dir.resolve() != (root / "runs" / "default").resolve():
        for parameters in chosen.values():
            parameters["run_dir"] = str(run_dir)
    _apply_settings(settings or {}, chosen, known)
    for name, parameters in chosen.items():
        for setting in ("tasks", "further_tasks"):
            if isinstance(parameters.get(setting), list):
                parameters[setting] = [_checked_file(task, root) for task in parameters[setting]]
        _check_types(name, parameters, known[name])
        if "recipe" in parameters:
            parameters["recipe"] = merged(known[name]["recipe"], parameters["recipe"])
    values = {name: {**known[name], **parameters} for name, parameters in chosen.items()}
    _check_values(values)
    replaced = values.get("02_finetune", {}).get("tasks", []) if values.get("03_evaluate", {}).get("rates") else []
    if sources and any(task_named(task).synonyms == "wordnet" for task in replaced):
        wordnet()  # else its absence would be told after the trainings
    named = {name: [each for setting in _READ if (value := of.get(setting)) for each in (value if isinstance(value, list) else [value])]
             for name, of in values.items()}
    return Plan(profile, run_dir, tuple(notebooks), chosen, {
        name: [root / user_path(each) for each in some] + (source_files() if {"sst3", "sst5"} & set(some) else [])
        for name, some in named.items()})


def _checked_file(task: Any, root: Path) -> Any:
    """A task; if it is a file of one's own, its path as the notebooks find it, which run in the root.

    A relative path counts from the working directory, else from the root. Its rows are checked. Raises `RunError` for a
    file that is not there or that breaks the rules.
    """
    if not isinstance(task, str) or not own.is_file_name(task):
        return task
    path = next((path for folder in (Path.cwd(), root) if (path := folder / user_path(task)).is_file()), Path.cwd() / user_path(task))
    own.check_file(path)
    return task if path == root / user_path(task) else str(path)


def _declared_parameters(notebook: Notebook) -> dict[str, Any]:
    import papermill

    if not notebook.path.is_file():
        raise RunError(f"{MANIFEST} lists {notebook.name}, but {notebook.path} is missing")
    try:
        declared = papermill.inspect_notebook(str(notebook.path))
        known = {name: ast.literal_eval(entry["default"]) for name, entry in declared.items()}
    except (ValueError, SyntaxError) as error:
        raise RunError(f"{notebook.path} cannot be read: {type(error).__name__}: {error}") from error
    if not known:
        raise RunError(f"{notebook.name} has no cell tagged 'parameters'")
    return known


def _apply_settings(settings: dict[str, str], chosen: dict[str, dict[str, Any]],
                    known: dict[str, dict[str, Any]]) -> None:
    for key, literal in settings.items():
        notebook, _, name = key.rpartition(".")
        if name == "run_dir":
            raise RunError("run_dir is one for all notebooks: use --run-dir")
        targets = [target for target in known if name in known[target] and notebook in ("", target)]
        home = "02_finetune" if name in Training.model_fields else "03_evaluate" if name in Testing.model_fields else None
        if home in known and home not in targets and notebook in ("", home):
            if not isinstance(chosen[home].setdefault("recipe", {}), dict):
                raise RunError(f"{home}: 'recipe' takes settings by name, such as {{'learning_rate': 0.001}}, not {chosen[home]['recipe']!r}")
            chosen[home]["recipe"][name] = _literal(literal)
        elif not targets:
            available = sorted({name for parameters in known.values() for name in parameters} | (
                {*Recipe.model_fields} if "02_finetune" in known else set()))
            near = difflib.get_close_matches(name, available, 5) if len(available) > 20 else []
            raise RunError(f"no notebook has the parameter '{key}'; there are {', '.join(near or available)}"
                           f"{' and others' if near else ''}")
        for target in targets:
            chosen[target][name] = _literal(literal)


def _literal(text: str) -> Any:
    """A value of the command line: a Python literal as JSON holds it (tuples as lists), else the text itself."""
    try:
        return json.loads(json.dumps(ast.literal_eval(text)))
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return text


def _check_values(parameters: dict[str, dict[str, Any]]) -> None:
    """Refuse before the first cell runs what a notebook would refuse after hours. `RunError` in one line."""
    name, studies = "", {}  # of the plans that are checked already
    try:
        for name, values in parameters.items():
            for setting, value in values.items():
                _check_value(setting, value)
            of = str(values.get("start", "random")).removeprefix("random:")
            if name != "02_finetune" and of not in (*SMALL_STARTS, *pretrained.names()):
                load_config(of)
            if "plan" in values and "changes" in values:
                given = repr((values["plan"], values["changes"]))  # several notebooks read one study
                if given not in studies:
                    studies[given] = read_study(project_root() / values["plan"], values["changes"])
                    studies[given].cells(defaultdict(lambda: 1e-3), {})  # which checks every cell's recipe
                    check_plan(claims_for(studies[given].claims, studies[given].tasks))
                if unknown := [block for block in values.get("blocks", ()) if block not in studies[given].blocks]:
                    raise ValueError(f"the plan has no block '{unknown[0]}'; it has {', '.join(studies[given].blocks)}")
            for setting in ("archive", "trials_from"):
                if (folder := values.get(setting)) and (project_root() / folder).is_file():
                    raise ValueError(f"{setting} is a folder, and {folder} is a file")
        if name := "03_evaluate" if "03_evaluate" in parameters else "":
            _check_tests(parameters[name])
        if name := "02_finetune" if "02_finetune" in parameters else "":
            _check_cells(parameters[name], parameters.get("03_evaluate", {}))
            if name := "04_statistics" if "04_statistics" in parameters else "":
                _check_comparison(parameters["02_finetune"]["methods"], parameters[name]["methods"], parameters[name]["baseline"])
    except (ValueError, TypeError, OSError) as error:
        if "hub cannot be reached" not in str(error):  # what depends on the model is then checked when it is loaded
            raise RunError(f"{name}: {' '.join(str(error).split())}") from error


def _check_value(setting: str, value: Any) -> None:
    each = value if isinstance(value, list) else [value]
    if any(entry in each[:place] for place, entry in enumerate(each)):
        raise ValueError(f"{setting} names something twice: {value}")
    for entry in each:
        if setting in ("task", "tasks", "further_tasks"):
            task_named(entry)
        if setting in _RULES:
            fits, what = _RULES[setting]
            try:
                right = fits(entry)
            except TypeError:
                right = False
            if not right:
                raise ValueError(f"{setting} must be {what}, not {entry!r}")


def _check_tests(testing: dict[str, Any]) -> None:
    if wrong := [name for name in testing["recipe"] if name not in Testing.model_fields]:
        raise ValueError(f"'{wrong[0]}' is no setting of the tests; there are {', '.join(Testing.model_fields)}")
    if not testing["rates"]:
        raise ValueError("rates is empty; name at least one share of words to replace, such as [0.25]")
    if testing["depth_shares"] and "word" not in testing["levels"]:
        raise ValueError("levels must name 'word', which the figures show; for no pooling leave depth_shares empty")


def _check_cells(training: dict[str, Any], testing: dict[str, Any]) -> None:
    for setting in ("tasks", "methods"):
        if not training[setting]:
            raise ValueError(f"{setting} is empty; name at least one")
    if training["methods"][0] == "untuned":  # notebook 2 takes the first one for the time of a training
        raise ValueError("methods begins with 'untuned', which is not trained: put it last")
    tests = {name: testing[name] for name in testing if name in Testing.model_fields} | testing.get("recipe", {})
    for task in training["tasks"]:
        filled = recipe_for(task_named(task).kind, {"start": training["start"], "steps": training["steps"],
                                                    **training["recipe"], **tests}, seeds=tuple(training["seeds"]))
        for method in training["methods"]:
            for seed in filled.seeds:
                Cell(task, method, seed, filled.recipe)


def _check_comparison(trained: list[str], compared: list[str], baseline: str) -> None:
    if absent := [name for name in compared if name not in trained]:
        raise ValueError(f"methods names '{absent[0]}', which 02_finetune does not train; it trains {', '.join(trained)}")
    if len({*trained} - {"untuned"}) < 2:
        raise ValueError("there is nothing to compare: 02_finetune.methods must name two that train, such as "
                         "[\"fine_tuning\", \"carma\"]")
    against = baseline if baseline in trained else next(name for name in METHODS if name in trained and name != "untuned")
    compared = compared or (["carma"] if "carma" in trained else trained)
    if not {*compared} - {against, "untuned"}:
        raise ValueError(f"methods compares {', '.join(compared)} with the baseline {against}: name another method or baseline")


def _check_types(notebook: str, parameters: dict[str, Any], known: dict[str, Any]) -> None:
    for name, value in parameters.items():
        if name not in known:
            raise RunError(f"{notebook} has no parameter '{name}'; it has {', '.join(known)}")
        wanted = type(known[name])
        if not (type(value) is wanted or (wanted is float and type(value) is int)):
            raise RunError(f"{notebook}: '{name}' takes {wanted.__name__}, such as {known[name]!r}, not {value!r}")


def source_of(path: Path) -> list[str]:
    """The source of every code cell of a notebook."""
    import nbformat

    return [cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]


def run_folder(run_dir: str | Path) -> Path:
    """The run folder as a path, made if absent; a relative one counts from the project's root."""
    folder = project_root() / run_dir
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def read_status(run_dir: Path) -> dict[str, dict[str, Any]] | None:
    """The entries of a run folder's `status.json` by notebook; None if there is no such file, {} if it is damaged."""
    try:
        status = read_json(run_dir / "status.json", keys=("notebooks",))
    except RunError:
        return {}
    if status is None:
        return None
    entries = status["notebooks"] if isinstance(status["notebooks"], dict) else {}
    return {name: entry for name, entry in entries.items() if isinstance(entry, dict)
            and isinstance(entry.get("parameters"), dict) and isinstance(entry.get("seconds", 0), (int, float))
            and {"state", "fingerprint"} <= entry.keys()}
