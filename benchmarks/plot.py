"""The figure of a benchmark's report: time and memory as ratios to plain fine-tuning, by batch size."""

from pathlib import Path

import matplotlib.pyplot as plt

from carma_lib.report.style import METHOD_COLOURS, METHOD_MARKERS
from carma_lib.files import whole_file

LABELS = {
    "carma": "CARMA",
    "mutual_information_only": "mutual information only",
    "stability_only": "stability only",
    "naive": "naive",
    "published": "published",
}
COLOURS = {**METHOD_COLOURS, "naive": "#555555", "published": "#999999"}
MARKERS = {**METHOD_MARKERS, "naive": "x", "published": "+"}


def draw(report: dict, path: Path) -> None:
    """Write `path`.png and `path`.svg; the interval is the 95 % bootstrap one over rounds."""
    panels = list(dict.fromkeys((record["model"], record["text"]) for record in report["results"]))
    with_memory = any("peak_ratio" in record for record in report["results"])
    rows = 2 if with_memory else 1
    figure, axes = plt.subplots(
        rows,
        len(panels),
        figsize=(3.1 * len(panels) + 0.6, 2.6 * rows + 0.6),
        squeeze=False,
        sharey="row",
        layout="constrained",
    )
    for column, panel in enumerate(panels):
        _panel(axes[0, column], report["results"], panel, "ratio")
        axes[0, column].set_title(f"{panel[0]}, {panel[1]}")
        if with_memory:
            _panel(axes[1, column], report["results"], panel, "peak_ratio")
        axes[-1, column].set_xlabel("rows in a batch")
    axes[0, 0].set_ylabel("time / plain fine-tuning")
    if with_memory:
        axes[1, 0].set_ylabel("peak memory / plain")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    for kind in ("png", "svg"):
        with whole_file(path.with_suffix(f".{kind}")) as temporary:
            figure.savefig(temporary, format=kind, dpi=200)
    plt.close(figure)


def _panel(axes, results: list[dict], panel: tuple[str, str], value: str) -> None:
    axes.axhline(1, color="#7f7f7f", linewidth=1)
    for method, label in LABELS.items():
        points = [
            record
            for record in results
            if (record["model"], record["text"]) == panel and record["method"] == method and value in record
        ]
        if not points:
            continue
        spread = None
        if value == "ratio":
            spread = [
                [record["ratio"] - record["ratio_low"] for record in points],
                [record["ratio_high"] - record["ratio"] for record in points],
            ]
        axes.errorbar(
            [record["batch"] for record in points],
            [record[value] for record in points],
            yerr=spread,
            label=label,
            color=COLOURS[method],
            marker=MARKERS[method],
            capsize=2,
        )
    if max(record.get(value, 1) for record in results) > 3:
        axes.set_yscale("log")
    axes.set_xscale("log", base=2)
    axes.set_xticks(
        sorted({record["batch"] for record in results}),
        labels=sorted({record["batch"] for record in results}),
    )
