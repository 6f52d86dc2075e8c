"""The pictures: accuracy by method with every seed as a dot, and the training curves of joint training against IGM."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

__all__ = ["accuracy_figure", "curves_figure", "write"]

ORANGE, GREEN, BLUE, VERMILION, PURPLE = "#E69F00", "#009E73", "#0072B2", "#D55E00", "#CC79A7"
"""Okabe and Ito's colours, which readers with any colour vision can tell apart."""

GREY = "#555555"

Edge = dict[str, Any]

EDGE: Edge = {"markeredgecolor": "black", "markeredgewidth": 0.6}
"""Outline of a marker that stands for a mean."""

FUSED = {
    "mean": ("mean of probabilities", ORANGE, "s"),
    "sum": ("sum of logits", GREEN, "^"),
    "calibrated": ("calibrated product", BLUE, "o"),
}
"""Fusion: its name, colour and marker."""

MODALITY_COLOURS = (BLUE, VERMILION, GREEN, PURPLE)

STYLES: dict[str, dict[str, Any]] = {
    "joint": {"linestyle": "--", "marker": "o", "markerfacecolor": "white"},
    "igm": {"linestyle": "-", "marker": "o"},
}
"""Methods of the training curves, with their lines: broken with hollow dots, solid with full dots."""

Results = dict[str, Any]


def accuracy_figure(datasets: Sequence[Results]) -> Figure:
    """Draw test accuracy by method, one panel a data set: a small dot for every seed, a large one for their mean."""
    tallest = max(len(data["rows"]) for data in datasets)
    figure = Figure(figsize=(5.2 * len(datasets), 1.6 + 0.46 * tallest), layout="constrained")
    for axes, data in zip(figure.subplots(1, len(datasets), squeeze=False)[0], datasets, strict=True):
        _accuracy_panel(axes, data)
    handles = [_marker(colour, marker, name) for name, colour, marker in FUSED.values()]
    handles += [_marker(GREY, "D", "one modality alone"), _marker(GREY, ".", "each seed (large: their mean)")]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, handletextpad=0.2)
    return figure


def _accuracy_panel(axes: Axes, data: Results) -> None:
    """Draw one data set."""
    rows = data["rows"]
    for place, row in enumerate(rows):
        shown: list[tuple[str, str, str, float]]
        if len(row["modalities"]) == 1:
            shown = [(row["modalities"][0], GREY, "D", 0.0)]
        else:
            styles = zip(FUSED, FUSED.values(), (-0.25, 0.0, 0.25), strict=True)
            shown = [(key, colour, marker, shift) for key, (_, colour, marker), shift in styles]
        for key, colour, marker, shift in shown:
            values = [100 * run["scores"]["accuracy"][key] for run in row["runs"]]
            height = place + shift
            axes.plot(values, [height] * len(values), ".", color=colour, markersize=5, alpha=0.55, markeredgewidth=0)
            axes.plot(float(np.mean(values)), height, marker, color=colour, markersize=6.5, **EDGE)
        if place % 2:
            axes.axhspan(place - 0.5, place + 0.5, color="#F2F2F2", zorder=0, linewidth=0)
    axes.set_yticks(range(len(rows)), [row["label"] for row in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axes.grid(axis="x", color="#CCCCCC", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.set_xlabel("test accuracy (%)")
    axes.set_title(data["title"], fontsize=11)
    axes.spines[["top", "right", "left"]].set_visible(False)


def curves_figure(datasets: Sequence[Results]) -> Figure | None:
    """Draw validation accuracy of each modality's branch over training, joint training against IGM.

    Returns
    -------
    Figure or None
        None if neither method was run.
    """
    drawn = [[row for row in data["rows"] if row["key"] in STYLES] for data in datasets]
    if not any(drawn):
        return None
    figure = Figure(figsize=(5.2 * len(datasets), 3.9), layout="constrained")
    for axes, data, rows in zip(figure.subplots(1, len(datasets), squeeze=False)[0], datasets, drawn, strict=True):
        _curves_panel(axes, data, rows)
    return figure


def _curves_panel(axes: Axes, data: Results, rows: Sequence[Results]) -> None:
    """Draw one data set: the mean over the seeds as a line, their range as a band."""
    handles = []
    for colour, modality in zip(MODALITY_COLOURS, data["modalities"], strict=False):
        for row in rows:
            steps = [point["steps"] for point in row["runs"][0]["curve"]]
            values = 100 * np.asarray([[point["accuracy"][modality] for point in run["curve"]] for run in row["runs"]])
            style = {**STYLES[row["key"]], "color": colour, "linewidth": 1.6, "markersize": 3.5}
            axes.fill_between(steps, values.min(0), values.max(0), color=colour, alpha=0.15, linewidth=0)
            label = f"{modality}, {row['label']}"
            handles += axes.plot(steps, values.mean(0), label=label, **style)
    columns = max(1, len(data["modalities"]))
    axes.legend(handles=handles, fontsize=8.5, frameon=False, ncols=columns, loc="upper left", handlelength=3)
    axes.set_ylim(0, 125)
    axes.set_yticks(range(0, 101, 20))
    axes.spines["left"].set_bounds(0, 100)
    axes.set_xlim(left=0)
    axes.grid(color="#DDDDDD", linewidth=0.6)
    axes.set_xlabel("gradient steps of each modality")
    axes.set_ylabel("validation accuracy of the branch (%)")
    axes.set_title(data["title"], fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)


def _marker(colour: str, marker: str, name: str) -> Line2D:
    """Return an entry of the legend."""
    edge: Edge = {"markeredgewidth": 0.0} if marker == "." else EDGE
    return Line2D([], [], color=colour, marker=marker, linestyle="", label=name, **edge)


def write(folder: Path, datasets: Sequence[Results]) -> list[Path]:
    """Write ``accuracy.png`` and, where joint training or IGM was run, ``curves.png``; return their paths."""
    figures = {"accuracy.png": accuracy_figure(datasets), "curves.png": curves_figure(datasets)}
    paths = []
    for name, figure in figures.items():
        if figure is not None:
            paths.append(folder / name)
            figure.savefig(paths[-1], dpi=160)
    return paths
