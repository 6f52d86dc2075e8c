"""Alternating turns: one modality after another, many batches each; and what IGM adds to them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch

import igm_rs
from igm_rs.experiments.configuration import Config
from igm_rs.experiments.networks import Branches

from .base import Method, base_optimizer, control_options, method

__all__ = ["Turns"]


@method
class Turns(Method):
    """Each modality in turns of many batches, with an encoder and a head of its own; no SAM, no modification.

    Methods that add SAM, modification or a control are subclasses and say so by their attributes.

    Attributes
    ----------
    control : {None, "random", "scalar"}
        What takes the place of T, to tell whether its directions matter.
    """

    key = "turns"
    label = "turns"
    schedule = "turns"
    control: ClassVar[str | None] = None

    @property
    def uses(self) -> tuple[str, ...]:
        """Those of SAM and of the modification, where it has them."""
        return (*(("rho",) if self.sam else ()), *(("tau", "scope", "sources") if self.modifies else ()))

    def optimizer(
        self,
        model: Branches,
        modalities: Sequence[str],
        config: Config,
        learning_rate: float,
        batches: int,
        seed: int = 0,
    ) -> torch.optim.Optimizer:
        """Return IGMOptimizer with the SAM, the modification and the control that the class asks for."""
        base = base_optimizer(model, config, learning_rate)
        parts = {name: model.parts_of(name) for name in modalities}
        rho = config.rho_of(modalities) if self.sam else 0.0
        if not self.modifies:
            return igm_rs.IGMOptimizer(base, parts, model=model, rho=rho, projector="identity")
        where: dict[str, Any] = (
            {"heads": {name: model.head_of(name) for name in modalities}}
            if config.scope is None
            else {"scope": config.scope}
        )
        return igm_rs.IGMOptimizer(
            base,
            parts,
            **where,
            model=model,
            rho=rho,
            tau=config.tau,
            sources="previous" if config.sources is None else config.sources,
            **control_options(self.control, seed),
        )
