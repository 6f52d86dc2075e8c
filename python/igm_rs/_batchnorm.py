"""BatchNorm statistics advance once a step: SAM's second pass normalises with its batch and records nothing."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

from torch import nn

__all__ = ["Statistics"]


class Statistics:
    """The running statistics of all BatchNorm layers among `modules`, which can be held still.

    A layer that does not record (evaluation mode, ``track_running_stats=False``) is left as it is. No layer stays held
    when this object goes.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        # weak: the layers are the model's
        self._layers = weakref.WeakSet(
            layer for root in modules for layer in root.modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm)
        )
        self._held: list[nn.modules.batchnorm._BatchNorm] = []
        weakref.finalize(self, _release, self._held)

    def __reduce__(self) -> tuple[Any, ...]:
        return Statistics, (list(self._layers),)

    def hold(self) -> None:
        """Record nothing until :meth:`release`."""
        for layer in self._layers:
            if layer.track_running_stats:
                self._held.append(layer)
                layer.track_running_stats = False

    def release(self) -> None:
        """Record again where it was recorded before."""
        _release(self._held)


def _release(held: list[nn.modules.batchnorm._BatchNorm]) -> None:
    while held:
        held[-1].track_running_stats = True
        held.pop()
