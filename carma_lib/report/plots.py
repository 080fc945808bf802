"""The figures, from the tables of `statistics` and `inference`. One look: a method has one colour and marker.

Every function returns a matplotlib figure; `save_figure` writes it as PNG and SVG with its data as CSV.
Dots are seeds, bars are 95 % intervals as the tables give them (see `statistics.crossed_interval`).
Widths are those of a paper: `COLUMN` 3.3 in, `PAGE` 6.8 in.
"""
from __future__ import annotations

import functools
import io
import os
from pathlib import Path
from typing import Callable

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from carma_lib.files import whole_file
from carma_lib.stats.table import METHOD_LABELS

COLUMN, PAGE, FOREST = 3.3, 6.8, 4.4
_PALETTE = sns.color_palette("colorblind").as_hex()
METHOD_COLOURS = dict(zip(METHOD_LABELS, (
    "#7f7f7f", _PALETTE[0], _PALETTE[1], _PALETTE[2], _PALETTE[4], _PALETTE[3], _PALETTE[9], _PALETTE[5],
    _PALETTE[6], _PALETTE[8])))
METHOD_MARKERS = dict(zip(METHOD_LABELS, ("X", "o", "s", "^", "v", "D", "P", "<", ">", "*")))
_STYLE = {
    "font.size": 8, "axes.titlesize": 8, "axes.labelsize": 8, "xtick.labelsize": 7, "ytick.labelsize": 7,
    "legend.fontsize": 7, "legend.frameon": False, "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "axes.grid.axis": "y", "grid.color": "#e3e3e3", "grid.linewidth": 0.6,
    "axes.axisbelow": True, "lines.linewidth": 1.3, "figure.constrained_layout.use": True,
    "figure.dpi": 110, "svg.fonttype": "none", "svg.hashsalt": "carma",
}


def method_order(methods: pd.Series) -> list[str]:
    """The methods present, in the order of `METHOD_LABELS`; ValueError for one without a colour."""
    present = set(methods.astype(str))
    if unknown := sorted(present - set(METHOD_LABELS)):
        raise ValueError(f"no colour for the methods {unknown}; add them to results.METHOD_LABELS")
    return [method for method in METHOD_LABELS if method in present]


def check_one(table: pd.DataFrame, columns: list[str], figure: str) -> None:
    """ValueError where a table is empty, or holds several values in a column of which a figure shows one."""
    for name in columns:
        if name in table.columns and table[name].nunique(dropna=False) > 1:
            raise ValueError(f"{figure} shows one {name}, not {list(table[name].unique())}; filter the table")
    if table.empty:
        raise ValueError(f"{figure}: the table has no rows; check the filter before this call")


def styled(draw: Callable[..., Figure]) -> Callable[..., Figure]:
    """Draw in the one style, and hand the figure over closed, so that a notebook shows it once."""
    @functools.wraps(draw)
    def in_style(*arguments, **options) -> Figure:
        open_before = plt.get_fignums()
        try:
            with plt.rc_context(_STYLE):
                return draw(*arguments, **options)
        finally:
            for number in set(plt.get_fignums()) - set(open_before):
                plt.close(number)
    return in_style


def make_panels(width: float, height: float, columns: int = 1, sharey: bool = False) -> tuple[Figure, np.ndarray]:
    """A figure of `width` × `height` inches, and its axes side by side."""
    figure, axes = plt.subplots(1, columns, figsize=(width, height), squeeze=False, sharey=sharey)
    return figure, axes[0]


def _error_bar(axes: Axes, x, rows: pd.DataFrame, method: str, line: str = "none") -> None:
    spread = np.abs(rows[["low", "high"]].to_numpy(float).T - rows["estimate"].to_numpy(float))
    axes.errorbar(x, rows["estimate"], yerr=spread, linestyle=line, color=METHOD_COLOURS[method],
                  marker=METHOD_MARKERS[method], label=METHOD_LABELS[method], markersize=4.5, capsize=2,
                  elinewidth=1, zorder=3)


