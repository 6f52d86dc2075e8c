"""What one optimizer consists of, in one object that turns, steps and checkpoints share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from . import _checks, _igm_rs
from ._amp import Scaling
from ._batchnorm import Statistics
from ._features import FeatureTap
from ._fused import fused_for
from ._head_pass import HeadPass
from ._layers import Layer
from ._modalities import Modalities
from ._projection import Projection
from ._random import RandomState
from ._turns import Counters
from ._warnings import warn
from .released import Released
from .stats import StepStats

__all__ = ["Core", "PerModality", "Perturbed", "Replay"]

Closure = Callable[[], Any]


class PerModality(MutableMapping[str, float]):
    """A number >= 0 for each modality, checked whenever it is set; modalities come and go with the optimizer only."""

    def __init__(self, argument: str, value: Any, modalities: tuple[str, ...]) -> None:
        self._argument = argument
        self._values = _checks.per_modality(argument, value, modalities)

    def __getitem__(self, name: str) -> float:
        return self._values[name]

    def __setitem__(self, name: str, value: Any) -> None:
        if name not in self._values:
            raise ValueError(f"{self._argument} names {name!r}, expected one of {', '.join(map(repr, self._values))}")
        self._values[name] = _checks.non_negative(f"{self._argument}[{name!r}]", value)

    def __delitem__(self, name: str) -> None:
        raise TypeError(f"{self._argument}[{name!r}] cannot be removed: every modality has a {self._argument}")

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __repr__(self) -> str:
        return repr(self._values)

    def add(self, name: str, value: float) -> None:
        """Take in one modality more."""
        self._values[name] = value

    def assign(self, value: Any) -> None:
        """Take one number for all modalities, or a mapping with one for each."""
        self._values = _checks.per_modality(self._argument, value, tuple(self._values))


@dataclass
class Perturbed:
    """A step between ``first_step`` and ``second_step``: who steps, what was perturbed, and the way back."""

    active: str | None
    params: list[torch.Tensor]
    before: list[torch.Tensor]
    figures: dict[str, Any]
    usable: bool = False


@dataclass
class Replay:
    """The closure that the next step without one runs for its second pass, the scaler of its loss, and the first's."""

    closure: Closure
    scaler: Any
    loss: Any


@dataclass
class Structure:
    """How the optimizer was told what to project, for modalities that come later."""

    heads: Mapping[str, Any] | nn.ModuleDict | None
    head: Any | None
    scope: float | None
    model: nn.Module | None
    sources: str | Mapping[str, Any]
    later: Mapping[str, list[str]] = field(default_factory=dict)
    """The sources of modalities that came later with sources of their own."""
    linear: bool = False
    """Whether Linear layers alone are projected."""


