"""The statistics of the tables: mean and standard deviation over seeds, paired differences, Student's t."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from statistics import fmean, stdev

__all__ = ["Difference", "Summary", "half_width", "paired_difference", "student_quantile", "summary"]

CONFIDENCE = 0.95
"""Of every interval."""


@dataclass(frozen=True)
class Summary:
    """A figure over seeds.

    Attributes
    ----------
    mean : float
        In the unit of the values.
    sd : float or None
        Standard deviation of the sample (n − 1); None for one seed.
    seeds : int
        How many values there were.
    """

    mean: float
    sd: float | None
    seeds: int


@dataclass(frozen=True)
class Difference:
    """One method minus another, seed by seed.

    Attributes
    ----------
    mean : float
        Of the differences.
    half_width : float or None
        Half the width of the 95 % confidence interval of that mean; None for one seed.
    seeds : int
        How many pairs there were.
    """

    mean: float
    half_width: float | None
    seeds: int

    @property
    def clear(self) -> bool:
        """Whether the interval leaves out zero; False for one seed."""
        return self.half_width is not None and abs(self.mean) > self.half_width


def summary(values: Sequence[float]) -> Summary:
    """Return mean and standard deviation.

    Raises
    ------
    ValueError
        If there is no value.
    """
    if not values:
        raise ValueError("values: expected one for each seed, got none")
    return Summary(fmean(values), stdev(values) if len(values) > 1 else None, len(values))


def paired_difference(mine: Mapping[int, float], theirs: Mapping[int, float]) -> Difference:
    """Return the mean of ``mine − theirs`` over the seeds that both have, with its interval.

    The pairing takes out what a seed does to both (initial weights, order of batches), so the interval is that of the
    difference, not of either mean.

    Parameters
    ----------
    mine, theirs : mapping of int to float
        Value by seed.

    Raises
    ------
    ValueError
        If they have no seed in common.
    """
    seeds = sorted(mine.keys() & theirs.keys())
    if not seeds:
        raise ValueError(f"no seed in common: {sorted(mine)} and {sorted(theirs)}")
    values = [mine[seed] - theirs[seed] for seed in seeds]
    return Difference(fmean(values), half_width(values), len(values))


def half_width(values: Sequence[float]) -> float | None:
    """Return half the width of the 95 % interval of the mean, by Student's t; None for fewer than two values."""
    if len(values) < 2:
        return None
    return student_quantile((1 + CONFIDENCE) / 2, len(values) - 1) * stdev(values) / math.sqrt(len(values))


@cache
def student_quantile(probability: float, degrees: int) -> float:
    """Return t with P(T ≤ t) = `probability` for Student's distribution, to about 1e-12 of its size.

    Parameters
    ----------
    probability : float
        In (0, 1).
    degrees : int
        Degrees of freedom ν ≥ 1.

    Raises
    ------
    ValueError
        If an argument is out of range.

    Notes
    -----
    With t = √ν tan φ the distribution function is ½ + A/2, where A(φ) is a finite sum for whole ν (Abramowitz and
    Stegun, 26.7.3 and 26.7.4). φ is found by bisection, so nothing can fail to converge.
    """
    if not 0 < probability < 1:
        raise ValueError(f"probability is {probability!r}, expected a number between 0 and 1")
    if degrees < 1:
        raise ValueError(f"degrees is {degrees!r}, expected a whole number of at least 1")
    if probability < 0.5:
        return -student_quantile(1 - probability, degrees)
    low, high = 0.0, math.pi / 2
    while low < (middle := (low + high) / 2) < high:
        if _within(middle, degrees) < 2 * probability - 1:
            low = middle
        else:
            high = middle
    return math.sqrt(degrees) * math.tan(low)


def _within(angle: float, degrees: int) -> float:
    """Return A = P(|T| ≤ √ν tan φ)."""
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = degrees % 2
    term, total = (cosine, 0.0) if odd else (1.0, 0.0)
    for power in range(
        1 + odd, degrees, 2
    ):  # cosⁿ φ with the coefficients 1, 2/3, 2·4/(3·5), … or 1, 1/2, 1·3/(2·4), …
        total += term
        term *= cosine * cosine * power / (power + 1)
    return 2 / math.pi * (angle + sine * total) if odd else sine * total
