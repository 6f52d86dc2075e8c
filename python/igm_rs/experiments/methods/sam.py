"""SAM alone: joint training by summation, with a second pass at the perturbed weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch

import igm_rs
from igm_rs.experiments.configuration import Config
from igm_rs.experiments.networks import Branches

from .base import base_optimizer, method
from .joint_sum import JointSum

__all__ = ["Sam"]


@method
class Sam(JointSum):
    """Joint training by summation with SAM (Eqs. 7 and 8)."""

    key = "sam"
    label = "joint, sum + SAM"
    sam = True

    @property
    def uses(self) -> tuple[str, ...]:
        """ρ."""
        return ("rho",)

    def optimizer(
        self,
        model: Branches,
        modalities: Sequence[str],
        config: Config,
        learning_rate: float,
        batches: int,
        seed: int = 0,
    ) -> torch.optim.Optimizer:
        """Return IGMOptimizer without modalities: SAM."""
        return igm_rs.IGMOptimizer(base_optimizer(model, config, learning_rate), model=model, rho=config.rho)
