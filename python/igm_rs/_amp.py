"""Gradients of a loss that a GradScaler has scaled: both passes are unscaled, and the scaler hears of both."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["Scaling"]


class _Pass:
    """What a scaler takes for an optimizer: the parameters of one pass. It keeps its notes by the object's identity."""

    def __init__(self) -> None:
        self.param_groups: list[dict[str, Any]] = []


class Scaling:
    """Tells a ``torch.amp.GradScaler`` of the two passes of a step, through its public ``unscale_`` alone.

    Each pass is an optimizer of its own to the scaler, so that ``scaler.update()`` finds an infinity in either and
    halves its scale once.
    """

    def __init__(self) -> None:
        self._passes = _Pass(), _Pass()
        self._left: list[_Pass] = []
        self._told = False

    def unscale(self, scaler: Any, params: list[torch.Tensor], which: int) -> None:
        """Divide the gradients of `params` by the scale; `which` is 0 for the first pass, 1 for the second.

        Raises
        ------
        RuntimeError
            When ``scaler.update()`` was not called since the step before.
        """
        self._told = True
        told = self._passes[which]
        told.param_groups = [{"params": params}]
        try:
            scaler.unscale_(told)
        finally:
            told.param_groups = []

    def abandon(self) -> None:
        """Let the next step begin anew with the scaler: this one has failed, and perhaps nobody calls ``update``."""
        if not self._told:
            return
        self._told = False
        self._left += self._passes  # kept alive: the scaler may still know them by their identity
        self._passes = _Pass(), _Pass()
