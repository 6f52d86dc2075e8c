"""Which layers are projected, and which layer of the source each of them is paired with (end of §3.3 of the paper)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from ._modalities import Modalities

__all__ = ["Layer", "check_gradients", "head_layers", "pair", "scope_layers"]

_NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
"""Layers whose parameters are never projected (method.md §1)."""


@dataclass(frozen=True)
class Layer:
    """A projected layer: its name in states and messages, and the Linear itself."""

    name: str
    module: nn.Linear

    @property
    def features(self) -> int:
        """The width d of the layer's input Z."""
        return self.module.in_features

    def __str__(self) -> str:
        return f"{self.name!r} (d = {self.features})"


def head_layers(
    modalities: Modalities,
    heads: Mapping[str, Any] | nn.ModuleDict | None,
    head: Any | None,
    model: nn.Module | None,
) -> dict[str, list[Layer]]:
    """Return the projected layers of each modality, input to output, from ``heads=`` or a shared ``head=``.

    Raises
    ------
    ValueError
        An unknown modality; a head without a Linear layer, with a layer of another kind or whose weight is not
        trained; a name that `model` does not have.
    TypeError
        Something that is no module or module name.
    """
    if head is not None:
        shared = _layers_of(_modules("head", head, model), model, "head")
        return dict.fromkeys(modalities.names, shared)
    if heads is None:
        return {name: [] for name in modalities.names}
    if not isinstance(heads, (Mapping, nn.ModuleDict)):
        raise TypeError(f"heads is a {type(heads).__name__}, expected a mapping from modality to head (or use head=)")
    for name in heads:
        modalities.check(name, "a key of heads")
    result: dict[str, list[Layer]] = {}
    for name in modalities.names:
        if name not in heads:
            raise ValueError(f"heads has no entry for {name!r}, expected one for each of {list(modalities.names)}")
        argument = f"heads[{name!r}]"
        modules = _modules(argument, heads[name], model)
        for module in modules:
            modalities.include(name, module, argument)
        result[name] = _layers_of(modules, model, name)
    return _once(result)


def scope_layers(modalities: Modalities, scope: float, model: nn.Module | None) -> dict[str, list[Layer]]:
    """Return each modality's layers from the output backwards until they hold the share `scope` of its parameters.

    The share is counted over the modality's trainable parameters, weight and bias of a taken layer together (Table 4).

    Raises
    ------
    ValueError
        A layer that cannot be projected stands before the share is reached; a modality without modules.
    """
    result: dict[str, list[Layer]] = {}
    for name in modalities.names:
        roots = modalities.modules[name]
        if not roots:
            raise ValueError(f"scope needs the modules of {name!r}, expected modalities[{name!r}] to list modules")
        wanted = scope * sum(parameter.numel() for parameter in modalities.listed[name])
        layers: list[Layer] = []
        taken = 0
        leaves = [leaf for label, root in roots for leaf in _leaves(root, model, label)]
        for label, module in reversed(leaves):
            if taken >= wanted:
                break
            if isinstance(module, _NORMS):
                continue
            layers.insert(0, _linear(label, module, f"scope={scope}"))
            taken += sum(parameter.numel() for parameter in module.parameters(recurse=False))
        result[name] = layers
    return _once(result)


def pair(active: str, source: str, layers: Mapping[str, list[Layer]]) -> list[tuple[Layer, Layer]]:
    """Pair each projected layer of `active` with the layer of `source` whose T acts on it.

    A layer that both have is paired with itself; the others by their position counted from the output, where the
    widths d agree: networks of unlike architecture share their deep layers only.

    Raises
    ------
    ValueError
        Both have layers and none can be paired, or one would be paired twice; they are named.
    """
    mine, theirs = layers[active], layers[source]
    own = {id(layer.module): layer for layer in theirs}
    pairs: list[tuple[Layer, Layer]] = []
    for position, layer in enumerate(reversed(mine), start=1):
        if id(layer.module) in own:
            pairs.append((layer, own[id(layer.module)]))
        elif position <= len(theirs) and theirs[-position].features == layer.features:
            pairs.append((layer, theirs[-position]))
    taken: dict[int, Layer] = {}
    for layer, other in pairs:
        if id(other.module) in taken:
            raise ValueError(
                f"the pairing of {active!r} with {source!r} is ambiguous: its layers {layer} and "
                f"{taken[id(other.module)]} both meet {other}; expected a shared layer at the same distance from the "
                "output in both heads"
            )
        taken[id(other.module)] = layer
    if mine and not pairs:
        raise ValueError(
            f"the heads of {active!r} and {source!r} have no layer in common: {', '.join(map(str, mine))} against "
            f"{', '.join(map(str, theirs)) or 'none'}; expected equal widths d at the same distance from the output"
        )
    return pairs[::-1]


