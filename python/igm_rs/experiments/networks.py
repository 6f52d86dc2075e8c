"""The networks: one encoder a modality, and either a head of its own for each or one linear head for all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from .data import DataSet

__all__ = ["FEATURES", "Branches", "ConvEncoder", "DenseEncoder", "three_layer_head"]

FEATURES = 64
"""Size d of every encoder's output, so that one head can serve all modalities."""


class ConvEncoder(nn.Module):
    """Three strided convolutions over time and their mean: windows ``(n, channels, readings)`` to ``(n, 64)``.

    Normalised by groups of channels within each window: nothing is remembered from batch to batch, so a second
    forward pass of the same step (SAM) leaves no trace.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv1d(channels, 16, kernel_size=8, stride=4, padding=2),
            nn.GroupNorm(4, 16),
            nn.ReLU(),
            nn.Conv1d(16, 32, kernel_size=5, stride=2, padding=2),
            nn.GroupNorm(4, 32),
            nn.ReLU(),
            nn.Conv1d(32, FEATURES, kernel_size=5, stride=2, padding=2),
            nn.GroupNorm(4, FEATURES),
            nn.ReLU(),
        )

    def forward(self, windows: Tensor) -> Tensor:
        """Return the features ``(n, 64)``."""
        features: Tensor = self.layers(windows).mean(-1)
        return features


class DenseEncoder(nn.Sequential):
    """Two dense layers: feature vectors ``(n, size)`` to ``(n, 64)``."""

    def __init__(self, size: int) -> None:
        super().__init__(nn.Linear(size, 128), nn.ReLU(), nn.Linear(128, FEATURES), nn.ReLU())


def three_layer_head(classes: int) -> nn.Sequential:
    """Return the paper's head, FC(d × 256), ReLU, FC(256 × 64), FC(64 × c) (its section 4.2)."""
    return nn.Sequential(nn.Linear(FEATURES, 256), nn.ReLU(), nn.Linear(256, 64), nn.Linear(64, classes))


class Branches(nn.Module):
    """An encoder and a head for each modality.

    Parameters
    ----------
    inputs : mapping of str to Tensor
        An example batch of each modality; 3-D gets a :class:`ConvEncoder`, 2-D a :class:`DenseEncoder`.
    classes : int
        Number of classes.
    shared_head : bool
        One linear layer for all modalities (MLA) in place of a three-layer head for each.
    seed : int
        Of the initial weights. A modality's weights depend on the seed and its own name's place in `order` only, so
        that every method starts a modality from the same encoder and, with heads of its own, the same head.
    order : sequence of str
        All modalities of the data set.
    """

    def __init__(
        self, inputs: Mapping[str, Tensor], classes: int, *, shared_head: bool, seed: int, order: Sequence[str]
    ) -> None:
        super().__init__()
        self.encoders = nn.ModuleDict()
        self.heads = nn.ModuleDict()
        self.head: nn.Linear | None = None
        with torch.random.fork_rng(devices=[]):
            for name, values in inputs.items():
                torch.manual_seed(1000 * seed + order.index(name))
                self.encoders[name] = (ConvEncoder if values.ndim == 3 else DenseEncoder)(values.shape[1])
                if not shared_head:
                    self.heads[name] = three_layer_head(classes)
            if shared_head:
                torch.manual_seed(1000 * seed + len(order))
                self.head = nn.Linear(FEATURES, classes)

    @classmethod
    def of(cls, data: DataSet, modalities: Sequence[str], *, shared_head: bool, seed: int) -> Branches:
        """Return the network for `modalities` of a data set."""
        inputs = {name: data.train.inputs[name] for name in modalities}
        return cls(inputs, data.classes, shared_head=shared_head, seed=seed, order=data.modalities)

    def head_of(self, modality: str) -> nn.Module:
        """Return the head that follows this modality's encoder."""
        return self.heads[modality] if self.head is None else self.head

    def branch(self, modality: str, inputs: Tensor) -> Tensor:
        """Return the logits ``(n, c)`` of one modality."""
        logits: Tensor = self.head_of(modality)(self.encoders[modality](inputs))
        return logits

    @torch.no_grad()
    def logits(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the logits of every modality of the network, without gradients and in evaluation mode."""
        training = self.training
        self.eval()
        out = {name: self.branch(name, inputs[name]) for name in self.encoders}
        self.train(training)
        return out
