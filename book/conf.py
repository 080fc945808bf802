"""The book: README, pages of this folder, the notebooks as they are committed, and the API. Built by `make book`.

The source folder is the repository's root, so that every link that works on the repository's page works here too.
"""
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import carma_lib  # noqa: E402

project, author, release = "CARMA notebooks", "The CARMA notebooks maintainers", carma_lib.__version__
copyright = author
root_doc = "README"
include_patterns = ["README.md", "CHANGELOG.md", "notebooks/*.ipynb", "book/**.md"]
exclude_patterns = ["**/.ipynb_checkpoints"]
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton", "sphinx-mathjax-offline"]

# Notebooks are shown with the outputs that are committed. Nothing is executed.
nb_execution_mode = "off"
nb_merge_streams = True
myst_enable_extensions = ["dollarmath", "amsmath"]
myst_heading_anchors = 3
suppress_warnings = ["myst.header", "mystnb.unknown_mime_type"]

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
html_theme_options = {"navigation_with_keys": True}
pygments_style = "friendly"

CONTENTS = """
```{toctree}
:hidden:
:caption: Begin
book/install
book/questions
book/glossary
```
```{toctree}
:hidden:
:caption: Notebooks
:glob:
notebooks/*
```
```{toctree}
:hidden:
:caption: Use it
book/own_data
book/own_training
book/sft
book/pretrained
book/sweeps
book/colab
book/extending
```
```{toctree}
:hidden:
:caption: Look up
book/study
book/rooms
book/reference
CHANGELOG
```
"""
BADGE = re.compile(r"\[!\[([^\]]*)\]\(https?://[^)]*\)\]\((https?://[^)]*)\)")


def as_page(app, name, source):
    """A page as the book shows it: the book's contents after README, and links in place of pictures from the web."""
    source[0] = BADGE.sub(r"[\1](\2)", source[0])
    if name == root_doc:
        source[0] += CONTENTS


def setup(app):
    app.connect("source-read", as_page)
