"""Where Algorithm 1 stands: finished turns, the open one, and the steps since each T was made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

__all__ = ["Counters"]


@dataclass
class Counters:
    """Plain counters, saved with the optimizer.

    ``open`` is the modality whose turn is under way or was interrupted, ``explicit`` whether it was opened by
    ``turn()`` rather than by steps outside any turn; ``started[j]`` whether j's present Ȳ has begun; ``since[j]`` the
    steps of j since its T was made; ``taken[j]`` the steps of j, of which SAM makes every k-th; ``inert`` the steps whose
    perturbation moved no weight, so that they had no second pass.
    ``pending[j]`` counts, on the device, steps of j that are counted here as taken and could not be (:meth:`settle`).
    """

    names: Sequence[str]
    turns: int = 0
    steps: int = 0
    skipped: int = 0
    unperturbed: int = 0
    inert: int = 0
    open: str | None = None
    explicit: bool = False
    replaced: bool = False
    started: dict[str, bool] = field(default_factory=dict)
    since: dict[str, int] = field(default_factory=dict)
    taken: dict[str, int] = field(default_factory=dict)
    pending: dict[str, torch.Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.started = dict.fromkeys(self.names, False) | self.started
        self.since = dict.fromkeys(self.names, 0) | self.since
        self.taken = dict.fromkeys(self.names, 0) | self.taken

    def add(self, name: str) -> None:
        """Count for one modality more."""
        self.names = [*self.names, name]
        self.__post_init__()

    def close(self) -> None:
        """Close the open turn, finished or not."""
        if self.open is not None:
            self.started[self.open] = False
            self.since[self.open] = 0
        self.open, self.explicit, self.replaced = None, False, False

    def doubt(self, active: str, usable: torch.Tensor) -> None:
        """Note of the step of `active` just counted that only the device knows whether it was taken."""
        unusable = usable.logical_not()
        so_far = self.pending.get(active)
        self.pending = self.pending | {active: unusable.long() if so_far is None else so_far + unusable}

    def settle(self) -> None:
        """Wait for the device, and count the steps that it found unusable as skipped."""
        if not self.pending:
            return
        settled = self.copy()
        settled.pending = {}
        for name, count in self.pending.items():
            unusable = int(count)
            settled.skipped += unusable
            settled.steps -= unusable
            settled.taken[name] -= unusable
            settled.since[name] = max(0, settled.since[name] - unusable)
        self.put_back(settled)

    def state(self) -> dict[str, Any]:
        """Plain values for a state dict."""
        self.settle()
        values = dict(vars(self))
        del values["names"], values["pending"]
        return values | {key: dict(value) for key, value in values.items() if isinstance(value, dict)}

    def copy(self) -> Counters:
        """Return the same counts, counted separately."""
        values = {key: dict(value) if isinstance(value, dict) else value for key, value in vars(self).items()}
        return Counters(**values)

    def put_back(self, earlier: Counters) -> None:
        """Count from `earlier` on."""
        vars(self).update(vars(earlier))

    @classmethod
    def of(cls, names: Sequence[str], state: Mapping[str, Any]) -> Counters:
        """Return the counters that :meth:`state` gave."""
        counters = cls(names)
        for key, value in state.items():
            setattr(counters, key, dict(value) if isinstance(value, Mapping) else value)
        return counters
