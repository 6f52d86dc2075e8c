"""What a run of the benchmarks is given: the device, the sizes, and how long to measure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

RHO = 0.05
TAU = 0.4
SGD: dict[str, Any] = {"lr": 1e-2, "momentum": 0.9, "weight_decay": 1e-4}


@dataclass(frozen=True)
class Setting:
    """Device, sizes and patience of one run.

    `quick` is a smoke run: every row on tiny sizes, figures without meaning.
    """

    device: torch.device
    quick: bool
    seconds: float

    @property
    def cuda(self) -> bool:
        """Whether the device is a GPU."""
        return self.device.type == "cuda"

    @property
    def block(self) -> float:
        """Seconds that one side runs before another has its turn; at least one run."""
        return 0.01 if self.quick else 0.25

    @property
    def batches(self) -> int:
        """Batches of a turn: 6,698 samples of CREMA-D, 12 in a batch."""
        return 12 if self.quick else 558

    @property
    def batch(self) -> int:
        """Samples of a batch."""
        return 12

    @property
    def kept(self) -> torch.dtype:
        """The dtype in which igm_rs keeps rows and Ȳ on this device."""
        return torch.float32 if self.cuda else torch.float64

    def width(self, d: int) -> int:
        """Return the width that stands for `d` in this run."""
        return max(4, d // 64) if self.quick else d

    def fewest(self, blocks: int) -> int:
        """Return the fewest blocks of each side."""
        return 1 if self.quick else blocks
