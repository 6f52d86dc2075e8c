"""A second pass on the head alone: what the encoders gave in the first pass stands in for their forward passes."""

from __future__ import annotations

import copy
import dataclasses
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch._compile import _disable_dynamo

from ._modalities import Modalities
from ._random import RandomState

__all__ = ["HeadPass", "head_pass_of"]

_MOST = 1024
"""Forward passes of one encoder that may wait for their step; the oldest are forgotten where nobody ever steps."""

_Call = tuple[Any, RandomState | None]
"""What one forward pass gave, and torch's random state after it."""


class HeadPass:
    """Keeps the outputs of the encoders, and lets them take the place of the encoders' forward passes.

    Every forward pass of an encoder with gradients enabled is noted until :meth:`drop`. Between :meth:`begin` and
    :meth:`end` the encoders of the modality that steps return what was noted, in the order of the calls and detached;
    gradients of all that is not of its head are out of everybody's reach.

    Parameters
    ----------
    encoders, heads : mappings of str to list of Module
        By modality; no encoder holds another.
    random : bool
        Whether the second pass goes on with the random state that an encoder has left in the first.
    """

    def __init__(
        self, encoders: Mapping[str, list[nn.Module]], heads: Mapping[str, list[nn.Module]], *, random: bool
    ) -> None:
        self._encoders: dict[str, list[nn.Module]] = {}
        self._heads: dict[str, list[nn.Module]] = {}
        self._random = random
        self._calls: dict[nn.Module, deque[_Call]] = {}
        self._replaced: list[tuple[nn.Module, Any]] = []
        self._hidden: list[tuple[torch.Tensor, torch.Tensor | None]] = []
        self._handles: list[Any] = []
        weakref.finalize(self, _remove, self._handles)
        for name, modules in encoders.items():
            self.add(name, modules, heads[name])

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy listens at the copied encoders, and has heard nothing yet."""
        return _copy, (self._encoders, self._heads, self._random)

    def add(self, modality: str, encoders: Iterable[nn.Module], head: Iterable[nn.Module]) -> None:
        """Listen at the encoders of one more modality."""
        self._encoders[modality], self._heads[modality] = list(encoders), list(head)
        for module in self._encoders[modality]:
            if module not in self._calls:
                self._calls[module] = deque(maxlen=_MOST)
                _remove_deaf(module)
                self._handles.append(module.register_forward_hook(_Hook(self), prepend=True))

    def parameters(self, modality: str) -> set[torch.Tensor]:
        """The parameters of the modality's head, which alone are perturbed."""
        return {p for module in self._heads[modality] for p in module.parameters()}

    def drop(self) -> None:
        """Forget what the forward passes gave."""
        for calls in self._calls.values():
            calls.clear()

    def begin(self, modality: str, params: Iterable[torch.Tensor]) -> None:
        """Let the encoders of `modality` stand still, and hide the gradients of `params` but for those of its head."""
        head = self.parameters(modality)
        for p in params:
            if p not in head:
                self._hidden.append((p, p.grad))
                p.grad = None
        for module in self._encoders[modality]:
            stand_in = _stand_in(module, self._calls[module])
            self._replaced.append((module, vars(module).get("forward")))
            vars(module)["forward"] = stand_in

    def check(self, modality: str) -> None:
        """Raise RuntimeError where the second pass has called an encoder less often than the first."""
        for module in self._encoders[modality]:
            if self._calls[module]:
                raise RuntimeError(_OTHER_CALLS.format(type(module).__name__, "less"))

    def end(self) -> None:
        """Let the encoders compute again, and put their gradients back; what an interrupt has left is done next time.

        Each entry is struck off when it is put back, and not before.
        """
        while self._replaced:
            module, own = self._replaced[-1]
            if own is None:
                vars(module).pop("forward", None)
            else:
                vars(module)["forward"] = own
            self._replaced.pop()
        while self._hidden:
            p, gradient = self._hidden[-1]
            p.grad = gradient
            self._hidden.pop()

    def hear(self, module: nn.Module, output: Any) -> None:
        """Note what one forward pass gave."""
        if _counts() and not self._replaced:
            random = RandomState({p.device for p in module.parameters()}) if self._random else None
            self._calls[module].append((_detached(output), random))


_OTHER_CALLS = (
    "sam_scope='head': the second pass calls {} {} often than the passes before the step did, whose outputs stand in "
    "for it; expected the same calls in both passes, and forget_step() after forward passes that no step follows"
)


