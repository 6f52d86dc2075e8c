"""Forward pre-hooks that see Z, the input of each projected layer, and hand its rows over once a step has succeeded."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Collection, Iterable
from typing import Any

import torch
from torch import nn
from torch._compile import _disable_dynamo

from ._kinds import Ear
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
    augment : bool
        Whether a constant 1 stands behind the features of each group, for layers with a trained bias.
    """

    def __init__(self, layers: Iterable[Layer], reduce: str, augment: bool = False) -> None:
        self._pending: deque[tuple[str, torch.Tensor]] = deque(maxlen=_MOST)
        self.sink: Callable[[str, torch.Tensor], None] | None = None
        self.muted = False
        self._layers: list[Layer] = []
        self._reduce = reduce
        self._augment = augment
        self._hooks: dict[nn.Module, _Hook] = {}
        self._handles: list[Any] = []
        self._close = weakref.finalize(self, _remove, self._handles)
        self.add(layers)

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy listens at the copied layers, and has heard nothing yet."""
        return FeatureTap, (self._layers, self._reduce, self._augment)

    def add(self, layers: Iterable[Layer]) -> None:
        """Listen at these layers, too; what is listened at already stays so, with what has been tied to it since."""
        for layer in layers:
            if layer not in self._layers:
                self._layers.append(layer)
            for ear in layer.ears:
                hook = self._hooks.get(ear.module)
                if hook is None:
                    _remove_deaf(ear.module)
                    hook = self._hooks[ear.module] = _Hook(self)
                    self._handles.append(ear.module.register_forward_pre_hook(hook, with_kwargs=True))
                hook.add(layer, ear)

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

    def listens(self, module: nn.Module) -> bool:
        """Whether a forward pass of `module` counts now."""
        if self.sink is not None:
            return True
        return (
            not self.muted
            and torch.is_grad_enabled()
            and module.training
            and torch._C._current_graph_task_id() == -1  # else activation checkpointing repeats a forward pass
        )

    def see(self, heard: list[tuple[Layer, Ear]], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note the arguments of one forward pass; the layers of one module that are given one tensor share its rows."""
        made: dict[tuple[int, bool], torch.Tensor] = {}
        for layer, ear in heard:
            if self.sink is None and layer.weight.is_cuda and torch.cuda.is_current_stream_capturing():
                continue  # nothing is computed yet
            augment = self._augment and layer.bias is not None
            given = id(ear.given(args, kwargs)), augment
            if given not in made:
                made[given] = layer.rows_of(ear.features(args, kwargs), self._reduce, augment, ear)
            if self.sink is None:
                self._pending.append((layer.name, made[given]))
            else:
                self.sink(layer.name, made[given])


class _Hook:
    """Hands the arguments of one module to the tap, which it does not keep alive: no hook outlives its optimizer.

    A copy of a module takes its hooks along. Such a hook is deaf, and removes itself when it is called: what the copy
    is given is no feature of the layer that is trained.
    """

    def __init__(self, tap: FeatureTap | None = None) -> None:
        self._tap = None if tap is None else weakref.ref(tap)
        self._heard: list[tuple[Layer, Ear]] = []

    def __reduce__(self) -> tuple[Any, ...]:
        return _Hook, ()

    @_disable_dynamo  # a compiled model calls it between two graphs
    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.deaf:
            _remove_deaf(module)
            return
        tap = None if self._tap is None else self._tap()
        if tap is not None and tap.listens(module):
            tap.see(self._heard, args, kwargs)

    def add(self, layer: Layer, ear: Ear) -> None:
        """Let what `ear` hears be features of `layer`."""
        if (layer, ear) not in self._heard:
            self._heard.append((layer, ear))

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
