"""Forward pre-hooks that see Z, the input of each projected layer, and hand its rows over once a step has succeeded."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Collection, Iterable
from typing import Any

import torch
from torch import nn
from torch._compile import _disable_dynamo

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
        self._pending: deque[tuple[str, torch.Tensor]] = deque(maxlen=_MOST)
        self.sink: Callable[[str, torch.Tensor], None] | None = None
        self.muted = False
        self._layers = list(layers)
        self._reduce = reduce
        handles = []
        for layer in self._layers:
            _remove_deaf(layer.module)
            handles.append(layer.module.register_forward_pre_hook(_Hook(self, layer), with_kwargs=True))
        self._close = weakref.finalize(self, _remove, handles)

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy listens at the copied layers, and has heard nothing yet."""
        return FeatureTap, (self._layers, self._reduce)

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
        elif (
            not self.muted
            and torch.is_grad_enabled()
            and layer.module.training
            and torch._C._current_graph_task_id() == -1  # else activation checkpointing repeats a forward pass
            and not (features.is_cuda and torch.cuda.is_current_stream_capturing())  # nothing is computed yet
        ):
            self._pending.append((layer.name, _igm_rs.batch_rows(features, self._reduce)))


class _Hook:
    """Hands the input of one layer to the tap, which it does not keep alive: no hook outlives its optimizer.

    A copy of a module takes its hooks along. Such a hook is deaf, and removes itself when it is called: what the copy
    is given is no feature of the layer that is trained.
    """

    def __init__(self, tap: FeatureTap | None = None, layer: Layer | None = None) -> None:
        self._tap = None if tap is None else weakref.ref(tap)
        self._layer = layer

    def __reduce__(self) -> tuple[Any, ...]:
        return _Hook, ()

    @_disable_dynamo  # a compiled model calls it between two graphs
    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.deaf:
            _remove_deaf(module)
            return
        tap = None if self._tap is None else self._tap()
        if tap is not None and self._layer is not None:
            tap.see(self._layer, args[0] if args else kwargs["input"])

    @property
    def deaf(self) -> bool:
        """Whether this is a copy."""
        return self._tap is None


def _remove_deaf(module: nn.Module) -> None:
    for key, hook in list(module._forward_pre_hooks.items()):
        if isinstance(hook, _Hook) and hook.deaf:
            del module._forward_pre_hooks[key]
            module._forward_pre_hooks_with_kwargs.pop(key, None)


def _remove(handles: list[Any]) -> None:
    for handle in handles:
        handle.remove()
