"""One row of the benchmarks: several sides that do the same, the ratios asked for, and what comes of measuring them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from .setting import Setting
from .timing import Work, interleave, summary


@dataclass(frozen=True)
class Ratio:
    """What is asked of two sides.

    ``sign`` "≥": `ours` is that many times faster than `peer`; "≤": `ours` takes at most that share of its time.
    Without a `limit` the ratio is only told.
    """

    ours: str
    peer: str
    sign: str
    limit: float | None = None

    def judge(self, sides: dict[str, dict[str, float]]) -> dict[str, Any]:
        """Return the ratio of the medians, and whether it is reached."""
        mine, theirs = sides[self.ours]["ms"], sides[self.peer]["ms"]
        ratio = theirs / mine if self.sign == "≥" else mine / theirs
        return asdict(self) | {"ratio": ratio, "reached": reached(ratio, self.sign, self.limit)}


@dataclass
class Comparison:
    """Sides that run interleaved; what they have to do with each other is told by `note`, once they have run."""

    name: str
    sides: dict[str, Work]
    ratios: list[Ratio]
    note: Callable[[], str]
    blocks: int = 15
    warm: bool = True
    errors: Callable[[], dict[str, float]] = field(default=dict)
    needs: Callable[[], dict[str, float]] = field(default=dict)
    """What ours cannot do without: "bytes" that it moves, "flops" that it does."""

    def measure(self, key: str, section: str, setting: Setting) -> dict[str, Any]:
        """Run all sides; return the row as it stands in the JSON file."""
        times = interleave(self.sides, setting, setting.fewest(self.blocks), warm=self.warm)
        sides = {label: summary(of_side) for label, of_side in times.items()}
        return {
            "key": key,
            "section": section,
            "name": self.name,
            "sides": sides,
            "ratios": [ratio.judge(sides) for ratio in self.ratios],
            "errors": self.errors(),
            "needs": self.needs(),
            "note": self.note(),
        }


@dataclass(frozen=True)
class Figure:
    """A number that is no time of two sides: memory, calls, the time of an import."""

    key: str
    name: str
    value: float
    unit: str
    sign: str
    limit: float | None
    note: str

    def told(self) -> dict[str, Any]:
        """Return the figure as it stands in the JSON file."""
        return asdict(self) | {"reached": reached(self.value, self.sign, self.limit)}


@dataclass(frozen=True)
class Case:
    """A comparison that is built when its turn comes, so that one at a time holds memory."""

    key: str
    section: str
    build: Callable[[], Comparison]


def reached(value: float, sign: str, limit: float | None) -> bool | None:
    """Tell whether a value keeps its limit; None where there is none."""
    if limit is None:
        return None
    return value >= limit if sign == "≥" else value <= limit


class Kept:
    """A side whose last result is looked at afterwards."""

    def __init__(self, work: Work) -> None:
        self.work = work
        self.result: Any = None

    def __call__(self) -> Any:
        """Run, and keep what comes of it."""
        self.result = self.work()
        return self.result
