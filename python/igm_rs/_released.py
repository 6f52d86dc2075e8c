"""One step as the released scripts take it (method.md §4), each deviation from the paper as `Released` says."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any, NoReturn

import torch

from . import _igm_rs
from ._core import Closure, Core
from ._course import Course
from ._device import capturing
from ._layers import modules_of
from ._perturbation import gradient_norm, judge
from ._step import Figures, Stepper, processes, usable
from .released import Released

__all__ = ["ReleasedStepper", "check_fit", "mode_of"]

_PAIR = (
    "a pair (loss, flat): L(θ) with its graph, and a callable that returns the loss of the head at the weights "
    "of the moment, on the features of that pass"
)


class ReleasedStepper(Stepper):
    """Takes the steps of an optimizer whose parts are `core`, and whose mode is a :class:`igm_rs.Released`.

    The perturbed weights lie in memory of their own, to which the parameters are bound between the perturbation and the
    end of the backward pass: nothing that autograd has saved is changed, as in the scripts, which replace a parameter's
    ``data``. The parameters' own memory holds θ all this time, so there is nothing to restore.
    """

    def __init__(self, core: Core, course: Course, settings: Released) -> None:
        super().__init__(core, course)
        self._settings = settings

    def check(self, closure: Any, scaler: Any) -> None:
        """Raise TypeError for a list of closures, ValueError for a scaler: the losses are put together here."""
        if isinstance(closure, (list, tuple)):
            raise TypeError(
                f"closure is a {type(closure).__name__} with mode='released', expected one callable: the perturbation "
                "is that of one batch"
            )
        if scaler is not None:
            raise ValueError(
                "scaler is given with mode='released', expected none: step() calls backward() on a loss of its own; "
                "bfloat16 needs no scaler"
            )

    def check_replay(self) -> None:
        """Refuse: there is no step without a closure."""
        _refuse("replay")

    def first(self, scaler: Any) -> None:
        """Refuse: the step makes both passes itself."""
        _refuse("first_step")

    def second(self, scaler: Any) -> None:
        """Refuse: the step makes both passes itself."""
        _refuse("second_step")

    def remember_random(self) -> None:
        """Refuse: both passes draw from the generators as they come."""
        _refuse("remember_rng")

    def _whole_step(self, closure: Closure | None, scaler: Any) -> Any:
        if self._make_state_only(closure):
            return None
        if closure is None:
            raise TypeError(f"step() without a closure with mode='released', expected one that returns {_PAIR}")
        if (count := processes()) > 1:
            raise RuntimeError(
                f"mode='released' in {count} processes: each would perturb by the gradient of its own batch, and the "
                "replicas would drift apart; expected one process, or mode='paper'"
            )
        core = self._core
        core.forget_passes()
        core.base.zero_grad(set_to_none=True)
        loss, flat = self._first_pass(closure)
        active = self._gradients(loss)
        if active is None:
            core.tap.drop()
            return loss
        params, gradients, rhos = core.moving(active)
        if capturing(params):
            raise RuntimeError("mode='released' while a CUDA graph is recorded: expected mode='paper' there")
        rhos = self._with_head(active, rhos)
        norm = gradient_norm(gradients)
        figures: Figures = {"loss": loss, "grad_norm": norm, "second_pass": None}
        if not usable(norm):
            self._skip(active, figures)
            return loss
        figures["second_pass"] = self._settings.second_pass
        figures |= {"climb_norm": norm, "rho": max(map(abs, rhos))}
        shifted = core.buffers(params, core.shifted)

        def at_shifted_weights(_: torch.Tensor | None) -> None:
            self._second_pass(closure, loss, flat, figures)

        try:
            core.begin_second_pass()
            figures["perturbation"] = _igm_rs.at_shifted(
                params,
                gradients,
                shifted,
                norm if self._settings.norm == "all" else None,
                rhos,
                at_shifted_weights,
                self._measures(active, norm),
            )
        finally:
            core.end_second_pass()
        moving, gradients, _ = core.moving(active)
        figures["grad_norm_perturbed"] = norm = gradient_norm(gradients)
        if usable(norm):
            start = None if self._settings.restore else (params, shifted)
            self._finish(active, figures, moving, gradients, start=start)
            judge(core, figures)
        else:
            self._skip(active, figures)
        return loss

    def _first_pass(self, closure: Closure) -> tuple[torch.Tensor, Callable[[], Any]]:
        """L(θ) and the callable for F, of a closure that has not called backward."""
        with torch.enable_grad():
            returned = closure()
        if not (isinstance(returned, tuple) and len(returned) == 2 and callable(returned[1])):
            if isinstance(returned, tuple):
                what = f"({', '.join(type(each).__name__ for each in returned)})"
            else:
                what = "None" if returned is None else f"a {type(returned).__name__}"
            raise TypeError(f"closure returned {what} with mode='released', expected {_PAIR}")
        loss, flat = returned
        _check_loss("closure", loss)
        if any(p.grad is not None for group in self._core.base.param_groups for p in group["params"]):
            raise RuntimeError(
                "closure has left gradients with mode='released', expected it to compute the loss and no more: step() "
                "calls backward()"
            )
        return loss, flat

    def _gradients(self, loss: torch.Tensor) -> str | None:
        """Put ∇L(θ) where gradients are; return who steps, None where nothing asks for a gradient."""
        core = self._core
        if core.turn is None:
            listed = [group["params"] for group in core.base.param_groups]
        else:
            listed = [members for _, members in core.modalities.active[core.turn]]
        params = [p for members in listed for p in members if p.requires_grad]
        if not params:
            return None
        again = self._settings.second_pass == "head" or self._settings.flat_ratio < 1
        found = torch.autograd.grad(loss, params, retain_graph=again, allow_unused=True)
        for p, gradient in zip(params, found, strict=True):
            p.grad = gradient
        active = core.who_steps()
        if active is None or not core.moving(active)[0]:
            of = "" if active is None else f" of {active!r}"
            raise RuntimeError(
                f"closure returned a loss that depends on none of the {len(params)} parameters{of}, expected one that "
                "is computed from them"
            )
        return active

    def _with_head(self, active: str, rhos: list[float]) -> list[float]:
        """ρ of each parameter that has a gradient, that of the head's where it differs, signed as `rhos`."""
        core, rho = self._core, self._settings.rho_head
        if rho is None:
            return rhos
        structure = core.structure
        told = structure.head if structure.heads is None else structure.heads[active]
        head = {p for module in modules_of("head", told, structure.model) for p in module.parameters()}
        signed = iter(rhos)
        result: list[float] = []
        for group, members in core.modalities.active[active]:
            for p in members:
                if p.grad is not None:
                    usual = next(signed)
                    own = "rho" in group or p not in head
                    result.append(usual if own else -rho if group.get("maximize") else rho)
        return result

    def _second_pass(self, closure: Closure, loss: torch.Tensor, flat: Callable[[], Any], figures: Figures) -> None:
        """Let the gradients be those of (1 − w) L + w F, while the weights are perturbed."""
        weight = self._settings.flat_ratio
        self._core.base.zero_grad(set_to_none=True)
        if self._settings.second_pass == "head":
            with torch.enable_grad():
                shaken = flat()
            _check_loss("flat", shaken)
        else:
            shaken, _ = self._first_pass(closure)
        figures["loss_perturbed"] = shaken
        with torch.enable_grad():
            parts = [share * part for share, part in ((1 - weight, loss), (weight, shaken)) if share > 0]
            total = functools.reduce(operator.add, parts)
        torch.autograd.backward(total)