def check_gradients(roots: Iterable[nn.Module]) -> None:
    """Raise ValueError for a layer whose gradients are sparse, before a step meets one."""
    for root in roots:
        for name, module in root.named_modules():
            if getattr(module, "sparse", False) is True and isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
                raise ValueError(
                    f"{type(module).__name__} {name or 'itself'!r} has sparse=True, expected sparse=False: sparse "
                    "gradients are not supported"
                )


def _once(layers: Mapping[str, list[Layer]]) -> dict[str, list[Layer]]:
    """Let a module have one name for all modalities, and stand once in each list."""
    seen: dict[int, Layer] = {}
    return {
        name: list(dict.fromkeys(seen.setdefault(id(layer.module), layer) for layer in mine))
        for name, mine in layers.items()
    }


def _modules(argument: str, value: Any, model: nn.Module | None) -> list[nn.Module]:
    if isinstance(value, nn.Module):
        return [value]
    if isinstance(value, str):
        found = dict(model.named_modules()).get(value) if model is not None else None
        if found is None:
            needed = "model=, to look it up" if model is None else "the name of one of model's modules"
            raise ValueError(f"{argument} is the name {value!r}, expected {needed}")
        return [found]
    if isinstance(value, Iterable) and not isinstance(value, torch.Tensor):
        return [module for member in value for module in _modules(argument, member, model)]
    raise TypeError(f"{argument} is a {type(value).__name__}, expected a module, a module's name or a list of them")


def _leaves(root: nn.Module, model: nn.Module | None, label: str) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules below `root` that hold parameters themselves, named as in `model` where it is known."""
    known = {} if model is None else {module: name for name, module in model.named_modules()}
    for name, module in root.named_modules():
        if "parametrizations" in name.split("."):
            continue
        if any(True for _ in module.parameters(recurse=False)) or is_parametrized(module):
            yield known.get(module) or (f"{label}.{name}" if name else label), module


def _layers_of(modules: list[nn.Module], model: nn.Module | None, label: str) -> list[Layer]:
    layers: list[Layer] = []
    for position, module in enumerate(modules):
        prefix = label if len(modules) == 1 else f"{label}.{position}"
        for name, leaf in _leaves(module, model, prefix):
            if not isinstance(leaf, _NORMS):
                layers.append(_linear(name, leaf, "the head"))
    if not layers:
        kinds = ", ".join(type(module).__name__ for module in modules) or "nothing"
        raise ValueError(f"the head {label!r} ({kinds}) has no layer to project, expected at least one nn.Linear")
    return layers


def _linear(name: str, module: nn.Module, where: str) -> Layer:
    """Return `module` as a projected layer; every other kind of layer is refused by its name."""
    if not isinstance(module, nn.Linear) or isinstance(module.weight, nn.UninitializedParameter):
        raise ValueError(
            f"{where} takes in layer {name!r}, a {type(module).__name__}, which cannot be projected: "
            "expected nn.Linear with known sizes (norm layers are passed over)"
        )
    if is_parametrized(module):
        raise ValueError(f"{where} takes in layer {name!r} with a parametrised weight, expected a plain nn.Linear")
    if not module.weight.requires_grad:
        raise ValueError(f"{where} takes in layer {name!r} whose weight is frozen, expected requires_grad=True")
    return Layer(name, module)
