"""Forward pre-hooks that see Z, the input of each projected layer, and hand its rows over once a step has succeeded."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Collection, Iterable
from typing import Any

import torch
from torch import nn

from . import _igm_rs
from ._layers import Layer

__all__ = ["FeatureTap"]

Rows = list[tuple[str, torch.Tensor]]

_MOST = 65536
"""Forward passes that may wait for their step; the oldest are forgotten where nobody ever steps."""


class FeatureTap:
    """Listens at the projected layers.

    While training, the rows of a forward pass are *pending*: they count when the step that they belong to succeeds
    (:meth:`take`), and are dropped when it fails or is skipped (:meth:`drop`). With a `sink` set every forward
    pass goes there instead, whatever the mode of the module and of autograd.

    Parameters
    ----------
    layers : iterable of Layer
        Each layer once.
    reduce : {"mean", "samples"}
        What a batch contributes, see `_igm_rs.batch_rows`.
    """

    def __init__(self, layers: Iterable[Layer], reduce: str) -> None:
        self._reduce = reduce
        self._pending: deque[tuple[str, torch.Tensor]] = deque(maxlen=_MOST)
        self.sink: Callable[[str, torch.Tensor], None] | None = None
        self.muted = False
        handles = [layer.module.register_forward_pre_hook(_hook(self, layer), with_kwargs=True) for layer in layers]
        self._close = weakref.finalize(self, _remove, handles)

    def close(self) -> None:
        """Remove the hooks from the modules."""
        self._close()

    def take(self, only: Collection[str] | None = None) -> Rows:
        """Return the pending rows, (layer name, rows) in the order of the forward passes, and forget them.

        With `only` those of other layers stay: of a forward pass of several modalities each step takes its own.
        """
        rows = [entry for entry in self._pending if only is None or entry[0] in only]
        left = [] if only is None else [entry for entry in self._pending if entry[0] not in only]
        self._pending.clear()
        self._pending.extend(left)
        return rows

    def drop(self) -> None:
        """Forget the pending rows."""
        self._pending.clear()

    def see(self, layer: Layer, features: torch.Tensor) -> None:
        """Note the input of one forward pass of `layer`."""
        if features.dim() == 1:  # one sample without a batch dimension, as Linear takes it
            features = features.unsqueeze(0)
        if self.sink is not None:
            self.sink(layer.name, _igm_rs.batch_rows(features, self._reduce))
        elif not self.muted and torch.is_grad_enabled() and layer.module.training:
            self._pending.append((layer.name, _igm_rs.batch_rows(features, self._reduce)))


def _hook(tap: FeatureTap, layer: Layer) -> Any:
    """Make a hook that does not keep `tap` alive: no hook outlives its optimizer."""
    listener = weakref.ref(tap)

    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        alive = listener()
        if alive is not None:
            alive.see(layer, args[0] if args else kwargs["input"])

    return hook


def _remove(handles: list[Any]) -> None:
    for handle in handles:
        handle.remove()
