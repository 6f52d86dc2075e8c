"""A shared trunk that only the first modality trains: the simple rival of protecting it."""

from __future__ import annotations

from collections.abc import Sequence

import torch

import igm_rs
from igm_rs.experiments.configuration import Config
from igm_rs.experiments.networks import Branches

from .base import Method, base_optimizer, method

__all__ = ["SharedFrozen"]


@method
class SharedFrozen(Method):
    """A trunk for all, modality after modality; after the first the trunk is left as it is."""

    key = "shared-frozen"
    label = "shared trunk, frozen after the first"
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
        """Return IGMOptimizer to which the trunk belongs to the first modality alone."""
        first, *later = modalities
        parts = {first: model.parts_of(first)}
        parts |= {name: [part for part in model.parts_of(name) if part is not model.trunk] for name in later}
        return igm_rs.IGMOptimizer(
            base_optimizer(model, config, learning_rate),
            parts,
            model=model,
            rho=0.0,
            projector="identity",
            reset="momentum",
        )