@dataclass
class Core:
    """All parts of an :class:`igm_rs.IGMOptimizer`; the names of the settings are those of its arguments."""

    base: torch.optim.Optimizer
    modalities: Modalities
    structure: Structure
    projection: Projection
    tap: FeatureTap
    statistics: Statistics
    rho: PerModality
    tau: PerModality
    refresh: str | int
    project_update: bool
    reset: frozenset[str]
    max_grad_norm: float | None
    preserve_rng: bool
    atomic: bool
    p: float
    adaptive: bool
    sam_every: int
    skip_inert: bool
    head_pass: HeadPass | None
    """What makes the second pass one of the head alone; None where it is one of everything."""
    released: Released | None
    """What a step has of the released scripts; None where it is the paper's."""
    initial_lr: list[float]
    counters: Counters
    turn: str | None = None
    """The modality whose ``turn()`` block is open."""
    perturbed: Perturbed | None = None
    replay: Replay | None = None
    random: RandomState | None = None
    """What ``remember_rng`` has noted."""
    accumulating: bool = False
    """Whether one closure of a list is running."""
    provisional: bool = False
    """Whether the base's state was made by a step with zero gradients and zero lr, for a checkpoint to fill."""
    last_stats: StepStats = field(default_factory=lambda: StepStats({}))
    warned: set[str] = field(default_factory=set)
    scaling: Scaling = field(default_factory=Scaling)
    unjudged: dict[str, Any] | None = None
    """Figures of a step whose perturbation was measured on a device, to be judged when that is waited for anyhow."""
    before: dict[torch.Tensor, torch.Tensor] = field(default_factory=dict)
    """Memory for weights, kept from step to step."""
    shifted: dict[torch.Tensor, torch.Tensor] = field(default_factory=dict)
    """The same, for perturbed weights that a base starts from."""
    spare: dict[str, list[torch.Tensor]] = field(default_factory=dict)
    """Memory for the base's state by modality, kept from step to step."""

    def __post_init__(self) -> None:
        self.groups = self.base.param_groups
        self.fused = fused_for(self.base)

    def __getstate__(self) -> dict[str, Any]:
        self.counters.settle()
        scratch: dict[str, Any] = {
            "unjudged": None,
            "turn": None,
            "accumulating": False,
            "before": {},
            "shifted": {},
            "spare": {},
            "replay": None,
            "random": None,
            "scaling": Scaling(),
        }
        return vars(self) | scratch

    def moving(self, active: str) -> tuple[list[torch.Tensor], list[torch.Tensor], list[float]]:
        """Return the parameters of `active` that have gradients, these gradients, and ρ for each.

        ρ is negative where the base maximises: what is worse lies downhill there.
        """
        params: list[torch.Tensor] = []
        gradients: list[torch.Tensor] = []
        rhos: list[float] = []
        default = self.rho[active]
        for group, members in self.modalities.active[active]:
            before = len(params)
            for p in members:
                gradient = p.grad
                if gradient is not None:
                    params.append(p)
                    gradients.append(gradient)
            for key in ("rho", "tau"):  # nobody checks a group when it is changed
                if key in group:
                    _checks.non_negative(f"{key} of a parameter group", group[key])
            rho = group.get("rho", default)
            rhos += [-rho if group.get("maximize") else rho] * (len(params) - before)
        return params, gradients, rhos

    def trainable(self, active: str | None) -> int:
        """Return how many parameters of `active`, or of all, ask for a gradient."""
        if active is None:
            return sum(p.requires_grad for group in self.base.param_groups for p in group["params"])
        return sum(p.requires_grad for _, members in self.modalities.active[active] for p in members)

    def who_steps(self) -> str | None:
        """Return the modality that steps now; None where nothing has a gradient.

        Raises RuntimeError where it cannot be told: more than one modality has gradients of its own, or none has and
        there are several.
        """
        if self.turn is not None:
            return self.turn
        names = self.modalities.names
        if len(names) == 1:
            return names[0]
        own = self.modalities.own
        having = [name for name in names if any(p.grad is not None for p in own[name])]
        if len(having) == 1:
            return having[0]
        if having:
            moved = [name for name in having if _has_nonzero_gradient(own[name])]
            if len(moved) == 1:
                return moved[0]
            if not moved:
                return having[0]
            having = moved
        elif not any(p.grad is not None for group in self.base.param_groups for p in group["params"]):
            return None
        who = " and ".join(map(repr, having)) or "no modality"
        raise RuntimeError(
            f"step outside any turn: {who} of {', '.join(map(repr, names))} has gradients of its own, expected exactly "
            "one; open a turn (with opt.turn(name): …), or clear the gradients between the modalities' backward passes"
        )

    def projects(self, active: str) -> bool:
        """Whether the settings ask for `active`'s gradient to be modified at all."""
        projection = self.projection
        if projection.options.projector == "identity":
            return False
        if projection.options.combine == "sum":
            layers = {mine for listed in projection.pairs[active] for mine, _ in listed}
            return any(self.tau_of(layer, active) > 0 for layer in layers)
        return any(
            self.tau_of(theirs, source) > 0
            for source, pairs in zip(projection.sources[active], projection.pairs[active], strict=False)
            for _, theirs in pairs
        )

    def tau_of(self, layer: Layer, modality: str) -> float:
        """Return τ for T of `layer`, made from `modality`'s features."""
        group = self.modalities.group_of(layer.weight, modality)
        return float(self.tau[modality] if group is None else group.get("tau", self.tau[modality]))

    def buffers(
        self, params: list[torch.Tensor], kept: dict[torch.Tensor, torch.Tensor] | None = None
    ) -> list[torch.Tensor]:
        """Return memory for these weights, `kept` from step to step: that for the weights before it by default."""
        kept = self.before if kept is None else kept
        buffers = []
        for p in params:
            buffer = kept.get(p)
            if buffer is None or not (
                buffer.shape == p.shape
                and buffer.dtype is p.dtype
                and buffer.device == p.device
                and buffer.stride() == p.stride()
            ):
                buffer = kept[p] = torch.empty_like(p, requires_grad=False)
            buffers.append(buffer)
        return buffers

    def restore(self) -> None:
        """Take the perturbation of ``first_step`` back, to the bit."""
        try:
            if self.perturbed is not None:
                _igm_rs.restore_(self.perturbed.params, self.perturbed.before)
            self.perturbed = None
        finally:
            self.end_second_pass()

    def check_shared(self) -> None:
        """Raise RuntimeError where the base's groups have been changed behind the optimizer that shares them."""
        if self.base.param_groups is not self.groups or len(self.groups) != len(self.initial_lr):
            raise RuntimeError(
                f"the groups of the base optimizer ({type(self.base).__name__}) were changed after it was wrapped: "
                "expected load_state_dict and add_param_group of the IGMOptimizer"
            )

    @property
    def gathers(self) -> bool:
        """Whether the forward passes of steps bring features, so that a turn ends with a new T."""
        return self.released is None or self.released.gather == "turn"

    def sam_is_due(self, active: str) -> bool:
        """Whether the next step of `active` is one of those that SAM makes."""
        return self.counters.taken[active] % self.sam_every == 0

    def forget_passes(self) -> None:
        """Forget the forward passes that have been: no step is to follow them."""
        self.tap.drop()
        if self.head_pass is not None:
            self.head_pass.drop()

    def begin_second_pass(self) -> None:
        """What is forwarded from now on is at θ + ε*: it is no feature of the data and no statistic of the model.

        Casts of the weights that a torch.autocast around the step has kept are those of other weights now.
        """
        torch.clear_autocast_cache()
        self.tap.muted = True
        self.statistics.hold()

    def end_second_pass(self) -> None:
        """Listen and record again."""
        torch.clear_autocast_cache()
        self.tap.muted = not self.gathers
        self.statistics.release()
        if self.head_pass is not None:
            self.head_pass.end()

    def abandon_perturbation(self) -> None:
        """Restore the weights and drop the step that ``first_step`` began."""
        self.restore()
        self.forget_passes()

    def refuse_perturbed(self, what: str) -> None:
        """Raise RuntimeError, with the weights restored, where ``first_step`` has perturbed them."""
        if self.perturbed is not None:
            self.abandon_perturbation()
            raise RuntimeError(
                f"{what} between first_step and second_step: the weights were restored and the begun step was dropped"
            )

    def warn_once(self, key: str, message: str) -> None:
        """Warn, a UserWarning, the first time that `key` comes."""
        if key not in self.warned:
            self.warned.add(key)
            warn(message, UserWarning)


def alike(buffer: torch.Tensor, tensor: torch.Tensor) -> bool:
    """Whether `buffer` can hold a copy of `tensor`, bit for bit and stride for stride."""
    return (
        buffer.shape == tensor.shape
        and buffer.dtype == tensor.dtype
        and buffer.device == tensor.device
        and buffer.layout == tensor.layout
        and (tensor.layout is not torch.strided or buffer.stride() == tensor.stride())
    )


def _has_nonzero_gradient(params: list[torch.Tensor]) -> bool:
    norm = _igm_rs.gradient_norm([p.grad for p in params if p.grad is not None])
    return float(norm) != 0


def lr_of(group: Mapping[str, Any]) -> float:
    """Return the learning rate of a group as a plain number; 0 for an optimizer that has none."""
    return float(group.get("lr", 0.0))
