"""Hyper-parameters and options, checked once at the entrance: Python's own exception with name, value and expectation."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from numbers import Real
from typing import Any

__all__ = ["choice", "names", "non_negative", "per_modality", "positive", "positive_integer"]


def non_negative(argument: str, value: Any) -> float:
    """Return `value` as a float in [0, ∞); TypeError or ValueError naming `argument` otherwise."""
    number = _real(argument, value)
    if not math.isfinite(number) or number < 0:
        raise ValueError(f"{argument} is {value!r}, expected a finite number >= 0")
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


def _real(argument: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{argument} is {value!r} ({type(value).__name__}), expected a number")
    return float(value)
