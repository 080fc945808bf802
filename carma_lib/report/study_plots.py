"""Figures of the controlled study, in the one `style`: budgets, paired differences, mechanism."""
from __future__ import annotations

from textwrap import fill

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter, NullLocator, PercentFormatter

from carma_lib.report.style import METHOD_COLOURS, METHOD_MARKERS, method_order, name_lines, panels_of, seed_lines, styled
from carma_lib.stats.table import METHOD_LABELS, select


@styled
def accuracy_by_budget(curves: pd.DataFrame, *, panel: str = "split") -> Figure:
    """Accuracy against training steps (logarithmic), one panel a value of `panel`: thin seeds, thick mean.

    `curves`: columns method, seed, budget, measured and `panel`, one value a method, seed, budget and panel. Panels
    have one axis of accuracy, but of several tasks (a column task) one each.
    """
    if curves.duplicated(["method", "seed", "budget", panel]).any():
        raise ValueError(f"accuracy_by_budget shows one value a method, seed, budget and {panel}; filter the rest")
    steps = sorted(curves["budget"].unique())
    ticks = steps[::-(-len(steps) // 5)]
    figure, panels = panels_of(curves, panel, sharey="task" not in curves or curves["task"].nunique() == 1)
    for axes, rows in panels:
        seed_lines(axes, rows, "budget", "measured")
        axes.set_xscale("log")
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xticks(ticks, [f"{step:,}" for step in ticks])
        axes.set_xlabel("training steps")
        axes.yaxis.set_major_formatter(PercentFormatter(1))
    figure.axes[0].set_ylabel("accuracy")
    name_lines(figure)
    return figure


@styled
def differences(table: pd.DataFrame, seeds: pd.DataFrame | None = None, *, rows: str, panel: str) -> Figure:
    """Paired differences as horizontal intervals, a line each value of `rows`, a panel each of `panel`.

    `table` from `curves.paired_differences` (shares; drawn in percentage points), coloured by method;
    `seeds`: columns `rows`, `panel`, difference, drawn as dots below each interval.
    """
    method_order(table["method"])  # says which method has no colour
    lines = list(dict.fromkeys(table[rows]))
    figure, panels = panels_of(table, panel, height=0.55 + 0.27 * len(lines), across=3)
    for axes, here in panels:
        for found in here.dropna(subset="estimate").to_dict("records"):
            place, colour = len(lines) - 1 - lines.index(found[rows]), METHOD_COLOURS[found["method"]]
            axes.plot([100 * found["low"], 100 * found["high"]], [place, place], color=colour, linewidth=1.6)
            axes.plot(100 * found["estimate"], place, METHOD_MARKERS[found["method"]], color=colour, markersize=5)
            if seeds is not None:
                dots = select(seeds, **{panel: found[panel], rows: found[rows]})["difference"]
                axes.scatter(100 * dots, np.full(len(dots), place - 0.27), s=6, alpha=0.5, linewidths=0, color=colour)
        axes.axvline(0, color="black", linewidth=0.8)
        axes.grid(axis="x")
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        axes.set(ylim=(-0.6, len(lines) - 0.4))
    figure.axes[0].set_yticks(range(len(lines)), [METHOD_LABELS.get(line, line) for line in reversed(lines)])
    figure.supxlabel("difference from plain fine-tuning, percentage points")
    return figure


@styled
def measure_by_layer(measures: pd.DataFrame, *, panel: str, label: str) -> Figure:
    """A measure of hidden states by layer, one panel a value of `panel`: thin lines seeds, thick their mean.

    `measures`: columns method, seed, layer, measured and `panel`; the method "untuned" is the start.
    """
    layers = sorted(measures["layer"].unique())
    figure, panels = panels_of(measures, panel)
    for axes, rows in panels:
        seed_lines(axes, rows, "layer", "measured")
        axes.set(xlabel="layer", xticks=layers[::-(-len(layers) // 10)])
    figure.axes[0].set_ylabel(fill(label, 24))
    name_lines(figure)
    return figure


@styled
def measure_against_accuracy(runs: pd.DataFrame, *, measure: str, panel: str, label: str) -> Figure:
    """Each run as a point: a measure of its hidden states and its accuracy on new combinations, by method.

    `runs`: columns method, `measure`, accuracy and `panel`.
    """
    figure, panels = panels_of(runs, panel, sharey=False)
    for axes, here in panels:
        for method in method_order(runs["method"]):
            rows = here[here["method"] == method]
            axes.scatter(rows[measure], rows["accuracy"], s=16, linewidths=0, alpha=0.8, color=METHOD_COLOURS[method],
                         marker=METHOD_MARKERS[method], label=METHOD_LABELS[method])
        axes.set_xlabel(fill(label, 30))
        axes.yaxis.set_major_formatter(PercentFormatter(1))
    figure.axes[0].set_ylabel("accuracy,\nnew combinations")
    name_lines(figure)
    return figure
