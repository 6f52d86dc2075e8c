"""A modality that comes later: a trained optimizer takes it in, last in the order of training."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from . import _checks, _igm_rs
from ._base import check_group
from ._batchnorm import Statistics
from ._core import Core, Structure, lr_of
from ._head_pass import encoders_of
from ._layers import Layer, check_gradients, check_held, head_layers, modules_of, scope_layers
from ._modalities import Modalities, check_parameters, parameter_names
from ._projection import Projection

__all__ = ["add_modality", "layers_of", "sources_of", "structure_of"]


def structure_of(
    heads: Any, head: Any, scope: float | None, model: nn.Module | None, sources: Any, linear: bool
) -> Structure:
    """Return what the optimizer was told, as it is now: iterators and the user's own mappings are looked at once."""
    if isinstance(heads, (Mapping, nn.ModuleDict)):
        heads = {name: _kept(value) for name, value in heads.items()}
    told = dict(sources) if isinstance(sources, Mapping) else sources
    return Structure(heads, _kept(head), scope, model, told, linear=linear)


def layers_of(
    modalities: Modalities, structure: Structure, names: tuple[str, ...], known: tuple[Layer, ...] = ()
) -> dict[str, list[Layer]]:
    """Return the projected layers of the modalities `names`.

    Raises
    ------
    ValueError
        As :func:`head_layers` and :func:`scope_layers`; a modality without a linear layer where those alone count.
    """
    if structure.scope is not None:
        found = scope_layers(modalities, structure.scope, structure.model, names=names, known=known)
    else:
        found = head_layers(modalities, structure.heads, structure.head, structure.model, names=names, known=known)
    if not structure.linear:
        return found
    linear = {name: [layer for layer in mine if layer.is_linear] for name, mine in found.items()}
    acting = sources_of(modalities.names, structure)
    projected = {name for active, listed in acting.items() if listed for name in (active, *listed)}
    for name, mine in found.items():
        if mine and not linear[name] and name in projected:
            raise ValueError(
                f"{name!r} has {', '.join(layer.name for layer in mine)} to be projected and no Linear layer among "
                "them, expected one: the released scripts project no other, mode=Released(layers='all') does"
            )
    return linear


def sources_of(names: tuple[str, ...], structure: Structure) -> dict[str, list[str]]:
    """Return for each modality those whose T acts on it (Algorithm 1, line 9): by the rule, or as listed for it."""

    def listed(rule: str | Mapping[str, Any]) -> dict[str, list[str]]:
        indices = _igm_rs.source_lists(list(names), rule)
        return {name: [names[k] for k in mine] for name, mine in zip(names, indices, strict=True)}

    rule, later = structure.sources, structure.later
    if not later:
        return listed(rule)
    return listed({**(listed(rule) if isinstance(rule, str) else rule), **later})


def add_modality(
    core: Core,
    name: str,
    members: Any,
    head: Any | None,
    sources: Any,
    rho: Any,
    tau: Any,
    group: dict[str, Any],
) -> None:
    """Take the modality `name` in; what is raised leaves everything as it was."""
    if not isinstance(name, str) or not name:
        raise ValueError(f"modality is {name!r}, expected a non-empty string")
    names = core.modalities.names
    if name in names:
        raise ValueError(f"modality is {name!r}, expected a name other than {', '.join(map(repr, names))}")
    radius = _checks.non_negative("rho", core.rho[names[-1]] if rho is None else rho)
    strength = _checks.non_negative("tau", core.tau[names[-1]] if tau is None else tau)
    base, projection = core.base, core.projection
    _check_options(base, group)
    members, head = _kept(members), _kept(head)
    structure = _extended(core, name, head, sources)
    of_head = [] if head is None else modules_of("head", head, structure.model)
    known = parameter_names(base.param_groups, structure.model)
    held = {p for each in base.param_groups for p in each["params"]}
    new = [p for p in _parameters([members, of_head], known) if p not in held]
    check_parameters([*base.param_groups, {"params": new}], known)
    if group and not new:
        raise ValueError(
            f"{next(iter(group))} is given for the group of {name!r}, expected no option of a group: all its "
            "parameters are in groups already"
        )
    groups = len(base.param_groups)
    undo = [core.modalities.checkpoint(), *_checkpoints(projection)]
    try:
        if new:
            base.add_param_group({"params": _named(base, name, new, known)} | group)
        core.modalities.append(name, members, base.param_groups, known)
        layers = layers_of(core.modalities, structure, (name,), _layers(projection))
        core.modalities.index(base.param_groups)
        check_held(core.modalities, projection.layers | layers)
        roots = core.modalities.roots(structure.model)
        check_gradients(roots)
        if core.head_pass is not None:
            of_head = of_head or modules_of("head", structure.head, structure.model)
            encoders = encoders_of(core.modalities, name, of_head)
        _extend(core, layers, structure, name, strength)
    except BaseException:
        del base.param_groups[groups:]
        for put_back in undo:
            put_back()
        core.modalities.index(base.param_groups)
        raise
    core.structure = structure
    core.rho.add(name, radius)
    core.tau.add(name, strength)
    core.counters.add(name)
    core.tap.add(layers[name])
    if core.head_pass is not None:
        core.head_pass.add(name, encoders, of_head)
    core.statistics = Statistics(roots)
    core.initial_lr += [lr_of(each) for each in base.param_groups[groups:]]


