"""Hyper-parameters and options, checked once at the entrance: Python's own exception with name, value, expectation."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from numbers import Real
from typing import Any

__all__ = [
    "choice",
    "flag",
    "is_number",
    "life",
    "names",
    "non_negative",
    "norm_order",
    "per_modality",
    "positive",
    "positive_integer",
    "refresh_rule",
    "share",
]


def non_negative(argument: str, value: Any) -> float:
    """Return `value` as a float in [0, ∞); TypeError or ValueError naming `argument` otherwise."""
    number = _real(argument, value)
    if not math.isfinite(number) or number < 0:
        raise ValueError(f"{argument} is {value!r}, expected a finite number >= 0")
    return number


def norm_order(argument: str, value: Any) -> float:
    """Return `value` as a float if it is 2 or ∞; TypeError or ValueError naming `argument` otherwise."""
    number = _real(argument, value)
    if number not in (2.0, math.inf):
        raise ValueError(f"{argument} is {value!r}, expected 2.0 or math.inf")
    return number


def positive(argument: str, value: Any) -> float:
    """Return `value` as a float in (0, ∞); TypeError or ValueError naming `argument` otherwise."""
    number = _real(argument, value)
    if not math.isfinite(number) or number <= 0:
        raise ValueError(f"{argument} is {value!r}, expected a finite number > 0")
    return number


def positive_integer(argument: str, value: Any) -> int:
    """Return `value` as an int >= 1; TypeError or ValueError naming `argument` otherwise."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{argument} is {value!r} ({type(value).__name__}), expected an integer >= 1")
    if value < 1:
        raise ValueError(f"{argument} is {value!r}, expected an integer >= 1")
    return value


def choice(argument: str, value: Any, options: Collection[str]) -> str:
    """Return `value` if it is one of `options`; ValueError that lists them otherwise."""
    if not isinstance(value, str) or value not in options:
        raise ValueError(f"{argument} is {value!r}, expected one of {', '.join(map(repr, options))}")
    return value


def names(argument: str, values: Any, options: Collection[str]) -> frozenset[str]:
    """Return `values`, a name or several, as a set of members of `options`; ValueError for another."""
    several: Iterable[Any] = [values] if isinstance(values, str) else values
    if not isinstance(several, Iterable):
        raise TypeError(f"{argument} is {values!r}, expected names among {', '.join(map(repr, options))}")
    return frozenset(choice(argument, value, options) for value in several)


def per_modality(argument: str, value: Any, modalities: Collection[str]) -> dict[str, float]:
    """Return one non-negative number for each modality, from one number for all or a mapping."""
    if not isinstance(value, Mapping):
        number = non_negative(argument, value)
        return dict.fromkeys(modalities, number)
    unknown = [name for name in value if name not in modalities]
    if unknown:
        raise ValueError(f"{argument} names {unknown[0]!r}, expected one of {', '.join(map(repr, modalities))}")
    missing = [name for name in modalities if name not in value]
    if missing:
        raise ValueError(f"{argument} has no value for {missing[0]!r}, expected one for each of {list(modalities)}")
    return {name: non_negative(f"{argument}[{name!r}]", value[name]) for name in modalities}


def share(argument: str, value: Any) -> float:
    """Return `value` as a float in [0, 1]; TypeError or ValueError naming `argument` otherwise."""
    number = non_negative(argument, value)
    if number > 1:
        raise ValueError(f"{argument} is {value!r}, expected a share in [0, 1]")
    return number


def flag(argument: str, value: Any) -> bool:
    """Return `value` if it is True or False; TypeError naming `argument` otherwise."""
    if not isinstance(value, bool):
        raise TypeError(f"{argument} is {value!r} ({type(value).__name__}), expected True or False")
    return value


def life(covariance: Any, projector: str) -> float:
    """Return how much of Ȳ lives on into the next turn: 0 for "fresh", 1 for "kept", or the factor itself."""
    if isinstance(covariance, str):
        return {"fresh": 0.0, "kept": 1.0}[choice("covariance", covariance, ("fresh", "kept"))]
    factor = positive("covariance", covariance)
    if factor >= 1:
        raise ValueError(f"covariance is {covariance!r}, expected 'fresh', 'kept' or a factor in (0, 1)")
    if projector == "orthogonal":
        raise ValueError(f"covariance is {covariance!r} with projector='orthogonal', expected 'fresh' or 'kept'")
    return factor


def refresh_rule(refresh: Any) -> str | int:
    """Return `refresh` if it is "turn", "manual" or an integer >= 1."""
    if isinstance(refresh, str):
        return choice("refresh", refresh, ("turn", "manual"))
    return positive_integer("refresh", refresh)


def is_number(value: Any) -> bool:
    """Whether `value` is a finite real number."""
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def _real(argument: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{argument} is {value!r} ({type(value).__name__}), expected a number")
    return float(value)
