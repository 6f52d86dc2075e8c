"""IGMOptimizer, the public face: what it takes, what it tells, turns, steps and state. `_step` and `_course` do it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch._compile import _disable_dynamo
from torch.amp.grad_scaler import GradScaler

from . import _checkpoint, _checks, _igm_rs
from ._base import base_optimizer, check_group
from ._batchnorm import Statistics
from ._core import Closure, Core, PerModality, Replay, lr_of
from ._course import Course
from ._features import FeatureTap
from ._growth import add_modality, layers_of, sources_of, structure_of
from ._head_pass import head_pass_of
from ._layers import check_gradients, check_held, projected_share
from ._modalities import Modalities, check_parameters, parameter_names
from ._options import projection_options
from ._projection import Projection
from ._released import ReleasedStepper, check_fit, mode_of
from ._step import Stepper, one_closure
from ._turns import Counters
from .released import Released
from .stats import StepStats

__all__ = ["IGMOptimizer"]


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
        share of its parameters (Table 4): linear, convolutional and attention layers, see the README; norm layers and
        embeddings are passed over. :attr:`projected_share` tells what came of it.
    model : torch.nn.Module, optional
        Where names of modules and parameters are looked up, and BatchNorm layers, whose statistics advance once a step
        and not twice; without it BatchNorm layers are found in `modalities` where these are modules.
    rho : float or mapping of str to float
        ρ ≥ 0, length of the perturbation in the unit of the parameters; 0 is no SAM. A group's own ``"rho"`` wins.
        Below the resolution of the dtype it does nothing, which is measured and warned about.
    tau : float or mapping of str to float
        τ ≥ 0, strength of the T⁽ᵏ⁾ that modality k's features make, dimensionless: its eigenvalues lie in [e^−τ, 1];
        0 is no projection. The ``"tau"`` of the group that holds a layer's weight wins.
    p : {2.0, math.inf}
        Norm in which ε* has the length ρ: 2 as in Eq. (7), or ∞, ε* = ρ sign(g).
    adaptive : bool
        Whether ε* grows with the weights (ASAM), with T_θ = |θ| + 0.01: ε* = ρ T_θ² g/‖T_θ g‖₂; with ``p=math.inf``
        ε* = ρ T_θ sign(g). A usual ρ is then ten times as large.
    sam_every : int
        SAM in the first of every so many steps of each modality; the other steps have one pass. In the two-call form
        the script makes the passes, and each step has both; what a CUDA graph repeats is the step it has recorded.
    sam_scope : {"all", "head"}
        What ε* moves. ``"head"``: the head's parameters alone, with the norm of their gradients; in the second pass the
        modules of the modality beside its head give what they gave in the first, without being called, and the
        gradients of all but the head are those of the first pass. This is no longer SAM of the encoders. It needs
        `heads` or `head`, encoders that are modules of `modalities`, and :meth:`step` with a closure, or
        :meth:`replay`.
    skip_inert : bool
        Whether the second pass is left out where the perturbation has moved no weight at all, to the bit: such a pass
        differs from the first by its random numbers at most. On CUDA the step then waits for the device; while a CUDA
        graph is recorded nothing is left out.
    sources : {"previous", "others", "earlier"} or mapping of str to None, str or list of str
        Whose T acts on each modality: the one trained before it (Algorithm 1, line 9), all others, those before it in
        the order of training, or as listed; None is "not projected" (Table 3).
    combine : {"product", "sum"}
        Of several sources: their T's act one after the other, in the order of training; or one T is made from the sum
        of their Ȳ, with the strength of the modality that it acts on.
    pairing : {"position", "name", "shape"} or mapping
        Which layer's T of the source acts on a layer; a layer that both have is paired with itself. By the position
        counted from the output, where the widths agree; by the path below head or modality; with every layer of the
        same weight shape, as the released code does; or {layer: the source's layer, or None for "not projected"}, also
        one such mapping for each modality. See :attr:`pairs`.
    projector : {"flat", "ridge", "null_space", "orthogonal", "identity"}
        T of Eq. (4); (I + α Ȳ/mean λ)⁻¹, a strong filter for shared parameters; V₀V₀ᵀ/‖V₀V₀ᵀ‖ of the directions with
        λ ≤ α λ_min (Adam-NSCL); the recursion of MLA, P ← P − k kᵀ/(α + rᵀk), where P belongs to the layer; or none.
    control : {None, "random", "scalar"}
        To tell whether directions matter: the eigenvalues of T in a random orthogonal basis, which `seed` decides; or
        their mean times I. For the flat, ridge and null-space projectors.
    seed : int
        Of ``control="random"``; torch's generators are left alone.
    augment_bias : bool
        Whether T acts on a layer's bias, too: a constant feature 1 stands behind Z, and [W b] is (out, d + 1).
    features : {"mean", "samples", "centred"}
        A batch adds its mean (Eq. 2), every sample, or every sample around the mean of all.
    covariance : {"fresh", "kept"} or float
        How long Ȳ lives: a turn (Eq. 2, t = 1), for ever, or multiplied by this factor in (0, 1) at each turn, also at
        one that is discarded.
    refresh : {"turn", "manual"} or int
        When T⁽ʲ⁾ is made: at the end of j's turn; by :meth:`refresh` only; or after every n of j's steps as well.
        Outside any ``turn()`` consecutive steps of one modality are its turn; with an integer, every n of its steps.
    project : {"gradient", "update"}
        What T acts on: the gradient (Eq. 9), or the base optimizer's update of the weight.
    route : {"auto", "svd", "eigh", "gram", "polynomial"}
        How T is computed. "auto": from the rows where there are fewer than d (Gram), kept in factored form where that
        is cheaper; else, for a flat float32 T of d ≥ 160, by a polynomial of Ȳ without its dominant direction where few
        products suffice; else by eigendecomposition. "gram": from the rows where there are fewer than d, else "eigh".
        Layers of several groups are decomposed, and with "polynomial" spectra with λ_max − λ_min below 1 % of λ_max,
        of which a polynomial would enlarge the rounding. ``last_stats["routes"]`` tells.
    reset : subset of {"momentum", "lr"}
        What starts anew with each turn: the base's state of the moving parameters, at the turn's first step; the lr of
        construction, where the ``turn()`` block begins, so that a scheduler made or stepped in it counts, or outside
        any at the first step.
    alpha : float, optional
        Of the ridge > 0, 30 by default (10 to 100 are usual); of the null space ≥ 1, 10 by default; of the orthogonal
        projector > 0, 0.1 by default.
    batches, normalise : int or None, bool
        For ``projector="orthogonal"`` alone: with `batches` (the loader's length) α is ``alpha ** (1 + batch /
        batches)``; whether P is divided by its Frobenius norm after each row, as released.
    max_grad_norm : float, optional
        c > 0: after projection the gradients of all that moves are clipped to a joint L2 norm of c, as
        ``torch.nn.utils.clip_grad_norm_`` does. None: no clipping.
    mode : {"paper", "released"} or Released
        Algorithm 1; or the arithmetic of the authors' scripts, which differs from it (method.md §4), each deviation a
        switch of :class:`igm_rs.Released`. The closure of :meth:`step` is another one then; and `pairing` and `reset`
        are those of the ``Released``.
    preserve_rng : bool
        Whether both passes of a step draw the same random numbers, such as dropout masks, from torch's generators. The
        two-call form and :meth:`replay` then need :meth:`remember_rng` before the first pass.
    atomic : bool
        Whether a base optimizer's step that fails half-way is undone. It costs a copy of the base's state, in memory
        and time; on the CPU ``torch.optim.SGD``, ``Adam`` and ``AdamW`` are atomic without. False: a failed step of the
        base may leave its state, and without SAM the weights, half changed; on CUDA a step then waits for its norms.
    **base_kwargs
        Passed to `base`, such as ``lr=0.01``.

    Raises
    ------
    ValueError, TypeError
        For every argument out of its range, and for sparse, complex and integer parameters, naming argument, value and
        what was expected.

    Notes
    -----
    With ``rho=0`` and no projection a step of the mode "paper" is the base optimizer's own, to the bit. Otherwise a
    step whose gradient is zero or not finite, in either pass, leaves everything as it was and is counted in
    ``last_stats["skipped_steps"]``.

    On CUDA a step of that mode waits for nothing, but where it makes the base's state, ends a turn, makes T, or finds
    gradients of several modalities outside any turn; ``first_step`` and ``second_step`` wait for the norm. An unusable
    gradient is undone on the device, and counted when that is asked for or a turn ends: until then `sam_every` counts
    such a step, and where Adam counts its steps on the host, that count goes on.

    A step is taken wholly or not at all: whatever is raised in it, a KeyboardInterrupt too, weights, the base's state,
    covariances, projectors and counters are as before it, or as after it.

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
        p: float = 2.0,
        adaptive: bool = False,
        sam_every: int = 1,
        sam_scope: str = "all",
        skip_inert: bool = False,
        sources: str | Mapping[str, Any] = "previous",
        combine: str = "product",
        pairing: str | Mapping[str, Any] = "position",
        projector: str = "flat",
        control: str | None = None,
        seed: int = 0,
        augment_bias: bool = False,
        features: str = "mean",
        covariance: str | float = "fresh",
        refresh: str | int = "turn",
        project: str = "gradient",
        route: str = "auto",
        reset: str | tuple[str, ...] = (),
        alpha: float | None = None,
        batches: int | None = None,
        normalise: bool = False,
        max_grad_norm: float | None = None,
        mode: str | Released = "paper",
        preserve_rng: bool = False,
        atomic: bool = True,
        **base_kwargs: Any,
    ) -> None:
        released = mode_of(mode)
        if released is not None:
            check_fit(
                released,
                head=heads is not None or head is not None,
                refresh=refresh,
                pairing=pairing,
                reset=reset,
                p=(p, 2.0),
                adaptive=(adaptive, False),
                sam_every=(sam_every, 1),
                sam_scope=(sam_scope, "all"),
                skip_inert=(skip_inert, False),
                preserve_rng=(preserve_rng, False),
            )
            pairing, reset = released.pairing, released.reset
        options = projection_options(
            projector=projector,
            control=control,
            seed=seed,
            features=features,
            covariance=covariance,
            route=route,
            alpha=alpha,
            batches=batches,
            normalise=normalise,
            pairing=pairing,
            combine=combine,
            augment_bias=augment_bias,
        )
        settings: dict[str, Any] = {
            "refresh": _checks.refresh_rule(refresh),
            "project_update": _checks.choice("project", project, ("gradient", "update")) == "update",
            "reset": _checks.names("reset", reset, ("momentum", "lr")),
            "max_grad_norm": None if max_grad_norm is None else _checks.positive("max_grad_norm", max_grad_norm),
            "preserve_rng": _checks.flag("preserve_rng", preserve_rng),
            "atomic": _checks.flag("atomic", atomic),
            "p": _checks.norm_order("p", p),
            "adaptive": _checks.flag("adaptive", adaptive),
            "sam_every": _checks.positive_integer("sam_every", sam_every),
            "skip_inert": _checks.flag("skip_inert", skip_inert),
            "released": released,
        }
        _checks.choice("sam_scope", sam_scope, ("all", "head"))
        if sum(given is not None for given in (heads, head, scope)) > 1:
            raise ValueError("heads, head and scope are given together, expected at most one of them")

        ready = base_optimizer(params, base, base_kwargs)
        for group in ready.param_groups:
            group.pop(_checkpoint.STATE_KEY, None)  # of a checkpoint of ours that the bare base has loaded
        super().__init__(ready.param_groups, ready.defaults)
        known = parameter_names(ready.param_groups, model)
        check_parameters(ready.param_groups, known)
        for group in ready.param_groups:
            check_group(group)
        members = Modalities(modalities, ready.param_groups, known)
        share = None if scope is None else _checks.share("scope", scope)
        linear = released is not None and released.layers == "linear"
        structure = structure_of(heads, head, share, model, sources, linear)
        layers = layers_of(members, structure, members.names)
        members.index(ready.param_groups)
        check_held(members, layers)
        roots = members.roots(model)
        check_gradients(roots)
        names = members.names
        core = Core(
            base=ready,
            modalities=members,
            rho=PerModality("rho", rho, names),
            tau=PerModality("tau", tau, names),
            structure=structure,
            projection=Projection(layers, sources_of(names, structure), options),
            tap=FeatureTap(
                dict.fromkeys(layer for mine in layers.values() for layer in mine),
                "mean" if features == "mean" else "samples",
                augment_bias,
            ),
            statistics=Statistics(roots),
            initial_lr=[lr_of(group) for group in ready.param_groups],
            counters=Counters(names),
            head_pass=(
                head_pass_of(members, structure.heads, structure.head, model, random=preserve_rng)
                if sam_scope == "head"
                else None
            ),
            **settings,
        )
        self._set_up(core)

    def _set_up(self, core: Core) -> None:
        """Make groups, state and hooks of the base this optimizer's own, the same objects."""
        base = core.base
        self._core = core
        self._course = Course(core)
        released = core.released
        self._stepper = (
            Stepper(core, self._course) if released is None else ReleasedStepper(core, self._course, released)
        )
        core.end_second_pass()  # so that the tap of a copy, too, listens only where features are gathered
        self.param_groups = base.param_groups
        self.state = base.state
        self.defaults = base.defaults
        self._optimizer_step_pre_hooks = base._optimizer_step_pre_hooks
        self._optimizer_step_post_hooks = base._optimizer_step_post_hooks

    def __getstate__(self) -> dict[str, Any]:
        """What a copy or a pickle holds: the hooks of a copy listen to the copied modules, and it stands in no turn.

        A turn that is open goes on in the copy when it is entered there, as after a checkpoint.
        """
        self._core.refuse_perturbed("copy")
        return {"core": self._core}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "core" not in state:  # torch, of itself: groups and state have been loaded
            super().__setstate__(state)
            return
        core = state["core"]
        super().__setstate__({"defaults": core.base.defaults, "state": core.base.state, "param_groups": []})
        core.modalities.index(core.base.param_groups)
        self._set_up(core)

    # ------------------------------------------------------------------------------------------------------------------
    # What it tells

    @property
    def modalities(self) -> tuple[str, ...]:
        """Names of the modalities, in the order of training."""
        return self._core.modalities.names

    @property
    def base(self) -> torch.optim.Optimizer:
        """The base optimizer; its groups and state are this optimizer's own."""
        return self._core.base

    @property
    def rho(self) -> PerModality:
        """ρ of each modality, >= 0, in the unit of the parameters; checked when set: ``opt.rho["audio"] = 0.02``."""
        return self._core.rho

    @rho.setter
    def rho(self, value: float | Mapping[str, float]) -> None:
        self._core.rho.assign(value)

    @property
    def tau(self) -> PerModality:
        """τ of each modality, >= 0, dimensionless, for the T's that are made from now on; checked when set."""
        return self._core.tau

    @tau.setter
    def tau(self, value: float | Mapping[str, float]) -> None:
        self._core.tau.assign(value)

    @property
    def mode(self) -> str | Released:
        """What a step is: ``"paper"``, or what it has of the released scripts."""
        return self._core.released or "paper"

    @property
    def preserve_rng(self) -> bool:
        """Whether both passes of a step draw the same random numbers."""
        return self._core.preserve_rng

    @property
    def sources(self) -> dict[str, list[str]]:
        """For each modality those whose T acts on it (Algorithm 1, line 9)."""
        return {name: list(listed) for name, listed in self._core.projection.sources.items()}

    @property
    def pairs(self) -> dict[str, dict[str, list[tuple[str, str]]]]:
        """For each modality and each of its sources: (projected layer, layer of the source whose T acts on it)."""
        projection = self._core.projection
        return {
            name: {
                source: [(mine.name, theirs.name) for mine, theirs in pairs]
                for source, pairs in zip(projection.sources[name], projection.pairs[name], strict=False)
            }
            for name in self.modalities
        }

    @property
    def projected_share(self) -> dict[str, float]:
        """For each modality the share of the parameters that move in its turn whose gradient a T can act on."""
        projection = self._core.projection
        paired = {
            name: [mine for pairs in of_source for mine, _ in pairs] for name, of_source in projection.pairs.items()
        }
        return projected_share(self._core.modalities, paired, augment=projection.options.augment_bias)

    @property
    def projectors(self) -> dict[str, dict[str, torch.Tensor]]:
        """T by modality and layer, (d, d) or (G, d, d), at least float32; a layer without T yet (T = I) is absent.

        With ``augment_bias`` (d + 1, d + 1). T's that are kept in factored form are written out here.
        """
        return self._core.projection.projectors()

    @property
    def covariances(self) -> dict[str, dict[str, torch.Tensor]]:
        """Ȳ by modality and layer, (d, d) or (G, d, d), float64 on the CPU, as gathered so far; without rows absent."""
        centred = self._core.projection.options.features == "centred"
        return {
            name: {
                layer: value
                for layer, turns in mine.items()
                if (value := turns.all().value(centred=centred)) is not None
            }
            for name, mine in self._core.projection.covariances.items()
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
            Layer name to float64 array of shape (d,), or (G, d) of a layer of G groups; one such dict for each modality
            when none is named. Layers that have seen no features are absent.

        Raises
        ------
        ValueError
            An unknown modality.
        """
        if modality is not None:
            return dict[str, Any](self._core.projection.spectrum(self._core.modalities.check(modality)))
        return {name: self._core.projection.spectrum(name) for name in self.modalities}

    @property
    def last_stats(self) -> StepStats:
        """What the last step did: a mapping of plain values, see :class:`igm_rs.StepStats`."""
        return self._core.last_stats

    @property
    def turns(self) -> int:
        """Number of finished turns."""
        return self._core.counters.turns

    @property
    def round(self) -> int:
        """Number of finished rounds, m turns each (Out_Iters)."""
        return _igm_rs.turn_at(self._core.counters.turns, len(self.modalities))[0]

    @property
    def skipped_steps(self) -> int:
        """Number of steps that were skipped for a zero or non-finite gradient; on CUDA, asking waits for the device."""
        self._core.counters.settle()
        return self._core.counters.skipped

    @property
    def unperturbed_steps(self) -> int:
        """Number of steps taken without SAM, because no closure was given, while ``rho`` asked for it."""
        return self._core.counters.unperturbed

    @property
    def inert_steps(self) -> int:
        """Number of steps without a second pass because ``skip_inert`` found that no weight had moved."""
        return self._core.counters.inert

    # ------------------------------------------------------------------------------------------------------------------
    # Turns (Algorithm 1, lines 1-3 and 11-13)

    @contextmanager
    def turn(self, modality: str) -> Iterator[IGMOptimizer]:
        """Train `modality` inside the ``with`` block; at its end T of `modality` is made from the turn's features.

        Where the mode's `gather` is "pass", as in ``mode="released"``, T is made by :meth:`collect` alone.
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
        core = self._core
        name = core.modalities.check(modality)
        if core.turn is not None:
            raise RuntimeError(f"turn({name!r}) inside turn({core.turn!r}): leave the one before the other begins")
        core.refuse_perturbed("turn")
        new = self._course.open(name)
        lr_as_it_was = self._course.way_back_of_lr()
        core.turn = name
        finished = False
        try:
            if new:
                self._course.first_lr()
            yield self
            finished = True
        finally:
            core.turn = None
            core.forget_passes()
            if core.perturbed is not None:
                core.abandon_perturbation()
            if core.counters.open != name:  # there was no step
                lr_as_it_was()
        if finished and core.counters.open == name:
            self._course.end(name)

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
        core = self._core
        name = core.modalities.check(modality)
        if core.tap.sink is not None:
            raise RuntimeError(f"collect({name!r}) inside another collect: leave the one before the other begins")
        if core.turn not in (None, name):
            raise RuntimeError(f"collect({name!r}) inside turn({core.turn!r}): collect in its own turn or outside any")
        core.refuse_perturbed("collect")
        gathered = core.projection.empty(name)

        def sink(layer: str, rows: torch.Tensor) -> None:
            if layer in gathered:
                gathered[layer].add(rows)

        core.tap.sink = sink
        try:
            yield
        finally:
            core.tap.sink = None
        if not any(gathered.values()):
            return
        self._course.wholly(self._course.collected, name, gathered)

    def refresh(self, modality: str) -> None:
        """Make T of `modality` now, from the features gathered so far; without any it stays as it was.

        With ``refresh="manual"`` and outside any turn the modality's next step begins a new Ȳ.

        Raises
        ------
        ValueError
            An unknown modality.
        """
        core = self._core
        core.refuse_perturbed("refresh")
        self._course.make_projector(core.modalities.check(modality))
        if core.turn is None and core.refresh == "manual":
            core.counters.started[modality] = False

    # ------------------------------------------------------------------------------------------------------------------
    # Steps (Algorithm 1, lines 5-10)

    @_disable_dynamo  # a compiled function calls it between two graphs
    def step(self, closure: Closure | Sequence[Closure] | None = None, *, scaler: Any = None) -> Any:
        """Take one step of the active modality.

        The active modality is that of the turn; outside any turn the one modality with gradients of its own.

        Parameters
        ----------
        closure : callable or list of callables, optional
            Clears the gradients, computes the loss, calls ``backward`` and returns the loss. It runs with gradients
            enabled, twice with SAM and once without. Without a closure the gradients at hand are projected and the
            base steps; SAM cannot be done, which is warned about once and counted (see :meth:`replay`).
            A list accumulates gradients: each closure computes the loss of a micro-batch, scaled as it shall count,
            and calls ``backward`` without clearing, which is done here; both passes run them all. Each micro-batch is
            a mini-batch of Eq. (2).
            With ``mode="released"`` one callable, which neither clears gradients nor calls ``backward`` and returns a
            pair: L(θ), a tensor with its graph; and a callable that returns the loss of the head at the weights of the
            moment, on the features of that pass, see :class:`igm_rs.Released`.
        scaler : torch.amp.GradScaler, optional
            For a closure that calls ``scaler.scale(loss).backward()`` and returns the loss itself: the gradients of
            both passes are unscaled, an infinity in either skips the step, and the scaler is told of both. Call
            ``scaler.update()`` afterwards, and no ``unscale_`` in the closure. Not with ``mode="released"``.

        Returns
        -------
        Any
            What the closure returned in the first pass, L(θ), of a list the sum; None without a closure.

        Raises
        ------
        RuntimeError
            Outside any turn when more than one modality has gradients; a closure that computed no gradient; between
            ``first_step`` and ``second_step``; projection in several processes.
        TypeError
            A closure that returns None; with ``mode="released"`` none, a list, or one that returns something else.
        ValueError
            A `scaler` without a closure, or with ``mode="released"``; a loss without a graph there.
        BaseException
            Whatever the closure raises; everything is then as before the step, to the bit.
        """
        _check_scaler(scaler)
        self._stepper.check(closure, scaler)
        return self._stepper.step(self._closure(closure), scaler)

    @_disable_dynamo
    def first_step(self, zero_grad: bool = False, *, scaler: Any = None) -> None:
        """Perturb the weights, θ ← θ + ε* (Eq. 7), for scripts written for the usual SAM packages.

        To be followed by a second forward and backward pass and :meth:`second_step`. `zero_grad` clears the gradients
        afterwards; `scaler` is that of :meth:`step`.

        Raises
        ------
        RuntimeError
            When the weights are perturbed already; more than one modality has gradients outside any turn; with
            ``sam_scope="head"``.
        """
        _check_scaler(scaler)
        self._stepper.first(scaler)
        if zero_grad:
            self.zero_grad()

    @_disable_dynamo
    def second_step(self, zero_grad: bool = False, *, scaler: Any = None) -> None:
        """Restore the weights to the bit and step with the gradients at θ + ε* (Eqs. 8 and 9).

        `zero_grad` clears the gradients afterwards; `scaler` is that of :meth:`step`.

        Raises
        ------
        RuntimeError
            Without a ``first_step`` before.
        """
        _check_scaler(scaler)
        self._stepper.second(scaler)
        if zero_grad:
            self.zero_grad()

    def replay(self, closure: Closure | Sequence[Closure], *, scaler: Any = None, loss: Any = None) -> None:
        """Give the next ``step()`` without a closure its second pass, for trainers that compute the first themselves.

        The gradients at hand at that step are those of the first pass. `closure` computes those at θ + ε*, on the same
        batches, and is forgotten afterwards, whatever comes of the step, and by :meth:`forget_step`.

        Parameters
        ----------
        closure : callable or list of callables
            As in :meth:`step`.
        scaler : torch.amp.GradScaler, optional
            For a closure that scales its loss. The first pass's gradients must have been unscaled by then.
        loss : torch.Tensor or float, optional
            L(θ) of the first pass, for ``last_stats["loss"]`` and ``["sharpness"]``.

        Raises
        ------
        TypeError
            Something that cannot be called.
        """
        _check_scaler(scaler)
        self._stepper.check_replay()
        one = self._closure(closure)
        if one is None:
            raise TypeError("closure is None, expected a callable or a list of callables")
        self._core.replay = Replay(one, scaler, loss)

    def forget_step(self) -> None:
        """Forget what was prepared for a step that will not be taken: its features, :meth:`replay`, the random state.

        For a ``scaler.step(opt)`` that did not call ``step()``, as the scaler found an infinity in the first pass.
        """
        self._core.replay = self._core.random = None
        self._core.forget_passes()

    def remember_rng(self) -> None:
        """Note torch's random state now, before the first pass of a step that ``first_step`` or ``replay`` will take.

        The second pass then draws the same random numbers; ``step(closure)`` does this by itself if ``preserve_rng``.
        """
        self._stepper.remember_random()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients, as in any PyTorch optimizer.

        Raises
        ------
        RuntimeError
            Inside one closure of a list: the gradients of those before it would be lost.
        """
        if self._core.accumulating:
            raise RuntimeError(
                "zero_grad inside a closure of a list: expected closures that only add to the gradients, which step() "
                "clears before the first of them"
            )
        super().zero_grad(set_to_none)

    def _closure(self, closure: Any) -> Callable[[], Any] | None:
        """One closure of what may be a list of them; TypeError for what cannot be called."""
        if isinstance(closure, (list, tuple)):
            if not closure:
                raise ValueError("closure is an empty list, expected at least one callable")
            for position, one in enumerate(closure):
                _check_callable(f"closure[{position}]", one)
            return one_closure(closure, self.zero_grad, self._core)
        if closure is not None:
            _check_callable("closure", closure)
        return closure  # type: ignore[no-any-return]

    # ------------------------------------------------------------------------------------------------------------------
    # State

    def add_modality(
        self,
        name: str,
        members: Any,
        *,
        head: Any | None = None,
        sources: str | Sequence[str] | None = None,
        rho: float | None = None,
        tau: float | None = None,
        **group_options: Any,
    ) -> None:
        """Take in a modality that comes later, last in the order of training; the others keep their Ȳ and T.

        What it shares with them is protected by their T's: with a strong projector (``projector="ridge"``, or a large
        `tau`), ``features="samples"``, ``augment_bias=True`` and ``sources="earlier"`` their predictions stay. Momentum
        left from their turns and weight decay are the base's and would still move them: ``reset="momentum"``, or
        ``project="update"``.

        Parameters
        ----------
        name : str
            A new name.
        members : module, parameter, name prefix, or a list of these
            What belongs to it, as in `modalities`; parameters that the optimizer does not hold form a group of their
            own.
        head : module, module name, or a list of these, optional
            Its head, as in `heads`; not for optimizers with a shared `head` or a `scope`, which count for it, too.
        sources : str or list of str, optional
            Whose T acts on it; an empty list is "not projected". None: by the rule that the optimizer was given.
        rho, tau : float, optional
            As of the optimizer; those of the last modality by default.
        **group_options
            Of the new group, such as ``lr=0.01``; the base optimizer's defaults otherwise.

        Raises
        ------
        ValueError, TypeError
            As for the optimizer itself; nothing has changed then.
        RuntimeError
            Inside a turn or a collecting block, or between ``first_step`` and ``second_step``.
        """
        core = self._core
        core.check_shared()
        core.refuse_perturbed("add_modality")
        if core.turn is not None or core.tap.sink is not None:
            raise RuntimeError("add_modality inside turn() or collect(): leave it first")
        add_modality(core, name, members, head, sources, rho, tau, group_options)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as in any PyTorch optimizer; parameters that no modality lists are shared by all.

        Raises
        ------
        ValueError, TypeError
            As the base optimizer; a ``"rho"`` or ``"tau"`` of the group that is no number >= 0; sparse, complex and
            integer parameters.
        """
        if "_core" not in self.__dict__:
            super().add_param_group(param_group)
            return
        core = self._core
        if not isinstance(param_group, dict):
            raise TypeError(f"param_group is a {type(param_group).__name__}, expected a dict")
        check_group(param_group)
        listed = param_group.get("params")
        if not isinstance(listed, (torch.Tensor, set)) and listed is not None:
            param_group = param_group | {"params": list(listed)}  # an iterator can be looked at once only
        check_parameters([*core.base.param_groups, param_group], {})
        core.base.add_param_group(param_group)
        core.modalities.index(core.base.param_groups)
        core.initial_lr.append(lr_of(core.base.param_groups[-1]))

    def state_dict(self) -> dict[str, Any]:
        """Return the base optimizer's state dict with one key more, ``"igm"``: tensors and plain values only.

        It holds counters, the open turn, covariances, projectors, rho and tau. Perturbed weights and scratch are not
        in it. ``torch.load(weights_only=True)`` reads it. The first group has the same under the same key, as
        ``torch.distributed.checkpoint`` keeps nothing else.
        """
        for prepare in self._optimizer_state_dict_pre_hooks.values():
            prepare(self)
        state = self._core.base.state_dict()
        mine = _checkpoint.state(self._core)
        state[_checkpoint.STATE_KEY] = mine
        if state["param_groups"]:
            state["param_groups"][0][_checkpoint.STATE_KEY] = mine
        for hook in self._optimizer_state_dict_post_hooks.values():
            changed = hook(self, state)
            state = state if changed is None else changed
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load what :meth:`state_dict` gave, or a state dict of the bare base optimizer.

        Covariances and projectors keep the precision they were saved with. A turn that was open when the state was
        saved goes on when ``turn()`` of that modality is entered, or in the turn that is open now.

        Raises
        ------
        TypeError, ValueError
            No state dict; one of other groups, shapes, modalities, layers or widths; nothing has changed then.
        RuntimeError
            Inside the turn of another modality than the saved open one.
        """
        core = self._core
        if isinstance(state_dict, Mapping) and self._optimizer_load_state_dict_pre_hooks:
            state_dict = dict(state_dict)  # a hook may change it
            for hook in self._optimizer_load_state_dict_pre_hooks.values():
                changed = hook(self, state_dict)
                state_dict = state_dict if changed is None else changed
        _checkpoint.check(core, state_dict)
        mine = _checkpoint.own(state_dict)
        if mine is not None:
            open_turn = mine["counters"]["open"] if mine["counters"]["explicit"] else None
            if core.turn is not None and open_turn not in (None, core.turn):
                raise RuntimeError(f"load_state_dict inside turn({core.turn!r}): the saved open turn is {open_turn!r}")
        if core.perturbed is not None:
            core.abandon_perturbation()
        base, groups, state = core.base, self.param_groups, self.state
        of_base = {key: value for key, value in state_dict.items() if key != _checkpoint.STATE_KEY}
        of_base["param_groups"] = [
            {key: value for key, value in group.items() if key != _checkpoint.STATE_KEY}
            for group in state_dict["param_groups"]
        ]
        try:
            base.load_state_dict(of_base)
        finally:  # the same objects go on, here, in the base, and perhaps in a trainer
            groups[:], loaded = base.param_groups, dict(base.state)
            state.clear()
            state.update(loaded)
            base.__setstate__({"state": state, "param_groups": groups})
        core.modalities.index(groups)
        core.before.clear()
        core.shifted.clear()
        core.spare.clear()
        core.provisional = False
        core.replay = core.random = core.unjudged = None
        core.counters.settle()
        core.forget_passes()
        if mine is not None:
            _checkpoint.load(core, mine)
            if core.turn is not None and core.counters.open not in (None, core.turn):
                self._course.leave()  # that of steps outside any turn, which the block around this ends
        for told in self._optimizer_load_state_dict_post_hooks.values():
            told(self)


def _check_callable(argument: str, closure: Any) -> None:
    if not callable(closure):
        raise TypeError(f"{argument} is a {type(closure).__name__}, expected a callable")


def _check_scaler(scaler: Any) -> None:
    if scaler is not None and not isinstance(scaler, GradScaler):
        raise TypeError(f"scaler is {scaler!r} ({type(scaler).__name__}), expected a torch.amp.GradScaler")
