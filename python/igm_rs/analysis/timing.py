"""Figure 5 (c): what a step of each method costs, taken in turns so that all meet the same machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from igm_rs import _checks

from ._model import check_labels
from .drawing import BLUE, GREY, Picture, bar, bare

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["TrainingTime", "training_time"]

BLOCKS = 10
"""Blocks in which each method is measured, the methods in turn, forwards and backwards."""


@dataclass(frozen=True)
class TrainingTime(Picture):
    """What :func:`training_time` gives.

    Attributes
    ----------
    seconds : dict of str to list of float
        By method, wall time of each measured call in seconds.
    calls : float
        How many calls a whole training has; the picture shows the time of so many.
    """

    seconds: dict[str, list[float]]
    calls: float = 1

    @property
    def size(self) -> tuple[float, float]:  # type: ignore[override]
        """Width and height in inches: the higher, the more methods there are."""
        return 6.0, 1.3 + 0.36 * len(self.seconds)

    def median(self, label: str) -> float:
        """Return the median time of a whole training of one method, in seconds."""
        return self.calls * median(self.seconds[label])

    @property
    def unit(self) -> str:
        """In what the picture shows time: ``s``, or ``ms`` where no method takes a second."""
        return "s" if max(map(self.median, self.seconds)) >= 1 else "ms"

    def ratio(self, label: str) -> float:
        """Return how many times as long as the first method this one takes."""
        return self.median(label) / self.median(next(iter(self.seconds)))

    def numbers(self) -> dict[str, Any]:
        """Return by method the median and the quartiles in seconds of a training, the ratio, and how many calls."""
        return {
            label: {
                "seconds": self.median(label),
                "quartiles": [self.calls * float(each) for each in np.quantile(values, (0.25, 0.75))],
                "ratio": self.ratio(label),
                "measured_calls": len(values),
                "calls": self.calls,
            }
            for label, values in self.seconds.items()
        }

    def _paint(self, ax: Axes) -> None:
        unit = self.unit
        factor = 1.0 if unit == "s" else 1e3
        labels = list(self.seconds)
        for place, label in enumerate(labels):
            low, high = factor * self.calls * np.quantile(self.seconds[label], (0.25, 0.75))
            middle = factor * self.median(label)
            ax.barh([place], [middle], height=0.62, color=BLUE, alpha=0.35 if place else 0.75)
            ax.plot([low, high], [place, place], color="black", linewidth=1.4)
            words = f"{middle:.3g} {unit}" + (f"   ×{self.ratio(label):.2f}" if place else "")
            ax.annotate(words, (max(high, middle), place), xytext=(6, 0), textcoords="offset points", va="center",
                        fontsize=8.5, color=GREY)  # fmt: skip
        ax.set_yticks(range(len(labels)), labels)
        ax.set_ylim(len(labels) - 0.4, -0.6)
        ax.set_xlim(0, 1.4 * max(factor * self.median(label) for label in labels))
        what = "a step" if self.calls == 1 else f"{self.calls:g} calls"
        ax.set_xlabel(f"time of {what} ({unit}): median, line = quartiles")
        bare(ax, "top", "right", "left")
        ax.grid(visible=False, axis="y")
        ax.tick_params(axis="y", length=0)


def training_time(
    steps: Mapping[str, Callable[[], Any]], *, seconds: float = 2.0, calls: float = 1, progress: bool = True
) -> TrainingTime:
    """Return what a training step of each method costs (Fig. 5 c).

    The methods are measured in turn, in ten blocks each and in changing order, so that whatever else the machine does
    meets all of them; each is called once before, unmeasured. On CUDA every call waits for the device.

    Parameters
    ----------
    steps : mapping of str to callable
        By method what takes its next training step; it really trains. The first is the one that others are compared to.
    seconds : float
        About how long each method is measured in all, > 0.
    calls : float
        How many calls make a whole training, for the picture, > 0; 1 shows the time of a step.
    progress : bool
        Whether a progress bar is shown.

    Returns
    -------
    TrainingTime
        The numbers; ``draw()`` and ``save(path)`` make a picture of them.

    Raises
    ------
    ValueError, TypeError
        If there is no method, or `seconds` or `calls` is out of its range.
    """
    check_labels("steps", steps)
    _checks.positive("seconds", seconds)
    _checks.positive("calls", calls)
    for step in steps.values():
        step()
    taken: dict[str, list[float]] = {label: [] for label in steps}
    with bar(BLOCKS * len(steps), "timing", progress) as done:
        for block in range(BLOCKS):
            for label in list(steps) if block % 2 else list(steps)[::-1]:
                begun = now = _now()
                while now - begun < seconds / BLOCKS:
                    steps[label]()
                    before, now = now, _now()
                    taken[label].append(now - before)
                done(1)
    return TrainingTime(taken, calls)


def _now() -> float:
    """Return the time in seconds, once a GPU that is in use has done its work."""
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()
    return time.perf_counter()
