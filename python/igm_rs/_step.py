"""One step of the active modality (Algorithm 1, lines 5-10): taken wholly, or not at all."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from . import _igm_rs
from ._base import step_without_hooks
from ._core import Closure, Core, Perturbed
from ._course import Course
from ._device import capturing, keep_where_unusable, usable_on_device, waits_for_nothing
from ._fused import Fused
from ._layers import Layer
from ._perturbation import climb_of, gradient_norm, judge
from ._projection import Factor, Made
from ._random import RandomState
from ._rollback import Rollback
from .stats import step_stats

__all__ = ["Figures", "Stepper", "one_closure", "processes", "usable"]

Figures = dict[str, Any]


@dataclass
class Second:
    """What the second pass of a step runs: its closure, the scaler of its loss, and the first pass's random state."""

    closure: Closure
    scaler: Any
    random: RandomState | None


class Stepper:
    """Takes the steps of an optimizer whose parts are `core`."""

    def __init__(self, core: Core, course: Course) -> None:
        self._core = core
        self._course = course

    # ------------------------------------------------------------------------------------------------------------------
    # The three forms of a step

    def check(self, closure: Any, scaler: Any) -> None:
        """Raise unless ``step`` can take these arguments."""
        if scaler is not None and closure is None:
            raise ValueError(
                "scaler is given to step() without a closure, expected scaler.unscale_(opt) and scaler.step(opt), or a "
                "closure"
            )

    def check_replay(self) -> None:
        """Raise unless a second pass can be given for a later step."""

    def step(self, closure: Closure | None, scaler: Any) -> Any:
        """First pass by `closure`, or the gradients at hand; then all the rest. Returns the loss of the first pass."""
        return self._safely(self._whole_step, closure, scaler)

    def first(self, scaler: Any) -> None:
        """Perturb the weights, θ ← θ + ε* (Eq. 7)."""
        self._safely(self._first, scaler)

    def second(self, scaler: Any) -> None:
        """Restore the weights to the bit and step with the gradients at θ + ε* (Eqs. 8 and 9)."""
        if self._core.perturbed is None:
            raise RuntimeError("second_step without first_step: the weights are not perturbed")
        self._safely(self._second, self._core.perturbed, scaler)

    def _safely(self, work: Callable[..., Any], *arguments: Any) -> Any:
        """Do `work` without autograd; whatever leaves it, nothing stays perturbed, held, muted or switched off.

        A signal may raise at any line, and within Python's own context managers: hence C functions in plain blocks.
        """
        core = self._core
        core.check_shared()
        enabled = torch.is_grad_enabled()
        try:
            torch._C._set_grad_enabled(False)
            return work(*arguments)
        except BaseException:
            core.restore()
            core.accumulating = False
            core.forget_passes()
            core.scaling.abandon()
            raise
        finally:
            torch._C._set_grad_enabled(enabled)

    def _whole_step(self, closure: Closure | None, scaler: Any) -> Any:
        core = self._core
        core.refuse_perturbed("step")
        replay, core.replay = core.replay, None
        random, core.random = core.random, None
        if replay is not None and closure is not None:
            raise RuntimeError("step(closure) after replay(closure): expected step() without a closure, or no replay")
        loss = None
        second, of_second = closure, scaler
        if closure is not None:
            core.forget_passes()
            random = self._random_now() if core.preserve_rng else None
            with torch.enable_grad():
                loss = _loss_of(closure)
        elif replay is not None:
            if core.preserve_rng and random is None:
                raise RuntimeError(_REMEMBER.format("replay"))
            second, of_second = replay.closure, replay.scaler
        if not self._make_state_only(closure):
            told = loss if replay is None else replay.loss
            self._step(second, told, closure is not None, scaler, of_second, random)
        if core.head_pass is not None:
            core.head_pass.drop()
        return loss

    def _first(self, scaler: Any) -> None:
        core = self._core
        core.refuse_perturbed("first_step")
        if core.head_pass is not None:
            raise RuntimeError(
                "first_step with sam_scope='head': only step(closure) knows where the second pass begins, expected "
                "step(closure) or replay(closure)"
            )
        self._forget_provisional()
        random, core.random = core.random, None
        if core.preserve_rng and random is None:
            raise RuntimeError(_REMEMBER.format("first_step"))
        active = core.who_steps()
        begun = Perturbed(active, [], [], {})
        if active is not None:
            self._check_processes(active)
            params, gradients, rhos = core.moving(active)
            self._unscale(scaler, params, 0)
            figures = begun.figures
            figures["second_pass"] = "taken" if any(rho != 0 for rho in rhos) else "off"
            figures["grad_norm"] = gradient_norm(gradients)
            climb = climb_of(core, active, params, gradients, rhos, figures)
            begun.usable = usable(figures["grad_norm"], climb.norm)
            if begun.usable:
                before = core.buffers(params)
                _igm_rs.restore_(before, params)  # whatever interrupts from here on, there is a way back
                core.perturbed = Perturbed(active, params, before, figures, usable=True)
                figures["perturbation"] = _igm_rs.perturb_(
                    params, gradients, before, climb.norm, rhos, p=core.p, adaptive=core.adaptive
                )
        core.perturbed = core.perturbed or begun
        core.begin_second_pass()
        if random is not None:
            random.restore()

    def _second(self, perturbed: Perturbed, scaler: Any) -> None:
        core = self._core
        active, figures = perturbed.active, perturbed.figures
        core.restore()
        if active is None:
            return
        params, gradients, _ = core.moving(active)
        kept = _identical(params, perturbed.params)
        self._unscale(scaler, params, 1)
        figures["grad_norm_perturbed"] = norm = gradient_norm(gradients)
        if not (perturbed.usable and usable(norm)):
            self._skip(active, figures)
            return
        self._finish(active, figures, params, gradients, kept=kept)
        judge(core, figures)

    # ------------------------------------------------------------------------------------------------------------------
    # Within a step

    def _step(
        self,
        second: Closure | None,
        loss: Any,
        computed: bool,
        scaler: Any,
        of_second: Any,
        random: RandomState | None,
    ) -> None:
        core = self._core
        active = core.who_steps()
        params, gradients, rhos = ([], [], []) if active is None else core.moving(active)
        if active is None or not params:
            core.tap.drop()
            if computed:
                self._check_computed(active)
            return
        self._check_processes(active)
        self._unscale(scaler, params, 0)
        figures: Figures = {"loss": loss, "grad_norm": gradient_norm(gradients)}
        sam = any(rho != 0 for rho in rhos)
        due = sam and core.sam_is_due(active)
        pass_two = Second(second, of_second, random) if due and second is not None else None
        figures["sam"] = sam
        figures["second_pass"] = (
            "off" if not sam else "every" if not due else "no closure" if second is None else "taken"
        )
        if capturing(params) or waits_for_nothing(core, params):
            self._on_device(active, figures, params, gradients, rhos, pass_two)
        elif not (usable(figures["grad_norm"]) if sam or core.projects(active) else _finite(figures["grad_norm"])):
            if pass_two is not None:
                figures["second_pass"] = None
            self._skip(active, figures)
        elif pass_two is not None:
            self._sam_step(active, figures, params, gradients, rhos, pass_two)
        else:
            self._finish(active, figures, params, gradients)
        if figures["second_pass"] == "no closure" and not (figures.get("skipped") or capturing(params)):
            core.warn_once(
                "closure",
                f"step() was called without a closure while rho is {core.rho[active]}: SAM needs step(closure) (or "
                "first_step and second_step); projection and the base optimizer's step are done without it",
            )

    def _sam_step(
        self,
        active: str,
        figures: Figures,
        params: list[torch.Tensor],
        gradients: list[torch.Tensor],
        rhos: list[float],
        second: Second,
    ) -> None:
        """Second pass at θ + ε* (Eq. 8). Whatever leaves the closure, the weights are restored before anything else."""
        core = self._core
        climb = climb_of(core, active, params, gradients, rhos, figures)
        if not usable(climb.norm):
            figures["second_pass"] = None
            self._skip(active, figures)
            return
        before = core.buffers(climb.params)
        done: list[bool] = []
        then: dict[str, Any] = {"skip": False, "way back": None}

        def at_perturbed_weights(measured: torch.Tensor | None) -> Any:
            moving, used = self._pass_two(active, second, figures, params, gradients, measured)
            then["moving"], then["gradients"] = moving, used
            then["skip"] = "grad_norm_perturbed" in figures and not usable(figures["grad_norm_perturbed"])
            then["same"] = _identical(moving, climb.params)
            fused = None if then["skip"] or core.project_update or not then["same"] else core.fused
            if fused is None or not fused.possible(moving, used):
                return None
            then["way back"] = Rollback(core, active, [], [], deep=False)
            return *self._all_but_the_step(active, figures, fused, used), done

        try:
            core.begin_second_pass()
            figures["perturbation"] = _igm_rs.at_perturbed(
                climb.params,
                climb.gradients,
                before,
                climb.norm,
                climb.rhos,
                at_perturbed_weights,
                self._measures(active, climb.norm),
                p=core.p,
                adaptive=core.adaptive,
            )
        except BaseException:
            if then["way back"] is not None and not done:
                then["way back"].undo()
            raise
        finally:
            core.end_second_pass()
        if then["skip"]:
            self._skip(active, figures)
            return
        if not done:
            self._finish(active, figures, then["moving"], then["gradients"], kept=then["same"])
        judge(core, figures)

    def _measures(self, active: str, norm: torch.Tensor) -> bool:
        """Whether this step measures its perturbation: always on the CPU, elsewhere at the first step of a turn."""
        core = self._core
        if norm.is_cpu or core.skip_inert:
            return True
        return "perturbation" not in core.warned or not core.counters.started[active]

    def _pass_two(
        self,
        active: str,
        second: Second,
        figures: Figures,
        params: list[torch.Tensor],
        gradients: list[torch.Tensor],
        measured: torch.Tensor | None,
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Gradient at θ + ε*: the closure once more. Returns what has gradients now, and these.

        Where the perturbation has moved no weight, and that is asked about, θ + ε* is θ: its gradient is known.
        """
        core = self._core
        if core.skip_inert and measured is not None and not float(measured[1]) and usable(figures["climb_norm"]):
            figures["second_pass"] = "unchanged"
            return params, gradients
        head = core.head_pass
        if second.random is not None:
            second.random.restore()
        if head is not None:
            figures["second_pass"] = "head"
            head.begin(active, params)
        with torch.enable_grad():
            figures["loss_perturbed"] = _loss_of(second.closure)
        moving, gradients, _ = core.moving(active)
        if head is not None:
            head.check(active)
            of_head = head.parameters(active)
            moving = [p for p in moving if p in of_head]
        if not moving:
            self._check_computed(active)
        self._unscale(second.scaler, moving, 1)
        if head is not None:
            head.end()
            moving, gradients, _ = core.moving(active)
        figures["grad_norm_perturbed"] = gradient_norm(gradients)
        return moving, gradients

    def _finish(
        self,
        active: str,
        figures: Figures,
        params: list[torch.Tensor],
        gradients: list[torch.Tensor],
        *,
        kept: bool = False,
        start: tuple[list[torch.Tensor], list[torch.Tensor]] | None = None,
    ) -> None:
        """Project and let the base optimizer step (Eq. 9; Algorithm 1, line 10), wholly or not at all.

        `kept`: the weights' memory holds these weights already. `start`: parameters, and the weights that each of them
        has before the base steps, in other memory; None where the base starts from the weights as they are.
        """
        core = self._core
        moved, there = ([], []) if start is None else start
        fused = None if core.project_update or not (start is None or _identical(moved, params)) else core.fused
        done: list[bool] = []
        if fused is not None and fused.possible(params, gradients):
            way_back = Rollback(core, active, [], [], deep=False)
        else:
            fused = None
            changed = list(dict.fromkeys([*params, *moved])) if moved else params
            copied = core.atomic or core.project_update or kept or moved or core.released is not None
            before = core.buffers(changed) if copied else []
            if before and not kept:
                _igm_rs.restore_(before, changed)
            way_back = Rollback(core, active, changed if before else [], before, deep=core.atomic)
        try:
            if fused is not None:
                fused.step_(params, there, self._all_but_the_step(active, figures, fused, gradients), done)
            else:
                if moved:
                    _igm_rs.restore_(moved, there)
                self._prepare(active, figures)
                self._base_step(active)
                if core.project_update:
                    self._project_update(active, figures, core.before | dict(zip(moved, there, strict=True)))
                self._note(active, figures)
        except BaseException:
            if not done:
                way_back.undo()
            raise

    def _all_but_the_step(
        self, active: str, figures: Figures, fused: Fused, gradients: list[torch.Tensor]
    ) -> tuple[Any, ...]:
        """Do what belongs to a step, so that the one call with the returned arguments is the last of it."""
        self._prepare(active, figures)
        arguments = fused.prepare(self._core.modalities.active[active], gradients)
        self._note(active, figures)
        return arguments

    def _on_device(
        self,
        active: str,
        figures: Figures,
        params: list[torch.Tensor],
        gradients: list[torch.Tensor],
        rhos: list[float],
        second: Second | None,
    ) -> None:
        """Take a step for which the host reads nothing: it is undone on the device where a gradient was unusable.

        While a CUDA graph is recorded nothing is computed, so no counter moves then; features are not gathered, now or
        when the graph is replayed, which writes to memory of its own.
        """
        core = self._core
        recorded = capturing(params)
        moving = params
        if second is not None:
            climb = climb_of(core, active, params, gradients, rhos, figures)
            found: list[Any] = []
            try:
                core.begin_second_pass()
                figures["perturbation"] = _igm_rs.at_perturbed(
                    climb.params,
                    climb.gradients,
                    self._room(climb.params, own=recorded),
                    climb.norm,
                    climb.rhos,
                    lambda measured: found.extend(self._pass_two(active, second, figures, params, gradients, measured)),
                    not recorded and self._measures(active, climb.norm),
                    p=core.p,
                    adaptive=core.adaptive,
                )
            finally:
                core.end_second_pass()
            moving = found[0]
        before = self._room(moving, own=recorded)
        _igm_rs.restore_(before, moving)
        way_back = Rollback(core, active, moving, before, deep=True, own_memory=recorded)
        try:
            if not recorded:
                self._course.enter(active)
            self._modify(active, figures)
            self._base_step(active)
            if core.project_update:
                self._project_update(active, figures, dict(zip(moving, before, strict=True)))
            figures["usable"] = usable_on_device(figures, strict=figures["sam"] or core.projects(active))
            if way_back.grown() and not recorded and not bool(figures["usable"]):
                way_back.undo()  # state that was not there before can only go as a whole
                self._skip(active, figures)
                return
            keep_where_unusable(figures["usable"], way_back.pairs())
            if not recorded:
                self._note(active, figures)
        except BaseException:
            way_back.undo()
            raise
        if figures.get("perturbation") is not None:
            core.unjudged = figures
        if not (recorded or core.counters.since[active]):  # T was made, which has waited
            self._course.judge()

    def _room(self, params: list[torch.Tensor], *, own: bool) -> list[torch.Tensor]:
        """Memory for weights, kept from step to step; or `own`, of a CUDA graph alone."""
        return [torch.empty_like(p, requires_grad=False) for p in params] if own else self._core.buffers(params)

    # ------------------------------------------------------------------------------------------------------------------
    # Parts of a step

    def _prepare(self, active: str, figures: Figures) -> None:
        """Begin the turn where this is its first step; then modify the gradient."""
        self._course.enter(active)
        self._modify(active, figures)

    def _modify(self, active: str, figures: Figures) -> None:
        """∇W ← ∇W T (Eq. 9); clip."""
        projected = self._projected(active)
        figures["layers"] = [layer.name for layer, _ in projected]
        if projected and not self._core.project_update:
            gradients = _matrices(projected, lambda p: p.grad)
            biases = self._biases(projected, lambda p: torch.zeros_like(p) if p.grad is None else p.grad)
            figures["projected"] = _igm_rs.project_(gradients, biases, [factors for _, factors in projected])
        self._clip(active, figures)

    def _projected(self, active: str) -> list[tuple[Layer, list[Factor]]]:
        """The layers of `active` that have a T and a gradient, with the factors of T."""
        return [
            (layer, factors)
            for layer, factors in zip(*self._core.projection.for_step(active), strict=True)
            if layer.weight.grad is not None
        ]

    def _biases(
        self, projected: list[tuple[Layer, list[Factor]]], of: Callable[[Any], Any]
    ) -> list[torch.Tensor | None]:
        """For each layer what belongs to its bias, a view, where T acts on it, too."""
        augmented = self._core.projection.augmented
        return [
            layer.vector(of(layer.bias)) if layer.bias is not None and augmented(layer) else None
            for layer, _ in projected
        ]

    def _clip(self, active: str, figures: Figures) -> None:
        """Clip all that moves to ``max_grad_norm`` together."""
        core = self._core
        if core.max_grad_norm is None:
            return
        params, gradients, _ = core.moving(active)
        figures["grad_norm_projected"] = norm = gradient_norm(gradients)
        torch.nn.utils.clip_grads_with_norm_(params, core.max_grad_norm, norm)

    def _base_step(self, active: str) -> None:
        """The base optimizer's step on what moves now; whatever else has a gradient is hidden from it meanwhile."""
        core = self._core
        hidden = [(p, p.grad) for p in core.modalities.inactive[active] if p.grad is not None]
        try:
            for p, _ in hidden:
                p.grad = None
            step_without_hooks(core.base)
        finally:
            for p, gradient in hidden:
                p.grad = gradient

    def _project_update(self, active: str, figures: Figures, weights_before: dict[torch.Tensor, torch.Tensor]) -> None:
        """Let T act on what the base optimizer has moved the weights by."""
        projected = self._projected(active)
        if projected:
            figures["projected"] = _igm_rs.project_update_(
                _matrices(projected, lambda p: p),
                _matrices(projected, lambda p: weights_before[p]),
                self._biases(projected, lambda p: p),
                self._biases(projected, lambda p: weights_before[p]),
                [factors for _, factors in projected],
            )

    def _note(self, active: str, figures: Figures) -> None:
        """Count the step and let its features count."""
        core = self._core
        own = {layer.name for layer in core.projection.layers[active]}
        rows = core.tap.take() if core.turn is not None else core.tap.take(own)
        usable = figures.get("usable")
        if usable is not None:
            keep_where_unusable(usable, [(new, torch.zeros_like(new)) for _, new in rows])
        if not core.counters.replaced:
            core.projection.add(active, rows, usable)
        acted = core.projection.told(active)
        turn = core.counters.turns
        core.counters.unperturbed += figures["second_pass"] == "no closure"
        core.counters.inert += figures["second_pass"] == "unchanged"
        self._course.count(active, usable)
        self._tell(active, figures, acted, (turn, core.counters.steps), skipped=False)

    def _skip(self, active: str, figures: Figures) -> None:
        """Count a step that is not taken; everything else stays as it was."""
        core = self._core
        core.tap.drop()
        core.counters.skipped += 1
        figures["skipped"] = True
        self._tell(active, figures, {}, (core.counters.turns, core.counters.steps), skipped=True)

    def _unscale(self, scaler: Any, params: list[torch.Tensor], which: int) -> None:
        if scaler is not None and params:
            self._core.scaling.unscale(scaler, params, which)

    def _random_now(self) -> RandomState:
        params = [p for group in self._core.base.param_groups for p in group["params"]]
        if params and capturing(params):
            raise RuntimeError("preserve_rng=True while a CUDA graph is recorded: expected preserve_rng=False there")
        return RandomState({p.device for p in params})

    def remember_random(self) -> None:
        """Note the generators' state for a first pass that begins now."""
        self._core.random = self._random_now()

    def _check_computed(self, active: str | None) -> None:
        """Raise RuntimeError unless there is nothing that asks for a gradient."""
        count = self._core.trainable(active)
        if count:
            of = "" if active is None else f" of {active!r}"
            raise RuntimeError(
                f"closure computed no gradient: none of the {count} parameters{of} has one after it; expected it to "
                "call backward() on a loss that depends on them"
            )

    def _check_processes(self, active: str) -> None:
        """Raise RuntimeError where T would differ from process to process."""
        count = processes()
        if count > 1 and self._core.projects(active):
            raise RuntimeError(
                f"projection in {count} processes: each would make another T from its own features, and the replicas "
                "would drift apart; expected tau=0 (SAM works), or one process"
            )

    def _make_state_only(self, closure: Closure | None) -> bool:
        """Let the base make its state and nothing else, as torch.distributed.checkpoint asks by a step with lr 0.

        It gives every parameter a gradient of zeros and lr 0 while there is no state. What the base makes of that is
        there for a checkpoint to fill, and forgotten if training goes on without one.
        """
        core = self._core
        state = core.base.state
        self._forget_provisional()
        if closure is not None or state:
            return False
        groups = core.base.param_groups
        lrs = [group["lr"] for group in groups if isinstance(group.get("lr"), torch.Tensor)]
        if not all(lr.is_cpu for lr in lrs):  # the zero that it sets is on the CPU; another would be waited for
            return False
        if not groups or not all("lr" in group and float(group["lr"]) == 0 for group in groups):
            return False
        params = [p for group in groups for p in group["params"] if p.requires_grad]
        if not params or any(p.grad is None for p in params):
            return False
        with torch.no_grad():
            if float(gradient_norm([p.grad for p in params if p.grad is not None])) != 0:
                return False
            step_without_hooks(core.base)
        core.provisional = bool(state)
        core.tap.drop()
        return True

    def _forget_provisional(self) -> None:
        core = self._core
        if core.provisional:
            core.base.state.clear()
            core.provisional = False

    # ------------------------------------------------------------------------------------------------------------------
    # What is told

    def _tell(
        self,
        active: str,
        figures: Figures,
        acted: dict[str, Made],
        position: tuple[int, int],
        *,
        skipped: bool,
    ) -> None:
        """Prepare ``last_stats``: everything stays on its device until it is looked at."""
        core = self._core
        turn, step = position
        constants = {
            "active": active,
            "sources": list(core.projection.sources[active]),
            "turn": turn,
            "round": _igm_rs.turn_at(turn, len(core.modalities.names))[0],
            "step": step,
            "skipped": skipped,
            "skipped_steps": core.counters.skipped,
            "second_pass": figures["second_pass"],
        }
        core.last_stats = step_stats(constants, figures, acted, list(core.counters.pending.values()))


_REMEMBER = (
    "{0} with preserve_rng=True does not know what the first pass has drawn: expected opt.remember_rng() before the "
    "first pass's forward, or step(closure)"
)


def one_closure(
    closures: list[Closure] | tuple[Closure, ...], clear: Callable[[], None], core: Core
) -> Callable[[], Any]:
    """Return a closure that runs several, each on a micro-batch, with gradients cleared once, before the first.

    It returns the sum of their losses. ``zero_grad`` in one of them would undo those before it and is refused.
    """

    def run() -> Any:
        clear()
        core.accumulating = True
        try:
            total: Any = 0.0
            for position, closure in enumerate(closures):
                loss = _loss_of(closure)
                if isinstance(loss, torch.Tensor):
                    loss = loss.detach()  # its graph is not kept for the sum
                elif not isinstance(loss, (int, float)):
                    raise TypeError(
                        f"closure[{position}] returned a {type(loss).__name__}, expected the loss: a tensor or a number"
                    )
                total = total + loss
        finally:
            core.accumulating = False
        return total

    return run


def _loss_of(closure: Closure) -> Any:
    """Call the closure; TypeError where it returns no loss."""
    loss = closure()
    if loss is None:
        raise TypeError("closure returned None, expected the loss: a tensor or a number")
    return loss


def _matrices(projected: list[tuple[Layer, list[Factor]]], of: Callable[[Any], Any]) -> list[torch.Tensor]:
    """For each layer what belongs to its weight, as a view (out, d) or (G, out/G, d)."""
    return [layer.matrix(of(layer.weight)) for layer, _ in projected]


def _identical(some: list[torch.Tensor], others: list[torch.Tensor]) -> bool:
    """Whether both lists hold the same objects in the same order."""
    return len(some) == len(others) and all(map(operator.is_, some, others))


def _finite(norm: torch.Tensor) -> bool:
    return math.isfinite(float(norm))


def processes() -> int:
    """Return how many processes train together, as torch.distributed has it."""
    distributed = torch.distributed
    together = distributed.is_available() and distributed.is_initialized()
    return distributed.get_world_size() if together else 1


def usable(*norms: torch.Tensor) -> bool:
    """Whether a step can be taken: each gradient norm finite and not zero. Waits for the device of the norms."""
    return all(math.isfinite(value) and value > 0 for value in map(float, norms))
