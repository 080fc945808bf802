"""Figures of single sentences and single trainings, and of what a training step costs, in the one `style`."""
from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from textwrap import fill, shorten

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from carma_lib.report.style import COLUMN, METHOD_COLOURS, name_lines, panels_of, styled

CELL = 0.125  # inches of a token in a map, so that its name in 7 pt fits
ROLES = ("no part", "a negative that was not drawn", "a drawn negative: pushed away", "a positive: pulled together")
THREE = ("#332288", "#cc6677", "#44aa99")  # of Paul Tol's colour-blind palette "muted"; no method has one of them
_ROLE_COLOURS = ("#ffffff", "#dcdcdc", THREE[1], THREE[0])
TEXTS = {"wordnet": "WordNet definitions", "sst": "SST sentences", "many_pieces": "WordNet, small pieces"}
PROTOCOL_LOOKS = dict(zip(("sum", "mean", "max"), zip(THREE, "os^")))


@styled
def token_roles(tokens: Sequence[str], roles) -> Figure:
    """Who meets whom in the mutual-information term: a row an anchor, a column the other token.

    `roles`: (tokens, tokens) of 0 to 3, an index into `ROLES`.
    """
    figure, axes = plt.subplots(figsize=(COLUMN, CELL * len(tokens) + 1.5))
    sns.heatmap(np.asarray(roles), ax=axes, cmap=ListedColormap(_ROLE_COLOURS), vmin=-0.5, vmax=3.5, linewidths=0.5,
                linecolor="#c8c8c8", square=True, cbar=False)
    _name_tokens(axes, tokens)
    axes.set(xlabel="other token", ylabel="anchor")
    figure.legend([Patch(facecolor=colour, edgecolor="#9a9a9a") for colour in _ROLE_COLOURS[1:]], ROLES[1:],
                  loc="outside lower center")
    return figure


@styled
def token_maps(maps: Mapping[str, object], tokens: Sequence[str], words: Sequence[int], *, label: str,
               bound: float = 1.0) -> Figure:
    """Values of all pairs of tokens, a panel a title of `maps`, on one scale from −bound to bound.

    Black squares enclose the words of two or more tokens; `words` holds a number for each token, −1 for none.
    """
    height = (0.11 * len(tokens) + 0.75) * len(maps)
    figure, panels = plt.subplots(len(maps), 1, figsize=(COLUMN, height), squeeze=False)
    edges = [place for place in range(len(words) + 1) if place in (0, len(words)) or words[place] != words[place - 1]]
    for axes, (title, values) in zip(panels.flat, maps.items()):
        sns.heatmap(np.asarray(values), ax=axes, cmap="vlag", vmin=-bound, vmax=bound, square=True,
                    cbar_kws={"label": label, "shrink": 0.8})
        for first, last in pairwise(edges):
            if words[first] >= 0 and last - first > 1:
                axes.add_patch(Rectangle((first, first), last - first, last - first, fill=False, linewidth=1.2))
        _name_tokens(axes, tokens)
        axes.set_title(title)
    return figure


@styled
def token_movement(movement, pull, tokens: Sequence[str]) -> Figure:
    """Above: how far each token moves from a block to the next, (steps, tokens); below: `pull`, (blocks, tokens)."""
    figure, panels = plt.subplots(2, 1, figsize=(COLUMN, 3.4), sharex=True)
    steps = [f"{block} → {block + 1}" for block in range(len(movement))]
    named = {"squared movement ÷ squared size": (movement, steps), "length of the gradient": (pull, range(len(pull)))}
    for axes, (title, (values, names)) in zip(panels, named.items()):
        sns.heatmap(np.asarray(values), ax=axes, cmap="Blues", vmin=0, yticklabels=names)
        axes.set(title=title, ylabel="block")
        axes.tick_params(axis="y", rotation=0, length=0)
    _name_tokens(axes, tokens, rows=False)
    return figure


@styled
def attention_maps(maps: Mapping[str, tuple[object, Sequence[str]]]) -> Figure:
    """Attention weights with the names of their positions, a panel a title: a row reads, a column is read.

    Names go beside the rows with their numbers; the columns have the numbers. Darker is more; above 0.3 all are alike.
    """
    heights = [CELL * len(names) + 0.2 for _, names in maps.values()]
    figure, panels = plt.subplots(len(maps), 1, figsize=(COLUMN, sum(heights) + 0.7 * len(maps) + 0.4), squeeze=False,
                                  height_ratios=heights)
    for axes, (title, (weights, names)) in zip(panels.flat, maps.items()):
        beside = [f"{shorten(name, 21, placeholder='…')}  {place}" for place, name in enumerate(names, 1)]
        sns.heatmap(np.asarray(weights), ax=axes, cmap="Blues", vmin=0, vmax=0.3, linewidths=0.3, linecolor="#eeeeee",
                    cbar=False, yticklabels=beside)
        step = 1 + len(names) // 7
        axes.set_xticks(np.arange(0, len(names), step) + 0.5, range(1, len(names) + 1, step), rotation=0)
        axes.tick_params(length=0, labelsize=7)
        axes.set(title=title, xlabel="position that is read")
    figure.colorbar(panels[0, 0].collections[0], ax=panels, location="bottom", aspect=30, label="attention weight", extend="max")
    return figure


