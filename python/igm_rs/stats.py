"""What the last step did (method.md §8): kept as tensors on their device, turned into plain numbers when looked at."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from ._projection import Made

__all__ = ["StepStats", "effective_perturbation", "effective_rank", "step_stats"]


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
    ``grad_norm_projected``
        L2 norm over all moving parameters after projection and before clipping to ``max_grad_norm``.
    ``second_pass``
        ``"taken"``; ``"head"``, taken for the head alone; ``"every"``, left out as ``sam_every`` says; ``"unchanged"``,
        left out as the perturbation has moved no weight; ``"no closure"``; ``"off"`` where rho is 0. None where the
        first gradient was unusable. With ``mode="released"`` ``"head"`` or ``"whole"``, see
        :class:`igm_rs.Released`, whose F is ``loss_perturbed`` then, and whose (1 − w) L + w F has the gradient of
        ``grad_norm_perturbed``.
    ``effective_perturbation``, ``moved``
        ‖realised ε‖ / ‖ε*‖ (None with ``adaptive``), and the share of weights with a gradient that the perturbation
        really changed; on CUDA measured at the first step of each turn.
    ``projected``
        For each projected layer ``norm_before``, ``norm_after`` and ``cosine`` of G and G T.
    ``lambda_max``, ``lambda_min``, ``effective_rank``
        By layer (of several sources: ``"source: layer"``), of the spectrum behind the T that acted; the rank is exp of
        the entropy of λ/Σλ (None where a polynomial has made T: :meth:`igm_rs.IGMOptimizer.spectrum` computes λ).
    ``top_share``
        By layer, λ_max/Σλ.
    ``routes``
        By layer how T was made: ``route``, ``flops`` (floating-point operations, estimated), ``error_bound`` (how far
        the entries of T can be from the exact ones, rounding counted as random). None in a T of an older checkpoint.
    """

    def __init__(self, entries: Mapping[str, Callable[[], Any]]) -> None:
        self._entries = dict(entries)

    def __getitem__(self, name: str) -> Any:
        return self._entries[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __reduce__(self) -> tuple[Any, ...]:
        return _of_values, (dict(self),)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({dict(self)!r})"


def step_stats(
    constants: Mapping[str, Any],
    figures: dict[str, Any],
    acted: Mapping[str, Made],
    pending: Sequence[torch.Tensor] = (),
) -> StepStats:
    """Return the stats of a step from what is known at once, what the step has noted, and the T's that acted.

    `figures` is read when an entry is looked at; losses in it are detached from their graph now. `pending` counts, on a
    device, steps that `constants` take for taken and were not.
    """
    for key in ("loss", "loss_perturbed"):
        value = figures.get(key)
        if isinstance(value, torch.Tensor):
            figures[key] = value.detach() if value.numel() == 1 else None
        elif not isinstance(value, (int, float)):
            figures[key] = None
    names = figures.get("layers", [])

    def taken() -> bool:
        return bool(figures.get("usable", True))

    def unusable() -> int:
        return sum(map(int, pending))

    def projected() -> dict[str, dict[str, float]]:
        if not (names and taken()):
            return {}
        rows = figures["projected"].tolist()
        return {
            name: dict(zip(("norm_before", "norm_after", "cosine"), row, strict=True))
            for name, row in zip(names, rows, strict=True)
        }

    entries: dict[str, Callable[[], Any]] = {key: partial(_same, value) for key, value in constants.items()}
    for key in ("loss", "loss_perturbed", "grad_norm", "grad_norm_perturbed", "grad_norm_projected"):
        entries[key] = partial(_number, figures, key)
    entries["sharpness"] = lambda: _difference(_number(figures, "loss_perturbed"), _number(figures, "loss"))
    entries["effective_perturbation"] = lambda: effective_perturbation(figures)[0]
    entries["moved"] = lambda: effective_perturbation(figures)[1]
    entries["projected"] = projected
    if "usable" in figures:  # the device knows
        entries["skipped"] = lambda: not taken()
    if pending:
        entries["skipped_steps"] = lambda: constants["skipped_steps"] + unusable()
        entries["step"] = lambda: constants["step"] - unusable()
    spectra = {name: one.singular_values for name, one in acted.items() if one.singular_values is not None}
    reports = {name: one.report for name, one in acted.items()}
    entries["lambda_max"] = lambda: {name: float(values.max()) for name, values in spectra.items()}
    entries["lambda_min"] = lambda: {name: float(values.min()) for name, values in spectra.items()}
    entries["effective_rank"] = lambda: {
        name: None if "polynomial" in reports[name].get("route", "") else effective_rank(values)
        for name, values in spectra.items()
    }
    entries["top_share"] = lambda: {
        name: _ratio(float(values.max()), reports[name].get("trace") or 0.0) for name, values in spectra.items()
    }
    entries["routes"] = lambda: {
        name: {key: report.get(key) for key in ("route", "flops", "error_bound")} for name, report in reports.items()
    }
    return StepStats(entries)


def effective_perturbation(figures: Mapping[str, Any]) -> tuple[float | None, float | None]:
    """Return ‖realised ε‖/‖ε*‖ and the share of weights with a gradient that moved; None without a perturbation."""
    measured = figures.get("perturbation")
    if measured is None:
        return None, None
    realised, moved, with_gradient, *length_asked = measured.tolist()
    norm = float(figures["climb_norm"])
    if not (math.isfinite(norm) and norm > 0):
        return None, None
    if length_asked:
        length = _ratio(realised, length_asked[0])
    elif figures["asked"] is None:
        length = None
    else:
        p, parts = figures["asked"]
        if math.isinf(p):
            asked = parts[0][0] * math.sqrt(with_gradient)
        else:
            asked = math.sqrt(sum((rho * float(part)) ** 2 for rho, part in parts)) / norm
        length = _ratio(realised, asked)
    return length, _ratio(moved, with_gradient)


def effective_rank(singular_values: torch.Tensor) -> float:
    """Return exp(H(λ/Σλ)), between 1 and d; 0 for a spectrum of zeros."""
    values = [value for value in singular_values.flatten().tolist() if value > 0]
    total = sum(values)
    return math.exp(-sum(value / total * math.log(value / total) for value in values)) if total > 0 else 0.0


def _of_values(values: Mapping[str, Any]) -> StepStats:
    """Stats that are known already: those of a copy."""
    return StepStats({name: partial(_same, value) for name, value in values.items()})


def _same(value: Any) -> Any:
    return value


def _number(figures: Mapping[str, Any], key: str) -> float | None:
    value = figures.get(key)
    return None if value is None else float(value)


def _ratio(above: float, below: float) -> float | None:
    return above / below if below else None


def _difference(above: float | None, below: float | None) -> float | None:
    return None if above is None or below is None else above - below
