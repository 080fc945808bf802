"""The book, built from what is committed and opened in Chromium: links, pictures, formulas, search, no sideways scroll."""
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import nbformat
import pandas as pd
import pytest
from browser import chromium, errors_of, needs_chromium
from figure_checks import assert_no_overlaps

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "book"))


class Page(HTMLParser):
    """The ids of a page, and the addresses that it links to or shows."""

    def __init__(self, path):
        super().__init__()
        self.ids, self.links, self.shown = set(), set(), set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.ids |= {given[name] for name in ("id", "name") if given.get(name)}
        self.links |= {given["href"]} if tag == "a" and "href" in given else set()
        name = "src" if "src" in given else "href" if tag == "link" else ""
        self.shown |= {given[name]} if name in given else set()


@pytest.fixture(scope="module")
def book(tmp_path_factory):
    pytest.importorskip("sphinx")
    folder = tmp_path_factory.mktemp("book")
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-b", "html", "-c", ROOT / "book", ROOT, folder]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return folder


def pages(book):
    return sorted(path for path in book.rglob("*.html") if "_static" not in path.parts)


def test_every_notebook_and_page_is_in_it(book):
    sources = [*ROOT.glob("notebooks/*.ipynb"), *ROOT.glob("book/**/*.md"), ROOT / "README.md"]
    assert not [path for path in sources if not (book / path.relative_to(ROOT)).with_suffix(".html").is_file()]


def test_every_link_has_its_place_and_nothing_comes_from_the_web(book):
    read = {path: Page(path) for path in pages(book)}
    broken = []
    for path, page in read.items():
        broken += [f"{path.name}: {address} is on the web" for address in page.shown if urlsplit(address).netloc]
        for address in page.links | page.shown:
            parts = urlsplit(address)
            if parts.scheme or parts.netloc:
                continue
            aim = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if not aim.is_file():
                broken.append(f"{path.name}: {address} is not there")
            elif parts.fragment and aim in read and unquote(parts.fragment) not in read[aim].ids:
                broken.append(f"{path.name}: {address} has no such place")
    assert not broken, "\n".join(broken)


def test_a_notebook_that_is_named_is_linked():
    """On the repository's page as in the book: no reader has to look for "notebook 5" in a list."""
    texts = {path: path.read_text(encoding="utf-8") for path in (*ROOT.glob("book/*.md"), ROOT / "README.md")}
    for path in ROOT.glob("notebooks/*.ipynb"):
        texts[path] = "\n\n".join(cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "markdown")
    bare = {path.name: [found for found in re.findall(r"[Nn]otebooks? (\d+)", re.sub(r"\[[^\]]*\]\([^)]*\)", "", text))
                        if not path.name.startswith(f"{int(found):02d}_")] for path, text in texts.items()}
    assert len(texts) > 20 and not {name: found for name, found in bare.items() if found}


def test_the_reference_holds_nothing_that_python_wrote_by_itself(book):
    assert not [path.name for path in pages(book) if "Alias for field number" in path.read_text(encoding="utf-8")]


def test_the_reference_names_every_module():
    import conf
    named = {module for page in (ROOT / "book/reference").glob("*.md")
             for patterns in re.findall("<!-- modules: (.*?) -->", page.read_text(encoding="utf-8"))
             for module in conf.documented(patterns)}
    rooms = {name for name in conf.NAMES if (conf.PACKAGE / name.replace(".", "/")).is_dir()} | {"__init__"}
    assert set(conf.NAMES) - rooms <= named


