"""Batches of what lies in files: decoded ahead by processes of their own, the same whatever their number."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from .columns import Column
from .on_disk.faults import DataFault

__all__ = ["Means", "alike", "at_once", "batch_stream", "feed", "in_order", "lost_process_told"]

Place = tuple[int, int | None]
"""Which example, and the seed of its random numbers; None: without any."""

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


@contextmanager
def alike() -> Iterator[None]:
    """Let cuDNN compute alike each time; ``torch.backends.cudnn.flags`` would change what it is not told, too."""
    cudnn = torch.backends.cudnn
    before = cudnn.deterministic, cudnn.benchmark
    cudnn.deterministic, cudnn.benchmark = True, False
    try:
        yield
    finally:
        cudnn.deterministic, cudnn.benchmark = before


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


class _Examples(Dataset[Any]):
    """A column as a loader indexes it; an error is handed over, so that its message comes out as it was said.

    What a column cannot decode is a fault of the data, by whatever ValueError it says so.
    """

    def __init__(self, column: Column) -> None:
        self._column = column

    def __getitem__(self, place: Place) -> Tensor | DataFault:
        try:
            return self._column.example(*place)
        except ValueError as error:
            return DataFault(str(error))


def _side_by_side(examples: list[Tensor | DataFault]) -> Tensor | DataFault:
    """Return a batch, or the first error."""
    for each in examples:
        if isinstance(each, DataFault):
            return each
    return torch.stack(examples)  # type: ignore[arg-type]  # all are tensors


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
    """Yield the batches ``(n, …)`` of a column's training examples, from the one with number `begin` on, for ever.

    Raises
    ------
    ValueError
        If a file cannot be decoded: names it.
    ChildProcessError
        If a process that decodes is gone.
    """
    return _loaded(column, _Batches(len(column), batch_size, seed, begin), seed, means)


def in_order(values: Tensor | Column, size: int, means: Means) -> Iterator[Tensor]:
    """Yield examples, so many at a time, as they are measured on; raises as :func:`feed`."""
    places = range(0, len(values), size)
    if isinstance(values, Column):
        ends = [(start, min(start + size, len(values))) for start in places]
        batches: list[list[Place]] = [[(place, None) for place in range(*each)] for each in ends]
        return _loaded(values, batches, 0, means)
    return (values[start : start + size] for start in places)


def _loaded(column: Column, batches: Iterable[list[Place]], seed: int, means: Means) -> Iterator[Tensor]:
    loader: DataLoader[Tensor] = DataLoader(
        _Examples(column),
        batch_sampler=batches,
        collate_fn=_side_by_side,
        num_workers=means.loaders,
        pin_memory=torch.device(means.device).type == "cuda",
        generator=torch.Generator().manual_seed(seed),  # torch's own, of which dropout draws, is left alone
    )
    with lost_process_told():
        for batch in loader:
            if isinstance(batch, DataFault):
                raise batch
            yield batch


@contextmanager
def lost_process_told() -> Iterator[None]:
    """Say what may be done where a process that decodes is gone.

    Raises
    ------
    ChildProcessError
        In place of torch's RuntimeError.
    """
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker (pid"):  # "Caught … in DataLoader worker" is an error of it
            raise
        raise ChildProcessError(
            f"a process that decodes files is gone ({str(error).splitlines()[0].rstrip('. ')}), most likely for want "
            "of memory or of room in /dev/shm: try fewer --loaders; --resume goes on from what was saved, where "
            "trainings are kept"
        ) from error


NUMBERS_AT_ONCE = 2**26
"""Numbers of one modality that are decoded at a time, unless one example has more."""


def at_once(inputs: Iterable[Tensor | Column], most: int, numbers: int | None = None) -> int | None:
    """Return how many examples, up to `most`, are `numbers` at most of each column; None where all are tensors.

    Without `numbers` they are so many as are decoded at a time.
    """
    numbers = NUMBERS_AT_ONCE if numbers is None else numbers
    sizes = [math.prod(values.shape[1:]) for values in inputs if isinstance(values, Column)]
    return min(most, max(1, numbers // max(sizes))) if sizes else None
