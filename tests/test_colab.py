"""The cell that makes a notebook work on Colab: one and the same in every notebook, and of no effect at home."""
import os
import sys
from pathlib import Path

import nbformat
from IPython.core.inputtransformer2 import TransformerManager

NOTEBOOKS = sorted((Path(__file__).resolve().parent.parent / "notebooks").glob("*.ipynb"))


def bootstrap(path):
    return next(cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code").source


def test_every_notebook_opens_with_the_same_cell():
    different = [path.name for path in NOTEBOOKS if bootstrap(path) != bootstrap(NOTEBOOKS[0])]
    assert not different and bootstrap(NOTEBOOKS[0]).startswith("import importlib.util")


def test_it_asks_for_no_other_torch():
    """What is installed goes through the bounds of pyproject.toml alone, and these are below Colab's own versions."""
    lines = [line.strip() for line in bootstrap(NOTEBOOKS[0]).split("\n")]
    assert [line for line in lines if "pip" in line] == ["!pip install --quiet --editable carma-notebooks"]
    assert lines[lines.index("!pip install --quiet --editable carma-notebooks") + 1].startswith("assert _exit_code == 0")


def test_at_home_it_does_nothing():
    before = (os.getcwd(), list(sys.path), set(sys.modules))
    exec(TransformerManager().transform_cell(bootstrap(NOTEBOOKS[0])), {"get_ipython": None})
    assert (os.getcwd(), list(sys.path)) == before[:2] and "google.colab" not in sys.modules
