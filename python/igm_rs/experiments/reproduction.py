"""The check that a fresh table says what a stored one does: what must agree, how closely, and why."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from .configuration import LATER, Config
from .statistics import Summary
from .tables import devices, figures

__all__ = ["EXACT", "Comparison", "compare", "same_arithmetic"]

EXACT = 2e-6
"""Largest difference of two figures where the arithmetic is the same: they are stored to six decimals."""

FLOOR = 0.03
"""Largest difference of two means where the arithmetic is not the same, in accuracy, MAP and macro-F1: three points.

Measured on ``watch`` (joint training, turns, MLA, IGM; five seeds; one machine with and without its AVX2 instructions):
single runs moved by up to 22 points, means of five by up to 2.9, and by 5.0 where the seeds scatter widely."""

ERRORS = 2.0
"""Where seeds scatter widely, the difference may be this many standard errors of a difference of independent runs."""

Results = Mapping[str, Any]


@dataclass(frozen=True)
class Comparison:
    """What :func:`compare` found.

    Attributes
    ----------
    exact : bool
        Whether the figures had to agree to the last stored digit.
    figures : int
        How many means were compared.
    largest : float
        The largest difference of them.
    problems : tuple of str
        What does not agree; empty where the table is reproduced.
    notes : tuple of str
        What else is to be known.
    """

    exact: bool
    figures: int
    largest: float
    problems: tuple[str, ...]
    notes: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """What is to be said about it, in lines."""
        how = (
            f"made with the same arithmetic (torch, processor): every figure must agree to {EXACT:g}"
            if self.exact
            else "made with another torch or processor, or with a GPU, so that training goes another way after some "
            f"hundred steps: means must agree within {100 * FLOOR:g} points, or {ERRORS:g} standard errors of their "
            "difference"
        )
        found = "reproduced" if not self.problems else "NOT reproduced"
        first = f"{found}: {self.figures} figures compared, largest difference {self.largest:.6f}; {how}."
        return "\n".join([first, *(f"- {line}" for line in (*self.problems, *self.notes))])


def same_arithmetic(one: Results, other: Results) -> bool:
    """Whether two tables were made with the same torch on the same kind of processor, so that sums round alike.

    What a GPU has computed counts as made otherwise: it is not told which, and not all of its sums have one order.
    """
    if devices([*one["rows"], *other["rows"]]) != {"cpu"}:
        return False
    names = ("torch", "processor", "instructions")
    versions = one["versions"], other["versions"]
    return all(name in versions[0] and versions[0][name] == versions[1].get(name) for name in names)


def stored_rates(stored: Results) -> dict[str, float]:
    """Return the learning rate of each row, by its key, to make the runs of :func:`compare` with."""
    return {row["key"]: row["learning_rate"] for row in stored["rows"]}


def compare(fresh: Results, stored: Results, chosen: Results | None = None) -> Comparison:
    """Compare a table with a stored one.

    Table, data set, protocol, configuration, rows, learning rates and seeds must be the same. The means over seeds of
    accuracy, MAP and macro-F1, at the chosen and at the last round, must agree

    - to :data:`EXACT` where torch, the processor and its instruction set are the same: one thread a run, so the same
      sums in the same order;
    - else within :data:`FLOOR`, or within :data:`ERRORS` standard errors √((s₁² + s₂²)/n), with s the standard
      deviations over the n seeds, where that is more. The reason: another order of summation changes the last digit of
      a gradient, and some hundred steps of training enlarge that until single predictions differ.

    Parameters
    ----------
    fresh, stored : mapping
        ``results`` of :class:`igm_rs.experiments.tables.Table`.
    chosen : mapping, optional
        The table with the learning rates that were chosen afresh, where `fresh` has the stored ones. With another
        processor another rate may be chosen: two or three seeds leave the choice to chance where rates are alike. That
        is told and no failure; with the same arithmetic it is one.

    Returns
    -------
    Comparison
        What agrees and what does not; times and memory are not compared.
    """
    problems = list(_other_things(fresh, stored))
    exact = same_arithmetic(fresh, stored)
    if problems:
        return Comparison(exact, 0, 0.0, tuple(problems))
    others = [] if chosen is None else list(_other_choices(chosen, stored))
    pairs = list(_pairs(fresh, stored))
    largest = 0.0
    for place, mine, theirs in pairs:
        difference = abs(mine.mean - theirs.mean)
        largest = max(largest, difference)
        allowed = EXACT if exact else _allowed(mine, theirs)
        if not difference <= allowed:
            problems.append(
                f"{place}: {mine.mean:.6f}, stored {theirs.mean:.6f}, difference {difference:.6f}, "
                f"allowed {allowed:.6f}"
            )
    if exact:
        return Comparison(exact, len(pairs), largest, (*others, *problems))
    return Comparison(exact, len(pairs), largest, tuple(problems), tuple(others))


def _other_things(fresh: Results, stored: Results) -> Iterator[str]:
    """What must be the same before figures can be compared, and is not."""
    for name in ("table", "dataset", "protocol"):
        if fresh[name] != stored[name]:
            yield f"{name} is {fresh[name]!r}, stored {stored[name]!r}"
    mine, theirs = ({**_defaults_of_later(), **results["config"]} for results in (fresh, stored))
    for name in sorted(mine.keys() | theirs.keys()):
        if mine.get(name) != theirs.get(name):
            yield f"{name} is {mine.get(name)!r}, stored {theirs.get(name)!r}"
    seeds = [
        {row["key"]: [run["seed"] for run in row["runs"]] for row in results["rows"]} for results in (fresh, stored)
    ]
    for key in [*seeds[0], *(key for key in seeds[1] if key not in seeds[0])]:
        if seeds[0].get(key) != seeds[1].get(key):
            yield f"row {key} has seeds {seeds[0].get(key)}, stored {seeds[1].get(key)}"

    kept = stored_rates(stored)
    for key, rate in stored_rates(fresh).items():
        if key in kept and kept[key] != rate:
            yield f"row {key} has learning rate {rate:g}, stored {kept[key]:g}"


def _defaults_of_later() -> dict[str, Any]:
    """Return the values that older results were made with and do not have."""
    plain = Config().plain()
    return {name: plain[name] for name in LATER}


def _other_choices(chosen: Results, stored: Results) -> Iterator[str]:
    """Tell rows for which another learning rate was chosen, with what was tried."""
    kept = {row["key"]: row for row in stored["rows"]}
    for row in chosen["rows"]:
        other = kept[row["key"]]
        if row["learning_rate"] != other["learning_rate"]:
            yield (
                f"row {row['key']}: learning rate {row['learning_rate']:g} was chosen ({_tried(row)}), stored is "
                f"{other['learning_rate']:g} ({_tried(other)}); compared with the stored one"
            )


def _tried(row: Results) -> str:
    """Validation accuracy by learning rate."""
    told = [f"{entry['learning_rate']:g}: {entry['validation_accuracy']:.1%}" for entry in row["tried"]]
    return ", ".join(told) or "nothing tuned"


def _pairs(fresh: Results, stored: Results) -> Iterator[tuple[str, Summary, Summary]]:
    """Every pair of means, with its place."""
    others = {row["key"]: figures(row) for row in stored["rows"]}
    for row in fresh["rows"]:
        for (weights, measure, name), mine in figures(row).items():
            if measure != "nll":
                place = f"{row['key']}, {weights} round, {measure} of {name}"
                yield place, mine, others[row["key"]][weights, measure, name]


def _allowed(mine: Summary, theirs: Summary) -> float:
    """Return the largest difference of two means where the arithmetic is not the same; of single runs, any."""
    if mine.sd is None or theirs.sd is None:
        return math.inf
    return max(FLOOR, ERRORS * math.sqrt((mine.sd**2 + theirs.sd**2) / mine.seeds))