#: Wait until formulas are drawn, on a page that has some.
TYPESET = """
const done = arguments[0];
(function look() {
  if (!document.querySelector("script[src*=mathjax]")) done();
  else if (window.MathJax && MathJax.startup && MathJax.startup.promise) MathJax.startup.promise.then(() => done());
  else setTimeout(look, 50); })();
"""
def test_the_readme_says_what_its_figure_shows():
    """The finding's numbers are those of the claims behind the figure, and no text of the figure overlaps another."""
    import finding
    claims = pd.read_csv(finding.PICTURES / "finding.csv").set_index("name")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for asked in ("accuracy", "synonyms 25 %", "pooling"):
        for task in ("WordNet inverse dictionary", "SST sentiment"):
            row = 100 * claims.loc[f"{task}: {asked}", ["estimate", "low", "high"]].astype(float)
            said = f"{row.estimate:+.1f} points (95 % interval {row.low:.1f} to {row.high:.1f})".replace("-", "−")
            assert said in readme
    levels = {f"{each:.0%}".replace("%", " %") for column in ("method_estimate", "baseline_estimate")
              for each in claims.loc[["WordNet inverse dictionary: accuracy", "SST sentiment: accuracy"], column]}
    assert levels == {"12 %", "75 %"} and "both get 12 % of the items right in the inverse dictionary and 75 % in sentiment" in readme
    counted = [claims.loc[f"{task}: {asked}", "n_items"] for task in ("WordNet inverse dictionary", "SST sentiment") for asked in ("synonyms 25 %", "pooling")]
    assert "({} and {} in the inverse dictionary, {} and {} in sentiment)".format(*counted) in readme
    shown = claims.index[claims["outcome"] == "shown"].tolist()
    assert len(claims) == 12 and set(claims["outcome"]) == {"shown", "open"} and shown == ["WordNet inverse dictionary: performance preserved"]
    assert "**One of 12 claims is shown:** accuracy in the inverse dictionary is preserved within 2 points. The other 11 are open" in readme
    seeds = sorted(claims["n_seeds"].unique())
    assert f"{' to '.join(map(str, seeds))} seeds and at most {claims['n_items'].max()} items" in readme
    assert_no_overlaps(finding.finding())
    notebook = nbformat.read(ROOT / "notebooks/12_pretrained_answers.ipynb", as_version=4)
    shown = " ".join(str(output.get("data", "")) for cell in notebook.cells for output in cell.get("outputs", []))
    told = re.findall(r"([+−]\d+\.\d)(?: points[^(.;]*)? \((?:95 % interval )?([−\d.]+) to ([−\d.]+)\)", readme)
    assert len(told) == 11 and not [each for each in told if "{} [{}, {}]".format(*each) not in shown]


#: What is read off an open page: sideways scroll, what leads to it, pictures and formulas that are not there.
LOOK = """
const width = document.documentElement.clientWidth, root = document.documentElement;
const wide = [...document.querySelectorAll("article *")].filter(each => {
  if (each.getBoundingClientRect().right <= width + 1) return false;
  for (let above = each.parentElement; above.tagName !== "ARTICLE"; above = above.parentElement)
    if (getComputedStyle(above).overflowX !== "visible") return false;
  return true; }).slice(0, 3).map(each => each.outerHTML.slice(0, 100));
return {scroll: root.scrollWidth - width, wide: wide,
  broken: [...document.images].filter(each => !each.complete || !each.naturalWidth).map(each => each.src),
  untold: [...document.images].filter(each => !/\\w \\w/.test(each.alt)).map(each => each.src),
  raw: [...document.querySelectorAll(".math")].filter(each => !each.querySelector("mjx-container")).length,
  stray: [...document.querySelectorAll("article p, article li, article td")].filter(each => {
    if (each.closest("dl.py")) return false;
    const copy = each.cloneNode(true);
    copy.querySelectorAll("code, pre, .math").forEach(part => part.remove());
    return copy.textContent.includes("$"); }).map(each => each.textContent.slice(0, 80)),
  wrong: document.querySelectorAll("mjx-merror").length};
"""


@needs_chromium
@pytest.mark.parametrize("width", [390, 1200])
def test_pages_in_chromium(book, tmp_path, width):
    """Every page on a phone; on a desk those that are laid out otherwise there."""
    shown = pages(book) if width == 390 else [book / "README.html", book / "notebooks/05_how_carma_works.html"]
    with chromium(tmp_path, width=width) as driver:
        driver.set_script_timeout(60)
        faults = []
        for page in shown:
            driver.get(page.as_uri())
            driver.execute_async_script(TYPESET)
            found = driver.execute_script(LOOK)
            found["console"] = errors_of(driver)
            faults += [f"{page.relative_to(book)}: {name} {value}" for name, value in found.items() if value]
        assert not faults, "\n".join(faults)


@needs_chromium
def test_search_finds_pages_without_a_server(book, tmp_path):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait
    with chromium(tmp_path) as driver:
        driver.get((book / "search.html").as_uri() + "?q=stability_loss")
        WebDriverWait(driver, 60).until(lambda page: page.find_elements(By.CSS_SELECTOR, "ul.search li a"))
        aims = [link.get_attribute("href") for link in driver.find_elements(By.CSS_SELECTOR, "ul.search li a")]
        assert any("reference/losses.html" in aim for aim in aims) and not errors_of(driver)
