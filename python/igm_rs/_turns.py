"""Where Algorithm 1 stands: finished turns, the open one, and the steps since each T was made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Counters"]


@dataclass
class Counters:
    """Plain counters, saved with the optimizer.

    ``open`` is the modality whose turn is under way or was interrupted, ``explicit`` whether it was opened by
    ``turn()`` rather than by steps outside any turn; ``started[j]`` whether j's present Ȳ has begun; ``since[j]`` the
    steps of j since its T was made.
    """

    names: Sequence[str]
    turns: int = 0
    steps: int = 0
    skipped: int = 0
    unperturbed: int = 0
    open: str | None = None
    explicit: bool = False
    replaced: bool = False
    started: dict[str, bool] = field(default_factory=dict)
    since: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.started = dict.fromkeys(self.names, False) | self.started
        self.since = dict.fromkeys(self.names, 0) | self.since

    def close(self) -> None:
        """Close the open turn, finished or not."""
        if self.open is not None:
            self.started[self.open] = False
            self.since[self.open] = 0
        self.open, self.explicit, self.replaced = None, False, False

    def state(self) -> dict[str, Any]:
        """Plain values for a state dict."""
        values = dict(vars(self))
        del values["names"]
        return values | {"started": dict(self.started), "since": dict(self.since)}

    def copy(self) -> Counters:
        """Return the same counts, counted separately."""
        return Counters(self.names, **self.state())

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
