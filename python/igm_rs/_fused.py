"""The base steps that are fused with the restore after SAM: SGD, Adam and AdamW, from the copy of the weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from . import _igm_rs

__all__ = ["Fused", "FusedAdam", "FusedSGD", "fused_for"]

Groups = list[tuple[dict[str, Any], list[torch.Tensor]]]
"""What moves, by parameter groups."""


class FusedSGD:
    """Steps for a base that is exactly ``torch.optim.SGD``, on CPU tensors, with the same results to the bit.

    Such a step is one call into Rust, which checks everything before it changes anything: it is taken wholly or not at
    all. Half precision is left to torch, which rounds after each of its operations.
    """

    def __init__(self, base: torch.optim.Optimizer) -> None:
        self._base = base

    def possible(self, params: list[torch.Tensor], gradients: list[torch.Tensor]) -> bool:
        """Whether these tensors and the groups' options allow it; the base's own step is taken otherwise."""
        for group in self._base.param_groups:
            if group["differentiable"] or group["fused"] or isinstance(group["lr"], torch.Tensor):
                return False
        state = self._base.state
        buffers = [state[p].get("momentum_buffer") if p in state else None for p in params]
        return bool(_igm_rs.sgd_step_possible(params, gradients, buffers))

    def prepare(self, groups: Groups, gradients: list[torch.Tensor]) -> tuple[Any, ...]:
        """Return what `step_` takes, and `at_perturbed` from its body; momentum that is missing is made, unfilled.

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
        for group, members, stop in _moving(groups):
            if momentum:
                for p in members:
                    buffer = state[p].get("momentum_buffer") if group["momentum"] != 0 else None
                    first.append(group["momentum"] != 0 and buffer is None)
                    if first[-1]:
                        buffer = state[p]["momentum_buffer"] = torch.empty_like(p, requires_grad=False)
                    buffers.append(buffer)
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
        return "sgd", gradients, buffers, first, spans

    def step_(
        self, params: list[torch.Tensor], before: list[torch.Tensor], arguments: tuple[Any, ...], done: list[bool]
    ) -> None:
        """Take the step that `prepare` has prepared, from `before`, or from the weights where that is empty."""
        _, gradients, buffers, first, spans = arguments
        _igm_rs.sgd_step_(params, before, gradients, buffers, first, spans, done)


class FusedAdam:
    """The same for a base that is exactly ``torch.optim.Adam`` or ``AdamW``, as these step without foreach or fused."""

    _KEYS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "step")

    def __init__(self, base: torch.optim.Optimizer) -> None:
        self._base = base

    def possible(self, params: list[torch.Tensor], gradients: list[torch.Tensor]) -> bool:
        """Whether these tensors and the groups' options allow it; the base's own step is taken otherwise."""
        state = self._base.state
        for group in self._base.param_groups:
            if any(group[option] for option in ("foreach", "fused", "capturable", "differentiable")):
                return False
            if any(isinstance(number, torch.Tensor) for number in (group["lr"], *group["betas"])):
                return False
            needed = [key for key in self._KEYS if group["amsgrad"] or key != "max_exp_avg_sq"]
            if any(
                not isinstance(state[p].get(key), torch.Tensor)
                for p in group["params"]
                if state.get(p)
                for key in needed
            ):
                return False
        columns = [[state[p].get(key) if p in state else None for p in params] for key in self._KEYS]
        return bool(_igm_rs.adam_step_possible(params, gradients, *columns))

    def prepare(self, groups: Groups, gradients: list[torch.Tensor]) -> tuple[Any, ...]:
        """Return what `step_` takes, and `at_perturbed` from its body; state that is missing is made, as torch does.

        Parameters
        ----------
        groups : list of (group, parameters)
            What moves. Parameters without a gradient are passed over.
        gradients : list of Tensor
            Those of the others, in this order.
        """
        state = self._base.state
        spans: list[tuple[int, float, float, float, float, float, bool, bool, bool]] = []
        averages: list[torch.Tensor] = []
        squares: list[torch.Tensor] = []
        largest: list[torch.Tensor | None] = []
        steps: list[torch.Tensor] = []
        for group, members, stop in _moving(groups):
            for p in members:
                entry = state[p]
                if not entry:
                    double = torch.get_default_dtype() == torch.float64
                    entry["step"] = torch.zeros((), dtype=torch.float64 if double else torch.float32, device="cpu")
                    for key in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")[: 3 if group["amsgrad"] else 2]:
                        entry[key] = torch.zeros_like(p, requires_grad=False)
                averages.append(entry["exp_avg"])
                squares.append(entry["exp_avg_sq"])
                largest.append(entry["max_exp_avg_sq"] if group["amsgrad"] else None)
                steps.append(entry["step"])
            beta1, beta2 = group["betas"]
            spans.append(
                (
                    stop,
                    float(group["lr"]),
                    float(beta1),
                    float(beta2),
                    float(group["eps"]),
                    float(group["weight_decay"]),
                    bool(group["amsgrad"]),
                    bool(group["maximize"]),
                    bool(group["decoupled_weight_decay"]),
                )
            )
        self._base._opt_called = True  # type: ignore[attr-defined]  # what LR schedulers look at
        return "adam", gradients, averages, squares, largest, steps, spans

    def step_(
        self, params: list[torch.Tensor], before: list[torch.Tensor], arguments: tuple[Any, ...], done: list[bool]
    ) -> None:
        """Take the step that `prepare` has prepared, from `before`, or from the weights where that is empty."""
        _, gradients, averages, squares, largest, steps, spans = arguments
        _igm_rs.adam_step_(params, before, gradients, averages, squares, largest, steps, spans, done)


Fused = FusedSGD | FusedAdam


def fused_for(base: torch.optim.Optimizer) -> Fused | None:
    """Return what takes the steps of `base` in Rust; None for what is not exactly SGD, Adam or AdamW of torch."""
    if type(base) is torch.optim.SGD:
        return FusedSGD(base)
    if type(base) in (torch.optim.Adam, torch.optim.AdamW):
        return FusedAdam(base)
    return None


def _moving(groups: Groups) -> Iterator[tuple[dict[str, Any], list[torch.Tensor], int]]:
    """Groups with their parameters that have a gradient, and the number of these so far; empty ones are passed over."""
    stop = 0
    for group, members in groups:
        moving = [p for p in members if p.grad is not None]
        stop += len(moving)
        if moving:
            yield group, moving, stop