def _say_if_empty(axes: Axes, estimates: pd.DataFrame) -> None:
    if not estimates["estimate"].notna().any():
        axes.text(0.5, 0.5, "no estimate", transform=axes.transAxes, ha="center", color="grey")


def save_figure(figure: Figure, folder: str | os.PathLike, name: str, data: pd.DataFrame) -> Path:
    """Write name.png (200 dpi), name.svg and name.csv, the data behind it, into `folder`; the PNG's path."""
    folder = Path(folder)
    for kind, options in (("svg", {"metadata": {"Date": None}}), ("png", {"dpi": 200})):
        buffer = io.BytesIO()
        with plt.rc_context(_STYLE):
            figure.savefig(buffer, format=kind, **options)
        with whole_file(folder / f"{name}.{kind}") as temporary:
            temporary.write_bytes(buffer.getvalue())
    with whole_file(folder / f"{name}.csv") as temporary:
        data.to_csv(temporary, index=False)
    return folder / f"{name}.png"


@styled
def learning_curves(history: pd.DataFrame) -> Figure:
    """Task loss, mutual information, stability, validation accuracy by step: thin lines seeds, thick mean.

    `history`: columns task, method, seed, step and any of task_loss, mutual_information, stability,
    validation_accuracy, NaN where a row does not hold one.
    """
    check_one(history, ["task"], "learning_curves")
    titles = {"task_loss": "task loss", "mutual_information": "mutual-information loss",
              "stability": "stability loss", "validation_accuracy": "validation accuracy"}
    shown = [name for name in titles if name in history.columns and history[name].notna().any()]
    if not shown:
        raise ValueError(f"the training history holds none of {list(titles)}")
    figure, panels = make_panels(PAGE, 2.1, len(shown))
    for axes, name in zip(panels, shown):
        for method in method_order(history["method"]):
            rows = history[(history["method"] == method) & history[name].notna()]
            for _, line in rows.groupby("seed"):
                axes.plot(line["step"], line[name], color=METHOD_COLOURS[method], alpha=0.3, linewidth=0.6)
            mean = rows.groupby("step")[name].mean()
            axes.plot(mean.index, mean, color=METHOD_COLOURS[method], marker=METHOD_MARKERS[method],
                      markersize=3.5, markevery=max(len(mean) // 6, 1), label=METHOD_LABELS[method])
        axes.set(title=titles[name], xlabel="training step")
    if shown[-1] == "validation_accuracy":
        panels[-1].yaxis.set_major_formatter(PercentFormatter(1))
    legend_below(figure, panels)
    return figure


def legend_below(figure: Figure, panels: np.ndarray) -> None:
    """One legend below all panels, each label once."""
    entries: dict[str, object] = {}
    for axes in panels:
        for handle, label in zip(*axes.get_legend_handles_labels()):
            entries.setdefault(label, handle)
    figure.legend(entries.values(), entries.keys(), loc="outside lower center", fontsize=7, frameon=False,
                  ncols=min(len(entries), 3 if figure.get_figwidth() < 5 else 5))


@styled
def by_method(estimates: pd.DataFrame, values: pd.DataFrame | None = None, *, label: str) -> Figure:
    """One estimate a method, one panel a split: marker and bar are estimate and interval, dots the seeds.

    `estimates` from `statistics.summarise` or `coefficient_of_variation`, `values` from `per_seed`, both
    filtered to one task, model, condition and budget (an untuned model's budget of 0 aside).
    """
    check_one(estimates, ["task", "model", "condition", "rate", "source", "start_layer", "protocol"], "by_method")
    if estimates.duplicated(["split", "method"]).any():
        raise ValueError("by_method shows one row a split and method; filter budget, start and level")
    splits, methods = list(dict.fromkeys(estimates["split"])), method_order(estimates["method"])
    figure, panels = make_panels(COLUMN if len(splits) == 1 else PAGE, 2.3, len(splits), sharey=True)
    for axes, split in zip(panels, splits):
        for place, method in enumerate(methods):
            if values is not None:
                dots = values.loc[(values["split"] == split) & (values["method"] == method), "value"]
                axes.scatter(place + np.linspace(-0.24, -0.1, len(dots)), dots, s=9, linewidths=0, alpha=0.6,
                             color=METHOD_COLOURS[method], zorder=2)
            rows = estimates[(estimates["split"] == split) & (estimates["method"] == method)]
            _error_bar(axes, np.full(len(rows), place + 0.06), rows, method)
        _say_if_empty(axes, estimates[estimates["split"] == split])
        axes.set(title=split.replace("_", " "), xlim=(-0.6, len(methods) - 0.4))
        axes.set_xticks(range(len(methods)), [METHOD_LABELS[method] for method in methods],
                        **({"rotation": 30, "ha": "right"} if len(methods) > 3 else {}))
        axes.yaxis.set_major_formatter(PercentFormatter(1))
    panels[0].set_ylabel(label)
    return figure


def accuracy_by_method(estimates: pd.DataFrame, values: pd.DataFrame) -> Figure:
    """Accuracy of each method, one panel a split: dots seeds, bars 95 % intervals over seeds and items."""
    return by_method(estimates, values, label="accuracy")


def cv_by_method(estimates: pd.DataFrame) -> Figure:
    """CV across seeds of each method, one panel a split: bars are 95 % modified McKay intervals."""
    known = estimates.dropna(subset="estimate")
    return by_method(known if len(known) else estimates, label="coefficient of variation")


@styled
def consist_syn_by_rate(estimates: pd.DataFrame, values: pd.DataFrame) -> Figure:
    """ConsistSyn against the share of words replaced, one panel a split: dots seeds, bars 95 % intervals."""
    return _by_condition(estimates, values, "rate", "split", "share of words asked to be replaced", "ConsistSyn")


@styled
def pooling_by_depth(estimates: pd.DataFrame, values: pd.DataFrame, *,
                     label: str = "accuracy kept") -> Figure:
    """A pooling metric against the share of depth where pooling starts, one panel a protocol.

    `estimates` and `values` of 'accuracy_kept' or 'pooling_drop', one split; dots seeds, bars 95 % intervals.
    """
    check_one(estimates, ["split", "level"], "pooling_by_depth")
    return _by_condition(estimates, values, "depth_share", "protocol", "depth where pooling starts", label)


def _by_condition(estimates: pd.DataFrame, values: pd.DataFrame, x: str, panel: str, x_label: str,
                  label: str) -> Figure:
    check_one(estimates, ["task", "model", "source"], f"the figure of {label}")
    if estimates.duplicated([panel, "method", x]).any():
        raise ValueError(f"the figure of {label} shows one row a {panel}, method and {x}; filter the rest")
    names, methods = list(dict.fromkeys(estimates[panel])), method_order(estimates["method"])
    figure, panels = make_panels(COLUMN if len(names) == 1 else PAGE, 2.5, len(names), sharey=True)
    grid = np.sort(estimates[x].unique())
    step = 0.03 * (np.ptp(grid) or 1.0)
    for axes, name in zip(panels, names):
        for place, method in enumerate(methods):
            shift = (place - (len(methods) - 1) / 2) * step
            dots = values[(values[panel] == name) & (values["method"] == method)]
            axes.scatter(dots[x] + shift, dots["value"], s=7, linewidths=0, alpha=0.45,
                         color=METHOD_COLOURS[method], zorder=2)
            rows = estimates[(estimates[panel] == name) & (estimates["method"] == method)].sort_values(x)
            if len(rows):
                _error_bar(axes, rows[x] + shift, rows, method, line="-")
        _say_if_empty(axes, estimates[estimates[panel] == name])
        axes.set(title=name.replace("_", " "), xlabel=x_label, xticks=grid)
        axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.yaxis.set_major_formatter(PercentFormatter(1))
    panels[0].set_ylabel(label)
    legend_below(figure, panels)
    return figure


@styled
def forest_plot(comparisons: pd.DataFrame) -> Figure:
    """A row a claim of `comparisons.primary_comparisons`: estimate and 95 % interval.

    Upper panel: differences of shares, in percentage points; a dotted mark at minus the non-inferiority
    margin. Lower panel, if any: CV ratios on a logarithmic axis. Filled: p below 0.05 after Holm's
    correction. A claim's name stands above its interval, so that the figure is legible on a phone too.
    """
    check_one(comparisons, [], "forest_plot")
    known = comparisons.dropna(subset=["estimate"])
    ratio = known["kind"] == "cv ratio"
    parts = [(rows, is_ratio) for is_ratio, rows in known.groupby(ratio)]
    if not parts:
        raise ValueError("forest_plot: no claim of the table could be tested; its notes say why")
    figure, panels = plt.subplots(len(parts), 1, figsize=(FOREST, 0.7 * len(parts) + 0.38 * len(known)),
                                  squeeze=False, height_ratios=[len(rows) + 0.5 for rows, _ in parts])
    for axes, (rows, is_ratio) in zip(panels[:, 0], parts):
        _forest(axes, rows.iloc[::-1], 1.0 if is_ratio else 100.0)
        axes.axvline(1.0 if is_ratio else 0.0, color="black", linewidth=0.8)
        axes.grid(axis="x")
        axes.set_xlabel("ratio of coefficients of variation" if is_ratio else "difference, percentage points")
        if is_ratio:
            axes.set_xscale("log")
            axes.xaxis.set_major_formatter("{x:g}")
            axes.xaxis.set_minor_formatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in "25" else "")
    return figure


def _forest(axes: Axes, rows: pd.DataFrame, scale: float) -> None:
    for place, row in enumerate(rows.to_dict("records")):
        colour = METHOD_COLOURS[row["method"]]
        axes.plot([scale * row["low"], scale * row["high"]], [place, place], color=colour, linewidth=1.6)
        axes.plot(scale * row["estimate"], place, METHOD_MARKERS[row["method"]], color=colour, markersize=6,
                  markerfacecolor=colour if row["holm_p"] < 0.05 else "white")
        if row["margin"] > 0:
            axes.plot([-scale * row["margin"]] * 2, [place - 0.25, place + 0.25], ":", color="black")
        axes.annotate(row["name"], xy=(0, place), xycoords=("axes fraction", "data"), xytext=(2, 5),
                      textcoords="offset points", fontsize=7.5,
                      bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6})
    axes.set(ylim=(-0.5, len(rows) - 0.2), yticks=[])
    axes.spines["left"].set_visible(False)


@styled
def drift_by_layer(drift: pd.DataFrame, *, label: str = "distance from the start") -> Figure:
    """Distance of hidden states from the starting model by layer: thin lines seeds, thick line their mean.

    `drift`: columns method, seed, layer, value. No interval is drawn.
    """
    check_one(drift, ["task", "split", "model"], "drift_by_layer")
    figure, (axes,) = make_panels(COLUMN, 2.4)
    for method in method_order(drift["method"]):
        rows = drift[drift["method"] == method]
        for _, line in rows.groupby("seed"):
            axes.plot(line["layer"], line["value"], color=METHOD_COLOURS[method], alpha=0.3, linewidth=0.6)
        mean = rows.groupby("layer")["value"].mean()
        axes.plot(mean.index, mean, color=METHOD_COLOURS[method], marker=METHOD_MARKERS[method], markersize=4,
                  label=METHOD_LABELS[method])
    axes.set(xlabel="layer", ylabel=label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    legend_below(figure, np.array([axes]))
    return figure
