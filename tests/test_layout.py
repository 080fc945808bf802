"""The rooms of the package: imports go one way, and what knows only tensors or tables knows no files."""
import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "carma_lib"
# Each room may import the rooms before it. Within the first, the core, each module may import those before it.
CORE = ["files", "losses.negatives", "losses.terms", "losses", "words", "blocks", "collate", "trainer", "pooling_inputs", "pooling",
        "models.table", "models.pretrained", "models", "methods"]
ROOMS = ["core", "synonyms", "tasks", "stats", "report", "lab", "manifest", "notebooks", "__main__"]
KNOW_NO_FILES = ["losses.negatives", "losses.terms", "losses.__init__", "pooling", "stats.intervals", "stats.metrics", "stats.inference",
                 "stats.claims", "stats.curves"]


def name_of(path):
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def room_of(name):
    first = name.split(".")[0]
    return "core" if name in CORE else first


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
NAMES = {name_of(path) for path in MODULES}


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_go_one_way(path):
    name = name_of(path)
    room = room_of(name)
    assert room in ROOMS, f"{name} is in no room"
    for other in imported(path):
        while other and other not in NAMES:  # a function's name after its module's
            other = other.rpartition(".")[0]
        if not other or other == name:
            continue
        if room == room_of(other) == "core":
            assert CORE.index(other) < CORE.index(name), f"{name} imports {other}, which comes after it"
        else:
            assert ROOMS.index(room_of(other)) <= ROOMS.index(room), f"{name} imports {other}, of a room above it"


@pytest.mark.parametrize("name", KNOW_NO_FILES)
def test_pure_modules_know_no_files(name):
    tree = ast.parse((PACKAGE / f"{name.replace('.', '/')}.py").read_text(encoding="utf-8"))
    used = {alias.name for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom)) for alias in node.names}
    assert not used & {"Path", "pathlib", "os", "whole_file", "papermill", "nbformat", "datasets"}


def test_the_drawing_of_the_rooms_is_that_of_the_imports(monkeypatch):
    monkeypatch.syspath_prepend(PACKAGE.parent / "book")
    import rooms
    assert rooms.PICTURE.read_text(encoding="utf-8") == rooms.drawing(), "draw it again: python book/rooms.py"
