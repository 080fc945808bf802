"""The figures of a run, from the tables of `stats`. Every function returns a matplotlib figure in the one `style`.

Dots are seeds, bars are 95 % intervals as the tables give them (see `stats.intervals`).
"""
from __future__ import annotations

from textwrap import fill, wrap
from typing import Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, PercentFormatter

from carma_lib.report.style import (METHOD_COLOURS, METHOD_MARKERS, PAGE, check_one, make_panels, method_order,
                                    name_lines, panels_of, save_figure, seed_lines, styled)  # noqa: F401
from carma_lib.stats.table import METHOD_LABELS, select, sides, task_label


def _error_bar(axes: Axes, x, rows: pd.DataFrame, method: str, line: str = "none") -> None:
    spread = np.abs(rows[["low", "high"]].to_numpy(float).T - rows["estimate"].to_numpy(float))
    endless = np.isinf(spread[1])
    spread[1, endless] = 0
    for place, value in zip(np.asarray(x)[endless], rows["estimate"].to_numpy(float)[endless]):  # an arrow upwards
        axes.plot([place, place], [value, 2 * value], color=METHOD_COLOURS[method], linewidth=1, marker="^", markersize=4, markevery=[1])
    axes.errorbar(x, rows["estimate"], yerr=spread, linestyle=line, color=METHOD_COLOURS[method],
                  marker=METHOD_MARKERS[method], label=METHOD_LABELS[method], markersize=4.5, capsize=2,
                  elinewidth=1, zorder=3)


def _say_if_empty(axes: Axes, estimates: pd.DataFrame) -> None:
    if not estimates["estimate"].notna().any():
        axes.text(0.5, 0.5, "no estimate", transform=axes.transAxes, ha="center", color="grey")


@styled
def text_lengths(lengths: pd.DataFrame) -> Figure:
    """Words in a text by split, a panel a task: the box is the middle half, its line the median.

    `lengths`: columns task, split and words, a row a text. Whiskers reach 1.5 box lengths; texts beyond are dots.
    """
    most = lengths.groupby("task")["split"].nunique().max()
    figure, panels = panels_of(lengths.assign(task=lengths["task"].map(task_label)), "task", height=0.55 + 0.2 * most, sharey=False)
    for axes, rows in panels:
        splits = list(dict.fromkeys(rows["split"]))
        sns.boxplot(rows, x="words", y="split", order=splits, orient="h", ax=axes, color="#9ecae1", width=0.6,
                    fliersize=1.5, linewidth=0.8)
        axes.set_yticks(range(len(splits)), [split.replace("_", " ") for split in splits])
        axes.grid(axis="x")
        axes.grid(axis="y", visible=False)
        axes.set(xlabel="words in a text", ylabel="")
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    return figure


@styled
def learning_curves(history: pd.DataFrame) -> Figure:
    """Task loss, mutual information, stability, validation accuracy by step: thin lines seeds, thick mean.

    `history`: columns task, method, seed, step and any of task_loss, mutual_information, stability,
    validation_accuracy, NaN if a row does not hold one.
    """
    check_one(history, ["task"], "learning_curves")
    titles = {"task_loss": "task loss", "mutual_information": "mutual-information loss",
              "stability": "stability loss", "validation_accuracy": "validation accuracy"}
    shown = [name for name in titles if name in history.columns and history[name].notna().any()]
    if not shown:
        raise ValueError(f"the training history holds none of {list(titles)}")
    figure, panels = make_panels([titles[name] for name in shown], sharey=False)
    for axes, name in zip(panels, shown):
        seed_lines(axes, history, "step", name)
        axes.set_xlabel("training step")
    if shown[-1] == "validation_accuracy":
        panels[-1].yaxis.set_major_formatter(PercentFormatter(1))
    name_lines(figure)
    return figure