@styled
def losses_by_step(runs: Mapping[str, pd.DataFrame], again: Mapping[str, pd.DataFrame]) -> Figure:
    """The task loss and both terms by training step: a line a run, and rings for runs made a second way.

    `runs` and `again`: name → a table with the columns step, task_loss, mutual_information, stability.
    """
    titles = {"task_loss": "task loss", "mutual_information": "mutual-information loss", "stability": "stability loss"}
    figure, panels = plt.subplots(3, 1, figsize=(COLUMN, 4.3), sharex=True)
    colours = [METHOD_COLOURS["fine_tuning"], METHOD_COLOURS["carma"], "#029e73", "#555555"]
    for axes, column in zip(panels, titles):
        for colour, (name, table) in zip(colours, runs.items()):
            axes.plot(table["step"], table[column], color=colour, linewidth=1.0, label=name)
        for name, table in again.items():
            some = table.iloc[::max(1, len(table) // 12)]
            axes.plot(some["step"], some[column], "o", markerfacecolor="none", markeredgecolor="black", markersize=4.5,
                      markeredgewidth=0.8, label=name)
        axes.set_ylabel(fill(titles[column], 12))
    panels[-1].set_xlabel("training step")
    figure.legend(*panels[-1].get_legend_handles_labels(), loc="outside lower center")
    return figure


@styled
def answer_by_start_layer(curves: pd.DataFrame, *, clean: float) -> Figure:
    """Log-probability of the answer by the block where pooling starts: a panel a level, a line a protocol.

    `curves`: columns level, start_layer, protocol, log_probability; `clean`: the same without pooling.
    """
    figure, panels = panels_of(curves.assign(level=curves["level"] + "s pooled"), "level")
    for axes, of_level in panels:
        axes.axhline(clean, color="#444444", linestyle="--", label="not pooled")
        for protocol, rows in of_level.groupby("protocol", sort=False):
            colour, marker = PROTOCOL_LOOKS[protocol]
            axes.plot(rows["start_layer"], rows["log_probability"], marker=marker, markersize=4.5, color=colour,
                      label=protocol)
        axes.set(xlabel="pooled from this block on", xticks=sorted(curves["start_layer"].unique()))
    figure.axes[0].set_ylabel("log-probability\nof the right answer")
    name_lines(figure)
    return figure


def read_step_costs(folder: str | os.PathLike) -> pd.DataFrame:
    """The measurements of `benchmarks/step.py` in a folder, one row a device, model, text, batch size and method.

    Raises `FileNotFoundError` if the folder holds no `step_*.json`.
    """
    tables = []
    for path in sorted(Path(folder).glob("step_*.json")):
        report = json.loads(path.read_text(encoding="utf-8"))
        where = report["device_name"] if report["device"] == "cuda" else f"CPU, {report['threads']} threads"
        tables.append(pd.DataFrame(report["results"]).assign(device=f"{where}, {report['precision']}"))
    if not tables:
        raise FileNotFoundError(f"no step_*.json in {folder}: python benchmarks/step.py measures them")
    return pd.concat(tables, ignore_index=True)


def read_long_costs(folder: str | os.PathLike) -> pd.DataFrame:
    """`long_cpu.json` of `benchmarks/long.py` in a folder, a row for each number of tokens of a row (the index).

    Columns ratio, ratio_low, ratio_high: a training step with CARMA over a plain one, with its 95 % interval, and rounds;
    memory_ratio: of the peak memories; carma and dense: processor seconds of the two terms alone, and from all pairs of
    tokens at once.
    """
    report = json.loads((Path(folder) / "long_cpu.json").read_text(encoding="utf-8"))
    steps, terms, memory = (pd.DataFrame(report[part]).set_index("length") for part in ("steps", "terms", "memory"))
    steps = steps[steps["method"] == "carma"][["ratio", "ratio_low", "ratio_high", "rounds"]]
    terms = pd.DataFrame({name: terms[f"{name}_processor_seconds"] for name in ("carma", "dense")})
    memory = memory[~memory["gradient_checkpointing"]]["ratio"].rename("memory_ratio")
    return pd.concat([steps, memory, terms], axis=1).sort_index()


@styled
def step_costs(costs: pd.DataFrame) -> Figure:
    """Time that CARMA adds to a step of fine-tuning, in per cent, by rows in a batch; a panel a model and device.

    `costs` from `read_step_costs`; bars are its 95 % intervals over rounds. All panels have one axis.
    """
    shown = costs[costs["method"] == "carma"]
    figure, panels = panels_of(shown.assign(place=shown["model"] + ":\n" + shown["device"]), "place", height=2.0)
    looks = dict(zip(dict.fromkeys(shown["text"]), zip(THREE, "os^")))
    sizes = sorted(shown["batch"].unique())
    for axes, here in panels:
        axes.axhline(0, color="black", linewidth=0.8)
        for shift, (text, rows) in zip((-0.1, 0, 0.1), here.sort_values("batch").groupby("text", sort=False)):
            spread = np.abs(rows[["ratio_low", "ratio_high"]].to_numpy().T - rows["ratio"].to_numpy())
            colour, marker = looks[text]
            axes.errorbar([sizes.index(size) + shift for size in rows["batch"]], 100 * (rows["ratio"] - 1), yerr=100 * spread,
                          color=colour, marker=marker, markersize=4.5, capsize=2, elinewidth=1, label=TEXTS.get(text, text))
        axes.set_xticks(range(len(sizes)), sizes)
        axes.set_xlabel("rows in a batch")
    figure.axes[0].set_ylabel("time added to a step, %")
    name_lines(figure, most=0)
    return figure


def _name_tokens(axes: Axes, tokens: Sequence[str], *, rows: bool = True) -> None:
    places, names = np.arange(len(tokens)) + 0.5, [token.strip() or "␣" for token in tokens]
    axes.set_xticks(places, names, rotation=90)
    if rows:
        axes.set_yticks(places, names, rotation=0)
    axes.tick_params(length=0, labelsize=7)
