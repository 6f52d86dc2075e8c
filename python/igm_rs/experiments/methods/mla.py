"""MLA: one head for all modalities, which take each batch one after another, and its orthogonal projection."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import ClassVar

import torch
from torch import Tensor

import igm_rs
from igm_rs.experiments.configuration import Config
from igm_rs.experiments.networks import Branches, Head

from .base import Method, base_optimizer, method

__all__ = ["Mla"]


@method
class Mla(Method):
    """MLA's training (Zhang et al., CVPR 2024), with the recursion of its paper for the shared head."""

    key = "mla"
    label = "MLA"
    head: ClassVar[Head] = "shared"
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

    def take_step(
        self,
        model: Branches,
        optimizer: torch.optim.Optimizer,
        active: Sequence[str],
        inputs: Mapping[str, Tensor],
        labels: Tensor,
        config: Config,
    ) -> Tensor:
        """Take a step; in a turn if the modality has nothing of its own to train, as nothing else tells whose it is."""
        (name,) = active
        own = [p for part in model.parts_of(name) if part is not model.head for p in part.parameters()]
        entered: AbstractContextManager[object] = nullcontext()
        if isinstance(optimizer, igm_rs.IGMOptimizer) and not any(p.requires_grad for p in own):
            entered = optimizer.turn(name)
        with entered:
            return super().take_step(model, optimizer, active, inputs, labels, config)
