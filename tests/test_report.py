"""Tables for readers and the HTML report of a made run folder, with a notebook that is really executed."""
import functools
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser

import nbformat
import numpy as np
import pandas as pd
import pytest
from made_results import made_results
from nbclient import NotebookClient

from carma_lib.report import plots as figures
from carma_lib.report import tables
from carma_lib.stats.claims import default_claims, primary_comparisons
from carma_lib.report.page import formulas_to_pictures, write_report
from carma_lib.stats.metrics import per_seed, summarise
from carma_lib.stats.table import select

PAIR = {"method": "carma", "baseline": "fine_tuning"}
PLAN = [
    {"name": "Accuracy", "kind": "difference", "metric": "accuracy", "condition": "clean", **PAIR},
    {"name": "Preserved", "kind": "non-inferiority", "metric": "accuracy", "condition": "clean",
     "margin": 0.02, **PAIR},
    {"name": "ConsistSyn", "kind": "difference", "metric": "consist_syn", "rate": 0.4, **PAIR},
    {"name": "Spread", "kind": "cv ratio", "metric": "accuracy", "condition": "clean", **PAIR},
    {"name": "Against R-Drop", "kind": "difference", "metric": "accuracy", "condition": "clean",
     "method": "carma", "baseline": "r_drop"},
]


@functools.cache
def _comparisons(effect):
    results = made_results(methods={"fine_tuning": 0.0, "carma": effect}, seeds=8, items=200)
    return primary_comparisons(results, PLAN)


def made_comparisons(effect):
    return _comparisons(effect).copy()


# -- tables ----------------------------------------------------------------------------------------

def test_paper_table_holds_what_the_metrics_say():
    results = made_results(items=120)
    table = tables.paper_table(results)
    assert len(table) == 3 * 3 and not table.duplicated(["method", "rate"]).any()
    row = table[(table["method"] == "carma") & (table["rate"] == 0.4)].iloc[0]
    carma = results[results["method"] == "carma"].pivot_table(
        index=["seed", "item_id"], columns=["condition", "rate"], values="correct", aggfunc="first")
    clean, replaced = carma["clean", 0.0].astype(bool), carma["replaced", 0.4].astype(bool)
    kept = replaced[clean].groupby("seed").mean()
    by_seed = replaced.groupby("seed").mean()
    assert row["consist_syn"] == pytest.approx(kept.mean())
    assert row["accuracy"] == pytest.approx(replaced.mean())
    assert row["cv_accuracy"] == pytest.approx(by_seed.std() / by_seed.mean())
    assert row["cv_consist_syn"] == pytest.approx(kept.std() / kept.mean())
    empty = table[table["cv_accuracy"].isna()]
    assert (empty["method"] == "untuned").all() and empty["note"].str.contains("one seed").all()
    shown = tables.readable(table)
    assert shown.loc[shown["method"] == "untuned", "CV of accuracy"].eq("–").all()
    assert f"{100 * row['consist_syn']:.1f} [" in shown["ConsistSyn"].iloc[table.index.get_loc(row.name)]


def test_several_sources_of_synonyms_are_told_apart():
    drawn = made_results(rates=(0.25,), items=40)
    worst = drawn[drawn["condition"] == "replaced"].assign(source="adversary", correct=False, rank=2)
    both = pd.concat([drawn, worst], ignore_index=True)
    shown = tables.readable(tables.paper_table(both))
    assert set(shown["source"]) == {"", "controlled", "adversary"} and "source" not in tables.readable(tables.paper_table(drawn))
    estimates, values = summarise(both, "consist_syn"), per_seed(both, "consist_syn")
    lines = {name: len(figures.consist_syn_by_rate(*of).axes[0].lines) for name, of in {
        "both": (estimates, values), "drawn": tuple(select(table, source="controlled") for table in (estimates, values))}.items()}
    assert lines["both"] == lines["drawn"] > 0


