"""Joint training by concatenation: one head over the features of all modalities."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from igm_rs.experiments.configuration import Config
from igm_rs.experiments.networks import Branches

from .base import Method, base_optimizer, method

__all__ = ["JointConcat"]


@method
class JointConcat(Method):
    """All modalities in each step, through one three-layer head over their features side by side."""

    key = "joint-concat"
    label = "joint, concatenation"
    head = "concat"
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
