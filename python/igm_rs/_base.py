"""The base optimizer: which are taken, what their groups may say, and their step without the hooks around it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from . import _checks

__all__ = ["base_optimizer", "check_group", "step_without_hooks"]


def base_optimizer(
    params: Any, base: type[torch.optim.Optimizer] | None, base_kwargs: dict[str, Any]
) -> torch.optim.Optimizer:
    """Return the base optimizer: `params` itself, or an instance of `base` made from it."""
    if isinstance(params, torch.optim.Optimizer):
        if base is not None or base_kwargs:
            given = ", ".join((["base"] if base is not None else []) + list(base_kwargs))
            raise TypeError(f"{given} given with a ready base optimizer, expected these in the optimizer itself")
        ready = params
    else:
        kind = torch.optim.SGD if base is None else base
        if not (isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)):
            raise TypeError(f"base is {kind!r}, expected a class of torch.optim.Optimizer")
        if "lr" in base_kwargs:
            _check_lr(base_kwargs["lr"], "lr")
        ready = kind(params, **base_kwargs)
    if isinstance(ready, torch.optim.LBFGS) or hasattr(ready, "first_step"):
        raise TypeError(
            f"the base optimizer is a {type(ready).__name__}, expected one whose step() takes gradients as they are, "
            "such as torch.optim.SGD or AdamW"
        )
    if not {"state", "param_groups"} <= ready.state_dict().keys():
        raise TypeError(
            f"the base optimizer is a {type(ready).__name__}, whose state dict has no 'state' and 'param_groups', "
            "expected one that saves as torch.optim's do"
        )
    return ready


def check_group(group: Mapping[str, Any]) -> None:
    """Raise TypeError or ValueError unless a group's own rho, tau and lr are finite numbers >= 0."""
    for key in ("rho", "tau"):
        if key in group:
            _checks.non_negative(f"{key} of a parameter group", group[key])
    if "lr" in group:
        _check_lr(group["lr"], "lr of a parameter group")


def step_without_hooks(base: torch.optim.Optimizer) -> None:
    """Let `base` step as its class does, without the step hooks: the optimizer around it has run them already."""
    step = type(base).step
    if getattr(step, "hooked", False):
        step = getattr(step, "__wrapped__", step)
    step(base)
    base._opt_called = True  # type: ignore[attr-defined]  # what LR schedulers look at


def _check_lr(lr: Any, argument: str) -> None:
    if isinstance(lr, torch.Tensor):
        if lr.numel() != 1:
            raise ValueError(f"Tensor lr must be 1-element: {argument} has the shape {tuple(lr.shape)}, expected ()")
        if lr.is_meta:
            raise ValueError(f"{argument} is a tensor on meta, expected one that holds a number")
        lr = lr.item()
    _checks.non_negative(argument, lr)