def _extend(core: Core, layers: dict[str, list[Layer]], structure: Structure, name: str, strength: float) -> None:
    """Let `projection` know the layers and sources, and make what follows from the Ȳ and P that there are."""
    projection = core.projection
    before = projection.sources
    after = sources_of(core.modalities.names, structure)
    projection.extend(layers, after)
    if projection.options.projector == "orthogonal":  # P belongs to the layer, whoever has made it
        made = {layer: one for mine in projection.made.values() for layer, one in mine.items()}
        projection.made[name] = {layer.name: made[layer.name] for layer in layers[name] if layer.name in made}
    if projection.options.combine == "sum":

        def tau(layer: Layer, active: str) -> float:
            return strength if active == name else core.tau_of(layer, active)

        for active, listed in after.items():
            if listed != before.get(active):
                projection.sum_up(active, tau)


def _check_options(base: torch.optim.Optimizer, group: dict[str, Any]) -> None:
    """Raise TypeError for an option that no group of `base` has; ValueError for one out of its range."""
    known = {key for each in [base.defaults, *base.param_groups] for key in each} - {"params", "param_names", "igm"}
    for key in group:
        if key not in known:
            raise TypeError(f"{key} is given, expected options of a group of {type(base).__name__}: {sorted(known)}")
    check_group(group)


def _kept(value: Any) -> Any:
    """What an iterator gives, as a list: it can be looked at once only."""
    plain = isinstance(value, (nn.Module, torch.Tensor, str, Mapping)) or not isinstance(value, Iterable)
    return value if plain else list(value)


def _extended(core: Core, name: str, head: Any | None, sources: Any) -> Structure:
    """Return the structure with the new modality in it."""
    before = core.structure
    heads = before.heads
    if head is not None and (before.head is not None or before.scope is not None):
        other = "a shared head" if before.head is not None else f"scope={before.scope}"
        raise ValueError(
            f"head is given to an optimizer with {other}, expected none: {name!r} is projected as the others"
        )
    if head is None and heads is not None:
        raise ValueError(f"head is None, expected the head of {name!r}: this optimizer was given heads")
    if head is not None:
        given: dict[str, Any] = {each: [] for each in core.modalities.names} if heads is None else dict(heads.items())
        heads = given | {name: head}
    if sources is None and not isinstance(before.sources, str):
        raise ValueError(f"sources is None, expected a name or names for {name!r}, or []: there is no rule for it")
    later = dict(before.later)
    if sources is not None:
        listed = [sources] if isinstance(sources, str) else sources
        if not isinstance(listed, (list, tuple)) or not all(isinstance(each, str) for each in listed):
            raise TypeError(f"sources is {sources!r}, expected the name of a modality or a list of names")
        later[name] = list(listed)
    return replace(before, heads=heads, later=later)


def _layers(projection: Projection) -> tuple[Layer, ...]:
    """All projected layers, each once."""
    return tuple(dict.fromkeys(layer for mine in projection.layers.values() for layer in mine))


def _checkpoints(projection: Projection) -> list[Callable[[], None]]:
    """Return functions that, in this order, put `projection` and its layers' ears back as they are now."""
    values = {key: dict(value) if isinstance(value, dict) else value for key, value in vars(projection).items()}
    ears = [(layer, list(layer.ears)) for layer in _layers(projection)]

    def put_back() -> None:
        vars(projection).update(values)
        for layer, mine in ears:
            layer.ears[:] = mine

    return [put_back, projection.checkpoint()]


def _named(
    base: torch.optim.Optimizer, name: str, params: list[torch.Tensor], known: Mapping[torch.Tensor, str]
) -> list[Any]:
    """Return `params`, with names where the groups of `base` have names."""
    if not any("param_names" in group for group in base.param_groups):
        return list(params)
    return [(known.get(p) or f"{name}.{position}", p) for position, p in enumerate(params)]


def _parameters(members: Any, known: Mapping[torch.Tensor, str]) -> list[torch.Tensor]:
    """Return the trainable parameters that modules, parameters and prefixes of `known` names stand for, each once.

    What is none of these is left to :class:`Modalities`, which says so.
    """
    found: list[torch.Tensor] = []
    if isinstance(members, nn.Module):
        found = list(members.parameters())
    elif isinstance(members, torch.Tensor):
        found = [members]
    elif isinstance(members, str):
        found = [p for p, name in known.items() if name.startswith(members)]
    elif isinstance(members, Iterable):
        found = [p for member in members for p in _parameters(member, known)]
    return list(dict.fromkeys(p for p in found if p.requires_grad))