def mode_of(mode: Any) -> Released | None:
    """Return what `mode` names; None for the paper's."""
    if isinstance(mode, Released):
        return mode
    if mode == "released":
        return Released()
    if mode == "paper":
        return None
    raise ValueError(f"mode is {mode!r}, expected 'paper', 'released' or an igm_rs.Released")


def check_fit(settings: Released, *, head: bool, refresh: Any, pairing: Any, reset: Any, **others: Any) -> None:
    """Raise ValueError for arguments of the optimizer that this mode has no use for, or has under its own name.

    `others`: the argument's name to what was given and what it is by default.
    """
    if pairing != "position":
        raise ValueError(f"pairing is {pairing!r} with mode='released', expected mode=igm_rs.Released(pairing=…)")
    if reset:
        raise ValueError(f"reset is {reset!r} with mode='released', expected mode=igm_rs.Released(reset=…)")
    for name, (given, usual) in others.items():
        if given != usual:
            raise ValueError(f"{name} is {given!r} with mode='released', which has no use for it; expected {usual!r}")
    if settings.gather == "pass" and isinstance(refresh, int):
        raise ValueError(
            f"refresh is {refresh} with Released(gather='pass'), whose steps gather no features; expected 'turn' or "
            "'manual', or Released(gather='turn')"
        )
    if settings.rho_head is not None and not head:
        raise ValueError(f"rho_head is {settings.rho_head} without a head, expected heads= or head=")


def _check_loss(origin: str, loss: Any) -> None:
    """Raise TypeError or ValueError unless `loss` is one number with a graph."""
    if not isinstance(loss, torch.Tensor):
        raise TypeError(f"{origin} returned the loss as a {type(loss).__name__}, expected a tensor with its graph")
    if loss.numel() != 1:
        raise ValueError(f"{origin} returned a loss of the shape {tuple(loss.shape)}, expected one number")
    if not loss.requires_grad:
        raise ValueError(
            f"{origin} returned a loss without a graph, expected one computed from the parameters, not detached, and "
            "with no backward() before"
        )


def _refuse(what: str) -> NoReturn:
    raise RuntimeError(f"{what} with mode='released', expected step(closure), which makes both passes itself")
