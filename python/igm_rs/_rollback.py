"""The way back from a step that fails half-way: weights, the base's state, covariances, projectors and counters."""

from __future__ import annotations

import contextlib
from typing import Any

import torch

from ._core import Core, alike

__all__ = ["Rollback", "copy_"]


class Rollback:
    """Everything that a step of `active` changes, as it is now.

    Parameters
    ----------
    core : Core
        The optimizer's parts.
    active : str
        Who steps.
    params, before : lists of Tensor
        Weights, and memory that holds a copy of each; they are put back from it. Two empty lists where the step of the
        base optimizer is one that is taken wholly or not at all.
    deep : bool
        Whether to copy the tensors in the base's state as well; without it they are taken to be changed by nobody.
    own_memory : bool
        Whether these copies have memory of their own, instead of that of the step before.
    """

    def __init__(
        self,
        core: Core,
        active: str,
        params: list[torch.Tensor],
        before: list[torch.Tensor],
        *,
        deep: bool,
        own_memory: bool = False,
    ) -> None:
        self._core = core
        self._projection = core.projection.checkpoint()
        self._counters = core.counters.copy()
        self._stats = core.last_stats
        self._params, self._before = params, before
        state = core.base.state
        self._tensors: list[torch.Tensor] = []
        noted = self._noted if deep else _shallow
        self._groups = [(group, noted(group)) for group in core.base.param_groups]
        entries = [(p, state.get(p)) for _, members in core.modalities.active[active] for p in members]
        if deep:  # some optimizers keep what belongs to no parameter there
            entries += [(key, entry) for key, entry in state.items() if not isinstance(key, torch.Tensor)]
        self._size = len(state)
        self._entries = [(key, entry, noted(entry)) for key, entry in entries]
        self._copies = self._room([] if own_memory else core.spare.get(active, []))
        if self._copies:
            if not own_memory:
                core.spare[active] = self._copies
            copy_(self._copies, self._tensors)

    def pairs(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Return each tensor that may change with the copy of what it was."""
        return [*zip(self._params, self._before, strict=True), *zip(self._tensors, self._copies, strict=True)]

    def grown(self) -> bool:
        """Whether the base's state holds something that was not there."""
        state = self._core.base.state
        return len(state) > self._size or any(
            isinstance(entry, dict) and len(entry) > len(noted) for _, entry, noted in self._entries
        )

    def undo(self) -> None:
        """Put everything back, to the bit; what cannot be does not keep the rest from it."""
        core = self._core
        with contextlib.ExitStack() as last_first:
            last_first.callback(setattr, core, "last_stats", self._stats)
            last_first.callback(core.counters.put_back, self._counters)
            last_first.callback(self._projection)
            last_first.callback(self._put_back_state, core.base.state)
            for group, noted in self._groups:
                last_first.callback(_put_back, group, noted)
            last_first.callback(copy_, self._tensors, self._copies)
            last_first.callback(copy_, self._params, self._before)

    def _put_back_state(self, state: Any) -> None:
        for key, entry, noted in self._entries:
            if entry is None:
                state.pop(key, None)
            elif isinstance(entry, dict):
                state[key] = entry
                _put_back(entry, noted)
            else:
                state[key] = noted

    def _noted(self, value: Any) -> Any:
        """The same containers anew; tensors in them are listed, to be copied together."""
        if isinstance(value, dict):
            return {key: each if key == "params" else self._noted(each) for key, each in value.items()}
        if isinstance(value, list):
            return [self._noted(each) for each in value]
        if isinstance(value, torch.Tensor):
            self._tensors.append(value)
        return value

    def _room(self, kept: list[torch.Tensor]) -> list[torch.Tensor]:
        """Memory for the listed tensors, that of the step before where it fits."""
        spare: list[torch.Tensor | None] = [*kept[: len(self._tensors)]]
        spare += [None] * (len(self._tensors) - len(spare))
        return [
            room if room is not None and alike(room, tensor) else torch.empty_like(tensor, requires_grad=False)
            for room, tensor in zip(spare, self._tensors, strict=True)
        ]


def copy_(tensors: list[torch.Tensor], sources: list[torch.Tensor]) -> None:
    """Copy bit for bit, with one call for each device and dtype: a mixed list would take one for each tensor."""
    by_kind: dict[tuple[torch.device, torch.dtype], tuple[list[torch.Tensor], list[torch.Tensor]]] = {}
    for tensor, source in zip(tensors, sources, strict=True):
        there, here = by_kind.setdefault((tensor.device, tensor.dtype), ([], []))
        there.append(tensor)
        here.append(source)
    with torch.no_grad():
        for there, here in by_kind.values():
            torch._foreach_copy_(there, here)


def _shallow(value: Any) -> Any:
    return dict(value) if isinstance(value, dict) else value


def _put_back(entry: dict[str, Any], noted: dict[str, Any]) -> None:
    """Let `entry`, the same object, hold what was noted."""
    entry.clear()
    entry.update(noted)
