"""One HTML page of a run: the answer in five sentences, its claims, tables and the executed notebooks.

The page stands alone: pictures, style and formulas are inside it, and it asks the network for nothing.
"""
from __future__ import annotations

import base64
import io
import os
import re
from pathlib import Path
from typing import Iterable

import jinja2
import nbformat
import pandas as pd
from matplotlib.font_manager import FontProperties
from matplotlib.mathtext import math_to_image
from nbconvert import HTMLExporter
from pygments.formatters import HtmlFormatter

from carma_lib.files import whole_file
from carma_lib.report.tables import answer, claim_rows
from carma_lib.stats.claims import KINDS
from carma_lib.stats.metrics import METRICS

TEMPLATE = Path(__file__).parent / "template"
#: Made by the statistics notebook; the answer, the table of claims and the picture come from these.
CLAIMS, PICTURE = Path("tables/primary_comparisons.csv"), Path("figures/primary_comparisons.png")
PICTURE_TEXT = ("The primary comparisons: estimates and 95 % intervals over seeds and items (the ratio's: over seeds). A filled mark: the two "
                "methods differ, p below 0.05 after Holm's correction. A short black line: the margin of non-inferiority.")
ROWS_SHOWN = 60
_NEEDED = ("name", "kind", "metric", "method", "baseline", "method_estimate", "baseline_estimate", "estimate", "low", "high", "holm_p",
           "effect_size", "n_items", "n_seeds", "outcome", "verdict", "note")
_AGAIN = "delete it and run its notebook again (--resume), then the report"
_CODE = re.compile(r"(```.*?```|~~~.*?~~~|`[^`\n]*`)", re.S)
_MATH = re.compile(r"\$\$(.+?)\$\$|(?<![\\$])\$(?=\S)([^$\n]+?)(?<=\S)\$(?!\d)", re.S)
_REMOTE_IMAGE = re.compile(r"!\[([^\]]*)\]\(https?:[^)]*\)")
_NOTEBOOK_LINK = re.compile(r"\[([^\]]*)\]\(([^():]*\.ipynb)\)")
_CAPTION = re.compile(r"\*\*(Figure[^*]*?)\.?\*\*:?\s*(.+?)(?:(?<=[.])\s|$)", re.S)
#: What matplotlib does not know and can do without.
_SIZES = re.compile(r"\\[bB]igg?[lrm]?(?![a-zA-Z])")


