"""IGMOptimizer: turns, hooks, steps and state of Algorithm 1. The arithmetic on tensors is in Rust (`_igm_rs`)."""

from __future__ import annotations

import math
import operator
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from . import _checks, _igm_rs
from ._base import base_optimizer, check_group, step_without_hooks
from ._batchnorm import Statistics
from ._features import FeatureTap
from ._layers import Layer, head_layers, scope_layers
from ._modalities import Modalities, parameter_names
from ._projection import Projection, ProjectionOptions
from ._sgd import FusedSGD
from ._turns import Counters
from .stats import StepStats, effective_perturbation, step_stats

__all__ = ["IGMOptimizer"]

Closure = Callable[[], Any]

STATE_KEY = "igm"
"""The key of a state dict under which everything that is not the base optimizer's stands."""

STATE_VERSION = 1

_NOTICEABLE = 0.5
"""Share of ρ: a perturbation whose realised length is below it is warned about."""


class IGMOptimizer(torch.optim.Optimizer):
    r"""Interactive multimodal learning by flat gradient modification, around any PyTorch optimizer.

    A step of the active modality j (Algorithm 1): the gradient g at θ⁽ʲ⁾; ε* = ρ g/‖g‖₂ (Eq. 7); the gradient at
    θ⁽ʲ⁾ + ε* (Eq. 8), after which θ⁽ʲ⁾ is restored to the bit; ∇W ← ∇W T⁽ᵏ⁾ for every projected layer, k the source
    (Eq. 9); the base optimizer's step. At the end of a *turn* of j, Ȳ⁽ʲ⁾ of the turn's batches (Eq. 2) gives T⁽ʲ⁾
    (Eq. 4). Until a modality has had its first turn its T is I.

    Parameters
    ----------
    params : torch.optim.Optimizer or iterable
        A ready base optimizer, whose groups and state are shared from now on; or what `base` takes as parameters.
    modalities : mapping of str to module, parameter, name prefix, or a list of these, optional
        What belongs to each modality, in the order of training. A parameter under several or under none is shared:
        it moves in the turn of each that lists it, or in every turn. None: one modality, ``"all"``.
        A prefix is matched against the names in `model` (or in ``named_parameters()`` given to the base); end it with
        a dot to stop at a module's name.
    base : type, optional
        Class of the base optimizer when `params` is no optimizer; ``torch.optim.SGD`` by default.
    heads : mapping of str to module, module name, or a list of these, optional
        For each modality its own head, whose Linear layers are projected; its parameters count as the modality's.
    head : module, module name, or a list of these, optional
        One head that all modalities share; its Linear layers are projected. What passes through it before a step counts
        as features of the modality that steps, so forward one modality, step, then forward the next.
    scope : float, optional
        In [0, 1], instead of heads: project layers from the output of each modality backwards until they hold this
        share of its parameters (Table 4).
    model : torch.nn.Module, optional
        Where names of modules and parameters are looked up, and BatchNorm layers, whose statistics advance once a step
        and not twice; without it BatchNorm layers are found in `modalities` where these are modules.
    rho : float or mapping of str to float
        ρ ≥ 0, length of the perturbation in the unit of the parameters; 0 is no SAM. A group's own ``"rho"`` wins.
        Below the resolution of the dtype it does nothing, which is measured and warned about.
    tau : float or mapping of str to float
        τ ≥ 0, strength of the T⁽ᵏ⁾ that modality k's features make, dimensionless: its eigenvalues lie in [e^−τ, 1];
        0 is no projection. The ``"tau"`` of the group that holds a layer's weight wins.
    sources : {"previous", "others"} or mapping of str to None, str or list of str
        Whose T acts on each modality: the one trained before it (Algorithm 1, line 9), all others (their product in
        the order of training), or as listed; None is "not projected" (Table 3).
    projector : {"flat", "orthogonal"}
        T of Eq. (4); or the recursion of MLA, P ← P − k kᵀ/(α + rᵀk), where P belongs to the layer.
    features : {"mean", "samples", "centred"}
        A batch adds its mean (Eq. 2), every sample, or every sample around the mean of all.
    covariance : {"fresh", "kept"} or float
        How long Ȳ lives: a turn (Eq. 2, t = 1), for ever, or multiplied by this factor in (0, 1) at each turn.
    refresh : {"turn", "manual"} or int
        When T⁽ʲ⁾ is made: at the end of j's turn; by :meth:`refresh` only; or after every n of j's steps as well.
        Outside any ``turn()`` consecutive steps of one modality are its turn; with an integer, every n of its steps.
    project : {"gradient", "update"}
        What T acts on: the gradient (Eq. 9), or the base optimizer's update of the weight.
    route : {"auto", "eigh", "svd"}
        How T is computed: from the rows where there are fewer than d, else by ``eigh``; or as named.
    reset : subset of {"momentum", "lr"}
        What starts anew with each turn: the base's state of the moving parameters; the lr of construction.
    alpha, batches, normalise : float, int or None, bool
        For ``projector="orthogonal"`` alone: α > 0 of the recursion; with `batches` (the loader's length) α is
        ``alpha ** (1 + batch / batches)``; whether P is divided by its Frobenius norm after each row, as released.
    **base_kwargs
        Passed to `base`, such as ``lr=0.01``.

    Raises
    ------
    ValueError, TypeError
        For every argument out of its range, naming argument, value and what was expected.

    Notes
    -----
    With ``rho=0`` and no projection a step is the base optimizer's own, to the bit. Otherwise a step whose gradient is
    zero or not finite, in either pass, leaves everything as it was and is counted in ``last_stats["skipped_steps"]``.

    References
    ----------
    Jiang, Chi, Yang: Interactive Multimodal Learning via Flat Gradient Modification, IJCAI 2025: Algorithm 1,
    Eqs. (2)-(9). Foret et al.: Sharpness-Aware Minimization, ICLR 2021. Zhang et al.: MLA, CVPR 2024.

    Examples
    --------
    >>> import torch, igm_rs
    >>> audio, video = torch.nn.Linear(4, 2), torch.nn.Linear(4, 2)
    >>> base = torch.optim.SGD([*audio.parameters(), *video.parameters()], lr=0.1)
    >>> opt = igm_rs.IGMOptimizer(base, {"audio": audio, "video": video}, heads={"audio": audio, "video": video})
    >>> def closure():
    ...     opt.zero_grad()
    ...     loss = audio(torch.ones(3, 4)).square().mean()
    ...     loss.backward()
    ...     return loss
    >>> with opt.turn("audio"):
    ...     loss = opt.step(closure)
    >>> opt.last_stats["active"]
    'audio'
    """

    def __init__(
        self,
        params: Any,
        modalities: Mapping[str, Any] | nn.ModuleDict | None = None,
        *,
        base: type[torch.optim.Optimizer] | None = None,
        heads: Mapping[str, Any] | nn.ModuleDict | None = None,
        head: Any | None = None,
        scope: float | None = None,
        model: nn.Module | None = None,
        rho: float | Mapping[str, float] = 0.05,
        tau: float | Mapping[str, float] = 0.4,
        sources: str | Mapping[str, Any] = "previous",
        projector: str = "flat",
        features: str = "mean",
        covariance: str | float = "fresh",
        refresh: str | int = "turn",
        project: str = "gradient",
        route: str = "auto",
        reset: str | tuple[str, ...] = (),
        alpha: float = 0.1,
        batches: int | None = None,
        normalise: bool = False,
        **base_kwargs: Any,
    ) -> None:
        self._options = ProjectionOptions(
            projector=_checks.choice("projector", projector, ("flat", "orthogonal")),
            features=_checks.choice("features", features, ("mean", "samples", "centred")),
            life=_checks.life(covariance, projector),
            route=_checks.choice("route", route, ("auto", "eigh", "svd")),
            alpha=_checks.positive("alpha", alpha),
            batches=None if batches is None else _checks.positive_integer("batches", batches),
            normalise=_checks.flag("normalise", normalise),
        )
        self._refresh = _checks.refresh_rule(refresh)
        self._project_update = _checks.choice("project", project, ("gradient", "update")) == "update"
        self._reset = _checks.names("reset", reset, ("momentum", "lr"))
        _check_projector(self._options)
        if sum(given is not None for given in (heads, head, scope)) > 1:
            raise ValueError("heads, head and scope are given together, expected at most one of them")

        ready = base_optimizer(params, base, base_kwargs)
        super().__init__(ready.param_groups, ready.defaults)
        self._share(ready)
        self._modalities = Modalities(modalities, self.param_groups, parameter_names(self.param_groups, model))
        if scope is not None:
            layers = scope_layers(self._modalities, _checks.share("scope", scope), model)
        else:
            layers = head_layers(self._modalities, heads, head, model)
        self._modalities.index(self.param_groups)
        self._check_held(layers)
        names = self._modalities.names
        self.rho = _checks.per_modality("rho", rho, names)
        self.tau = _checks.per_modality("tau", tau, names)
        self._check_groups()
        indices = _igm_rs.source_lists(list(names), sources)
        by_name = {name: [names[k] for k in listed] for name, listed in zip(names, indices, strict=True)}
        self._projection = Projection(layers, by_name, self._options)
        self._counters = Counters(names)
        self._tap = FeatureTap(
            {id(layer.module): layer for mine in layers.values() for layer in mine}.values(),
            "mean" if features == "mean" else "samples",
        )
        roots = [module for mine in self._modalities.modules.values() for _, module in mine]
        self._statistics = Statistics(roots if model is None else [*roots, model])
        self._initial_lr = [_lr_of(group) for group in self.param_groups]
        self._turn: str | None = None
        self._before: dict[torch.Tensor, torch.Tensor] = {}
        self._perturbed: tuple[str | None, list[torch.Tensor], list[torch.Tensor], dict[str, Any]] | None = None
        self._warned: set[str] = set()
        self._last_stats = StepStats({})

    # ------------------------------------------------------------------------------------------------------------------
    # What it tells

    @property
    def modalities(self) -> tuple[str, ...]:
        """Names of the modalities, in the order of training."""
        return self._modalities.names

    @property
    def base(self) -> torch.optim.Optimizer:
        """The base optimizer; its groups and state are this optimizer's own."""
        return self._base

    @property
    def sources(self) -> dict[str, list[str]]:
        """For each modality those whose T acts on it (Algorithm 1, line 9)."""
        return {name: list(listed) for name, listed in self._projection.sources.items()}

    @property
    def pairs(self) -> dict[str, dict[str, list[tuple[str, str]]]]:
        """For each modality and each of its sources: (projected layer, layer of the source whose T acts on it)."""
        projection = self._projection
        return {
            name: {
                source: [(mine.name, theirs.name) for mine, theirs in pairs]
                for source, pairs in zip(projection.sources[name], projection.pairs[name], strict=False)
            }
            for name in self.modalities
        }

    @property
    def projectors(self) -> dict[str, dict[str, torch.Tensor]]:
        """T by modality and layer, (d, d) each, at least float32; a layer without T yet (T = I) is absent."""
        return self._projection.projectors()

    @property
    def covariances(self) -> dict[str, dict[str, torch.Tensor]]:
        """Ȳ by modality and layer, (d, d), float64 on the CPU, as gathered so far; absent before the first row."""
        centred = self._options.features == "centred"
        return {
            name: {
                layer: value
                for layer, turns in mine.items()
                if (value := turns.all().value(centred=centred)) is not None
            }
            for name, mine in self._projection.covariances.items()
        }

    def spectrum(self, modality: str | None = None) -> dict[str, Any]:
        """Return the singular values λ of Ȳ, descending (Eq. 3).

        Parameters
        ----------
        modality : str, optional
            One modality; all of them by default.

        Returns
        -------
        dict
            Layer name to float64 array of shape (d,); one such dict for each modality when none is named. Layers
            that have seen no features are absent.

        Raises
        ------
        ValueError
            An unknown modality.
        """
        if modality is not None:
            return dict[str, Any](self._projection.spectrum(self._modalities.check(modality)))
        return {name: self._projection.spectrum(name) for name in self.modalities}

    @property
    def last_stats(self) -> StepStats:
        """What the last step did: a mapping of plain values, see :class:`igm_rs.StepStats`."""
        return self._last_stats

    @property
    def turns(self) -> int:
        """Number of finished turns."""
        return self._counters.turns

    @property
    def round(self) -> int:
        """Number of finished rounds, m turns each (Out_Iters)."""
        return _igm_rs.turn_at(self._counters.turns, len(self.modalities))[0]

    @property
    def skipped_steps(self) -> int:
        """Number of steps that were skipped for a zero or non-finite gradient."""
        return self._counters.skipped

    @property
    def unperturbed_steps(self) -> int:
        """Number of steps taken without SAM, because no closure was given, while ``rho`` asked for it."""
        return self._counters.unperturbed

    # ------------------------------------------------------------------------------------------------------------------
    # Turns (Algorithm 1, lines 1-3 and 11-13)

    @contextmanager
    def turn(self, modality: str) -> Iterator[IGMOptimizer]:
        """Train `modality` inside the ``with`` block; at its end T of `modality` is made from the turn's features.

        A block without a step changes nothing. Features forwarded since the last step count with the first step in it.
        A turn that an exception leaves, or that a state dict was saved in, is taken up again when the same modality's
        turn is entered next; another modality's turn discards it.

        Raises
        ------
        ValueError
            An unknown modality.
        RuntimeError
            Inside another turn, or between ``first_step`` and ``second_step``; at the end, if steps were taken and a
            projected layer saw no features.
        """
        name = self._modalities.check(modality)
        if self._turn is not None:
            raise RuntimeError(f"turn({name!r}) inside turn({self._turn!r}): leave the one before the other begins")
        self._refuse_perturbed("turn")
        if not (self._counters.open == name and self._counters.explicit):
            self._leave()
            self._counters.started[name] = False
        self._turn = name
        finished = False
        try:
            yield self
            finished = True
        finally:
            self._turn = None
            self._tap.drop()
            if self._perturbed is not None:
                self._abandon_perturbation()
        if finished and self._counters.open == name:
            self._end_turn(name)

    @contextmanager
    def collect(self, modality: str) -> Iterator[None]:
        """Gather Ȳ of `modality` from the forward passes inside the ``with`` block (Algorithm 1, lines 11-12).

        Inside a turn of `modality` the rows replace those that the turn's own steps have gathered and will gather;
        outside any turn T of `modality` is made when the block ends. A block without a forward pass changes nothing.

        Raises
        ------
        ValueError
            An unknown modality.
        RuntimeError
            Inside another collecting block, or inside the turn of another modality.
        """
        name = self._modalities.check(modality)
        if self._tap.sink is not None:
            raise RuntimeError(f"collect({name!r}) inside another collect: leave the one before the other begins")
        if self._turn not in (None, name):
            raise RuntimeError(f"collect({name!r}) inside turn({self._turn!r}): collect in its own turn or outside any")
        self._refuse_perturbed("collect")
        gathered = self._projection.empty(name)

        def sink(layer: str, rows: torch.Tensor) -> None:
            if layer in gathered:
                gathered[layer].add(rows)

        self._tap.sink = sink
        try:
            yield
        finally:
            self._tap.sink = None
        if not any(gathered.values()):
            return
        if self._turn is None:
            self._leave()
            self._projection.begin(name)
            self._projection.put(name, gathered)
            self._make_projector(name)
            self._counters.started[name] = False
        else:
            self._enter(name)
            self._projection.put(name, gathered)
            self._counters.replaced = True

    def refresh(self, modality: str) -> None:
        """Make T of `modality` now, from the features gathered so far; without any it stays as it was.

        Raises
        ------
        ValueError
            An unknown modality.
        """
        self._refuse_perturbed("refresh")
        self._make_projector(self._modalities.check(modality))
        if self._turn is None and self._refresh == "manual":
            self._counters.started[modality] = False

    # ------------------------------------------------------------------------------------------------------------------
    # Steps (Algorithm 1, lines 5-10)

    def step(self, closure: Closure | None = None) -> Any:
        """Take one step of the active modality.

        The active modality is that of the turn; outside any turn the one modality with gradients of its own.

        Parameters
        ----------
        closure : callable, optional
            Clears the gradients, computes the loss, calls ``backward`` and returns the loss. It runs with gradients
            enabled, twice with SAM and once without. Without a closure the gradients at hand are projected and the
            base steps; SAM cannot be done, which is warned about once and counted.

        Returns
        -------
        Any
            What the closure returned in the first pass, L(θ); None without a closure.

        Raises
        ------
        RuntimeError
            Outside any turn when more than one modality has gradients; between ``first_step`` and ``second_step``.
        BaseException
            Whatever the closure raises; the weights are then as before the step, to the bit.
        """
        self._refuse_perturbed("step")
        loss = None
        if closure is not None:
            self._tap.drop()
            try:
                with torch.enable_grad():
                    loss = closure()
            except BaseException:
                self._tap.drop()
                raise
        with torch.no_grad():
            self._step(closure, loss)
        return loss

    def first_step(self, zero_grad: bool = False) -> None:
        """Perturb the weights, θ ← θ + ε* (Eq. 7), for scripts written for the usual SAM packages.

        To be followed by a second forward and backward pass and :meth:`second_step`. `zero_grad` clears the gradients
        afterwards.

        Raises
        ------
        RuntimeError
            When the weights are perturbed already, or more than one modality has gradients outside any turn.
        """
        self._refuse_perturbed("first_step")
        with torch.no_grad():
            active = self._active()
            figures: dict[str, Any] = {}
            params: list[torch.Tensor] = []
            before: list[torch.Tensor] = []
            if active is not None:
                params, gradients, rhos = self._moving(active)
                figures["grad_norm"] = norm = _igm_rs.gradient_norm(gradients)
                figures["usable"] = _usable(norm)
                if figures["usable"]:
                    before = self._buffers(params)
                    figures["parts"] = _parts(gradients, rhos, norm)
                    _igm_rs.restore_(before, params)  # whatever interrupts from here on, there is a way back
                    self._perturbed = active, params, before, figures
                    figures["perturbation"] = _igm_rs.perturb_(params, gradients, before, norm, rhos)
                else:
                    params = []
            self._perturbed = active, params, before, figures
            self._begin_second_pass()
        if zero_grad:
            self.zero_grad()

    def second_step(self, zero_grad: bool = False) -> None:
        """Restore the weights to the bit and step with the gradients at θ + ε* (Eqs. 8 and 9).

        `zero_grad` clears the gradients afterwards.

        Raises
        ------
        RuntimeError
            Without a ``first_step`` before.
        """
        if self._perturbed is None:
            raise RuntimeError("second_step without first_step: the weights are not perturbed")
        active, _, _, figures = self._perturbed
        with torch.no_grad():
            self._restore()
            if active is not None:
                _, gradients, rhos = self._moving(active)
                figures["grad_norm_perturbed"] = norm = _igm_rs.gradient_norm(gradients)
                if figures["usable"] and _usable(norm):
                    self._finish(active, figures)
                    self._judge_perturbation(figures, rhos)
                else:
                    self._skip(active, figures)
        if zero_grad:
            self.zero_grad()

    def _step(self, closure: Closure | None, loss: Any) -> None:
        active = self._active()
        if active is None:
            self._tap.drop()
            return
        figures: dict[str, Any] = {"loss": loss}
        params, gradients, rhos = self._moving(active)
        if not params:
            self._tap.drop()
            return
        sam = any(rho > 0 for rho in rhos)
        figures["grad_norm"] = norm = _igm_rs.gradient_norm(gradients)
        two_passes = sam and closure is not None
        judged_later = two_passes and norm.device.type != "cpu"  # so that a step waits for the device once, not twice
        if not judged_later and not (_usable(norm) if sam or self._projects(active) else _finite(norm)):
            self._skip(active, figures)
        elif two_passes and closure is not None:
            self._sam_step(active, closure, params, gradients, rhos, figures)
        else:
            if sam:
                self._counters.unperturbed += 1
                self._warn_once(
                    "closure",
                    UserWarning,
                    f"step() was called without a closure while rho is {self.rho[active]}: SAM needs step(closure) (or "
                    "first_step and second_step); projection and the base optimizer's step are done without it",
                )
            self._finish(active, figures)

    def _sam_step(
        self,
        active: str,
        closure: Closure,
        params: list[torch.Tensor],
        gradients: list[torch.Tensor],
        rhos: list[float],
        figures: dict[str, Any],
    ) -> None:
        """Second pass at θ + ε* (Eq. 8). Whatever leaves the closure, the weights are restored before anything else."""
        before = self._buffers(params)
        verdict = {"skip": False, "done": False}

        def at_perturbed_weights() -> bool:
            with torch.enable_grad():
                figures["loss_perturbed"] = closure()
            moving, second, _ = self._moving(active)
            figures["grad_norm_perturbed"] = norm = _igm_rs.gradient_norm(second)
            verdict["skip"] = not _usable(figures["grad_norm"], norm)
            same = len(moving) == len(params) and all(map(operator.is_, moving, params))
            fused = self._fused if same and not (verdict["skip"] or self._project_update) else None
            if fused is not None and fused.possible(params, second):
                self._update(active, figures, fused=(params, before, second))
                verdict["done"] = True
            return verdict["done"]

        on_cpu = figures["grad_norm"].device.type == "cpu"  # elsewhere it is measured at the first step of a turn
        measure = on_cpu or "perturbation" not in self._warned or not self._counters.started[active]
        figures["parts"] = _parts(gradients, rhos, figures["grad_norm"])
        try:
            self._begin_second_pass()
            figures["perturbation"] = _igm_rs.at_perturbed(
                params, gradients, before, figures["grad_norm"], rhos, at_perturbed_weights, measure
            )
        except BaseException:
            self._tap.drop()
            raise
        finally:
            self._end_second_pass()
        if verdict["skip"]:
            self._skip(active, figures)
            return
        if not verdict["done"]:
            self._update(active, figures)
        self._note(active, figures)
        self._judge_perturbation(figures, rhos)

    # ------------------------------------------------------------------------------------------------------------------
    # Parts of a step

    def _active(self) -> str | None:
        """The modality that steps now; None where nothing has a gradient.

        Raises RuntimeError where it cannot be told: more than one modality has gradients of its own, or none has and
        there are several.
        """
        if self._turn is not None:
            return self._turn
        names = self.modalities
        if len(names) == 1:
            return names[0]
        own = self._modalities.own
        having = [name for name in names if any(p.grad is not None for p in own[name])]
        if len(having) == 1:
            return having[0]
        if having:
            moved = [name for name in having if self._has_nonzero_gradient(own[name])]
            if len(moved) == 1:
                return moved[0]
            if not moved:
                return having[0]
            having = moved
        elif not any(p.grad is not None for group in self.param_groups for p in group["params"]):
            return None
        who = " and ".join(map(repr, having)) or "no modality"
        raise RuntimeError(
            f"step outside any turn: {who} of {', '.join(map(repr, names))} has gradients of its own, expected exactly "
            "one; open a turn (with opt.turn(name): …), or clear the gradients between the modalities' backward passes"
        )

    @staticmethod
    def _has_nonzero_gradient(params: list[torch.Tensor]) -> bool:
        norm = _igm_rs.gradient_norm([p.grad for p in params if p.grad is not None])
        return float(norm) != 0

    def _moving(self, active: str) -> tuple[list[torch.Tensor], list[torch.Tensor], list[float]]:
        """The parameters of `active` that have gradients, these gradients, and ρ for each."""
        params: list[torch.Tensor] = []
        gradients: list[torch.Tensor] = []
        rhos: list[float] = []
        default = self.rho[active]
        for group, members in self._modalities.active[active]:
            before = len(params)
            for p in members:
                gradient = p.grad
                if gradient is not None:
                    params.append(p)
                    gradients.append(gradient)
            rhos += [group.get("rho", default)] * (len(params) - before)
        return params, gradients, rhos

    def _projects(self, active: str) -> bool:
        """Whether the settings ask for `active`'s gradient to be modified at all."""
        projection = self._projection
        return any(
            self._tau_of(theirs, source) > 0
            for source, pairs in zip(projection.sources[active], projection.pairs[active], strict=False)
            for _, theirs in pairs
        )

    def _tau_of(self, layer: Layer, modality: str) -> float:
        group = self._modalities.group_of(layer.module.weight, modality)
        return float(self.tau[modality] if group is None else group.get("tau", self.tau[modality]))

    def _buffers(self, params: list[torch.Tensor]) -> list[torch.Tensor]:
        """Memory for the weights before the perturbation, kept from step to step."""
        kept = self._before
        buffers = []
        for p in params:
            buffer = kept.get(p)
            if buffer is None or not (
                buffer.shape == p.shape
                and buffer.dtype == p.dtype
                and buffer.device == p.device
                and buffer.stride() == p.stride()
            ):
                buffer = kept[p] = torch.empty_like(p, requires_grad=False)
            buffers.append(buffer)
        return buffers

    def _finish(self, active: str, figures: dict[str, Any]) -> None:
        self._update(active, figures)
        self._note(active, figures)

    def _update(
        self,
        active: str,
        figures: dict[str, Any],
        fused: tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]] | None = None,
    ) -> None:
        """Project and let the base optimizer step (Eq. 9; Algorithm 1, line 10)."""
        self._enter(active)
        layers, projectors = self._projection.for_step(active)
        having = [
            (layer, projector, gradient)
            for layer, projector in zip(layers, projectors, strict=True)
            if (gradient := layer.module.weight.grad) is not None
        ]
        weights = [layer.module.weight for layer, _, _ in having]
        projectors = [projector for _, projector, _ in having]
        if self._project_update and weights:
            moving, _, _ = self._moving(active)
            before = self._buffers(moving)
            _igm_rs.restore_(before, moving)
            try:
                self._base_step(active)
                figures["projected"] = _igm_rs.project_update_(weights, self._buffers(weights), projectors)
            except BaseException:
                _igm_rs.restore_(moving, before)
                raise
        else:
            if weights:
                figures["projected"] = _igm_rs.project_([gradient for _, _, gradient in having], projectors)
            if fused is not None and self._fused is not None:
                self._fused.step(self._modalities.active[active], *fused)
            else:
                self._base_step(active)
        figures["layers"] = [layer.name for layer, _, _ in having]

    def _note(self, active: str, figures: dict[str, Any]) -> None:
        """Count the step, let its features count, and make T where n steps have been taken."""
        own = {layer.name for layer in self._projection.layers[active]}
        rows = self._tap.take() if self._turn is not None else self._tap.take(own)
        if not self._counters.replaced:
            self._projection.add(active, rows)
        self._counters.steps += 1
        self._counters.since[active] += 1
        self._tell(active, figures, skipped=False)
        if isinstance(self._refresh, int) and self._counters.since[active] >= self._refresh:
            self._make_projector(active)
            if self._turn is None:  # n steps outside any turn were one
                self._counters.started[active] = False
                self._counters.turns += 1

    def _skip(self, active: str, figures: dict[str, Any]) -> None:
        """Count a step that is not taken; everything else stays as it was."""
        self._tap.drop()
        self._counters.skipped += 1
        self._tell(active, figures, skipped=True)

    def _base_step(self, active: str) -> None:
        """The base optimizer's step on what moves now; whatever else has a gradient is hidden from it meanwhile."""
        hidden = [(p, p.grad) for p in self._modalities.inactive[active] if p.grad is not None]
        try:
            for p, _ in hidden:
                p.grad = None
            step_without_hooks(self._base)
        finally:
            for p, gradient in hidden:
                p.grad = gradient

    def _restore(self) -> None:
        """Take the perturbation of ``first_step`` back, to the bit."""
        try:
            if self._perturbed is not None:
                _, params, before, _ = self._perturbed
                _igm_rs.restore_(params, before)
            self._perturbed = None
        finally:
            self._end_second_pass()

    def _begin_second_pass(self) -> None:
        """What is forwarded from now on is at θ + ε*: it is no feature of the data and no statistic of the model."""
        self._tap.muted = True
        self._statistics.hold()

    def _end_second_pass(self) -> None:
        self._tap.muted = False
        self._statistics.release()

    def _abandon_perturbation(self) -> None:
        """Restore the weights and drop the step that ``first_step`` began."""
        with torch.no_grad():
            self._restore()
        self._tap.drop()

    def _refuse_perturbed(self, what: str) -> None:
        if self._perturbed is not None:
            self._abandon_perturbation()
            raise RuntimeError(
                f"{what} between first_step and second_step: the weights were restored and the begun step was dropped"
            )

    # ------------------------------------------------------------------------------------------------------------------
    # Turns within

    def _enter(self, active: str) -> None:
        """Note that a step (or a collecting pass) of `active` succeeds; the first of a turn begins its Ȳ."""
        counters = self._counters
        implicit = self._turn is None
        if implicit and (counters.explicit or (self._refresh == "turn" and counters.open not in (None, active))):
            self._leave()
        if implicit and self._refresh == "turn" and len(self.modalities) == 1 and self._projects(active):
            self._warn_once(
                "one modality",
                UserWarning,
                f"{active!r} is the only modality and refresh is 'turn', so outside turn() its projector is never "
                "made; open turns, or give refresh=n",
            )
        if not counters.started[active]:
            self._projection.begin(active)
            counters.started[active] = True
            counters.since[active] = 0
            self._start_anew(active)
        if not implicit or self._refresh == "turn":
            counters.open, counters.explicit = active, not implicit

    def _leave(self) -> None:
        """End the turn that steps outside any turn have formed; drop one that an exception has left."""
        counters = self._counters
        if counters.open is None:
            return
        if counters.explicit:
            self._projection.discard(counters.open)
            counters.close()
        else:
            self._end_turn(counters.open)

    def _end_turn(self, modality: str) -> None:
        counters = self._counters
        try:
            if self._refresh != "manual" and (counters.since[modality] or counters.replaced):
                self._make_projector(modality)
        finally:
            counters.turns += 1
            counters.close()

    def _make_projector(self, modality: str) -> None:
        """T of `modality` from its Ȳ (Eq. 4); RuntimeError where steps were taken and a layer saw no features."""
        stepped = self._counters.since[modality] > 0 and not self._counters.replaced
        unseen = self._projection.unseen(modality) if stepped else []
        tau = {layer.name: self._tau_of(layer, modality) for layer in self._projection.layers[modality]}
        needed = any(modality in listed for listed in self._projection.sources.values())
        self._projection.refresh(modality, tau)
        steps, self._counters.since[modality] = self._counters.since[modality], 0
        if needed and any(tau[layer.name] > 0 for layer in unseen):
            raise RuntimeError(
                f"{modality!r} took {steps} steps and its projected layer {unseen[0]} saw no features, so its "
                "projector cannot be made: expected the layer's own forward to be called, in training mode, in each "
                "first pass"
            )

    def _start_anew(self, active: str) -> None:
        """The options of ``reset``, at the first step of a turn."""
        if "momentum" in self._reset:
            for _, members in self._modalities.active[active]:
                for p in members:
                    self.state.pop(p, None)
        if "lr" in self._reset:
            for group, lr in zip(self.param_groups, self._initial_lr, strict=True):
                if isinstance(group.get("lr"), torch.Tensor):
                    group["lr"].fill_(lr)
                elif "lr" in group:
                    group["lr"] = lr

    # ------------------------------------------------------------------------------------------------------------------
    # What is told

    def _tell(self, active: str, figures: dict[str, Any], *, skipped: bool) -> None:
        """Prepare ``last_stats``: everything stays on its device until it is looked at."""
        constants = {
            "active": active,
            "sources": list(self._projection.sources[active]),
            "turn": self._counters.turns,
            "round": self.round,
            "step": self._counters.steps,
            "skipped": skipped,
            "skipped_steps": self._counters.skipped,
        }
        spectra = {} if skipped else self._projection.spectra_for(active)
        self._last_stats = step_stats(constants, figures, spectra)

    def _judge_perturbation(self, figures: dict[str, Any], rhos: list[float]) -> None:
        """Warn once where the dtype swallows most of the perturbation (method.md §7)."""
        if "perturbation" in self._warned or figures.get("perturbation") is None:
            return
        length, moved = effective_perturbation(figures)
        if figures["perturbation"].device.type != "cpu":
            self._warned.add("perturbation")  # looked at once: the next look would wait for the device again
        if length is not None and length < _NOTICEABLE:
            self._warned.discard("perturbation")
            self._warn_once(
                "perturbation",
                UserWarning,
                f"rho = {max(rhos):g} is below the resolution of the weights: the realised perturbation has "
                f"{length:.2%} of the length asked for and moved {moved or 0:.2%} of them, so SAM does next to "
                "nothing; 0.02 to 0.05 is a usual rho",
            )

    def _warn_once(self, key: str, category: type[Warning], message: str) -> None:
        if key not in self._warned:
            self._warned.add(key)
            warnings.warn(message, category, stacklevel=5)

    # ------------------------------------------------------------------------------------------------------------------
    # State

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as in any PyTorch optimizer; parameters that no modality lists are shared by all.

        Raises
        ------
        ValueError, TypeError
            As the base optimizer; a ``"rho"`` or ``"tau"`` of the group that is no number >= 0.
        """
        if "_base" not in self.__dict__:
            super().add_param_group(param_group)
            return
        check_group(param_group)
        self._base.add_param_group(param_group)
        self._modalities.index(self.param_groups)
        self._initial_lr.append(_lr_of(self.param_groups[-1]))

    def state_dict(self) -> dict[str, Any]:
        """Return the base optimizer's state dict with one key more, ``"igm"``: tensors and plain values only.

        It holds counters, the open turn, covariances, projectors, rho and tau. Perturbed weights and scratch are not
        in it. ``torch.load(weights_only=True)`` reads it.
        """
        state = super().state_dict()
        state[STATE_KEY] = {
            "version": STATE_VERSION,
            "rho": dict(self.rho),
            "tau": dict(self.tau),
            "initial_lr": list(self._initial_lr),
            "counters": self._counters.state(),
            "projection": self._projection.state(),
        }
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load what :meth:`state_dict` gave, or a state dict of the bare base optimizer.

        Covariances and projectors keep the precision they were saved with. A turn that was open when the state was
        saved goes on when ``turn()`` of that modality is entered, or in the turn that is open now.

        Raises
        ------
        ValueError
            A state dict of other groups, modalities, layers or widths; nothing has changed then.
        RuntimeError
            Inside the turn of another modality than the saved open one.
        """
        mine = state_dict.get(STATE_KEY)
        if mine is not None:
            if mine["version"] > STATE_VERSION:
                raise ValueError(
                    f"the state dict has igm version {mine['version']}, expected at most {STATE_VERSION}: it was saved "
                    "by a newer igm-rs"
                )
            self._projection.check(mine["projection"])  # before anything changes
            open_turn = mine["counters"]["open"] if mine["counters"]["explicit"] else None
            if self._turn is not None and open_turn not in (None, self._turn):
                raise RuntimeError(f"load_state_dict inside turn({self._turn!r}): the saved open turn is {open_turn!r}")
        if self._perturbed is not None:
            self._abandon_perturbation()
        super().load_state_dict({key: value for key, value in state_dict.items() if key != STATE_KEY})
        self._base.__setstate__({"state": self.state, "param_groups": self.param_groups})
        self._modalities.index(self.param_groups)
        self._before.clear()
        self._tap.drop()
        if mine is not None:
            self.rho, self.tau = dict(mine["rho"]), dict(mine["tau"])
            self._initial_lr = list(mine["initial_lr"])
            self._counters = Counters.of(self.modalities, mine["counters"])
            self._projection.load(mine["projection"])

    def _share(self, base: torch.optim.Optimizer) -> None:
        """Make groups, state and hooks of the base this optimizer's own, the same objects."""
        self._base = base
        self.param_groups = base.param_groups
        self.state = base.state
        self.defaults = base.defaults
        self._optimizer_step_pre_hooks = base._optimizer_step_pre_hooks
        self._optimizer_step_post_hooks = base._optimizer_step_post_hooks
        self._fused = FusedSGD(base) if type(base) is torch.optim.SGD else None

    def _check_held(self, layers: Mapping[str, list[Layer]]) -> None:
        for name, mine in layers.items():
            for layer in mine:
                if self._modalities.group_of(layer.module.weight, name) is None:
                    raise ValueError(
                        f"the weight of projected layer {layer} of {name!r} is not held by the base optimizer, or "
                        "belongs to another modality alone; expected it in param_groups and in that modality or in none"
                    )

    def _check_groups(self) -> None:
        for group in self.param_groups:
            check_group(group)


