"""The book: README, pages of this folder, the notebooks as they are committed, and the API. Built by `make book`.

The source folder is the repository's root, so that every link that works on the repository's page works here too.
"""
import re
import sys
from fnmatch import fnmatch
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "book")]

import nbformat  # noqa: E402

import carma_lib  # noqa: E402
from carma_lib.report.page import figure_texts  # noqa: E402

project, author, release = "CARMA notebooks", "The CARMA notebooks maintainers", carma_lib.__version__
copyright = author
root_doc = "README"
include_patterns = ["README.md", "CHANGELOG.md", "notebooks/*.ipynb", "book/**.md"]
exclude_patterns = ["**/.ipynb_checkpoints"]
extensions = ["myst_nb", "sphinx.ext.autodoc", "docstrings", "sphinx.ext.napoleon", "sphinx_copybutton", "sphinx-mathjax-offline"]

# Notebooks are shown with the outputs that are committed. Nothing is executed.
nb_execution_mode = "off"
nb_merge_streams = True
myst_enable_extensions = ["dollarmath", "amsmath"]
myst_dmath_double_inline = True  # $$ begins a displayed formula inside a paragraph too, as in Jupyter
myst_heading_anchors = 3
suppress_warnings = ["misc.highlighting_failure", "myst.header", "mystnb.unknown_mime_type"]

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_default_options = {"members": True, "show-inheritance": True}
default_role = "code"
python_use_unqualified_type_names = True
maximum_signature_line_length = 88

html_theme = "furo"
html_title = "CARMA notebooks"
html_static_path = ["static"]
html_css_files = ["book.css"]
html_extra_path = ["extra"]  # index.html, which leads to README.html
html_copy_source = False
html_use_index = html_domain_indices = False  # search finds names
html_theme_options = {"navigation_with_keys": True}
pygments_style = "friendly"

CONTENTS = """
```{toctree}
:hidden:
:caption: Notebooks
:glob:
notebooks/*
```
```{toctree}
:hidden:
:caption: Use it
book/install
book/own_data
book/own_training
book/sft
book/pretrained
book/colab
book/sweeps
book/extending
```
```{toctree}
:hidden:
:caption: Look up
book/questions
book/glossary
book/rooms
book/attack
book/reference/index
CHANGELOG
```
"""
BADGE = re.compile(r"\[!\[([^\]]*)\]\(https?://[^)]*\)\]\((https?://[^)]*)\)")
MODULES = re.compile(r"<!-- modules: (.*?) -->")


PACKAGE = ROOT / "carma_lib"
NAMES = sorted(".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")
               for path in PACKAGE.rglob("*.py") if path.stem != "__main__")


def documented(patterns: str) -> list[str]:
    """The modules that patterns such as "losses lab.*" name, in that order; a room itself only by its own name."""
    return [name for pattern in patterns.split() for name in NAMES
            if name == pattern or (fnmatch(name, pattern) and not (PACKAGE / name.replace(".", "/")).is_dir())]


def _modules(comment: re.Match) -> str:
    return "\n".join(f"## `carma_lib.{name}`\n```{{eval-rst}}\n.. automodule:: carma_lib.{name}\n```\n"
                     for name in documented(comment[1]))


def as_page(app, name, source):
    """A page as the book shows it: contents after README, links for badges from the web, modules with docstrings.

    The pictures of a notebook have their captions as text for screen readers.
    """
    source[0] = MODULES.sub(_modules, BADGE.sub(r"[\1](\2)", source[0]))
    if name.startswith("notebooks/"):
        notebook = nbformat.reads(source[0], as_version=4)
        for place, text in figure_texts(notebook.cells).items():
            notebook.cells[place].metadata["mystnb"] = {"image": {"alt": text}}
        source[0] = nbformat.writes(notebook)
    if name == root_doc:
        source[0] += CONTENTS


def is_numbered_field(app, what, name, member, skip, options):
    """Leave out what Python writes of each field of a named tuple; the signature names them, the docstring explains."""
    return True if (getattr(member, "__doc__", None) or "").startswith("Alias for field number") else None


def setup(app):
    app.connect("source-read", as_page)
    app.connect("autodoc-skip-member", is_numbered_field)
