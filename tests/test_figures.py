"""Every figure of made tables: it draws what the table says, in one look, and goes to disk with its data."""
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from figure_checks import assert_no_overlaps, overlaps
from made_results import made_history, made_results
from matplotlib.colors import to_hex
from matplotlib.collections import LineCollection

from carma_lib.report import plots as figures
from carma_lib.report import study_plots, style
from carma_lib.stats import metrics as statistics
from carma_lib.stats.claims import primary_comparisons
from carma_lib.stats.table import METHOD_LABELS, task_label

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


def made_lengths(tasks=("sst3", "controlled_task_with_a_longer_name")):
    generator = np.random.default_rng(0)
    return pd.DataFrame([{"task": task, "split": split, "words": words} for task in tasks for place, split in enumerate(
        ("train", "validation", *SPLITS)) for words in generator.poisson(8 + place, 200)])


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
        "text_lengths": (figures.text_lengths(made_lengths()), made_lengths()),
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
        assert width in (style.COLUMN, style.PAGE)
        texts = [text for text in figure.findobj(plt.Text) if text.get_text().strip() and text.get_visible()]
        assert min(text.get_fontsize() for text in texts) >= 7, f"{name} has text too small to read"
    assert not plt.get_fignums(), "a figure is left open, and a notebook would show it twice"
    assert not list(tmp_path.glob(".*"))


MANY = list(METHOD_LABELS)


def seeds_rows(column, places, panels=("a",), methods=MANY, seeds=3, scale=1.0):
    generator = np.random.default_rng(0)
    return pd.DataFrame([{"method": method, "seed": seed, "panel": panel, column: place,
                          "measured": scale * (number + generator.normal())} for number, method in enumerate(methods)
                         for seed in range(seeds) for panel in panels for place in places])


def claims_table(names, low=-0.05, high=0.05, methods=("carma",)):
    lines = [{"name": name, "kind": kind, "metric": "accuracy", "method": methods[place % len(methods)],
              "baseline": "fine_tuning", "estimate": (low + high) / 2 + (kind == "cv ratio"), "low": low + (kind == "cv ratio"),
              "high": high + (kind == "cv ratio"), "holm_p": (0.01, 0.5, np.nan)[place % 3],
              "margin": 0.02 if kind == "non-inferiority" else np.nan}
             for place, name in enumerate(names) for kind in ("difference", "non-inferiority", "cv ratio")]
    return pd.DataFrame(lines)


