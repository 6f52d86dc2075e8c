"""A shared trunk without modification: what is forgotten when nothing protects it."""

from __future__ import annotations

from collections.abc import Sequence

import torch

import igm_rs
from igm_rs.experiments.configuration import Config
from igm_rs.experiments.networks import Branches

from .base import Method, base_optimizer, method

__all__ = ["SharedPlain"]


@method
class SharedPlain(Method):
    """A trunk for all, modality after modality; each moves the trunk as it likes."""

    key = "shared-plain"
    label = "shared trunk, no modification"
    head = "trunk"
    schedule = "once"

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
        """Return IGMOptimizer without projector."""
        return igm_rs.IGMOptimizer(
            base_optimizer(model, config, learning_rate),
            {name: model.parts_of(name) for name in modalities},
            model=model,
            rho=0.0,
            projector="identity",
            reset="momentum",
        )