@styled
def by_method(estimates: pd.DataFrame, values: pd.DataFrame | None = None, *, label: str) -> Figure:
    """One estimate a method, one panel a split: marker and bar are estimate and interval, dots the seeds.

    `estimates` from `metrics.summarise` or `coefficient_of_variation`, `values` from `per_seed`, both filtered to one
    task, model, condition and budget (an untuned model's budget of 0 aside). An untuned model, often at 0 %, would take
    most of the axis from the others: its estimate is written into the panel's title instead.
    """
    check_one(estimates, ["task", "model", "condition", "rate", "source", "start_layer", "protocol"], "by_method")
    if estimates.duplicated(["split", "method"]).any():
        raise ValueError("by_method shows one row a split and method; filter budget, start and level")
    methods = method_order(estimates["method"])
    methods = [method for method in methods if method != "untuned"] or methods
    upright = 0.055 * max(len(METHOD_LABELS[method]) for method in methods) if len(methods) > 2 else 0.0
    figure, panels = panels_of(estimates, "split", height=1.9 + upright)
    for axes, here in panels:
        for place, method in enumerate(methods):
            rows = here[here["method"] == method]
            if values is not None:
                dots = select(values, split=here["split"].iloc[0], method=method)["value"]
                axes.scatter(place + np.linspace(-0.24, -0.12, len(dots)), dots, s=9, linewidths=0, alpha=0.6,
                             color=METHOD_COLOURS[method], zorder=2)
            _error_bar(axes, np.full(len(rows), place + 0.06), rows, method)
        _say_if_empty(axes, here)
        if "untuned" not in methods and len(left := here.loc[here["method"] == "untuned", "estimate"].dropna()):
            axes.set_title(f"{axes.get_title()}\n(untuned: {100 * left.iloc[0]:.1f} %)")
        axes.set_xlim(-0.6, len(methods) - 0.4)
        axes.set_xticks(range(len(methods)), [METHOD_LABELS[method] for method in methods],
                        rotation=90 if upright else 0)
        axes.yaxis.set_major_formatter(PercentFormatter(1))
    figure.axes[0].set_ylabel(fill(label, 24))
    return figure


def accuracy_by_method(estimates: pd.DataFrame, values: pd.DataFrame) -> Figure:
    """Accuracy of each method, one panel a split: dots seeds, bars 95 % intervals over seeds and items."""
    return by_method(estimates, values, label="accuracy")


def cv_by_method(estimates: pd.DataFrame) -> Figure:
    """CV across seeds of each method, one panel a split: bars are 95 % modified McKay intervals, an arrow if without an end."""
    known = estimates.dropna(subset="estimate")
    return by_method(known if len(known) else estimates, label="coefficient of variation")


@styled
def consist_syn_by_rate(estimates: pd.DataFrame, values: pd.DataFrame) -> Figure:
    """ConsistSyn against the share of words replaced, one panel a split: dots seeds, bars 95 % intervals.

    An adversary's choice of synonyms, which has one rate, is left out.
    """
    estimates, values = (table[table["source"] != "adversary"] for table in (estimates, values))
    return _by_condition(estimates, values, "rate", "split", "share of words\nasked to be replaced", "ConsistSyn")


@styled
def pooling_by_depth(estimates: pd.DataFrame, values: pd.DataFrame) -> Figure:
    """Accuracy kept under pooling against the share of depth where pooling starts, one panel a protocol.

    `estimates` and `values` of 'accuracy_kept', one split; dots seeds, bars 95 % intervals.
    """
    check_one(estimates, ["split", "level"], "pooling_by_depth")
    return _by_condition(estimates, values, "depth_share", "protocol", "depth where pooling starts", "accuracy kept")


def _by_condition(estimates: pd.DataFrame, values: pd.DataFrame, x: str, panel: str, x_label: str,
                  label: str) -> Figure:
    if estimates.empty:
        raise ValueError(f"the figure of {label} has no row to show; check the filter before this call")
    check_one(estimates, ["task", "model", "source"], f"the figure of {label}")
    if estimates.duplicated([panel, "method", x]).any():
        raise ValueError(f"the figure of {label} shows one row a {panel}, method and {x}; filter the rest")
    methods, grid = method_order(estimates["method"]), np.sort(estimates[x].unique())
    step = min(0.03, 0.2 / len(methods)) * (np.ptp(grid) or 1.0)
    figure, panels = panels_of(estimates, panel)
    for axes, here in panels:
        for place, method in enumerate(methods):
            shift = (place - (len(methods) - 1) / 2) * step
            dots = select(values, **{panel: here[panel].iloc[0], "method": method})
            axes.scatter(dots[x] + shift, dots["value"], s=7, linewidths=0, alpha=0.45,
                         color=METHOD_COLOURS[method], zorder=2)
            rows = here[here["method"] == method].sort_values(x)
            if len(rows):
                _error_bar(axes, rows[x] + shift, rows, method, line="-")
        _say_if_empty(axes, here)
        axes.set(xlabel=x_label, xticks=grid)
        axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.yaxis.set_major_formatter(PercentFormatter(1))
    figure.axes[0].set_ylabel(fill(label, 24))
    name_lines(figure, most=0)
    return figure


