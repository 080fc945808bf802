"""Every figure of made tables: it draws what the table says, in one look, and goes to disk with its data."""
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from made_results import made_history, made_results
from matplotlib.colors import to_hex

from carma_lib.report import plots as figures
from carma_lib.stats import metrics as statistics
from carma_lib.stats.claims import primary_comparisons
from carma_lib.stats.table import METHOD_LABELS

SPLITS = ("test_seen", "test_held_out", "test_longer")
CLAIMS = [{"name": f"{kind} of {metric}", "kind": kind, "metric": metric, "split": "test_seen",
           "method": "carma", "baseline": "fine_tuning", **more} for metric, kind, more in (
    ("accuracy", "difference", {"condition": "clean"}), ("consist_syn", "difference", {"rate": 0.4}),
    ("accuracy", "non-inferiority", {"condition": "clean", "margin": 0.02}),
    ("accuracy", "cv ratio", {"condition": "clean", "rate": 0.0}))]


@pytest.fixture(scope="module")
def results():
    return pd.concat([made_results(split=split, seed=place) for place, split in enumerate(SPLITS)])


@pytest.fixture(scope="module")
def comparisons(results):
    return primary_comparisons(results, CLAIMS)


def drawn(results, comparisons):
    """Each figure with the table behind it."""
    tables = {name: (statistics.summarise(results, name), statistics.per_seed(results, name))
              for name in ("accuracy", "consist_syn", "accuracy_kept")}
    clean, clean_seeds = (table[table["condition"] == "clean"] for table in tables["accuracy"])
    kept, kept_seeds = (table[table["split"] == "test_seen"] for table in tables["accuracy_kept"])
    variation = statistics.coefficient_of_variation(results).query("condition == 'clean'")
    drift = pd.DataFrame({"method": np.repeat(["fine_tuning", "carma"], 6),
                          "seed": np.tile([0, 0, 0, 1, 1, 1], 2), "layer": np.tile(range(3), 4),
                          "value": np.arange(12.0)})
    return {
        "learning_curves": (figures.learning_curves(made_history()), made_history()),
        "accuracy_by_method": (figures.accuracy_by_method(clean, clean_seeds), clean),
        "consist_syn_by_rate": (figures.consist_syn_by_rate(*tables["consist_syn"]),
                                tables["consist_syn"][0]),
        "pooling_by_depth": (figures.pooling_by_depth(kept, kept_seeds), kept),
        "cv_by_method": (figures.cv_by_method(variation), variation),
        "forest_plot": (figures.forest_plot(comparisons), comparisons),
        "drift_by_layer": (figures.drift_by_layer(drift), drift),
    }


def test_every_figure_is_saved_with_its_data_and_nothing_is_cut_off(results, comparisons, tmp_path):
    for name, (figure, table) in drawn(results, comparisons).items():
        path = figures.save_figure(figure, tmp_path, name, table)
        assert path == tmp_path / f"{name}.png" and path.stat().st_size > 5000
        assert "<svg" in (tmp_path / f"{name}.svg").read_text(encoding="utf-8")
        assert len(pd.read_csv(tmp_path / f"{name}.csv")) == len(table)
        figure.draw_without_rendering()
        box, width = figure.get_tightbbox(), figure.get_figwidth()
        assert box.x0 > -0.02 and box.y0 > -0.02 and box.x1 < width + 0.02, f"{name} is cut off"
        assert width in (figures.COLUMN, figures.PAGE, figures.FOREST)
        texts = [text for text in figure.findobj(plt.Text) if text.get_text().strip() and text.get_visible()]
        assert min(text.get_fontsize() for text in texts) >= 7, f"{name} has text too small to read"
    assert not plt.get_fignums(), "a figure is left open, and a notebook would show it twice"
    assert not list(tmp_path.glob(".*"))


def test_same_svg_twice(results, comparisons, tmp_path):
    for folder in ("a", "b"):
        figure, table = drawn(results, comparisons)["forest_plot"]
        figures.save_figure(figure, tmp_path / folder, "forest", table)
    assert (tmp_path / "a/forest.svg").read_bytes() == (tmp_path / "b/forest.svg").read_bytes()


