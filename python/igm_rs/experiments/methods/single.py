"""One modality alone: the floor that every way of training several must rise above."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from igm_rs.experiments.configuration import Config
from igm_rs.experiments.networks import Branches

from .base import Method, base_optimizer, method

__all__ = ["Single"]


@method
class Single(Method):
    """A modality's encoder and head, nothing else."""

    key = "single"
    label = "{} alone"
    schedule = "single"

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
