"""Figures of the controlled study, in the one look of `figures`: budgets, paired differences, mechanism."""
from __future__ import annotations

import numpy as np
import pandas as pd
import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, PercentFormatter

from carma_lib.report.plots import (COLUMN, METHOD_COLOURS, METHOD_MARKERS, PAGE, check_one, legend_below, make_panels,
                               method_order, styled)
from carma_lib.stats.table import METHOD_LABELS


@styled
def accuracy_by_budget(curves: pd.DataFrame, *, panel: str = "split") -> Figure:
    """Accuracy against training steps (logarithmic), one panel a value of `panel`: thin seeds, thick mean.

    `curves`: columns method, seed, budget, measured and `panel`, one value a method, seed, budget and panel.
    """
    check_one(curves, [], "accuracy_by_budget")
    if curves.duplicated(["method", "seed", "budget", panel]).any():
        raise ValueError(f"accuracy_by_budget shows one value a method, seed, budget and {panel}; filter the rest")
    names = list(dict.fromkeys(curves[panel]))
    figure, panels = make_panels(COLUMN if len(names) == 1 else PAGE, 2.5, len(names), sharey=True)
    for axes, name in zip(panels, names):
        for method in method_order(curves["method"]):
            rows = curves[(curves[panel] == name) & (curves["method"] == method)].sort_values("budget")
            for _, line in rows.groupby("seed"):
                axes.plot(line["budget"], line["measured"], color=METHOD_COLOURS[method], alpha=0.3, linewidth=0.6)
            mean = rows.groupby("budget")["measured"].mean()
            axes.plot(mean.index, mean, color=METHOD_COLOURS[method], marker=METHOD_MARKERS[method], markersize=4,
                      label=METHOD_LABELS[method])
        axes.set_xscale("log")
        axes.set_xticks(sorted(curves["budget"].unique()), [f"{step:,}" for step in sorted(curves["budget"].unique())])
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set(title=str(name).replace("_", " "), xlabel="training steps")
        axes.yaxis.set_major_formatter(PercentFormatter(1))
    panels[0].set_ylabel("accuracy")
    legend_below(figure, panels)
    return figure


@styled
def differences(table: pd.DataFrame, seeds: pd.DataFrame | None = None, *, rows: str, panel: str,
                label: str = "difference to fine-tuning, percentage points") -> Figure:
    """Paired differences as horizontal intervals, a line each value of `rows`, a panel each of `panel`.

    `table` from `study_tables.paired_differences` (shares; drawn in percentage points), coloured by method;
    `seeds`: columns `rows`, `panel`, difference, drawn as dots below each interval.
    """
    check_one(table, [], "differences")
    names, lines = list(dict.fromkeys(table[panel])), list(dict.fromkeys(table[rows]))
    figure, axes_of = plt.subplots(1, len(names), figsize=(PAGE, 0.9 + 0.27 * len(lines)), squeeze=False, sharey=True)
    for axes, name in zip(axes_of[0], names):
        for found in table[table[panel] == name].dropna(subset="estimate").to_dict("records"):
            place, colour = len(lines) - 1 - lines.index(found[rows]), METHOD_COLOURS[found["method"]]
            axes.plot([100 * found["low"], 100 * found["high"]], [place, place], color=colour, linewidth=1.6)
            axes.plot(100 * found["estimate"], place, METHOD_MARKERS[found["method"]], color=colour, markersize=5)
            if seeds is not None:
                dots = seeds.loc[(seeds[panel] == name) & (seeds[rows] == found[rows]), "difference"]
                axes.scatter(100 * dots, np.full(len(dots), place - 0.27), s=6, alpha=0.5, linewidths=0, color=colour)
        axes.axvline(0, color="black", linewidth=0.8)
        axes.grid(axis="x")
        axes.set(title=str(name).replace("_", " "), ylim=(-0.6, len(lines) - 0.4))
    axes_of[0][0].set_yticks(range(len(lines)), [METHOD_LABELS.get(line, line) for line in reversed(lines)])
    figure.supxlabel(label, fontsize=8)
    return figure


@styled
def measure_by_layer(measures: pd.DataFrame, *, panel: str, label: str) -> Figure:
    """A measure of hidden states by layer, one panel a value of `panel`: thin lines seeds, thick their mean.

    `measures`: columns method, seed, layer, measured and `panel`; the method "untuned" is the start.
    """
    check_one(measures, [], "measure_by_layer")
    names = list(dict.fromkeys(measures[panel]))
    figure, panels = make_panels(COLUMN if len(names) == 1 else PAGE, 2.3, len(names), sharey=True)
    for axes, name in zip(panels, names):
        for method in method_order(measures["method"]):
            rows = measures[(measures[panel] == name) & (measures["method"] == method)]
            for _, line in rows.groupby("seed"):
                axes.plot(line["layer"], line["measured"], color=METHOD_COLOURS[method], alpha=0.25, linewidth=0.6)
            mean = rows.groupby("layer")["measured"].mean()
            axes.plot(mean.index, mean, color=METHOD_COLOURS[method], marker=METHOD_MARKERS[method], markersize=4,
                      label=METHOD_LABELS[method])
        axes.set(title=str(name).replace("_", " "), xlabel="layer", xticks=sorted(measures["layer"].unique()))
    panels[0].set_ylabel(label)
    legend_below(figure, panels)
    return figure


@styled
def measure_against_accuracy(runs: pd.DataFrame, *, measure: str, panel: str, label: str) -> Figure:
    """Each run as a point: a measure of its hidden states and its accuracy on new combinations, by method.

    `runs`: columns method, `measure`, accuracy and `panel`.
    """
    check_one(runs, [], "measure_against_accuracy")
    names = list(dict.fromkeys(runs[panel]))
    figure, panels = make_panels(COLUMN if len(names) == 1 else PAGE, 2.6, len(names))
    for axes, name in zip(panels, names):
        for method in method_order(runs["method"]):
            rows = runs[(runs[panel] == name) & (runs["method"] == method)]
            axes.scatter(rows[measure], rows["accuracy"], s=16, linewidths=0, alpha=0.8, color=METHOD_COLOURS[method],
                         marker=METHOD_MARKERS[method], label=METHOD_LABELS[method])
        axes.set(title=str(name).replace("_", " "), xlabel=label)
        axes.yaxis.set_major_formatter(PercentFormatter(1))
    panels[0].set_ylabel("accuracy, new combinations")
    legend_below(figure, panels)
    return figure
