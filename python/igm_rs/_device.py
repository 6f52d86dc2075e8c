"""Steps on a device that the host does not wait for: whether a gradient was usable is decided, and acted on, there."""

from __future__ import annotations

from typing import Any

import torch

from . import _igm_rs
from ._core import Core

__all__ = ["capturing", "keep_where_unusable", "usable_on_device", "waits_for_nothing"]

Pair = tuple[torch.Tensor, torch.Tensor]


def capturing(params: list[torch.Tensor]) -> bool:
    """Whether a CUDA graph is being recorded on the stream that `params` are computed on."""
    return params[0].is_cuda and torch.cuda.is_current_stream_capturing()


def waits_for_nothing(core: Core, params: list[torch.Tensor]) -> bool:
    """Whether a step of `params` is taken without the host: on a device, where there are copies to undo it from."""
    return capturing(params) or (core.atomic and on_device(params))


def on_device(params: list[torch.Tensor]) -> bool:
    """Whether reading a number that follows from `params` would wait."""
    return not params[0].is_cpu


def usable_on_device(figures: dict[str, Any], *, strict: bool) -> torch.Tensor:
    """Whether a step can be taken: each gradient norm finite and, if `strict`, not zero. A 0-dim tensor of bool."""
    norms = [figures[name] for name in ("grad_norm", "climb_norm", "grad_norm_perturbed") if name in figures]
    usable = torch.isfinite(norms[0])
    for norm in norms[1:]:
        usable = usable & torch.isfinite(norm)
    if strict:
        for norm in norms:
            usable = usable & (norm > 0)
    return usable


def keep_where_unusable(usable: torch.Tensor, pairs: list[Pair]) -> None:
    """Put back, in each pair, the first tensor from the second, unless `usable`.

    A number that a base keeps on the host, such as Adam's count of steps, stays if `usable` is on a device.
    """
    here = [pair for pair in pairs if pair[0].device == usable.device]
    if here:
        _igm_rs.select_([tensor for tensor, _ in here], [kept for _, kept in here], usable)
