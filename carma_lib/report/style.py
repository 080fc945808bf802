"""The one look of all figures: a method has one colour and marker, sizes, panels, direct labels, and files on disk.

Widths are chosen so that 9 pt text is legible in print and on a phone: `COLUMN` 3.3 in for one panel, `PAGE` 4.8 in for
several, at most two beside each other.
"""
from __future__ import annotations

import functools
import os
from itertools import cycle
from pathlib import Path
from textwrap import fill
from typing import Callable, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from carma_lib.files import whole_file
from carma_lib.stats.table import METHOD_LABELS, SPLIT_LABELS

COLUMN, PAGE = 3.3, 4.8
#: The colour-blind palette, its lightest colours darkened so that they are legible as text on white.
_COLOURS = ("#6f6f6f", "#0173b2", "#de8f05", "#029e73", "#cc78bc", "#d55e00", "#2f8fc4", "#ca9161", "#a8479a",
            "#8a7f00", "#444444", "#7a3b00")
#: Methods beyond the known ones, as one adds to `METHOD_LABELS`, take the next look.
METHOD_COLOURS = dict(zip(METHOD_LABELS, cycle(_COLOURS)))
METHOD_MARKERS = dict(zip(METHOD_LABELS, cycle(("X", "o", "s", "^", "v", "D", "P", "<", ">", "*", "p", "h"))))
_STYLE = {
    "font.size": 9, "figure.labelsize": 9, "axes.titlesize": 9, "axes.labelsize": 9, "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5, "legend.fontsize": 8.5, "legend.frameon": False, "legend.columnspacing": 1.2,
    "legend.handlelength": 1.5, "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "axes.grid.axis": "y", "grid.color": "#e3e3e3", "grid.linewidth": 0.6,
    "axes.axisbelow": True, "lines.linewidth": 1.3, "figure.constrained_layout.use": True,
    "figure.dpi": 110, "svg.fonttype": "none", "svg.hashsalt": "carma",
}


def method_order(methods: pd.Series) -> list[str]:
    """The methods present, in the order of `METHOD_LABELS`; ValueError for one that is not in it."""
    present = set(methods.astype(str))
    if unknown := sorted(present - set(METHOD_LABELS)):
        raise ValueError(f"no colour for the methods {unknown}; add them to stats.table.METHOD_LABELS")
    return [method for method in METHOD_LABELS if method in present]


def check_one(table: pd.DataFrame, columns: Sequence[str], figure: str) -> None:
    """ValueError if a table holds several values in a column of which a figure shows one."""
    for name in columns:
        if name in table and table[name].nunique(dropna=False) > 1:
            raise ValueError(f"{figure} shows one {name}, not {list(table[name].unique())}; filter the table")


def styled(draw: Callable[..., Figure]) -> Callable[..., Figure]:
    """Draw in the one style, and hand the figure over closed, so that a notebook shows it once.

    ValueError if the first argument is a table without rows.
    """
    @functools.wraps(draw)
    def in_style(data, *arguments, **options) -> Figure:
        if isinstance(data, pd.DataFrame) and data.empty:
            raise ValueError(f"{draw.__name__}: the table has no rows; check the filter before this call")
        open_before = plt.get_fignums()
        try:
            with plt.rc_context(_STYLE):
                return draw(data, *arguments, **options)
        finally:
            for number in set(plt.get_fignums()) - set(open_before):
                plt.close(number)
    return in_style