def _check_projector(options: ProjectionOptions) -> None:
    """Raise ValueError for an option that the chosen projector has no use for."""
    if options.projector == "flat":
        unused = {"alpha": options.alpha != 0.1, "batches": options.batches is not None, "normalise": options.normalise}
    else:
        unused = {"route": options.route != "auto", "features": options.features == "centred"}
    for name, given in unused.items():
        if given:
            raise ValueError(
                f"{name} is {getattr(options, name)!r} with projector={options.projector!r}, which has no use for it"
            )


def _lr_of(group: Mapping[str, Any]) -> float:
    """The learning rate of a group as a plain number; 0 for an optimizer that has none."""
    return float(group.get("lr", 0.0))


def _finite(norm: torch.Tensor) -> bool:
    return math.isfinite(float(norm))


def _usable(*norms: torch.Tensor) -> bool:
    """Whether a step can be taken: each gradient norm finite and not zero. Waits for the device of the norms."""
    return all(math.isfinite(value) and value > 0 for value in map(float, norms))


def _parts(gradients: list[torch.Tensor], rhos: list[float], norm: torch.Tensor) -> list[tuple[float, torch.Tensor]]:
    """Each ρ with the norm of the gradients that it is for: what the length of ε* follows from."""
    different = sorted(set(rhos))
    if len(different) == 1:
        return [(different[0], norm)]
    return [
        (rho, _igm_rs.gradient_norm([g for g, own in zip(gradients, rhos, strict=True) if own == rho]))
        for rho in different
    ]
