"""Figure 3: a measure over τ or ρ, and on a second axis what that value did, so that an inert one is seen."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any

import numpy as np

from igm_rs import _checks

from .drawing import BLACK, GREY, Picture, bar, bare, finite, look

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["INERT", "RHOS", "TAUS", "Sweep", "effects_of", "sweep"]

TAUS = (1e-3, 1e-2, 0.1, 0.4, 1.0, 10.0, 100.0)
"""The paper's range of τ, with its 0.4 in it."""

RHOS = (1e-15, 1e-12, 1e-10, 1e-8, 1e-6, 1e-4, 1e-2, 0.05, 0.1)
"""The paper's range of ρ, 1e-15 to 1e-4, and on to where SAM does something."""

INERT = 0.5
"""Below this effective perturbation the optimizer warns that ρ is lost in rounding."""

LOST = "rho = .* is below the resolution of the weights"
"""Beginning of the optimizer's warning, which a sweep need not repeat: it is there to show this."""

EFFECTS = {
    "rho": ("effective_perturbation", "effective perturbation", "‖realised ε‖ / ρ"),
    "tau": ("cosine", "cosine before/after T", "cosine of the gradient before and after T"),
}
"""For each parameter what is on the second axis: its name in the numbers, in the legend, and at the axis."""

SYMBOLS = {"rho": ("ρ", "length of the perturbation, unit of the weights"), "tau": ("τ", "strength of the projection")}

Scores = Mapping[str, float]


@dataclass(frozen=True)
class Sweep(Picture):
    """What :func:`sweep` gives.

    Attributes
    ----------
    parameter : {"rho", "tau"}
        What was varied.
    values : list of float
        Its values, ascending, > 0.
    scores : dict of str to list of list of float
        By measure, for each value one score a repeat.
    effects : dict of str to list of list
        What each value did, as the optimizer told after the last step of each run: ``effective_perturbation``
        (‖realised ε‖/‖ε*‖, 1 if all of it arrived), ``moved`` (share of the weights that it changed) and ``cosine`` (of
        a layer's gradient before and after T, mean over the layers; 1 if T did nothing); None where a step has none.
    """

    parameter: str
    values: list[float]
    scores: dict[str, list[list[float]]]
    effects: dict[str, list[list[float | None]]]
    size = (6.4, 3.9)

    def numbers(self) -> dict[str, Any]:
        """Return the values with scores and effects, and their means."""
        means = {measure: [fmean(each) for each in per] for measure, per in self.scores.items()}
        return {
            "parameter": self.parameter,
            "values": self.values,
            "scores": self.scores,
            "mean_scores": means,
            "effects": self.effects,
            "mean_effects": {name: [_mean(each) for each in per] for name, per in self.effects.items()},
        }

    def inert(self) -> list[float]:
        """Return the values of ρ of which less than half arrives at the weights: they are not SAM. Of τ, none."""
        if self.parameter != "rho":
            return []
        arrived = (_mean(each) for each in self.effects["effective_perturbation"])
        return [value for value, mean in zip(self.values, arrived, strict=True) if mean is not None and mean < INERT]

    def _paint(self, ax: Axes) -> None:
        from matplotlib.ticker import LogLocator, NullFormatter, NullLocator

        symbol, words = SYMBOLS[self.parameter]
        name, short, label = EFFECTS[self.parameter]
        shown = []
        for place, (measure, per) in enumerate(self.scores.items()):
            colour, marker, line = look(place)
            rows = 100 * np.array(per)
            for value, each in zip(self.values, rows, strict=True):
                ax.plot([value] * len(each), each, marker, color=colour, markersize=3, alpha=0.45, markeredgewidth=0)
            style = {"color": colour, "marker": marker, "linestyle": line, "markersize": 5.5}
            shown += ax.plot(self.values, rows.mean(1), label=f"{measure} (left)", **style)
        ax.set_xscale("log")
        ax.xaxis.set_major_locator(LogLocator(numticks=30))
        ax.xaxis.set_minor_locator(NullLocator())
        decades = math.log10(self.values[-1] / self.values[0])
        if decades > 9:
            ax.xaxis.set_major_locator(LogLocator(base=100, numticks=30))
        ax.xaxis.set_minor_formatter(NullFormatter())
        ax.set_xlabel(f"{symbol} ({words})")
        ax.set_ylabel(f"{', '.join(self.scores)} (%)")
        ax.margins(y=0.12)
        bare(ax, "top")
        other = ax.twinx()
        told = [_mean(each) for each in self.effects[name]]
        points = [(value, each) for value, each in zip(self.values, told, strict=True) if each is not None]
        if points:
            x, y = zip(*points, strict=True)
            shown += other.plot(
                x, y, color=BLACK, linestyle=(0, (4, 2)), linewidth=1.1, marker="x", label=f"{short} (right)"
            )
        low = min([0.0, *(each for _, each in points)])
        other.set_ylim(low - 0.05, max([1.0, *(each for _, each in points)]) * 1.08)
        other.set_ylabel(label, color=GREY)
        other.spines["top"].set_visible(False)
        inert = self.inert()
        if inert:
            place = self.values.index(inert[-1])
            after = self.values[place + 1] if place + 1 < len(self.values) else inert[-1] * 10
            end = math.sqrt(inert[-1] * after)
            ax.axvspan(ax.get_xlim()[0], end, color="#EEEEEE", zorder=0, linewidth=0)
            ax.set_xlim(left=ax.get_xlim()[0])
            ax.annotate(
                f"{symbol} is mostly lost in rounding here",
                (end, 1.0),
                xycoords=ax.get_xaxis_transform(),
                xytext=(-5, -5),
                textcoords="offset points",
                ha="right",
                va="top",
                fontsize=8.5,
                color=GREY,
            )
        ax.legend(handles=shown, frameon=False, fontsize=8.5, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=4)