class _Hook:
    """Hands the output of an encoder to the pass, which it does not keep alive: no hook outlives its optimizer.

    A copy of a module takes its hooks along. Such a hook is deaf, and removes itself when it is called.
    """

    def __init__(self, listener: HeadPass | None = None) -> None:
        self._listener = None if listener is None else weakref.ref(listener)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Hook, ()

    @_disable_dynamo  # a compiled model calls it between two graphs
    def __call__(self, module: nn.Module, _: tuple[Any, ...], output: Any) -> None:
        if self.deaf:
            _remove_deaf(module)
            return
        listener = None if self._listener is None else self._listener()
        if listener is not None:
            listener.hear(module, output)

    @property
    def deaf(self) -> bool:
        """Whether this is a copy."""
        return self._listener is None


def head_pass_of(
    modalities: Modalities, heads: Any, head: Any, model: nn.Module | None, *, random: bool
) -> HeadPass:
    """Return the head pass of an optimizer that was given these.

    Raises
    ------
    ValueError
        Neither `heads` nor `head`; a modality without a module beside its head; a module that holds a part of it.
    """
    if heads is None and head is None:
        raise ValueError("sam_scope is 'head' without a head, expected heads= or head=")
    of = {name: _modules(heads[name] if head is None else head, model) for name in modalities.names}
    return HeadPass({name: encoders_of(modalities, name, of[name]) for name in of}, of, random=random)


def encoders_of(modalities: Modalities, name: str, head: list[nn.Module]) -> list[nn.Module]:
    """Return the modules of a modality that hold nothing of its head, without those within another of them."""
    label = f"modalities[{name!r}]"
    of_head = {p for module in head for p in module.parameters()}
    inside = {module for one in head for module in one.modules()}
    encoders: list[nn.Module] = []
    for path, root in modalities.modules[name]:
        own = set(root.parameters())
        if root in inside or (own and own <= of_head):
            continue
        if own & of_head:
            raise ValueError(
                f"sam_scope is 'head', and {path!r} of {label} ({type(root).__name__}) holds the head of {name!r} and "
                "more, expected encoders and head as separate modules"
            )
        encoders.append(root)
    if not encoders:
        raise ValueError(
            f"sam_scope is 'head', and {label} names no module but the head's, expected the encoder's modules"
        )
    within = {module for root in encoders for module in root.modules() if module is not root}
    return list(dict.fromkeys(root for root in encoders if root not in within))


def _copy(encoders: dict[str, list[nn.Module]], heads: dict[str, list[nn.Module]], random: bool) -> HeadPass:
    return HeadPass(encoders, heads, random=random)


def _modules(value: Any, model: nn.Module | None) -> list[nn.Module]:
    """The modules of a head, which may be given by their names in `model`; they have been looked up before."""
    if isinstance(value, nn.Module):
        return [value]
    if isinstance(value, str):
        return [] if model is None else [model.get_submodule(value)]
    return [module for member in value for module in _modules(member, model)]


def _counts() -> bool:
    """Whether a forward pass is one of training, and not one that activation checkpointing repeats."""
    return torch.is_grad_enabled() and torch._C._current_graph_task_id() == -1


def _stand_in(module: nn.Module, calls: deque[_Call]) -> Callable[..., Any]:
    """Return what takes the place of `module.forward`: what it gave before, once for each of the noted calls."""
    usual = module.forward

    @_disable_dynamo
    def forward(*args: Any, **kwargs: Any) -> Any:
        if not _counts():  # such a call was not noted either
            return usual(*args, **kwargs)
        if not calls:
            raise RuntimeError(_OTHER_CALLS.format(type(module).__name__, "more"))
        output, random = calls.popleft()
        if random is not None:
            random.restore()
        return output

    return forward


def _detached(value: Any) -> Any:
    """A copy of an output without its graph: tensors in tuples, lists, mappings and dataclasses, or alone.

    What follows the encoder may change its output in place, so memory is not shared.
    """
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, tuple):
        parts = [_detached(each) for each in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    if isinstance(value, list):
        return [_detached(each) for each in value]
    if isinstance(value, dict):
        mine = copy.copy(value)
        for key, each in value.items():
            mine[key] = _detached(each)
        return mine
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        mine = copy.copy(value)
        for field in dataclasses.fields(value):
            object.__setattr__(mine, field.name, _detached(getattr(value, field.name)))
        return mine
    return value


def _remove_deaf(module: nn.Module) -> None:
    for key, hook in list(module._forward_hooks.items()):
        if isinstance(hook, _Hook) and hook.deaf:
            del module._forward_hooks[key]


def _remove(handles: list[Any]) -> None:
    for handle in handles:
        handle.remove()