def test_published_figures_stand_beside_ours_and_say_how_they_differ():
    sizes = {"methods": {"fine_tuning": 0.5, "carma": 0.5}, "seeds": 2, "items": 20, "layers": ()}
    runs = {"sst3": "openai-community/gpt2", "wordnet_inverse_dictionary": "gpt2-large", "made_task": "gpt2"}
    results = pd.concat([made_results(task=task, model=model, **sizes) for task, model in runs.items()])
    table = tables.beside_published(tables.paper_table(results)).set_index(["task", "method"])
    assert table.loc[("sst3", "carma"), "published_accuracy"] == pytest.approx(1670 / 2210)
    assert table.loc[("wordnet_inverse_dictionary", "carma"), "published_correct"] == 324
    assert np.isnan(table.loc[("wordnet_inverse_dictionary", "carma"), "published_accuracy"])
    assert "counts only" in table.loc[("wordnet_inverse_dictionary", "carma"), "published_note"]
    assert "nothing published" in table.loc[("made_task", "carma"), "published_note"]
    assert table["published_note"].str.len().gt(0).all()


def test_pooling_stands_beside_the_published_for_the_same_start_layer():
    made = made_results(methods={"fine_tuning": 0.5, "carma": 0.5}, seeds=2, items=40, layers=(0, 5, 11),
                        task="sst3", model="openai-community/gpt2-medium")
    kept = summarise(made[made["condition"].isin(["clean", "pooled"])], "accuracy_kept")
    beside = tables.pooling_beside_published(kept).set_index(["method", "protocol", "start_layer"])
    assert beside["published_accuracy_kept"].to_dict() == {
        ("fine_tuning", "mean", 5): 0.558, ("fine_tuning", "mean", 11): 0.733, ("carma", "mean", 5): 0.742,
        ("carma", "mean", 11): 0.836, ("fine_tuning", "sum", 5): 0.450, ("fine_tuning", "sum", 11): 0.436,
        ("carma", "sum", 5): 0.601, ("carma", "sum", 11): 0.526}
    assert tables.pooling_beside_published(kept.assign(model="mine")).empty


def test_saved_tables(tmp_path):
    table = pd.DataFrame({"rate_of": ["25 %", "a_b"], "value": [1.0, np.nan]})
    path = tables.save_table(table, tmp_path, "some_table", caption="Shares, 95 % intervals")
    pd.testing.assert_frame_equal(pd.read_csv(path), table, check_dtype=False)
    text = (tmp_path / "some_table.tex").read_text(encoding="utf-8")
    assert r"rate\_of" in text and r"25 \%" in text and r"95 \% intervals" in text and "nan" not in text


def test_small_numbers_stay_in_latex_tables(tmp_path):
    table = pd.DataFrame({"λ ≥": [3e-5, 0.123456, 12345.6, np.nan], "seeds": [1, 20, 300, 4000], "of": ["λ", "a", "−1", "_"]})
    tables.save_table(table, tmp_path, "small", caption="η")
    text = (tmp_path / "small.tex").read_text(encoding="utf-8")
    for line in (r"$\lambda$ $\geq$ & seeds & of \\", r"3e-05 & 1 & $\lambda$ \\", r"0.1235 & 20 & a \\", r"12346 & 300 & $-$1 \\",
                 r"– & 4000 & \_ \\", r"\caption{$\eta$}"):
        assert line in text, (line, text)


def test_a_readable_table_keeps_starts_apart():
    both = pd.concat([made_results(rates=()).assign(start=start) for start in ("base", "random")])
    shown = tables.readable(tables.paper_table(both))
    assert not shown.drop(columns=["accuracy", "CV of accuracy"]).duplicated().any() and "nan" not in shown.to_string()


def test_tables_for_readers_have_labels_in_index_headings_and_cells():
    table = pd.DataFrame({"method": ["carma"], "n_seeds": [3], "learning_rate": [0.1], "text": ["fine_tuning"]},
                         index=pd.MultiIndex.from_tuples([("controlled_sentiment", "test_seen")], names=["task", "split"]))
    found = tables.labelled(table)
    assert list(found.columns) == ["method", "seeds", "learning rate", "text"] and list(found.index) == [("sentiment", "test_seen")]
    assert found.iloc[0].tolist() == ["CARMA", 3, 0.1, "fine_tuning"] and table.method.tolist() == ["carma"]
    wide = pd.DataFrame([[1, 2]], columns=pd.MultiIndex.from_tuples([("sst3", "fine_tuning"), ("own_birds", 10)]))
    assert list(tables.labelled(wide).columns) == [("SST sentiment", "fine-tuning"), ("own birds", 10)]