def test_methods_differ_in_colour_and_marker_everywhere():
    assert list(figures.METHOD_COLOURS) == list(figures.METHOD_MARKERS) == list(METHOD_LABELS)
    for look in (figures.METHOD_COLOURS, figures.METHOD_MARKERS):
        assert len(set(look.values())) == len(METHOD_LABELS)
    assert figures.METHOD_COLOURS["fine_tuning"] == "#0173b2" and figures.METHOD_COLOURS["carma"] == "#de8f05"


def test_points_and_bars_are_those_of_the_table(results):
    table = statistics.summarise(results, "accuracy").query("condition == 'clean' and split == 'test_longer'")
    seeds = statistics.per_seed(results, "accuracy").query("condition == 'clean' and split == 'test_longer'")
    axes = figures.accuracy_by_method(table, seeds).axes[0]
    for place, line in enumerate(table.to_dict("records")):
        marker, caps, bars = axes.containers[place].lines
        assert to_hex(marker.get_color()) == figures.METHOD_COLOURS[line["method"]]
        assert marker.get_ydata() == pytest.approx([line["estimate"]])
        assert [cap.get_ydata()[0] for cap in caps] == pytest.approx([line["low"], line["high"]])
        dots = axes.collections[2 * place].get_offsets()[:, 1]
        assert sorted(dots) == pytest.approx(sorted(seeds.loc[seeds["method"] == line["method"], "value"]))


def test_forest_plot_fills_what_survives_correction_and_leaves_out_what_was_not_tested(comparisons):
    table = comparisons.assign(holm_p=[0.01, 0.2, 0.01, 0.5])
    axes = figures.forest_plot(table).axes
    fills = [to_hex(line.get_markerfacecolor()) for panel in axes for line in panel.lines
             if line.get_marker() == "s"]
    assert fills == [figures.METHOD_COLOURS["carma"], "#ffffff", figures.METHOD_COLOURS["carma"], "#ffffff"]
    marks = [line for line in axes[0].lines if line.get_marker() == "s"]
    expected = (100 * table["estimate"][[2, 1, 0]]).tolist()
    assert [mark.get_xdata()[0] for mark in marks] == pytest.approx(expected)
    untested = table.assign(estimate=[np.nan, 0.1, 0.1, np.nan])
    assert len(figures.forest_plot(untested).axes) == 1
    with pytest.raises(ValueError, match="no claim of the table could be tested"):
        figures.forest_plot(table.assign(estimate=np.nan))


def test_tables_that_mix_what_a_figure_cannot_show_are_refused(results):
    mixed = pd.concat([results, made_results(task="other_task")])
    clean = statistics.summarise(mixed, "accuracy").query("condition == 'clean'")
    with pytest.raises(ValueError, match="shows one task"):
        figures.accuracy_by_method(clean, clean)
    with pytest.raises(ValueError, match="shows one condition"):
        figures.accuracy_by_method(statistics.summarise(results, "accuracy"), clean)
    with pytest.raises(ValueError, match="shows one row a split and method"):
        twice = pd.concat([clean, clean.assign(budget=7)]).query("task == 'made_task'")
        figures.accuracy_by_method(twice, clean)
    with pytest.raises(ValueError, match="no rows"):
        figures.accuracy_by_method(clean.iloc[:0], clean)
    with pytest.raises(ValueError, match="no colour for the methods"):
        figures.learning_curves(made_history(methods=("dropout",)))
    with pytest.raises(ValueError, match="holds none of"):
        figures.learning_curves(made_history()[["task", "method", "seed", "step"]])


def test_models_that_answer_nothing_right_have_figures_that_say_so(results):
    wrong = results.assign(correct=False)
    for figure in (
            figures.consist_syn_by_rate(statistics.summarise(wrong, "consist_syn"), statistics.per_seed(wrong, "consist_syn")),
            figures.cv_by_method(statistics.coefficient_of_variation(wrong).query("condition == 'clean'"))):
        for axes in figure.axes:
            assert "no estimate" in [text.get_text() for text in axes.texts]
