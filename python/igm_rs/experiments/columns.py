"""Modalities that lie in files: examples are decoded when they are asked for, alike however many processes do it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

__all__ = ["NETWORKS", "SPEAKERS", "Column", "Reading", "seeded"]

NETWORKS = ("default", "small", "pretrained", "frozen")
"""Which encoders a data set is trained with, see :attr:`Reading.network`."""

SPEAKERS = ("apart", "shared")
"""Whether somebody may be in two splits, see :attr:`Reading.speakers`."""


@dataclass(frozen=True)
class Reading:
    """How a data set is read that lies in a folder of the user's.

    Attributes
    ----------
    network : {"default", "small", "pretrained", "frozen"}
        The set's own encoders at full size; the same with few channels and small inputs, to try a folder out;
        pretrained ones in their place, trained on; the same ones, left as they are.
    weights : mapping of str to Path
        By modality, a file or folder with the weights that its encoder begins with.
    skip_broken : bool
        Whether examples with something wrong are left out and counted, instead of an error.
    speakers : {"apart", "shared"}
        Whether a speaker in two splits is something wrong, or allowed, as the paper's own split of CREMA-D has it.
    """

    network: str = "default"
    weights: Mapping[str, Path] = field(default_factory=dict)
    skip_broken: bool = False
    speakers: str = "apart"

    def __post_init__(self) -> None:
        """Check the choices.

        Raises
        ------
        ValueError
            Names the field, its value and what was expected.
        """
        for name, known in (("network", NETWORKS), ("speakers", SPEAKERS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is {getattr(self, name)!r}, expected {', '.join(map(repr, known))}")

    def __hash__(self) -> int:
        return hash((self.network, tuple(sorted(self.weights.items())), self.skip_broken, self.speakers))

    @property
    def small(self) -> bool:
        """Whether networks and inputs are small."""
        return self.network == "small"


class Column(ABC):
    """One modality of a split, in files; stands where a tensor ``(n, …)`` would.

    ``column[chosen]`` gives the chosen examples as they are measured on. Pickled to the processes that decode.
    """

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of examples."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """``(n, …)``, with the shape of an example."""

    @abstractmethod
    def example(self, place: int, seed: int | None) -> Tensor:
        """Decode one example.

        Parameters
        ----------
        place : int
            Which one.
        seed : int, optional
            Of all random numbers (which frames, crops, flips), for training: the same seed, the same example. None: as
            for measuring, without any.

        Raises
        ------
        ValueError
            If a file cannot be decoded: names it.
        """

    @abstractmethod
    def digest_lines(self) -> Iterable[str]:
        """Yield what the examples depend on: relative path and size of every file, and how they are decoded."""

    def __getitem__(self, chosen: Tensor | slice | Sequence[int]) -> Tensor:
        """Return the chosen examples side by side, without random numbers."""
        places = range(len(self))[chosen] if isinstance(chosen, slice) else [int(place) for place in chosen]
        return torch.stack([self.example(place, None) for place in places])


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Let torch's own generator give the numbers of a seed, here; it goes on afterwards as if nothing had been drawn.

    Transforms of torchvision draw from it. Generators of devices are left alone, unlike by ``torch.manual_seed``.
    """
    own = torch.default_generator
    before = own.get_state()
    try:
        own.manual_seed(seed)
        yield
    finally:
        own.set_state(before)
