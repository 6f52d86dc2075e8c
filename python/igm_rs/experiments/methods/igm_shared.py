"""The flat modification where parameters are shared: a trunk for all, a strong T, one modality after another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch

import igm_rs
from igm_rs.experiments.configuration import Config
from igm_rs.experiments.networks import Branches

from .base import Method, base_optimizer, control_options, method

__all__ = ["IgmShared"]


@method
class IgmShared(Method):
    """A trunk for all, modality after modality; T protects in the trunk what the earlier ones have learnt.

    T is made of the full second moment with the bias, from all earlier modalities, with the strength ``trunk_tau``; no
    SAM. Methods that leave T out or put a control in its place are subclasses.

    Attributes
    ----------
    control : {None, "random", "scalar"}
        What takes the place of T, to tell whether its directions matter.
    """

    key = "igm-shared"
    label = "shared trunk, flat"
    head = "trunk"
    schedule = "once"
    modifies = True
    control: ClassVar[str | None] = None

    @property
    def uses(self) -> tuple[str, ...]:
        """τ of the trunk."""
        return ("trunk_tau",)

    def optimizer(
        self,
        model: Branches,
        modalities: Sequence[str],
        config: Config,
        learning_rate: float,
        batches: int,
        seed: int = 0,
    ) -> torch.optim.Optimizer:
        """Return IGMOptimizer with the flat projector of the shared trunk."""
        return igm_rs.IGMOptimizer(
            base_optimizer(model, config, learning_rate),
            {name: model.parts_of(name) for name in modalities},
            head=model.trunk,
            model=model,
            rho=0.0,
            tau=config.trunk_tau,
            features="samples",
            augment_bias=True,
            sources="earlier",
            reset="momentum",
            **control_options(self.control, seed),
        )