@styled
def forest_plot(comparisons: pd.DataFrame) -> Figure:
    """A row a claim of `claims.primary_comparisons`: its name on the left, its estimate and 95 % interval beside it.

    A claim's name is "task: what is asked". Above, a panel a task has the differences of shares in percentage points;
    below, if any, one panel has the CV ratios of all tasks on a logarithmic axis. A filled mark means one thing: the two
    methods differ, p below 0.05 after Holm's correction. A claim of non-inferiority has an open mark, a short black line
    at minus its margin, and its outcome in words under its name.
    """
    known = comparisons.dropna(subset=["estimate"])
    if known.empty:
        raise ValueError("forest_plot: no claim of the table could be estimated; its notes say why")
    parted = known["name"].str.rpartition(": ")
    known = known.assign(heading=parted[0], asked=parted[2])
    is_ratio = known["kind"] == "cv ratio"
    parts = [(heading, rows["asked"], rows) for heading, rows in known[~is_ratio].groupby("heading", sort=False)]
    of_tasks = len(parts)
    if is_ratio.any():
        ratios = known[is_ratio]
        alike = len(ratios) > 1 and ratios["asked"].nunique() == 1
        parts.append((ratios["asked"].iloc[0], ratios["heading"], ratios) if alike else ("", ratios["name"], ratios))
    parts = [(title, [_claim_name(name, claim) for name, claim in zip(names, rows.to_dict("records"))], rows) for title, names, rows in parts]
    lines = max(name.count("\n") + 1 for _, names, _ in parts for name in names)
    height = (0.06 + 0.14 * lines) * len(known) + 0.3 * len(parts) + 0.4 * is_ratio.nunique() + 0.2
    figure, panels = plt.subplots(len(parts), squeeze=False, figsize=(PAGE, height), height_ratios=[len(rows) for *_, rows in parts])
    panels = panels[:, 0]
    method, baseline = sides(known)
    for axes in panels[1:of_tasks]:  # before anything is drawn, so that the one axis has room for all
        axes.sharex(panels[0])
    for axes, (title, names, rows) in zip(panels, parts):
        _forest(axes, rows, names)
        axes.set_title(fill(title, 44), loc="left")
    for axes in panels[:of_tasks]:
        last = axes is panels[of_tasks - 1]
        axes.tick_params(axis="x", labelbottom=last, length=3.5 * last)
        axes.spines["bottom"].set_visible(last)
    if of_tasks:
        panels[of_tasks - 1].set_xlabel(fill(f"{method} minus {baseline}, percentage points", 44))
    if is_ratio.any():
        _ratio_axis(panels[-1])
        panels[-1].set_xlabel(f"CV of {method} ÷ CV of {baseline}\n(below 1: {method} is steadier)")
    return figure


def _claim_name(name: str, claim: dict) -> str:
    """A claim's name in at most two short lines; of non-inferiority its outcome below."""
    lines = wrap(name, 26, max_lines=2, placeholder=" …")
    if claim["kind"] == "non-inferiority":
        lines.append(f"(≥ −{100 * claim['margin']:g}: {'shown' if claim['holm_p'] < 0.05 else 'not shown'})")
    return "\n".join(lines)


def _forest(axes: Axes, rows: pd.DataFrame, names: Sequence[str]) -> None:
    is_ratio = rows["kind"].iloc[0] == "cv ratio"
    scale = 1 if is_ratio else 100
    for place, row in enumerate(rows.to_dict("records")):
        colour, preserved = METHOD_COLOURS.get(row["method"], "black"), row["kind"] == "non-inferiority"
        axes.plot([scale * row["low"], scale * row["high"]], [place, place], color=colour, linewidth=1.6)
        axes.plot(scale * row["estimate"], place, METHOD_MARKERS.get(row["method"], "o"), color=colour, markersize=6,
                  markerfacecolor=colour if row["holm_p"] < 0.05 and not preserved else "white")
        if preserved:
            axes.plot(-scale * row["margin"], place, "|", color="black", markersize=8)
    axes.axvline(1 if is_ratio else 0, color="black", linewidth=0.8, zorder=1)
    axes.set(ylim=(len(rows) - 0.5, -0.5))
    axes.set_yticks(range(len(rows)), names)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x")
    axes.grid(axis="y", visible=False)
    axes.spines["left"].set_visible(False)


def _ratio_axis(axes: Axes) -> None:
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    low, high = axes.get_xlim()
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 100 else (1,)))
    axes.xaxis.set_minor_locator(NullLocator())
    if high / low < 5:
        ticks = MaxNLocator(4).tick_values(low, high)
        ticks[np.abs(ticks - 1).argmin()] = 1  # where the line of no difference is
        axes.set_xticks([tick for tick in ticks if low <= tick <= high])


@styled
def drift_by_layer(drift: pd.DataFrame) -> Figure:
    """Distance of hidden states from the starting model by layer: thin lines seeds, thick line their mean.

    `drift`: columns method, seed, layer, value. No interval is drawn.
    """
    check_one(drift, ["task", "split", "model"], "drift_by_layer")
    figure, (axes,) = make_panels([""])
    seed_lines(axes, drift, "layer", "value")
    axes.set(xlabel="layer", ylabel="distance from the start")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    name_lines(figure)
    return figure
