"""What a data set says about a modality's encoder before it is made."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

__all__ = ["EncoderSpec"]


@dataclass(frozen=True)
class EncoderSpec:
    """How an encoder is made, and what a head needs to know of it.

    Attributes
    ----------
    make : callable
        Returns the encoder, in training mode; can be pickled. Random weights are drawn from torch's global generator.
    width : int
        d of its features ``(n, d)``.
    narrowed : int, optional
        The width that the head's first layer makes of `width`, before the head proper; None: there is no such layer.
    digest : str
        16 hexadecimal digits that tell its weights' files apart; "" for random weights.
    """

    make: Callable[[], nn.Module]
    width: int
    narrowed: int | None = None
    digest: str = ""
