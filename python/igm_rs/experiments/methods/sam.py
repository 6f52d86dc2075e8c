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
        """Return IGMOptimizer without modalities: SAM; where each has a ρ, the parameters of each have it."""
        base = base_optimizer(model, config, learning_rate)
        rho = config.rho_of(modalities)
        if not isinstance(rho, dict):
            return igm_rs.IGMOptimizer(base, model=model, rho=rho)
        (group,) = base.param_groups
        options = {name: value for name, value in group.items() if name != "params"}
        base.param_groups.clear()
        for name in modalities:
            own = [p for part in model.parts_of(name) for p in part.parameters() if p.requires_grad]
            base.add_param_group({**options, "params": own, "rho": rho[name]})
        return igm_rs.IGMOptimizer(base, model=model)