def drawn_hard():
    """Figures of long names, many methods, many panels, extreme values."""
    several = pd.concat([made_results(methods={method: place / 4 for place, method in enumerate(MANY)}, seeds=3, items=12,
                                      rates=(0.1, 0.25, 0.4), layers=(), split=split) for split in SPLITS])
    means = statistics.summarise(several, "accuracy").query("condition == 'clean'")
    long = "held out combinations of a task with a name that goes on"
    layers = seeds_rows("layer", range(-1, 30), panels=(long, "b", f"{long}\nc"))
    steps = seeds_rows("budget", (60, 120, 240, 480, 960, 1920, 100_000), panels=("300 items", "900 items", "b", "c"))
    flat = seeds_rows("layer", range(4), methods=MANY[:4], scale=0.0)
    huge = seeds_rows("layer", range(4), methods=MANY[:4], scale=1e9)
    claims = [f"a task with quite a long name, CARMA, {place}: performance preserved on seen combinations of words"
              for place in range(9)]
    differences = pd.DataFrame([dict(method=method, panel=panel, estimate=0.1 * place, low=-0.9, high=0.9)
                                for place, method in enumerate(MANY[1:]) for panel in ("new combinations", "pooling", long)])
    runs = layers.rename(columns={"measured": "measure"}).assign(accuracy=lambda rows: rows["measure"] / 10)
    long_history = made_history(methods=MANY, steps=10_000)
    yield "lengths of one task", figures.text_lengths(made_lengths(tasks=("a task",)))
    yield "lengths of many", figures.text_lengths(made_lengths(tasks=(long, "b", "c", "d")).query("task != 'b' or split == 'train'"))
    yield "many methods", figures.by_method(means, label="accuracy")
    yield "many methods by rate", figures.consist_syn_by_rate(statistics.summarise(several, "consist_syn"),
                                                              statistics.per_seed(several, "consist_syn"))
    yield "long history", figures.learning_curves(long_history)
    yield "few methods", figures.learning_curves(made_history(methods=MANY[1:5]))
    yield "one loss", figures.learning_curves(made_history().drop(columns=["stability", "mutual_information"]))
    yield "layers", study_plots.measure_by_layer(layers, panel="panel", label="information, nats")
    yield "flat", study_plots.measure_by_layer(flat, panel="panel", label="information, nats")
    yield "huge", study_plots.measure_by_layer(huge, panel="panel", label="information, nats")
    yield "drift", figures.drift_by_layer(huge.assign(value=huge["measured"]))
    yield "drift of many", figures.drift_by_layer(layers[layers["panel"] == "b"].assign(value=layers["measured"]))
    yield "budgets", study_plots.accuracy_by_budget(steps, panel="panel")
    yield "differences", study_plots.differences(differences, rows="method", panel="panel")
    yield "runs", study_plots.measure_against_accuracy(runs[runs["layer"] == 3], measure="measure", panel="panel",
                                                       label="variance that a sum of parts explains in the last layer")
    yield "forest, long names", figures.forest_plot(claims_table(claims, methods=MANY))
    yield "forest, wide", figures.forest_plot(claims_table(["a", "b"], low=-0.9, high=1.0))
    yield "forest, narrow", figures.forest_plot(claims_table(["new combinations"], low=0.01999, high=0.02001))
    yield "forest, one claim", figures.forest_plot(claims_table(["new combinations"]).iloc[:1])
    yield "forest, two scales", figures.forest_plot(pd.concat([claims_table(["a task: pooling"]), claims_table(["another task: pooling"], low=-0.4, high=0.9)]))
    yield "forest, one ratio", figures.forest_plot(claims_table(["new combinations"], -0.9, 9).iloc[2:])


def test_no_text_lies_over_another_or_over_a_mark(results, comparisons):
    cases = {**{name: figure for name, (figure, _) in drawn(results, comparisons).items()}, **dict(drawn_hard())}
    found = {name: overlaps(figure) for name, figure in cases.items()}
    assert len(found) == 29 and not {name: lines for name, lines in found.items() if lines}


def test_a_long_name_does_not_hide_the_outcome():
    figure = figures.forest_plot(claims_table(["a task with quite a long name, of two models and words: performance preserved"]))
    names = [text.get_text() for text in figure.axes[0].get_yticklabels()]
    assert [name.split("\n")[-1] for name in names] == ["performance preserved", "(≥ −2: shown)"]
    assert figure.axes[0].get_title(loc="left").replace("\n", " ") == "a task with quite a long name, of two models and words"
    endless = figures.forest_plot(claims_table(["a task: performance preserved on seen combinations of words that go on and on"]))
    name = endless.axes[0].get_yticklabels()[1].get_text().split("\n")
    assert len(name) == 3 and name[1].endswith("…") and name[2] == "(≥ −2: shown)"


