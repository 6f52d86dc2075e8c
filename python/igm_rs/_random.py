"""The state of torch's random generators, so that both passes of a step draw the same dropout masks."""

from __future__ import annotations

from collections.abc import Iterable

import torch

__all__ = ["RandomState"]


class RandomState:
    """The state of the CPU's generator and of those of the CUDA devices among `devices`, now."""

    def __init__(self, devices: Iterable[torch.device]) -> None:
        self._cpu = torch.get_rng_state()
        cuda = {device for device in devices if device.type == "cuda"}
        self._cuda = [(device, torch.cuda.get_rng_state(device)) for device in cuda]

    def restore(self) -> None:
        """Let the generators draw again what they have drawn since."""
        torch.set_rng_state(self._cpu)
        for device, state in self._cuda:
            torch.cuda.set_rng_state(state, device)