@pytest.mark.parametrize(("estimate", "low", "high", "text"), [
    (0.0149, -0.0072, 0.036, "+1.5 [−0.7, 3.6]"), (-0.0004, -0.5, 0.0001, "0.0 [−50.0, 0.0]"), (0.0, np.nan, np.nan, "0.0"),
    (-0.02, np.nan, np.nan, "−2.0"), (np.nan, np.nan, np.nan, "–"), (0.693, 0.319, np.inf, "+69.3 [31.9 or more]")])
def test_an_estimate_with_its_interval(estimate, low, high, text):
    assert tables.with_interval(pd.DataFrame([{"estimate": estimate, "low": low, "high": high}])).tolist() == [text]


def test_disagreements_show_both_sides():
    results = made_results(methods={"fine_tuning": 0.0, "carma": 0.3}, items=80).query("condition == 'clean'")
    table = tables.disagreements(results, "carma", "fine_tuning", rows=6)
    gap = (table["method_right"] - table["baseline_right"]).to_numpy()
    assert len(tables.disagreements(results[results["item_id"].isin(table["item_id"][2:])], "carma", "fine_tuning", rows=4)) == 4
    assert len(table) == 6 and (gap[:3] > 0).all() and (gap[3:] < 0).all() and gap[0] >= gap[1]
    row = table.iloc[0]
    mine = results[(results["method"] == "carma") & (results["item_id"] == row["item_id"])]
    assert row["method_right"] == mine["correct"].mean() and row["target"] == mine["target"].iloc[0]
    with pytest.raises(ValueError, match="one condition"):
        tables.disagreements(made_results(), "carma", "fine_tuning")
    with pytest.raises(ValueError, match="no rows of r_drop"):
        tables.disagreements(results, "carma", "r_drop")


# -- the answer ------------------------------------------------------------------------------------

@pytest.mark.parametrize("effect, accuracy, count", [
    (2.0, "CARMA is better than fine-tuning", "3 shown"),
    (0.0, "no difference shown", "none shown"),
    (-2.0, "CARMA is worse than fine-tuning", "2 shown to be the other way round"),
])
def test_answer_is_right_for_better_equal_and_worse(effect, accuracy, count, tmp_path):
    comparisons = made_comparisons(effect)
    tables.save_table(comparisons, tmp_path, "claims")
    for table in (comparisons, pd.read_csv(tmp_path / "claims.csv")):
        sentences = tables.answer(table)
        assert len(sentences) == 5 and all(text.endswith(".") and "nan" not in text for text, _ in sentences)
        assert count in sentences[0][0] and "1 not tested" in sentences[0][0]
        assert accuracy in sentences[1][0] and sentences[1][1] == 0
        estimate = f"{100 * comparisons['estimate'][0]:+.1f}".replace("-", "−")
        assert f"difference {estimate} points" in sentences[1][0]
        assert ("not shown that" in sentences[2][0]) == (effect <= 0)


def test_claims_in_a_readers_units():
    comparisons = made_comparisons(1.0)
    headings, rows = tables.claim_rows(comparisons)
    first, spread = comparisons.iloc[0], comparisons.iloc[3]
    points = [f"{100 * first[name]:+.1f}".replace("-", "−") for name in ("estimate", "low", "high")]
    assert rows[0][1] == f"{100 * first['method_estimate']:.1f} %"
    assert rows[0][3:5] == [points[0], f"{points[1]} to {points[2]}"]
    assert rows[3][3:5] == [f"{spread['estimate']:.2f}", f"{spread['low']:.2f} to {spread['high']:.2f}"]
    assert rows[4][1:7] == [""] * 6 and rows[4][-1].startswith("not tested (no rows of r_drop")
    assert {len(row) for row in rows} == {len(headings)}