def write_report(run_dir: str | os.PathLike, *, notebooks: Iterable[str | os.PathLike], title: str) -> Path:
    """Write report.html into the run folder from its tables/, figures/ and the executed notebooks; its path.

    The answer comes from tables/primary_comparisons.csv; without it the page says that there is no answer yet. Raises
    FileNotFoundError for a notebook that is not there, ValueError for a file that is damaged; both name the file.
    """
    run_dir = Path(run_dir)
    claims = _claims(run_dir / CLAIMS) if (run_dir / CLAIMS).is_file() else None
    columns, rows, sentences = [], [], [("This run has made no comparisons, so it has no answer yet.", None)]
    if claims is not None:
        (columns, rows), sentences = claim_rows(claims), answer(claims)
    picture = run_dir / PICTURE
    style = (TEMPLATE / "style.css").read_text(encoding="utf-8") + HtmlFormatter().get_style_defs(".highlight")
    paths = [Path(path) for path in notebooks]
    anchors = {path.name: f"notebook-{number}" for number, path in enumerate(paths, start=1)}
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(TEMPLATE), autoescape=True)
    page = environment.get_template("page.html.j2").render(
        title=title, style=jinja2.filters.Markup(style), claim_columns=columns,
        claims=[{"anchor": f"claim-{number}", "cells": cells} for number, cells in enumerate(rows, start=1)],
        answer=[{"text": text, "anchor": claims is not None and ("claims" if number is None else f"claim-{number + 1}")}
                for text, number in sentences],
        picture_text=PICTURE_TEXT, picture=_embedded(picture.read_bytes(), "png") if picture.is_file() else None,
        tables=[_table(path) for path in sorted((run_dir / "tables").glob("*.csv"))],
        notebooks=[_notebook(path, anchors) for path in paths])
    path = run_dir / "report.html"
    with whole_file(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return path


def _claims(path: Path) -> pd.DataFrame:
    """The table of `claims.primary_comparisons` read back. ValueError with one line for a file that is cut."""
    claims = _csv(path)
    if lacking := [name for name in _NEEDED if name not in claims]:
        raise ValueError(f"{path} is cut or no table of claims: it lacks {', '.join(lacking)}; {_AGAIN}")
    texts = claims[["name", "kind", "metric", "method", "baseline", "outcome", "verdict"]]
    numbers = claims[[name for name in _NEEDED if name not in texts and name != "note"]]
    odd = texts.isna().any(axis=1) | ~claims["metric"].isin(METRICS) | ~claims["kind"].isin(KINDS)
    if claims.empty or odd.any() or not all(map(pd.api.types.is_numeric_dtype, numbers.dtypes)):
        raise ValueError(f"{path} is cut or no table of claims: {int(odd.sum())} of its {len(claims)} rows cannot be "
                         f"read; {_AGAIN}")
    older = [name for name in ("steps", "curve") if name not in claims]
    return claims.reindex(columns=[*claims, *older]).fillna({"steps": 0}).astype({"steps": int})


def _csv(path: Path) -> pd.DataFrame:
    try:
        return pd.read_csv(path)
    except pd.errors.EmptyDataError:
        return pd.DataFrame()
    except (ValueError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"{path} is no table ({reason}); {_AGAIN}") from error


def _embedded(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def _table(path: Path) -> dict:
    frame = _csv(path)
    more = f", the first {ROWS_SHOWN} shown" if len(frame) > ROWS_SHOWN else ""
    return {"name": path.stem.replace("_", " "), "anchor": f"table-{path.stem}",
            "note": f"{len(frame)} rows{more}; tables/{path.name}",
            "html": frame.head(ROWS_SHOWN).to_html(index=False, border=0, na_rep="",
                                                   float_format="{:.4g}".format)}


def _notebook(path: Path, anchors: dict[str, str]) -> dict:
    """An executed notebook as HTML: pictures inside, remote ones as their text, no progress bars (stderr).

    anchors: of the page's notebooks, by their files' names; a link to another notebook is only its text.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no notebook at {path}; the report is made from executed copies")
    try:
        notebook = nbformat.read(path, as_version=4)
        nbformat.validate(notebook)
    except (ValueError, AttributeError, TypeError, KeyError, nbformat.ValidationError) as error:
        raise ValueError(f"{path} is cut or no notebook; run it again (--resume), then the report") from error
    def linked(match: re.Match) -> str:
        return f"[{match[1]}](#{anchors[match[2]]})" if match[2] in anchors else match[1]

    for place, text in figure_texts(notebook.cells).items():
        notebook.cells[place].metadata["alt"] = text
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = _NOTEBOOK_LINK.sub(linked, cell.source)
            cell.source = formulas_to_pictures(_REMOTE_IMAGE.sub(r"\1", cell.source))
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    exporter = HTMLExporter(template_name=TEMPLATE.name, extra_template_basedirs=[str(TEMPLATE.parent)],
                            embed_images=True, exclude_anchor_links=True)
    body, _ = exporter.from_notebook_node(notebook, {"metadata": {"path": str(path.parent)}})
    return {"name": path.stem, "anchor": anchors[path.name], "html": body}


def figure_texts(cells: list) -> dict[int, str]:
    """For screen readers: by the place of each code cell that shows a picture, what the caption below it says first."""
    texts: dict[int, str] = {}
    for place, cell in enumerate(cells):
        shown = [output for output in cell.get("outputs", ()) if "image/png" in output.get("data", {})]
        below = next((other["source"] for other in cells[place:] if other["cell_type"] == "markdown"), "")
        if shown and (caption := _CAPTION.search(below)):
            plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", f"{caption[1]}: {caption[2]}")
            texts[place] = " ".join(re.sub(r"[*`$\\]", "", plain).split()).rstrip(":")
    return texts


def formulas_to_pictures(markdown: str) -> str:
    """Markdown whose $…$ and $$…$$ are pictures set by matplotlib; what it cannot set stays as code."""
    parts = _CODE.split(markdown)
    return "".join(part if place % 2 else _MATH.sub(_formula, part) for place, part in enumerate(parts))


def _formula(match: re.Match) -> str:
    display, source = match[1] is not None, _SIZES.sub("", " ".join((match[1] or match[2]).split()))
    picture = io.BytesIO()
    try:
        depth = math_to_image(f"${source}$", picture, format="svg", prop=FontProperties(size=12))
    except ValueError:
        return f"`{source}`"
    place = 'class="equation"' if display else f'style="vertical-align:-{depth:.1f}pt"'
    text, source = jinja2.filters.escape(source), _embedded(picture.getvalue(), "svg+xml")
    return f'<img {place} alt="{text}" src="{source}">'
