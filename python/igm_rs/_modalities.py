"""Who moves in whose turn: the parameters θ⁽ʲ⁾ of each modality, and those that are shared (Algorithm 1, inputs)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

__all__ = ["IMPLIED", "Modalities", "check_parameters", "parameter_names"]

IMPLIED = "all"
"""Name of the one modality of an optimizer that was given none."""

Group = dict[str, Any]

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def parameter_names(groups: Iterable[Group], model: nn.Module | None) -> dict[torch.Tensor, str]:
    """Map each known parameter to its name: from `model`, else from the optimizer's own ``param_names``."""
    if model is not None:
        return {parameter: name for name, parameter in model.named_parameters(remove_duplicate=False)}
    known: dict[torch.Tensor, str] = {}
    for group in groups:
        known.update(zip(group["params"], group.get("param_names", ()), strict=False))
    return known


def check_parameters(groups: Iterable[Group], known: Mapping[torch.Tensor, str]) -> None:
    """Raise TypeError for a parameter that is not dense and real; ValueError where they are on several devices."""
    first: torch.Tensor | None = None
    for number, group in enumerate(groups):
        listed = group.get("params")
        several = [listed] if isinstance(listed, torch.Tensor) else listed
        if not isinstance(several, (list, tuple)):
            continue  # torch says what is wrong with it
        for position, entry in enumerate(several):
            p = entry[1] if isinstance(entry, tuple) else entry  # of named_parameters()
            if not isinstance(p, torch.Tensor):
                continue
            label = f"parameter {known.get(p) or f'{position} of group {number}'}"
            if p.layout is not torch.strided:
                raise TypeError(f"{label} has the layout {p.layout}, expected a dense tensor: sparse is not supported")
            if p.dtype not in _DTYPES:
                raise TypeError(
                    f"{label} is {p.dtype}, expected one of {', '.join(map(str, _DTYPES))}: complex, integer and "
                    "8-bit parameters are not supported"
                )
            first = p if first is None else first
            if p.device != first.device and "meta" not in (p.device.type, first.device.type):
                raise ValueError(f"{label} is on {p.device}, expected {first.device}, where the first parameter is")