def test_answer_says_why_a_claim_was_not_tested():
    comparisons = made_comparisons(1.0).iloc[[4]].reset_index(drop=True)
    (first, _), (second, place) = tables.answer(comparisons)
    assert "none shown, none left open, 1 not tested" in first and place == 0
    assert second.startswith("Against R-Drop: not tested, because no rows of r_drop")


@pytest.fixture(scope="module")
def two_tasks():
    """Six claims of each of two tasks; the second task's differences are larger."""
    parts = [made_results(task=f"controlled_{task}", methods={"fine_tuning": 0.0, "carma": effect}, seeds=4, items=60,
                          split=f"test_{split}") for task, effect in (("first", 0.5), ("second", 1.5))
             for split in ("seen", "held_out", "longer")]
    results = pd.concat(parts)
    return results, primary_comparisons(results, default_claims(results))


def test_every_task_has_its_line_and_the_largest_difference_is_told(two_tasks):
    _, comparisons = two_tasks
    assert len(comparisons) == 12
    largest = comparisons[comparisons["kind"] == "difference"]["estimate"].abs().idxmax()
    places = [place for _, place in tables.answer(comparisons)]
    assert len(places) == 5 and largest in places
    assert set(comparisons["task"][places[1:]]) == {"controlled_first", "controlled_second"}
    many = pd.concat([comparisons.assign(task=comparisons["task"] + str(copy)) for copy in range(3)], ignore_index=True)
    chosen = [place for _, place in tables.answer(many)][1:]
    assert many["task"][chosen].nunique() == 6 and len(chosen) == 6, "a line for each task, if there are more than four"
    turned = comparisons.assign(estimate=-comparisons["estimate"])
    assert largest in [place for _, place in tables.answer(turned)]


@pytest.mark.parametrize("curve, told", [
    ("still rises", "Validation accuracy still rises there."), ("has levelled", "Validation accuracy has levelled there."),
    ("CARMA: still rises; fine-tuning: has levelled",
     "Validation accuracy there: CARMA still rises, fine-tuning has levelled."),
    ("cannot be told (fewer than three seeds)",
     "Whether validation accuracy still rises there cannot be told (fewer than three seeds)."), ("", ")."), (np.nan, ").")])
def test_an_answer_says_how_long_training_was_and_whether_the_curve_still_rises(curve, told):
    text = tables.answer(made_comparisons(1.0).assign(curve=curve))[1][0]
    assert "better than fine-tuning, after 100 training steps (" in text and text.endswith(told)


def test_two_seeds_give_estimates_and_no_claim():
    results = made_results(methods={"fine_tuning": 0.0, "carma": 3.0}, seeds=2, items=60)
    comparisons = primary_comparisons(results, PLAN[:3])
    (first, _), *others = tables.answer(comparisons)
    assert "none shown, none left open, 3 not tested" in first and len(others) == 3
    for text, _ in others:
        assert "not tested: 2 seeds, a claim needs 3, after 100" in text and "95 % interval" in text and ", p" not in text
        assert "better" not in text
    assert figures.forest_plot(comparisons).axes


# -- the page --------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    comparisons = made_comparisons(1.0)
    tables.save_table(comparisons, folder / "tables", "primary_comparisons")
    tables.save_table(pd.DataFrame({"a<b": range(100)}), folder / "tables", "long_table")
    picture = figures.forest_plot(comparisons)
    figures.save_figure(picture, folder / "figures", "primary_comparisons", comparisons)
    notebook = nbformat.v4.new_notebook(cells=[
        nbformat.v4.new_markdown_cell("# A <made> study\n\nWith $\\lambda = 0.2$ and `$x$`, for \\$5:\n\n"
                                      "$$L = (1 - \\lambda) L_\\mathrm{task} + \\lambda L_\\mathrm{CARMA}$$"),
        nbformat.v4.new_code_cell("%matplotlib inline\nimport matplotlib.pyplot as plt\nplt.plot([1, 2])"),
        nbformat.v4.new_markdown_cell("**Figure 1.** A *line*, as in [notebook 2](02_absent.ipynb) and [here](01_made.ipynb). More."),
        nbformat.v4.new_code_cell("import sys\nprint('printed' + '_text')\n"
                                  "print('a progress bar', file=sys.stderr)"),
        nbformat.v4.new_markdown_cell("[![a badge](https://example.org/badge.svg)]"
                                      "(https://example.org/notebook)")])
    (folder / "notebooks").mkdir()
    NotebookClient(notebook, kernel_name="python3", timeout=300).execute()
    nbformat.write(notebook, folder / "notebooks" / "01_made.ipynb")
    return folder


