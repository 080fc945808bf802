"""Data flows one way: a module imports only from those above it, and the lower floors know no files or notebooks."""
import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "carma_lib"
ORDER = ["files", "losses", "constituents", "lexicon", "tagging", "tasks.schema", "tasks.sst", "tasks.wordnet",
         "tasks.controlled", "tasks.controlled_definitions", "tasks.controlled_opinions", "tasks", "perturbation",
         "perturbation_quality", "model_table", "models", "settings", "memory", "parallel", "collation", "training", "methods", "experiment", "distributed", "pooling", "drift", "results", "evaluation",
         "intervals", "statistics", "inference", "comparisons", "tables", "figures", "mechanism", "study_plan", "study",
         "study_tables", "study_figures", "report", "manifest", "pipeline",
         "sweep_plan", "sweep_worker", "sweep_estimate", "sweep_executors", "sweep_report", "sweep", "__main__"]
KNOW_NO_FILES = ["losses", "pooling", "intervals", "statistics", "inference", "comparisons"]


def name_of(path):
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def imported(path):
    """Names of the package's modules that a file imports, at any depth of its code."""
    package = ["carma_lib", *name_of(path).split(".")[:-1 if path.name != "__init__.py" else None]]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[:len(package) - node.level + 1]) if node.level else ""
            module = ".".join(filter(None, [base, node.module or ""]))
            names = [module, *(f"{module}.{alias.name}" for alias in node.names)]
        yield from (name.removeprefix("carma_lib.") for name in names if name.startswith("carma_lib."))


MODULES = [path for path in sorted(PACKAGE.rglob("*.py")) if name_of(path)]


def test_every_module_has_its_place():
    assert sorted(map(name_of, MODULES)) == sorted(ORDER)


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_go_one_way(path):
    place = ORDER.index(name_of(path))
    for name in imported(path):
        while name and name not in ORDER:  # a function's name after its module's
            name = name.rpartition(".")[0]
        assert name in ("", name_of(path)) or ORDER.index(name) < place, f"{name_of(path)} imports {name}, which stands below it"


@pytest.mark.parametrize("name", KNOW_NO_FILES)
def test_lower_floors_know_no_files(name):
    tree = ast.parse((PACKAGE / f"{name}.py").read_text(encoding="utf-8"))
    used = {alias.name for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom)) for alias in node.names}
    assert not used & {"Path", "pathlib", "os", "whole_file", "papermill", "nbformat", "datasets"}