def test_every_claim_has_its_own_name_beside_its_mark():
    names = [f"{task}: {asked}" for task in ("a task", "another task") for asked in ("new combinations", "pooling")]
    table = claims_table(names).assign(estimate=[place / 100 + (place % 3 == 2) for place in range(12)])
    table.loc[6, ["low", "high"]] = -0.3, 0.4  # of the second task, wider than all of the first
    axes = figures.forest_plot(table).axes
    assert [one.get_title(loc="left") for one in axes] == ["a task", "another task", ""]
    drawn = {}
    for panel in axes:
        marks = {line.get_ydata()[0]: line.get_xdata()[0] for line in panel.lines if line.get_marker() == "s"}
        for label in panel.get_yticklabels():
            drawn[panel.get_title(loc="left"), label.get_text().replace("\n", " ")] = marks[label.get_position()[1]]
    expected = {}
    for row in table.to_dict("records"):
        task, asked = row["name"].split(": ")
        if row["kind"] == "cv ratio":
            expected["", row["name"]] = row["estimate"]
        else:
            outcome = f" (≥ −2: {'shown' if row['holm_p'] < 0.05 else 'not shown'})" if row["kind"] == "non-inferiority" else ""
            expected[task, asked + outcome] = 100 * row["estimate"]
    assert {name: pytest.approx(value) for name, value in expected.items()} == drawn
    for panel in axes:
        low, high = panel.get_xlim()
        ends = [value for line in panel.lines for value in line.get_xdata()]
        assert low < min(ends) and max(ends) < high, "a mark or an end of an interval lies outside"
    assert axes[0].get_xlim() == axes[1].get_xlim(), "the tasks have one scale"
    assert len(figures.forest_plot(table.set_axis([0] * 12)).axes[0].get_yticklabels()) == 4, "whatever the table's index"
    alike = figures.forest_plot(table[table["name"].str.endswith("pooling")]).axes[-1]
    assert alike.get_title(loc="left") == "pooling" and [label.get_text() for label in alike.get_yticklabels()] == ["a task", "another task"]


def test_an_interval_without_an_end_is_drawn_as_an_arrow():
    estimates = pd.DataFrame({"split": "test", "method": ["carma", "fine_tuning"], "estimate": [0.4, 0.1], "low": [0.2, 0.06], "high": [np.inf, 0.3]})
    axes = figures.by_method(estimates, label="CV").axes[0]
    bars = [segment[:, 1].tolist() for bar in axes.collections if isinstance(bar, LineCollection) for segment in bar.get_segments()]
    assert sorted(bars) == [[0.06, 0.3], [0.2, 0.4]], "the lower end is there"
    assert [line.get_ydata().tolist() for line in axes.lines if line.get_marker() == "^"] == [[0.4, 0.8]]


def test_the_check_of_overlaps_finds_each_kind():
    figure, axes = plt.subplots(figsize=(4, 3), layout="constrained")
    axes.plot([0, 1, 2], [0, 1, 0], "o-")
    assert_no_overlaps(figure)
    spoilt = {"over a mark": lambda: axes.text(1, 1, "top", va="center", ha="center"),
              "over 'one'": lambda: [axes.text(0.2, 0.8, name) for name in ("one", "two")],
              "leaves the canvas": lambda: axes.annotate("far", (0, 0), xytext=(-200, 0), textcoords="offset points",
                                                         annotation_clip=False).set_in_layout(False),
              "outside its panel": lambda: axes.set_xlim(0.5, 1.5)}
    for message, spoil in spoilt.items():
        spoil()
        assert any(message in line for line in overlaps(figure)), (message, overlaps(figure))
        for text in list(axes.texts):
            text.remove()
    plt.close(figure)


def test_same_svg_twice(comparisons, tmp_path):
    for folder in ("a", "b"):
        figures.save_figure(figures.forest_plot(comparisons), tmp_path / folder, "forest", comparisons)
    assert (tmp_path / "a/forest.svg").read_bytes() == (tmp_path / "b/forest.svg").read_bytes()


def test_methods_differ_in_colour_and_marker_everywhere():
    assert list(style.METHOD_COLOURS) == list(style.METHOD_MARKERS) == list(METHOD_LABELS)
    for look in (style.METHOD_COLOURS, style.METHOD_MARKERS):
        assert len(set(look.values())) == len(METHOD_LABELS)
    assert style.METHOD_COLOURS["fine_tuning"] == "#0173b2" and style.METHOD_COLOURS["carma"] == "#de8f05"


