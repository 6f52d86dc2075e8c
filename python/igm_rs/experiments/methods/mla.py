"""MLA: one head for all modalities, which take each batch one after another, and its orthogonal projection."""

from __future__ import annotations

from collections.abc import Sequence

import torch

import igm_rs
from igm_rs.experiments.configuration import Config
from igm_rs.experiments.networks import Branches

from .base import Method, base_optimizer, method

__all__ = ["Mla"]


@method
class Mla(Method):
    """MLA's training (Zhang et al., CVPR 2024), with the recursion of its paper for the shared head."""

    key = "mla"
    label = "MLA"
    head = "shared"
    schedule = "batches"
    modifies = True

    @property
    def uses(self) -> tuple[str, ...]:
        """α of the recursion."""
        return ("alpha",)

    def optimizer(
        self,
        model: Branches,
        modalities: Sequence[str],
        config: Config,
        learning_rate: float,
        batches: int,
        seed: int = 0,
    ) -> torch.optim.Optimizer:
        """Return IGMOptimizer with the orthogonal projector of the head that all share."""
        return igm_rs.IGMOptimizer(
            base_optimizer(model, config, learning_rate),
            {name: model.parts_of(name) for name in modalities},
            head=model.head,
            model=model,
            rho=0.0,
            projector="orthogonal",
            covariance="kept",
            alpha=config.alpha,
            batches=batches,
        )