class Page(HTMLParser):
    """Ids, links, sources and open tags of a page."""

    def __init__(self, text):
        super().__init__()
        self.ids, self.links, self.sources, self.tags = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append(tag)
        self.ids += [attributes["id"]] if "id" in attributes else []
        self.links += [attributes["href"]] if "href" in attributes else []
        self.sources += [attributes["src"]] if "src" in attributes else []


def test_report_stands_alone_and_every_link_has_its_target(run_folder):
    path = write_report(run_folder, notebooks=[run_folder / "notebooks/01_made.ipynb"], title="A <run>")
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert path == run_folder / "report.html" and not list(run_folder.glob(".*"))
    assert page.sources and all(source.startswith("data:image/") for source in page.sources)
    assert "script" not in page.tags and "link" not in page.tags and "@import" not in text
    assert len(page.ids) == len(set(page.ids))
    inside = [link for link in page.links if link != "https://example.org/notebook"]
    assert len(inside) == len(page.links) - 1
    assert all(link[0] == "#" and link[1:] in page.ids for link in inside)
    assert [f"#claim-{number}" in page.links for number in (1, 2, 3, 4)] == [True] * 4
    assert "#notebook-1" in page.links and "as in notebook 2 and" in text
    assert 'alt="Figure 1: A line, as in notebook 2 and here."' in text
    assert "¶" not in text and ">a badge</a>" in text
    assert "a progress bar" not in re.sub(r"<details class=\"code\">.*?</details>", "", text, flags=re.S)
    assert "A &lt;run&gt;" in text and "printed_text" in text and "a&lt;b" in text
    assert "100 rows, the first 60 shown" in text
    code = re.search(r"<details class=\"code\">.*?</details>", text, re.S)[0]
    assert "matplotlib" in re.sub("<[^>]+>", "", code)


def test_report_without_comparisons_says_so_and_absent_notebooks_are_errors(run_folder, tmp_path):
    page = write_report(tmp_path, notebooks=[run_folder / "notebooks/01_made.ipynb"], title="part of a run")
    assert "has no answer yet" in page.read_text(encoding="utf-8")
    with pytest.raises(FileNotFoundError, match="no notebook at"):
        write_report(tmp_path, notebooks=[tmp_path / "02_absent.ipynb"], title="part of a run")


def test_formulas_become_pictures_and_code_stays():
    text = formulas_to_pictures("a $x^2$ b `$y$` costs \\$5 and \\$6\n```\n$z$\n```\n"
                                "$$\\frac{a}{b}$$ $\\unknowable{x}$")
    assert text.count("<img") == 2 and 'alt="x^2"' in text and 'class="equation" alt="\\frac{a}{b}"' in text
    assert "<img" in formulas_to_pictures(r"$\bigl(x\bigr)$")
    assert "`$y$`" in text and "$z$" in text and "\\$5 and \\$6" in text and "`\\unknowable{x}`" in text


WATCH = """<!DOCTYPE html><body><iframe id=page src="report.html" width=%d height=3000 style="border:0"></iframe>
<script>onload = () => { const page = document.getElementById("page").contentDocument, root = page.documentElement;
page.querySelectorAll("details").forEach(each => each.open = true);
const broken = [...page.images].filter(each => !each.complete || !each.naturalWidth).length;
document.title = `width ${root.clientWidth} scroll ${root.scrollWidth} broken ${broken} links ${page.links.length}`; }</script>"""


