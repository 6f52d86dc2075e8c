"""Batches of what lies in files: decoded ahead by processes of their own, the same whatever their number."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from .columns import Column

__all__ = ["Means", "batch_stream", "feed"]

Place = tuple[int, int]
"""Which example, and the seed of its random numbers."""

MODULUS = 2**63 - 25
"""A prime: seeds are numbers below it."""


@dataclass(frozen=True)
class Means:
    """By what a training computes; its numbers depend on the device in their last digits, on nothing else here.

    Attributes
    ----------
    device : str
        As torch calls it, such as "cpu" or "cuda:0".
    loaders : int
        Processes that decode files ahead of each modality; 0: the training's own does.
    """

    device: str = "cpu"
    loaders: int = 0


def batch_stream(examples: int, batch_size: int, seed: int) -> Iterator[Tensor]:
    """Yield the indices of one batch after another for ever, in a new order each pass; a short last batch is left out.

    Every modality of a run draws from a stream of its own with the run's seed: its i-th gradient step sees the same
    examples whatever the method.
    """
    generator = torch.Generator().manual_seed(seed)
    size = min(batch_size, examples)
    while True:
        order = torch.randperm(examples, generator=generator)
        for start in range(0, examples - size + 1, size):
            yield order[start : start + size]


class _Examples(Dataset[Tensor]):
    """A column as a loader indexes it."""

    def __init__(self, column: Column) -> None:
        self._column = column

    def __getitem__(self, place: Place) -> Tensor:
        return self._column.example(*place)


@dataclass(frozen=True)
class _Batches:
    """The batches of a stream from one of them on, each example with the seed of its random numbers."""

    examples: int
    batch_size: int
    seed: int
    begin: int

    def __iter__(self) -> Iterator[list[Place]]:
        stream = islice(batch_stream(self.examples, self.batch_size, self.seed), self.begin, None)
        for number, chosen in enumerate(stream, start=self.begin):
            yield [(place, _seed(self.seed, number, place)) for place in chosen.tolist()]


def _seed(run: int, batch: int, place: int) -> int:
    """Return the seed of an example's random numbers: another one in each run and each pass, alike for all modalities.

    So frames of one clip are cropped alike in every modality.
    """
    return ((run * 1_000_003 + batch) * 1_000_003 + place + 1) * 6_364_136_223_846_793_005 % MODULUS


def feed(column: Column, batch_size: int, seed: int, begin: int, means: Means) -> Iterator[Tensor]:
    """Return the batches ``(n, …)`` of a column's training examples, from the one with number `begin` on, for ever."""
    loader: DataLoader[Tensor] = DataLoader(
        _Examples(column),
        batch_sampler=_Batches(len(column), batch_size, seed, begin),
        num_workers=means.loaders,
        pin_memory=torch.device(means.device).type == "cuda",
        generator=torch.Generator().manual_seed(seed),  # torch's own, of which dropout draws, is left alone
    )
    return iter(loader)
