"""A modality that comes later: a trained optimizer takes it in, last in the order of training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from . import _checks, _igm_rs
from ._base import check_group
from ._batchnorm import Statistics
from ._core import Core, Structure, lr_of
from ._head_pass import head_pass_of
from ._layers import Layer, check_gradients, check_held, head_layers, scope_layers
from ._modalities import Modalities, check_parameters

__all__ = ["add_modality", "layers_of", "sources_of"]


def layers_of(
    modalities: Modalities, structure: Structure, names: tuple[str, ...], known: tuple[Layer, ...] = ()
) -> dict[str, list[Layer]]:
    """Return the projected layers of the modalities `names`."""
    if structure.scope is not None:
        return scope_layers(modalities, structure.scope, structure.model, names=names, known=known)
    return head_layers(modalities, structure.heads, structure.head, structure.model, names=names, known=known)


def sources_of(names: tuple[str, ...], sources: str | Mapping[str, Any]) -> dict[str, list[str]]:
    """Return for each modality those whose T acts on it (Algorithm 1, line 9)."""
    indices = _igm_rs.source_lists(list(names), sources)
    return {name: [names[k] for k in listed] for name, listed in zip(names, indices, strict=True)}


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
    if name in core.modalities.names:
        raise ValueError(f"modality is {name!r}, expected a name other than {', '.join(map(repr, core.modalities.names))}")
    radius = _checks.non_negative("rho", core.rho[core.modalities.names[-1]] if rho is None else rho)
    strength = _checks.non_negative("tau", core.tau[core.modalities.names[-1]] if tau is None else tau)
    check_group(group)
    structure = _extended(core, name, head, sources)
    base = core.base
    held = {p for each in base.param_groups for p in each["params"]}
    new = [p for p in _parameters([members, [] if head is None else head], structure.model) if p not in held]
    check_parameters([*base.param_groups, {"params": new}], {})
    groups = len(base.param_groups)
    put_back = core.modalities.checkpoint()
    try:
        if new:
            base.add_param_group({"params": new, **group})
        core.modalities.append(name, members, base.param_groups)
        known = tuple(dict.fromkeys(layer for mine in core.projection.layers.values() for layer in mine))
        layers = layers_of(core.modalities, structure, (name,), known)
        core.modalities.index(base.param_groups)
        check_held(core.modalities, layers)
        roots = core.modalities.roots(structure.model)
        check_gradients(roots)
        head_pass = core.head_pass
        if head_pass is not None:
            head_pass = head_pass_of(
                core.modalities, structure.heads, structure.head, structure.model, random=core.preserve_rng
            )
        core.projection.extend(layers, sources_of(core.modalities.names, structure.sources))
    except BaseException:
        del base.param_groups[groups:]
        put_back()
        core.modalities.index(base.param_groups)
        raise
    core.structure, core.head_pass = structure, head_pass
    core.rho.add(name, radius)
    core.tau.add(name, strength)
    core.counters.add(name)
    core.tap.add(layers[name])
    core.statistics = Statistics(roots)
    core.initial_lr += [lr_of(each) for each in base.param_groups[groups:]]


def _extended(core: Core, name: str, head: Any | None, sources: Any) -> Structure:
    """Return the structure with the new modality in it."""
    before = core.structure
    heads = before.heads
    if head is not None and (before.head is not None or before.scope is not None):
        given = "a shared head" if before.head is not None else f"scope={before.scope}"
        raise ValueError(f"head is given to an optimizer with {given}, expected none: {name!r} is projected as the others")
    if head is None and heads is not None:
        raise ValueError(f"head is None, expected the head of {name!r}: this optimizer was given heads")
    if head is not None:
        heads = dict({} if heads is None else heads.items()) | {name: head}
        heads = {each: heads.get(each, []) for each in (*core.modalities.names, name)}
    if sources is None and not isinstance(before.sources, str):
        raise ValueError(f"sources is None, expected None in a list, a name or names for {name!r}: there is no rule for it")
    if sources is None:
        return Structure(heads, before.head, before.scope, before.model, before.sources)
    listed = core.projection.sources | {name: list(sources) if not isinstance(sources, str) else [sources]}
    return Structure(heads, before.head, before.scope, before.model, listed)


def _parameters(members: Any, model: nn.Module | None) -> list[torch.Tensor]:
    """Return the trainable parameters that modules, parameters, and names of `model` stand for, each once."""
    if isinstance(members, nn.Module):
        found = list(members.parameters())
    elif isinstance(members, torch.Tensor):
        found = [members]
    elif isinstance(members, str):
        found = [] if model is None else [p for name, p in model.named_parameters() if name.startswith(members)]
    else:
        found = [p for member in members for p in _parameters(member, model)]
    return list(dict.fromkeys(p for p in found if p.requires_grad))
