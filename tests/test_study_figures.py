"""The study's figures: what they draw is what the tables say, and what would be drawn twice is refused."""
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from carma_lib.report.style import METHOD_COLOURS
from carma_lib.report.study_plots import accuracy_by_budget, differences, measure_against_accuracy, measure_by_layer


def curves():
    return pd.DataFrame([dict(method=method, seed=seed, split=split, budget=budget, measured=0.1 * place + 0.01 * seed)
                         for method in ("fine_tuning", "carma") for seed in (1, 2) for split in ("test_seen", "test_longer")
                         for place, budget in enumerate((60, 120, 240))])


def test_budgets_show_seeds_thin_and_their_mean_thick():
    figure = accuracy_by_budget(curves())
    assert [axes.get_title() for axes in figure.axes] == ["seen combinations", "longer texts"]
    lines = [line for line in figure.axes[0].lines if line.get_color() == METHOD_COLOURS["carma"]]
    assert sorted(line.get_linewidth() for line in lines)[:2] == [0.6, 0.6]
    mean = max(lines, key=lambda line: line.get_linewidth())
    assert mean.get_ydata() == pytest.approx([0.015, 0.115, 0.215]) and list(mean.get_xdata()) == [60, 120, 240]
    assert not plt.get_fignums(), "handed over closed"
    with pytest.raises(ValueError, match="one value a method, seed, budget and split"):
        accuracy_by_budget(pd.concat([curves(), curves()]))
    with pytest.raises(ValueError, match="no rows"):
        accuracy_by_budget(curves().head(0))


def test_differences_are_drawn_in_points_beside_their_seeds():
    table = pd.DataFrame([dict(method="r_drop", task=task, estimate=0.02, low=-0.01, high=0.05) for task in ("a", "b")])
    seeds = pd.DataFrame(dict(method="r_drop", task=["a", "a"], difference=[0.01, 0.03]))
    figure = differences(table, seeds, rows="method", panel="task")
    first = figure.axes[0]
    bar = next(line for line in first.lines if line.get_color() == METHOD_COLOURS["r_drop"])
    assert list(bar.get_xdata()) == pytest.approx([-1, 5]) and [each.get_text() for each in first.get_yticklabels()] == ["R-Drop"]
    dots = np.concatenate([each.get_offsets()[:, 0] for each in first.collections])
    assert sorted(dots) == pytest.approx([1, 3]) and not figure.axes[1].collections[0].get_offsets().size


def test_measures_by_layer_and_against_accuracy():
    rows = pd.DataFrame([dict(method=method, seed=1, layer=layer, task="a", measured=layer / 10)
                         for method in ("untuned", "carma") for layer in (-1, 0, 1)])
    axes = measure_by_layer(rows, panel="task", label="x").axes[0]
    assert list(axes.get_xticks()) == [-1, 0, 1]
    above = {line.get_label(): (line.get_linestyle(), line.get_zorder()) for line in axes.lines if line.get_marker() not in ("", "None", None)}
    assert above["untuned"] == ("--", 3) and above["CARMA"][0] == "-" and above["CARMA"][1] < 3, "what begins the training is seen on top"
    runs = pd.DataFrame(dict(method=["carma", "fine_tuning"], task="a", drift=[1.0, 2.0], accuracy=[0.5, 0.6]))
    axes = measure_against_accuracy(runs, measure="drift", panel="task", label="drift").axes[0]
    points = {tuple(offset) for each in axes.collections for offset in each.get_offsets().tolist()}
    assert points == {(1.0, 0.5), (2.0, 0.6)}
    with pytest.raises(ValueError, match="no colour for the methods"):
        measure_by_layer(rows.assign(method="mixout"), panel="task", label="x")