@pytest.mark.parametrize("width", [390, 1200])
@pytest.mark.skipif(not shutil.which("chromium") and not os.environ.get("CI"), reason="no chromium here; CI has it")
def test_the_page_in_chromium_scrolls_only_downwards(run_folder, two_tasks, tmp_path, width):
    """Wide tables and long formulas scroll inside their boxes; every picture is whole; nothing asks the network."""
    results, comparisons = two_tasks
    tables.save_table(comparisons, tmp_path / "tables", "primary_comparisons")
    wide = pd.DataFrame({f"a_column_with_a_long_name_{number}": [number / 7] * 3 for number in range(30)})
    tables.save_table(wide, tmp_path / "tables", "wide_table")
    figures.save_figure(figures.forest_plot(comparisons), tmp_path / "figures", "primary_comparisons", comparisons)
    write_report(tmp_path, notebooks=[run_folder / "notebooks/01_made.ipynb"], title="A run_with_a_name_of_some_length" * 2)
    (tmp_path / "watch.html").write_text(WATCH % width)
    done = subprocess.run(
        ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--disable-sync", "--allow-file-access-from-files",
         "--hide-scrollbars", "--enable-logging=stderr", f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=5000",
         "--window-size=1400,3000", "--dump-dom", (tmp_path / "watch.html").as_uri()],
        capture_output=True, text=True, timeout=180)
    found = re.search(r"<title>width (\d+) scroll (\d+) broken (\d+) links (\d+)</title>", done.stdout)
    assert found, done.stderr[-2000:]
    seen, scroll, broken, links = map(int, found.groups())
    assert seen == width and scroll <= width and not broken and links > 5
    assert "CONSOLE" not in done.stderr, done.stderr


def cut(text):
    return text[:len(text) * 2 // 3]


@pytest.mark.parametrize("spoil", [
    cut, lambda text: "", lambda text: text.splitlines()[0] + "\n", lambda text: "a,b\n1,2\n", lambda text: "\0" * 500,
    lambda text: text.replace("difference", "differences"), lambda text: text.replace(",accuracy,", ",acuracy,"),
    lambda text: text + 'x,"', lambda text: re.sub(r"\d", "x", text), lambda text: "[1, 2]"])
def test_a_damaged_table_of_claims_is_named_in_one_line(tmp_path, spoil):
    path = tables.save_table(made_comparisons(1.0), tmp_path / "tables", "primary_comparisons")
    write_report(tmp_path, notebooks=[], title="whole")
    path.write_text(spoil(path.read_text(encoding="utf-8")), encoding="utf-8")
    with pytest.raises(ValueError) as error:
        write_report(tmp_path, notebooks=[], title="damaged")
    assert str(path) in str(error.value) and "\n" not in str(error.value) and "run its notebook again" in str(error.value)


def test_other_damaged_files_are_named_and_older_tables_are_read(tmp_path):
    path = tables.save_table(made_comparisons(1.0).drop(columns=["steps", "curve"]), tmp_path / "tables", "primary_comparisons")
    assert "training steps (" not in write_report(tmp_path, notebooks=[], title="older").read_text(encoding="utf-8")
    (tmp_path / "tables" / "other.csv").write_bytes(b"a,b\n\xff\xfe,2\n")
    with pytest.raises(ValueError, match="other.csv is no table"):
        write_report(tmp_path, notebooks=[], title="damaged")
    (tmp_path / "tables" / "other.csv").unlink()
    for content in ('{"cells": [', "[]", '{"cells": 3, "nbformat": 4, "nbformat_minor": 5, "metadata": {}}'):
        (tmp_path / "01.ipynb").write_text(content)
        with pytest.raises(ValueError, match="01.ipynb is cut or no notebook") as error:
            write_report(tmp_path, notebooks=[tmp_path / "01.ipynb"], title="damaged")
        assert "\n" not in str(error.value)


def test_latex_tables_escape_every_mark(tmp_path):
    table = pd.DataFrame({"name & share": ["[a]", "*b", "c_d"], "50 %": [1.0, 2.0, float("nan")]})
    tables.save_table(table, tmp_path, "odd", caption="A & B, #1_a, 50 % ~ x^2 \\ {}")
    text = (tmp_path / "odd.tex").read_text(encoding="utf-8")
    assert r"\caption{A \& B, \#1\_a, 50 \% \textasciitilde{} x\textasciicircum{}2 \textbackslash{} \{\}}" in text
    assert not [line for line in text.splitlines() if line.startswith(("[", "*"))] and r"{}[a] &" in text and r"{}*b &" in text
