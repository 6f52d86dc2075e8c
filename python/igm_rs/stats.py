"""What the last step did (method.md §8): kept as tensors on their device, turned into plain numbers when looked at."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

__all__ = ["StepStats"]


class StepStats(Mapping[str, Any]):
    """A read-only mapping from name to plain value.

    Reading an entry may wait for the device (one small copy); writing them during the step never does.

    Entries of a step of :class:`igm_rs.IGMOptimizer` (None where a step has no such figure):

    ``active``, ``sources``
        The modality j that was trained; the modalities k whose T acted on it.
    ``turn``, ``round``, ``step``
        Finished turns, finished rounds, steps taken before and including this one.
    ``skipped``, ``skipped_steps``
        Whether this step was skipped (zero or non-finite gradient), and how many were so far.
    ``loss``, ``loss_perturbed``, ``sharpness``
        L(θ), L(θ + ε*), and their difference.
    ``grad_norm``, ``grad_norm_perturbed``
        ‖∇L(θ)‖₂ and ‖∇L(θ + ε*)‖₂ over all moving parameters.
    ``effective_perturbation``, ``moved``
        ‖realised ε‖ / ‖ε*‖, and the share of weights with a gradient that the perturbation really changed.
    ``projected``
        For each projected layer ``norm_before``, ``norm_after`` and ``cosine`` of G and G T.
    ``lambda_max``, ``lambda_min``, ``effective_rank``
        By layer, of the spectrum behind the T that acted; the rank is exp of the entropy of λ/Σλ.
    """

    def __init__(self, entries: Mapping[str, Callable[[], Any]]) -> None:
        self._entries = dict(entries)

    def __getitem__(self, name: str) -> Any:
        return self._entries[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({dict(self)!r})"


def number(value: Any) -> float | None:
    """Return a tensor of one element or a number as a float, None as None."""
    if value is None:
        return None
    return float(value.item() if isinstance(value, torch.Tensor) else value)


def ratio(above: float | None, below: float | None) -> float | None:
    """Return above / below, None where either is missing or `below` is zero."""
    return None if above is None or not below else above / below


def difference(above: float | None, below: float | None) -> float | None:
    """Return above − below, None where either is missing."""
    return None if above is None or below is None else above - below


def effective_rank(singular_values: torch.Tensor) -> float:
    """Return exp(H(λ/Σλ)), between 1 and d; 0 for a spectrum of zeros."""
    values = [value for value in singular_values.tolist() if value > 0]
    total = sum(values)
    return math.exp(-sum(value / total * math.log(value / total) for value in values)) if total > 0 else 0.0
