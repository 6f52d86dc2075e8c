"""Joint training by summation: one loss on the sum of all modalities' logits."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from igm_rs.experiments.configuration import Config
from igm_rs.experiments.networks import Branches

from .base import Method, base_optimizer, method

__all__ = ["JointSum"]


@method
class JointSum(Method):
    """All modalities in each step, each with a head of its own; their logits are added."""

    key = "joint-sum"
    label = "joint, sum"
    schedule = "joint"

    @property
    def uses(self) -> tuple[str, ...]:
        """No particular value."""
        return ()

    def optimizer(
        self,
        model: Branches,
        modalities: Sequence[str],
        config: Config,
        learning_rate: float,
        batches: int,
        seed: int = 0,
    ) -> torch.optim.Optimizer:
        """Return the optimizer underneath."""
        return base_optimizer(model, config, learning_rate)
