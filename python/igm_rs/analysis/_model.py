"""A model looked at and left as it was: weights, running statistics, modes and random state, whatever happens."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

__all__ = ["as_it_was", "check_labels", "restored"]


@contextmanager
def as_it_was(model: nn.Module, *, training: bool) -> Iterator[None]:
    """Hold `model` in training or evaluation mode; every module's mode and torch's random state are put back."""
    modes = [(module, module.training) for module in model.modules()]
    devices = sorted({each.device.index or 0 for each in model.parameters() if each.is_cuda})
    try:
        with torch.random.fork_rng(devices=devices):
            model.train(training)
            yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def restored(model: nn.Module) -> Iterator[None]:
    """Put every parameter and buffer of `model` back to the bit, in its own memory, whatever happens inside.

    Whatever was put in a buffer's place inside gives way to the buffer that was there.
    """
    parameters = [(each, each.detach().clone()) for each in model.parameters()]
    buffers = [
        (module, name, buffer, None if buffer is None else buffer.detach().clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
    ]
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, before in parameters:
                parameter.copy_(before)
            for module, name, buffer, kept in buffers:
                if buffer is not None and kept is not None:
                    buffer.copy_(kept)
                module._buffers[name] = buffer


def check_labels(argument: str, named: Collection[Any]) -> None:
    """Refuse an empty mapping or list."""
    if not named:
        raise ValueError(f"{argument} is empty, expected one entry or more")
