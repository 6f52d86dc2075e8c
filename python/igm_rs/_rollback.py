"""The way back from a step that fails half-way: weights, the base's state, covariances, projectors and counters."""

from __future__ import annotations

from typing import Any

import torch

from ._core import Core, alike

__all__ = ["Rollback"]


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
    """

    def __init__(
        self, core: Core, active: str, params: list[torch.Tensor], before: list[torch.Tensor], *, deep: bool
    ) -> None:
        self._core = core
        self._projection = core.projection.checkpoint()
        self._counters = core.counters.copy()
        self._stats = core.last_stats
        state = core.base.state
        self._tensors: list[torch.Tensor] = []
        self._groups = [(group, self._noted(group, deep)) for group in core.base.param_groups]
        entries = [(p, state.get(p)) for _, members in core.modalities.active[active] for p in members]
        if deep:
            self._entries = [(p, entry, self._noted(entry, deep)) for p, entry in entries]
        else:  # nothing within an entry's own containers is changed
            self._entries = [(p, entry, entry and dict(entry)) for p, entry in entries]
        self._copies = self._room(core.spare.get(active, ()))
        if self._copies:
            core.spare[active] = self._copies
            torch._foreach_copy_(self._copies, self._tensors)
        self._tensors += params
        self._copies = self._copies + before

    def pairs(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Return each tensor that may change with the copy of what it was."""
        return list(zip(self._tensors, self._copies, strict=True))

    def undo(self) -> None:
        """Put everything back, to the bit."""
        core = self._core
        with torch.no_grad():
            if self._tensors:
                torch._foreach_copy_(self._tensors, self._copies)
        for group, noted in self._groups:
            _put_back(group, noted)
        state = core.base.state
        for p, entry, noted in self._entries:
            if entry is None:
                state.pop(p, None)
            else:
                state[p] = _put_back(entry, noted)
        self._projection()
        core.counters.put_back(self._counters)
        core.last_stats = self._stats

    def _noted(self, value: Any, deep: bool) -> Any:
        """The same containers anew; tensors in them are listed, to be copied together."""
        if isinstance(value, dict):
            return {key: each if key == "params" else self._noted(each, deep) for key, each in value.items()}
        if isinstance(value, list):
            return [self._noted(each, deep) for each in value]
        if deep and isinstance(value, torch.Tensor):
            self._tensors.append(value)
        return value

    def _room(self, kept: Any) -> list[torch.Tensor]:
        """Memory for the listed tensors, that of the step before where it fits."""
        spare = list(kept)[: len(self._tensors)]
        spare += [None] * (len(self._tensors) - len(spare))
        return [
            room if room is not None and alike(room, tensor) else torch.empty_like(tensor, requires_grad=False)
            for room, tensor in zip(spare, self._tensors, strict=True)
        ]


def _put_back(entry: dict[str, Any], noted: dict[str, Any]) -> dict[str, Any]:
    """Let `entry`, the same object, hold what was noted."""
    entry.clear()
    entry.update(noted)
    return entry
