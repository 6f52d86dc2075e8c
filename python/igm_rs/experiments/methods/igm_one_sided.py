"""IGM with one side only: the modification of some modalities is left out (the paper's Table 3)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from igm_rs.experiments.configuration import Config
from igm_rs.experiments.networks import Branches

from .base import method
from .igm import Igm

__all__ = ["IgmOneSided"]


@method
class IgmOneSided(Igm):
    """IGM with ``sources`` that leave the modification of a modality out."""

    key = "igm-one-sided"
    label = "IGM, one-sided"

    def optimizer(
        self,
        model: Branches,
        modalities: Sequence[str],
        config: Config,
        learning_rate: float,
        batches: int,
        seed: int = 0,
    ) -> torch.optim.Optimizer:
        """Return IGM's optimizer with the given sources.

        Raises
        ------
        ValueError
            If the configuration has no ``sources``.
        """
        if config.sources is None:
            raise ValueError("sources is None, expected whose T acts on each modality, such as audio=video,video=none")
        return super().optimizer(model, modalities, config, learning_rate, batches, seed)