def test_points_and_bars_are_those_of_the_table(results):
    table = statistics.summarise(results, "accuracy").query("condition == 'clean' and split == 'test_longer'")
    seeds = statistics.per_seed(results, "accuracy").query("condition == 'clean' and split == 'test_longer'")
    axes = figures.accuracy_by_method(table, seeds).axes[0]
    assert axes.get_title() == f"longer texts\n(untuned: {100 * table['estimate'].iloc[0]:.1f} %)"
    for place, line in enumerate(table[table["method"] != "untuned"].to_dict("records")):
        marker, caps, bars = axes.containers[place].lines
        assert to_hex(marker.get_color()) == style.METHOD_COLOURS[line["method"]]
        assert marker.get_ydata() == pytest.approx([line["estimate"]])
        assert [cap.get_ydata()[0] for cap in caps] == pytest.approx([line["low"], line["high"]])
        dots = axes.collections[2 * place].get_offsets()[:, 1]
        assert sorted(dots) == pytest.approx(sorted(seeds.loc[seeds["method"] == line["method"], "value"]))


def test_boxes_of_text_lengths_are_those_of_the_table_and_in_its_order():
    table = made_lengths().iloc[::-1]
    for axes, (task, rows) in zip(figures.text_lengths(table).axes, table.groupby("task", sort=False)):
        assert axes.get_title().replace("\n", " ") == task_label(task)
        splits = list(dict.fromkeys(rows["split"]))
        assert [label.get_text() for label in axes.get_yticklabels()] == [split.replace("_", " ") for split in splits]
        upright = [line for line in axes.lines if len(line.get_xdata()) == 2 and len(set(line.get_xdata())) == 1]
        medians = [line.get_xdata()[0] for line in upright if np.ptp(line.get_ydata()) == pytest.approx(0.6)]
        assert medians == [rows.loc[rows["split"] == split, "words"].median() for split in splits]
        assert axes.get_ylim()[0] > axes.get_ylim()[1], "the first split is at the top"
    with pytest.raises(ValueError, match="text_lengths: the table has no rows"):
        figures.text_lengths(table.iloc[:0])


def test_an_untuned_model_at_zero_leaves_the_axis_to_the_others(results):
    clean = results[results["condition"] == "clean"]
    clean = clean.assign(correct=clean["correct"] & (clean["method"] != "untuned"))
    table, seeds = statistics.summarise(clean, "accuracy"), statistics.per_seed(clean, "accuracy")
    for axes in figures.accuracy_by_method(table, seeds).axes:
        assert axes.get_title().endswith("(untuned: 0.0 %)") and axes.get_ylim()[0] > 0.2
    alone = table[table["method"] == "untuned"]
    assert all(len(axes.containers) == 1 for axes in figures.accuracy_by_method(alone, seeds).axes)


def test_forest_plot_fills_what_survives_correction_and_leaves_out_what_was_not_tested(comparisons):
    table = comparisons.assign(holm_p=[0.01, 0.2, 0.01, 0.5])
    axes = figures.forest_plot(table).axes
    fills = [to_hex(line.get_markerfacecolor()) for panel in axes for line in panel.lines
             if line.get_marker() == "s"]
    # Non-inferiority is told in words and stays open, since a filled mark means a difference and only that.
    assert fills == [style.METHOD_COLOURS["carma"], "#ffffff", "#ffffff", "#ffffff"]
    names = [label.get_text().replace("\n", " ") for label in axes[0].get_yticklabels()]
    assert names[2] == "non-inferiority of accuracy (≥ −2: shown)" and "shown" not in "".join(names[:2])
    marks = [line for line in axes[0].lines if line.get_marker() == "s"]
    expected = (100 * table["estimate"][[0, 1, 2]]).tolist()
    assert [mark.get_xdata()[0] for mark in marks] == pytest.approx(expected)
    untested = table.assign(estimate=[np.nan, 0.1, 0.1, np.nan])
    assert len(figures.forest_plot(untested).axes) == 1
    with pytest.raises(ValueError, match="no claim of the table could be estimated"):
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