class Modalities:
    """Parameters by modality, in the order of the base optimizer's groups.

    A parameter listed under one modality is its own. One listed under several, or under none, is shared: it moves in
    the turn of each modality that lists it, or in every turn (method.md §1).

    Parameters
    ----------
    spec : mapping of str to modules, parameters, name prefixes or lists of them; None
        What belongs to each modality; None is one modality that holds everything.
    groups : list of dict
        The base optimizer's ``param_groups``.
    known : mapping of Tensor to str
        Names of parameters, for prefixes and for messages.

    Raises
    ------
    ValueError
        No modality; an empty one; a prefix that fits no name; a trainable parameter that the base does not hold.
    TypeError
        Something that is no module, parameter or prefix.
    """

    def __init__(
        self, spec: Mapping[str, Any] | nn.ModuleDict | None, groups: list[Group], known: Mapping[torch.Tensor, str]
    ) -> None:
        self._known = known
        self.modules: dict[str, list[tuple[str, nn.Module]]] = {}
        self.listed: dict[str, dict[torch.Tensor, str]] = {}
        held = {parameter for group in groups for parameter in group["params"]}
        if spec is None:
            self.modules[IMPLIED] = []
            self.listed[IMPLIED] = {parameter: known.get(parameter, "") for parameter in held}
        elif not isinstance(spec, (Mapping, nn.ModuleDict)):
            raise TypeError(f"modalities is a {type(spec).__name__}, expected a mapping from names to modules")
        elif not spec:
            raise ValueError("modalities is empty, expected at least one name with its modules, parameters or prefixes")
        else:
            for name, members in spec.items():
                if not isinstance(name, str) or not name:
                    raise ValueError(f"modalities has the name {name!r}, expected a non-empty string")
                self._list(name, members, f"modalities[{name!r}]", held)
                if not self.listed[name]:
                    raise ValueError(f"modalities[{name!r}] is empty, expected at least one trainable parameter")
        self.names = tuple(self.listed)
        self._held = held
        self.index(groups)

    def append(self, name: str, members: Any, groups: list[Group], known: Mapping[torch.Tensor, str]) -> None:
        """Take in a modality, last in the order of training; to be undone with :meth:`checkpoint` where it fails."""
        held = {parameter for group in groups for parameter in group["params"]}
        self._held, self._known = held, known
        self._list(name, members, f"modalities[{name!r}]", held)
        if not self.listed[name]:
            raise ValueError(f"modalities[{name!r}] is empty, expected at least one trainable parameter")
        self.names = tuple(self.listed)
        self.index(groups)

    def checkpoint(self) -> Callable[[], None]:
        """Return a function that puts the modalities back as they are now."""
        names, known = self.names, self._known
        modules = {name: list(mine) for name, mine in self.modules.items()}
        listed = {name: dict(mine) for name, mine in self.listed.items()}

        def put_back() -> None:
            self.names, self.modules, self.listed, self._known = names, modules, listed, known

        return put_back

    def roots(self, model: nn.Module | None) -> list[nn.Module]:
        """Return the modules of all modalities, and `model`."""
        found = [module for mine in self.modules.values() for _, module in mine]
        return found if model is None else [*found, model]

    def include(self, modality: str, module: nn.Module, label: str) -> None:
        """Count the parameters of `module` (a head of its own) as `modality`'s."""
        self.modules[modality].append((label, module))
        self._add(modality, self._of_module(module, label), self._held)

    def index(self, groups: list[Group]) -> None:
        """Sort the parameters of `groups` by modality; to be repeated when a group is added."""
        self._held = {parameter for group in groups for parameter in group["params"]}
        everyone = set().union(*self.listed.values())
        times: dict[torch.Tensor, int] = {}
        for members in self.listed.values():
            for parameter in members:
                times[parameter] = times.get(parameter, 0) + 1
        self.own = {
            name: [parameter for parameter in members if times[parameter] == 1] for name, members in self.listed.items()
        }
        self.active: dict[str, list[tuple[Group, list[torch.Tensor]]]] = {}
        self.inactive: dict[str, list[torch.Tensor]] = {}
        for name, members in self.listed.items():
            spans: list[tuple[Group, list[torch.Tensor]]] = []
            others: list[torch.Tensor] = []
            for group in groups:
                moving: list[torch.Tensor] = []
                for parameter in group["params"]:
                    if parameter in members or parameter not in everyone:
                        moving.append(parameter)
                    else:
                        others.append(parameter)
                if moving:
                    spans.append((group, moving))
            self.active[name] = spans
            self.inactive[name] = others

    def check(self, name: Any, argument: str = "modality") -> str:
        """Return `name` if it is a modality; ValueError that lists them otherwise."""
        if name not in self.listed:
            raise ValueError(f"{argument} is {name!r}, expected one of {', '.join(map(repr, self.names))}")
        return str(name)

    def group_of(self, parameter: torch.Tensor, modality: str) -> Group | None:
        """Return the group that holds `parameter`, None where the base does not hold it."""
        for group, moving in self.active[modality]:
            if any(parameter is member for member in moving):
                return group
        return None

    def _list(self, name: str, members: Any, label: str, held: set[torch.Tensor]) -> None:
        self.modules[name] = []
        self.listed[name] = {}
        if isinstance(members, (nn.Module, torch.Tensor, str)):
            self._member(name, members, label, name, held)
            return
        if not isinstance(members, Iterable):
            raise TypeError(f"{label} is a {type(members).__name__}, expected modules, parameters or name prefixes")
        for position, member in enumerate(members):
            self._member(name, member, f"{label}[{position}]", f"{name}.{position}", held)

    def _member(self, name: str, member: Any, label: str, path: str, held: set[torch.Tensor]) -> None:
        if isinstance(member, nn.Module):
            self.modules[name].append((path, member))
            self._add(name, self._of_module(member, label), held)
        elif isinstance(member, torch.Tensor):
            self._add(name, [(self._known.get(member, label), member)], held)
        elif isinstance(member, str):
            found = [(known, p) for p, known in self._known.items() if known.startswith(member)]
            if not found:
                some = ", ".join(list(self._known.values())[:6])
                raise ValueError(
                    f"{label} is the prefix {member!r}, which fits no parameter name; "
                    + (f"names are {some}, …" if some else "give model=, or named_parameters() to the base optimizer")
                )
            self._add(name, found, held)
        else:
            raise TypeError(f"{label} is a {type(member).__name__}, expected a module, a parameter or a name prefix")

    def _of_module(self, module: nn.Module, label: str) -> Iterator[tuple[str, torch.Tensor]]:
        for name, parameter in module.named_parameters():
            yield self._known.get(parameter, f"{label}.{name}"), parameter

    def _add(self, name: str, found: Iterable[tuple[str, torch.Tensor]], held: set[torch.Tensor]) -> None:
        for label, parameter in found:
            if not parameter.requires_grad:
                continue
            if parameter not in held:
                raise ValueError(
                    f"parameter {label} of modality {name!r}, shape {tuple(parameter.shape)}, is not held by the base "
                    "optimizer; expected every trainable parameter of a modality in its param_groups"
                )
            self.listed[name][parameter] = label
