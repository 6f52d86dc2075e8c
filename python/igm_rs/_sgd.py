"""torch.optim.SGD's step fused with the restore after SAM: the weights are read from their copy, in one pass."""

from __future__ import annotations

from typing import Any

import torch

from . import _igm_rs

__all__ = ["Arguments", "FusedSGD"]

Arguments = tuple[
    list[torch.Tensor], list[torch.Tensor | None], list[bool], list[tuple[int, float, float, float, float, bool, bool]]
]


class FusedSGD:
    """Steps for a base that is exactly ``torch.optim.SGD``, on CPU tensors, with the same results to the bit.

    Such a step is one call into Rust, which checks everything before it changes anything: it is taken wholly or not at
    all.
    """

    def __init__(self, base: torch.optim.SGD) -> None:
        self._base = base

    def possible(self, params: list[torch.Tensor], gradients: list[torch.Tensor]) -> bool:
        """Whether these tensors and the groups' options allow it; the base's own step is taken otherwise."""
        for group in self._base.param_groups:
            if group["differentiable"] or group["fused"] or isinstance(group["lr"], torch.Tensor):
                return False
        state = self._base.state
        buffers = [state[p].get("momentum_buffer") if p in state else None for p in params]
        return bool(_igm_rs.sgd_step_possible(params, gradients, buffers))

    def prepare(
        self, groups: list[tuple[dict[str, Any], list[torch.Tensor]]], gradients: list[torch.Tensor]
    ) -> Arguments:
        """Return what `_igm_rs.sgd_step_` takes after the weights; momentum that is missing is made, unfilled.

        Parameters
        ----------
        groups : list of (group, parameters)
            What moves. Parameters without a gradient are passed over.
        gradients : list of Tensor
            Those of the others, in this order.
        """
        state = self._base.state
        spans: list[tuple[int, float, float, float, float, bool, bool]] = []
        buffers: list[torch.Tensor | None] = []
        first: list[bool] = []
        momentum = any(group["momentum"] != 0 for group, _ in groups)
        stop = 0
        for group, members in groups:
            start = stop
            for p in members:
                if p.grad is None:
                    continue
                stop += 1
                if momentum:
                    buffer = state[p].get("momentum_buffer") if group["momentum"] != 0 else None
                    first.append(group["momentum"] != 0 and buffer is None)
                    if first[-1]:
                        buffer = state[p]["momentum_buffer"] = torch.empty_like(p, requires_grad=False)
                    buffers.append(buffer)
            if stop > start:
                spans.append(
                    (
                        stop,
                        float(group["lr"]),
                        float(group["momentum"]),
                        float(group["dampening"]),
                        float(group["weight_decay"]),
                        bool(group["nesterov"]),
                        bool(group["maximize"]),
                    )
                )
        self._base._opt_called = True  # type: ignore[attr-defined]  # what LR schedulers look at
        return gradients, buffers, first, spans