def sweep(
    parameter: str,
    train: Callable[[float, int], tuple[Scores, Any]],
    values: Sequence[float] | None = None,
    *,
    repeats: int = 1,
    progress: bool = True,
) -> Sweep:
    """Train at each value of ρ or τ, and return the scores beside what each value really did (Fig. 3).

    The optimizer's warning of a ρ that is lost in rounding is not shown: :meth:`Sweep.inert` and the picture say it.

    Parameters
    ----------
    parameter : {"rho", "tau"}
        What is varied.
    train : callable
        ``train(value, repeat)`` trains a new model with this value and returns (scores, optimizer): its measures by
        name, each in [0, 1], and the :class:`igm_rs.IGMOptimizer` that was used, which tells what its last step did.
        `repeat`, from 0, is for the seed.
    values : sequence of float, optional
        > 0; :data:`RHOS` or :data:`TAUS` by default.
    repeats : int
        Trainings at each value.
    progress : bool
        Whether a progress bar is shown.

    Returns
    -------
    Sweep
        The numbers; ``draw()`` and ``save(path)`` make a picture of them.

    Raises
    ------
    ValueError
        Another parameter; no values, or one that is not above 0; trainings that give unlike measures.
    """
    _checks.choice("parameter", parameter, tuple(EFFECTS))
    _checks.positive_integer("repeats", repeats)
    given = {"rho": RHOS, "tau": TAUS}[parameter] if values is None else values
    chosen = sorted({_checks.positive("values", value) for value in given})
    if not chosen:
        raise ValueError("values is empty, expected one number or more")
    found: list[list[tuple[Scores, Mapping[str, float | None]]]] = []
    with warnings.catch_warnings(), bar(len(chosen) * repeats, f"trainings by {parameter}", progress) as done:
        warnings.filterwarnings("ignore", message=LOST)
        for value in chosen:
            found.append([])
            for repeat in range(repeats):
                scores, optimizer = train(value, repeat)
                if found[0] and set(scores) != set(found[0][0][0]):
                    raise ValueError(
                        f"train({value:g}, {repeat}) gave {', '.join(scores)}, expected {', '.join(found[0][0][0])}"
                    )
                found[-1].append((dict(scores), effects_of(optimizer.last_stats)))
                done(1)
    return Sweep(
        parameter,
        chosen,
        {measure: [[scores[measure] for scores, _ in each] for each in found] for measure in found[0][0][0]},
        {name: [[effects[name] for _, effects in each] for each in found] for name in found[0][0][1]},
    )


def effects_of(stats: Mapping[str, Any]) -> dict[str, float | None]:
    """Return what a step did: ``effective_perturbation``, ``moved`` and ``cosine`` as in :class:`Sweep`.

    Parameters
    ----------
    stats : mapping
        ``last_stats`` of an :class:`igm_rs.IGMOptimizer`.
    """
    return {
        "effective_perturbation": stats["effective_perturbation"],
        "moved": stats["moved"],
        "cosine": _mean([layer["cosine"] for layer in stats["projected"].values()]),
    }


def _mean(values: Sequence[float | None]) -> float | None:
    there = finite(values)
    return fmean(there) if there else None
