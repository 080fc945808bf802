"""`nbs_ci.yml` read and checked: the notebooks in order, and what a run of a profile will do."""
from __future__ import annotations

import ast
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from carma_lib.files import RunError, fingerprint, read_json
from carma_lib.tasks.controlled.lexicon import lexicon_file

MANIFEST = "nbs_ci.yml"


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

    @property
    def fingerprints(self) -> dict[str, str]:
        """Per notebook: its parameters and source, the library and lexicon, and all that of the notebooks before."""
        package = Path(__file__).parent
        library = [path.read_text(encoding="utf-8") for path in sorted([*package.rglob("*.py"), *package.glob("*.csv"),
                                                                                 *package.glob("*.yml")])
                   if path.name not in ("manifest.py", "notebooks.py", "__main__.py", "page.py")
                   and not path.name.startswith("sweep")]
        before, result = fingerprint(library, lexicon_file().read_text(encoding="utf-8")), {}
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
        manifest = yaml.safe_load((root / MANIFEST).read_text(encoding="utf-8"))
        notebooks = [Notebook(entry["name"], root / "notebooks" / f"{entry['name']}.ipynb",
                              tuple(entry["needs"]), tuple(entry["makes"]), int(entry["cell_seconds"]),
                              int(entry["total_seconds"])) for entry in manifest["notebooks"]]
        profiles = {name: profile or {} for name, profile in manifest["profiles"].items()}
        if not all(isinstance(profile, dict) and all(isinstance(parameters, dict) or parameters is False
                                                     for parameters in profile.values())
                   for profile in profiles.values()):
            raise TypeError("a profile holds notebook: {parameter: value}, or notebook: false")
        return notebooks, profiles
    except (OSError, yaml.YAMLError, KeyError, TypeError, AttributeError, ValueError) as error:
        raise RunError(f"{root / MANIFEST} cannot be read: {type(error).__name__}: {error}") from error


def make_plan(profile: str, *, run_dir: Path | None = None, settings: dict[str, str] | None = None,
              root: Path | None = None) -> Plan:
    """Check everything that can be checked before the first cell runs.

    settings: `name` or `notebook.name` → literal, over the profile's own parameters.
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
    run_dir = (Path.cwd() / run_dir) if run_dir else root / "runs" / profile
    if run_dir.resolve() != (root / "runs" / "default").resolve():
        for parameters in chosen.values():
            parameters["run_dir"] = str(run_dir)
    _apply_settings(settings or {}, chosen, known)
    for name, parameters in chosen.items():
        _check_types(name, parameters, known[name])
    return Plan(profile, run_dir, tuple(notebooks), chosen)


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
        targets = [notebook] if notebook else [target for target in known if name in known[target]]
        if not targets or any(target not in known or name not in known[target] for target in targets):
            available = sorted({name for parameters in known.values() for name in parameters})
            raise RunError(f"no notebook has the parameter '{key}'; there are {', '.join(available)}")
        try:
            value = ast.literal_eval(literal)
        except (ValueError, SyntaxError):
            value = literal
        for target in targets:
            chosen[target][name] = value


def _check_types(notebook: str, parameters: dict[str, Any], known: dict[str, Any]) -> None:
    for name, value in parameters.items():
        if name not in known:
            raise RunError(f"{notebook} has no parameter '{name}'; it has {', '.join(known)}")
        wanted = type(known[name])
        if not (type(value) is wanted or (wanted is float and type(value) is int)):
            raise RunError(f"{notebook}: '{name}' takes {wanted.__name__}, such as {known[name]!r}, not {value!r}")


def source_of(path: Path) -> list[list[str]]:
    """Kind and source of every cell of a notebook, without its outputs."""
    import nbformat

    return [[cell.cell_type, cell.source] for cell in nbformat.read(path, as_version=4).cells]


def run_folder(run_dir: str | Path) -> Path:
    """The run folder as a path, made if absent; a relative one counts from the project's root."""
    folder = project_root() / run_dir
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def describe(plan: Plan, *, resume: bool) -> str:
    """What a run would do, for `--dry-run`: notebooks, parameters, inputs and outputs, what is done already."""
    status = read_json(plan.run_dir / "status.json") or {"notebooks": {}}
    lines = [f"profile {plan.profile} → {plan.run_dir}"]
    for notebook in plan.notebooks:
        entry = status["notebooks"].get(notebook.name, {})
        done = entry.get("state") == "done" and entry.get("fingerprint") == plan.fingerprints[notebook.name]
        took = f", took {entry['seconds']:.0f} s before" if entry.get("seconds") else ""
        lines.append(f"\n{notebook.name}: {'done, will be skipped' if done and resume else 'will run'}"
                     f" (at most {notebook.total_seconds} s{took})")
        lines += [f"    {name} = {value!r}" for name, value in plan.parameters[notebook.name].items()]
        lines.append(f"    needs {', '.join(notebook.needs) or 'nothing'}; makes {', '.join(notebook.makes)}")
    return "\n".join(lines + ["", f"at the end: {plan.run_dir / 'report.html'}"])
