"""Training problems without training: real parameters, gradients that cost nothing, so that the step alone is seen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import igm_rs

from .peers import Closure
from .setting import Setting
from .shapes import Stream


def parameters(shapes: Sequence[torch.Size | tuple[int, ...]], setting: Setting) -> list[nn.Parameter]:
    """Random parameters of these shapes."""
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(setting.device)) for shape in shapes]


def closure_for(params: Sequence[nn.Parameter], before: Callable[[], Any] | None = None) -> Closure:
    """A forward and backward pass that costs nothing: the gradients are put where autograd would have put them."""
    gradients = [torch.randn_like(p) for p in params]
    loss = torch.ones((), device=params[0].device)

    def closure() -> torch.Tensor:
        if before is not None:
            before()
        for p, gradient in zip(params, gradients, strict=True):
            p.grad = gradient
        return loss

    return closure


def shapes_of(make: Callable[[Setting], Stream], setting: Setting) -> list[torch.Size]:
    """The shapes of a stream's parameters."""
    with torch.device("meta"):
        return [p.shape for p in make(setting).parameters()]


@dataclass
class Streams:
    """Several modalities of the same network; the head of the active one sees a batch of features in each pass."""

    streams: dict[str, Stream]
    setting: Setting

    @classmethod
    def of(cls, make: Callable[[Setting], Stream], count: int, setting: Setting) -> Streams:
        """Make `count` streams."""
        torch.manual_seed(0)
        return cls({f"modality {i + 1}": make(setting).to(setting.device) for i in range(count)}, setting)

    @property
    def active(self) -> Stream:
        """The stream that steps: the last one."""
        return list(self.streams.values())[-1]

    @property
    def params(self) -> list[nn.Parameter]:
        """All parameters of all streams."""
        return [p for stream in self.streams.values() for p in stream.parameters()]

    def features(self, stream: Stream) -> torch.Tensor:
        """A batch of what the encoder gives."""
        return torch.randn(self.setting.batch, stream.d, device=self.setting.device)

    def closure(self) -> Closure:
        """A pass of the active stream: the head's forward pass, and gradients."""
        stream = self.active
        seen = self.features(stream)
        return closure_for(list(stream.parameters()), lambda: stream.head(seen))

    def ours(self, base: torch.optim.Optimizer, **options: Any) -> igm_rs.IGMOptimizer:
        """IGMOptimizer around `base`, with T's of a whole turn of each modality."""
        heads = {name: stream.head for name, stream in self.streams.items()}
        opt = igm_rs.IGMOptimizer(base, self.streams, heads=heads, **options)
        for name, stream in self.streams.items():
            with opt.collect(name), torch.no_grad():
                for _ in range(self.setting.batches):
                    stream.head(self.features(stream))
        return opt
