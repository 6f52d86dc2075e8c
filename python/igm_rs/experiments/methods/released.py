"""The released scripts' arithmetic: turns that leave the paper where they do, by one deviation or by all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import igm_rs
from igm_rs.experiments.configuration import Config
from igm_rs.experiments.networks import Branches
from igm_rs.released import mixup, mixup_loss

from .base import Method, base_optimizer, method

if TYPE_CHECKING:
    from collections.abc import Mapping

    from igm_rs.experiments.training import Training

__all__ = ["ReleasedScripts"]

FLAT_RATIO = 0.3
"""Share of the loss at θ + ε* in the scripts' loss."""

MIXUP = 1.0
"""α of their mixup."""

RATE_FACTOR = 0.1
"""What a StepLR multiplies the learning rate by."""


@method
class ReleasedScripts(Method):
    """IGM with those deviations of the released scripts that ``config.released`` names; with none it is IGM."""

    key = "released"
    label = "released scripts' arithmetic"
    schedule = "turns"
    sam = True
    modifies = True

    @property
    def uses(self) -> tuple[str, ...]:
        """ρ, τ, the deviations, and what belongs to them."""
        return ("rho", "tau", "released", "rho_head", "rate_passes")

    def optimizer(
        self,
        model: Branches,
        modalities: Sequence[str],
        config: Config,
        learning_rate: float,
        batches: int,
        seed: int = 0,
    ) -> torch.optim.Optimizer:
        """Return IGMOptimizer in the mode that the deviations ask for."""
        has = set(config.released)
        return igm_rs.IGMOptimizer(
            base_optimizer(model, config, learning_rate),
            {name: model.parts_of(name) for name in modalities},
            heads={name: model.head_of(name) for name in modalities},
            model=model,
            rho=config.rho_of(modalities),
            tau=config.tau,
            mode=igm_rs.Released(
                rho_head=config.rho_head,
                norm="tensor" if "tensor-norm" in has else "all",
                restore="kept" not in has,
                second_pass="head" if "stale-head" in has else "whole",
                flat_ratio=FLAT_RATIO if "mixed-loss" in has else 1.0,
                gather="pass" if "pass" in has else "turn",
                layers="linear" if "shape" in has else "all",
                pairing="shape" if "shape" in has else "position",
                reset=("momentum",) if "rebuild" in has else (),
            ),
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
        """Take a step on mixed examples, where that is asked for and they are numbers; words cannot be mixed."""
        (name,) = active
        mixed, labels_a, labels_b, share = inputs[name], labels, labels, 1.0
        if "mixed-loss" in config.released and mixed.is_floating_point():
            mixed, labels_a, labels_b, share = mixup(mixed, labels, MIXUP)
        head = model.head_of(name)
        passes = 0

        def closure() -> tuple[Tensor, Any]:
            nonlocal passes
            passes += 1
            features = model.features(name, mixed)
            logits = head(features)
            first = passes == 1  # a second pass of the whole network has the unmixed labels, as one of the head
            loss = mixup_loss(logits, labels_a, labels_b, share) if first else cross_entropy(logits, labels)
            return loss, lambda: cross_entropy(head(features), labels)

        loss: Tensor = optimizer.step(closure)  # type: ignore[arg-type, assignment]  # the mode's closure
        return loss.detach()

    def begin_turn(self, training: Training, modality: str | None) -> None:
        """Go back to the best weights so far; make T of the modality before from a pass over the training split."""
        before = training.turn_before
        if before is None:
            return
        has = training.config.released
        model, optimizer = training.model, training.optimizer
        if "best" in has and training.best:
            model.load_state_dict(training.best)
        if "pass" in has and isinstance(optimizer, igm_rs.IGMOptimizer):
            model.eval()
            with optimizer.collect(before), torch.no_grad():
                for batch in training.one_pass(before):
                    model.branch(before, batch)
            model.train()

    def goes_back(self, config: Config) -> bool:
        """Whether turns begin at the best weights so far."""
        return "best" in config.released

    def by_macro_f1(self, config: Config) -> bool:
        """Whether the macro-F1 of the mean fusion chooses."""
        return "macro-f1" in config.released

    def rate_factor(self, config: Config, passes: int) -> float | None:
        """Return the factor of a StepLR that begins anew in each turn and is stepped before the pass."""
        return float(RATE_FACTOR ** ((passes + 1) // config.rate_passes)) if "step-lr" in config.released else None
