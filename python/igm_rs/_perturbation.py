"""What is perturbed in a step and how far (Eq. 7), and whether the weights' dtype has let it happen (method.md §7)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from . import _igm_rs
from ._core import Core
from .stats import effective_perturbation

__all__ = ["Climb", "climb_of", "gradient_norm", "judge"]

_NOTICEABLE = 0.5
"""Share of ρ: a perturbation whose realised length is below it is warned about."""


@dataclass
class Climb:
    """The weights that ε* moves, their gradients, ρ for each (signed), and the norm that ε* is divided by."""

    params: list[torch.Tensor]
    gradients: list[torch.Tensor]
    rhos: list[float]
    norm: torch.Tensor


def climb_of(
    core: Core,
    active: str,
    params: list[torch.Tensor],
    gradients: list[torch.Tensor],
    rhos: list[float],
    figures: dict[str, Any],
) -> Climb:
    """Return what is perturbed of all that moves; `figures` gets what the length of ε* follows from.

    Raises
    ------
    RuntimeError
        With ``sam_scope="head"`` where no parameter of the head has a gradient.
    """
    whole = core.head_pass is None
    if core.head_pass is not None:
        head = core.head_pass.parameters(active)
        chosen = [i for i, p in enumerate(params) if p in head]
        if not chosen:
            raise RuntimeError(
                f"sam_scope='head': no parameter of the head of {active!r} has a gradient, expected a loss that "
                "depends on the head"
            )
        params, gradients, rhos = [params[i] for i in chosen], [gradients[i] for i in chosen], [rhos[i] for i in chosen]
    norm = figures["grad_norm"]
    if core.adaptive:
        norm = gradient_norm(gradients, params)
    elif not whole:
        norm = gradient_norm(gradients)
    figures["climb_norm"] = norm
    radii = [abs(rho) for rho in rhos]
    figures["rho"] = max(radii)
    figures["asked"] = None
    if not core.adaptive:
        different = sorted(set(radii))
        if len(different) == 1:
            figures["asked"] = core.p, [(different[0], norm)]
        elif core.p == 2:
            figures["asked"] = (
                core.p,
                [
                    (rho, gradient_norm([g for g, own in zip(gradients, radii, strict=True) if own == rho]))
                    for rho in different
                ],
            )
    return Climb(params, gradients, rhos, norm)


def gradient_norm(gradients: list[torch.Tensor], weights: list[torch.Tensor] | None = None) -> torch.Tensor:
    """‖g‖₂ over all gradients, or ‖T g‖₂ with T = |θ| + η; TypeError for one that is sparse."""
    try:
        return _igm_rs.gradient_norm(gradients, weights)
    except ValueError:
        for g in gradients:
            if g.layout is not torch.strided:
                raise TypeError(
                    f"the gradient of a parameter of shape {tuple(g.shape)} has the layout {g.layout}, expected a "
                    "dense tensor: sparse gradients are not supported"
                ) from None
        raise


def judge(core: Core, figures: dict[str, Any]) -> None:
    """Warn once where the dtype swallows most of the perturbation."""
    warned = core.warned
    if "perturbation" in warned or figures.get("perturbation") is None or figures["rho"] == 0:
        return
    length, moved = effective_perturbation(figures)
    if figures["perturbation"].device.type != "cpu":
        warned.add("perturbation")  # looked at once: the next look would wait for the device again
    told = moved if length is None else length
    if told is None or told >= _NOTICEABLE:
        return
    warned.discard("perturbation")
    if core.released is not None and length is None and figures["rho"] > float(figures["climb_norm"]):
        core.warn_once(
            "perturbation",
            f"rho = {figures['rho']:g} over the norm of a gradient is beyond the dtype of every weight, so none was "
            "perturbed; 0.02 to 0.05 is a usual rho",
        )
        return
    realised = "" if length is None else f"has {length:.2%} of the length asked for and "
    core.warn_once(
        "perturbation",
        f"rho = {figures['rho']:g} is below the resolution of the weights: the realised perturbation {realised}"
        f"moved {moved or 0:.2%} of them, so SAM does next to nothing; 0.02 to 0.05 is a usual rho",
    )