def make_panels(names: Sequence[str], *, height: float = 1.9, across: int = 2, sharey: bool = True) -> tuple[Figure, list[Axes]]:
    """A figure of titled panels, a name each, at most `across` beside each other; a panel is `height` inches high."""
    across, down = min(across, len(names)), -(-len(names) // across)
    figure, axes = plt.subplots(down, across, figsize=(COLUMN if len(names) == 1 else PAGE, 0.35 + height * down),
                                squeeze=False, sharey=sharey)
    panels = list(axes.flat)
    for axes, name in zip(panels, names):
        lines = SPLIT_LABELS.get(name, str(name)).replace("_", " ").split("\n")
        axes.set_title("\n".join(fill(line, 25 if across < 3 else 16) for line in lines))
    for axes in panels[len(names):]:
        axes.remove()
    return figure, panels[:len(names)]


def panels_of(table: pd.DataFrame, column: str, **options) -> tuple[Figure, list[tuple[Axes, pd.DataFrame]]]:
    """`make_panels` for the values of a column in the table's order: each panel with its rows."""
    parts = dict(list(table.groupby(column, sort=False, observed=True)))
    figure, panels = make_panels(list(parts), **options)
    return figure, list(zip(panels, parts.values()))


def seed_lines(axes: Axes, rows: pd.DataFrame, x: str, y: str) -> None:
    """By method: a thin line a seed, and their mean as a thick line with markers; dashed for the untuned model."""
    rows = rows.dropna(subset=[y])
    for method in method_order(rows["method"]):
        of_method = rows[rows["method"] == method]
        look = {"color": METHOD_COLOURS[method], "ax": axes, "legend": False, "data": of_method, "x": x, "y": y}
        if method == "untuned":  # above the lines that lie on it
            look |= {"zorder": 3, "linestyle": "--"}
        sns.lineplot(**look, units="seed", estimator=None, linewidth=0.6, alpha=0.3)
        sns.lineplot(**look, errorbar=None, marker=METHOD_MARKERS[method], markersize=4.5, markeredgewidth=0,
                     markevery=max(of_method[x].nunique() // 6, 1), label=METHOD_LABELS[method])
    axes.set(xlabel="", ylabel="")


def name_lines(figure: Figure, *, most: int = 4) -> None:
    """Names of methods: beside the ends of the last panel's lines if they are few, else one legend below all panels."""
    entries: dict[str, object] = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels()):
            entries.setdefault(label, handle)
    last = figure.axes[-1]
    lines = {line.get_label(): line for line in last.lines if line.get_label() in entries}
    if len(lines) < len(entries) or len(entries) > most:
        columns = 2 if figure.get_figwidth() < PAGE else 3
        figure.set_figheight(figure.get_figheight() + 0.19 * -(-len(entries) // columns))
        figure.legend(entries.values(), entries.keys(), loc="outside lower center", frameon=False, ncols=columns)
        return
    figure.draw_without_rendering()
    ends = {label: last.transData.transform((0, line.get_ydata()[-1]))[1] for label, line in lines.items()}
    points, bottom = 72 / figure.dpi, last.get_window_extent().y0
    heights = _spread({label: (end - bottom) * points for label, end in ends.items()}, 11.5)
    for label, height in heights.items():
        last.annotate(label, xy=(1, 0), xycoords="axes fraction", xytext=(4, height), textcoords="offset points",
                      color=lines[label].get_color(), va="center", fontsize=8.5)


def _spread(places: dict[str, float], gap: float) -> dict[str, float]:
    """The places moved apart so that none is nearer than `gap` to the next, their order and mean kept."""
    names = sorted(places, key=places.get)
    moved: list[float] = []
    for name in names:
        moved.append(max(places[name], moved[-1] + gap if moved else 0.0))
    shift = np.mean([places[name] for name in names]) - np.mean(moved)
    return {name: place + max(shift, -moved[0]) for name, place in zip(names, moved)}


def save_figure(figure: Figure, folder: str | os.PathLike, name: str, data: pd.DataFrame) -> Path:
    """Write name.png (200 dpi), name.svg and name.csv, the data behind it, into `folder`; the PNG's path."""
    folder = Path(folder)
    for kind, options in (("svg", {"metadata": {"Date": None}}), ("png", {"dpi": 200})):
        with whole_file(folder / f"{name}.{kind}") as temporary, plt.rc_context(_STYLE):
            figure.savefig(temporary, format=kind, **options)
    with whole_file(folder / f"{name}.csv") as temporary:
        data.to_csv(temporary, index=False)
    return folder / f"{name}.png"
