"""Which layers are projected, and which layer of the source each of them is paired with (end of §3.3 of the paper)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils.parametrize import is_parametrized

from ._kinds import KINDS, Ear, Slot, original, passed_over, slots
from ._modalities import Modalities

__all__ = [
    "Layer",
    "Pairs",
    "Rule",
    "check_gradients",
    "check_held",
    "head_layers",
    "modules_of",
    "pair",
    "pair_all",
    "projected_share",
    "scope_layers",
]

Pairs = list[tuple["Layer", "Layer"]]
Rule = str | Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class Layer:
    """A projected layer: the weight whose gradient T acts on, and the modules that are given its input Z.

    Attributes
    ----------
    name : str
        Its name in states and messages.
    relative : str
        Its path below what the user has given as head or as modality, by which layers are paired by name.
    ears : list of Ear
        Where it hears Z; several where the weight is tied.
    weight : torch.Tensor
        The trained tensor: of a parametrised weight the one that has its shape.
    bias : torch.Tensor or None
        The bias, if it is trained.
    groups : int
        G: 1, but for grouped convolutions.
    features : int
        The width d of one group's Z.
    rows, bias_rows : slice or None
        The part of `weight` and of `bias` that is this layer's; None is all.
    transposed : bool
        Whether `weight` is (d, out).
    """

    name: str
    relative: str
    ears: list[Ear]
    weight: torch.Tensor
    bias: torch.Tensor | None
    groups: int
    features: int
    rows: slice | None = None
    bias_rows: slice | None = None
    transposed: bool = False

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        """The modules whose forward passes it listens to."""
        return tuple({ear.module: None for ear in self.ears})

    @property
    def width(self) -> int:
        """G·d, the columns of its rows."""
        return self.groups * self.features

    def matrix(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a view of a tensor like `weight`: (out, d), or (G, out/G, d) of a grouped convolution.

        Where the memory of a convolution's tensor forbids that (channels last), the last dimensions stay apart:
        (out, C, …) or (G, out/G, C, …), with ∏ = d.
        """
        own = tensor if self.rows is None else tensor[self.rows]
        if self.transposed:
            return own.t()
        shape = (self.groups, own.shape[0] // self.groups) if self.groups > 1 else own.shape[:1]
        if own.dim() > 2:
            try:
                return own.view(*shape, self.features)
            except RuntimeError:
                return own.view(*shape, *own.shape[1:])
        return own if self.groups == 1 else own.view(*shape, self.features)

    def vector(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a view of a tensor like `bias`: (out,), or (G, out/G) of a grouped convolution."""
        own = tensor if self.bias_rows is None else tensor[self.bias_rows]
        return own if self.groups == 1 else own.view(self.groups, -1)

    @property
    def is_linear(self) -> bool:
        """Whether it is a Linear layer wherever its weight is."""
        return all(isinstance(module, nn.Linear) for module in self.modules)

    def size(self, *, bias: bool) -> int:
        """Number of its parameters, with or without the bias."""
        return self.matrix(self.weight).numel() + (
            self.vector(self.bias).numel() if bias and self.bias is not None else 0
        )

    def rows_of(
        self, features: torch.Tensor, reduce: str = "mean", augment: bool = False, ear: Ear | None = None
    ) -> torch.Tensor:
        """Return the rows by which Z, with the batch first, enters Ȳ: (n, G·d), or (n, G·(d + 1)) with `augment`.

        `ear` says where Z was heard: convolutions with a tied weight need not look at it in the same way.
        """
        return (ear or self.ears[0]).rows(features, reduce, self.groups, augment)

    def __str__(self) -> str:
        of_groups = f", {self.groups} groups" if self.groups > 1 else ""
        return f"{self.name!r} (d = {self.features}{of_groups})"


class _Finder:
    """Makes the layers of one optimizer: one for each weight, however many modules and modalities have it."""

    def __init__(self, roots: Iterable[nn.Module], model: nn.Module | None, known: Iterable[Layer]) -> None:
        self._names = {} if model is None else {module: name for name, module in model.named_modules()}
        self._layers = {_key(layer.weight, layer.rows): layer for layer in known}
        self._slots: dict[tuple[int, int], list[Slot]] = {}
        everyone = [*roots, *([] if model is None else [model])]
        for module in {module: None for root in everyone for _, module in _own(root)}:
            for slot in slots(module) or ():
                for weight in original(slot.holder, slot.attribute, slot.shape):
                    self._slots.setdefault(_key(weight, slot.rows), []).append(slot)

    def candidates(self, roots: list[tuple[str, nn.Module]]) -> Iterator[tuple[str, str, nn.Module]]:
        """Yield the modules below `roots` that hold parameters themselves, with name and relative path, in order."""
        for position, (label, root) in enumerate(roots):
            for path, module in _own(root):
                relative = ".".join(filter(None, [str(position) if len(roots) > 1 else "", path]))
                yield self._names.get(module) or (f"{label}.{path}" if path else label), relative, module

    def layers(self, name: str, relative: str, module: nn.Module, where: str) -> list[Layer]:
        """Return the layers of `module`, none where it is passed over; every other kind is refused by its name."""
        found = slots(module)
        if found is None and passed_over(module):
            return []
        if found is None:
            raise ValueError(
                f"{where} takes in layer {name!r}, a {type(module).__name__}, which cannot be projected: expected "
                f"{KINDS} (norm layers, embeddings and vectors are passed over)"
            )
        return [self._layer(name + slot.suffix, (relative + slot.suffix).lstrip("."), slot, where) for slot in found]

    def _layer(self, name: str, relative: str, slot: Slot, where: str) -> Layer:
        weights = original(slot.holder, slot.attribute, slot.shape)
        if len(weights) != 1:
            raise ValueError(
                f"{where} takes in layer {name!r} with a parametrised weight that is made from "
                f"{len(weights) or 'no'} parameters of its shape {slot.shape}, expected one, for T to act on"
            )
        weight = weights[0]
        if not weight.requires_grad:
            raise ValueError(f"{where} takes in layer {name!r} whose weight is frozen, expected requires_grad=True")
        tied = self._slots[_key(weight, slot.rows)]
        for other in tied:
            if (other.groups, other.features, other.transposed) != (slot.groups, slot.features, slot.transposed):
                raise ValueError(
                    f"{where} takes in layer {name!r}, d = {slot.features} in {slot.groups} groups, whose weight is "
                    f"tied to a {type(other.ear.module).__name__} with d = {other.features} in {other.groups} "
                    "groups, expected the same"
                )
        layer = self._layers.get(_key(weight, slot.rows))
        if layer is None:
            bias = slot.holder._parameters.get(slot.bias)
            layer = self._layers[_key(weight, slot.rows)] = Layer(
                name,
                relative,
                [],
                weight,
                bias if bias is not None and bias.requires_grad else None,
                slot.groups,
                slot.features,
                slot.rows,
                slot.bias_rows,
                slot.transposed,
            )
        heard = {(ear.module, ear.argument) for ear in layer.ears}
        layer.ears.extend(other.ear for other in tied if (other.ear.module, other.ear.argument) not in heard)
        return layer


def head_layers(
    modalities: Modalities,
    heads: Mapping[str, Any] | nn.ModuleDict | None,
    head: Any | None,
    model: nn.Module | None,
    *,
    names: Iterable[str] | None = None,
    known: Iterable[Layer] = (),
) -> dict[str, list[Layer]]:
    """Return the projected layers of each modality, input to output, from ``heads=`` or a shared ``head=``.

    `names` are the modalities that are asked for, all by default; `known` the layers that there are already.

    Raises
    ------
    ValueError
        An unknown modality; a head without a layer to project, with one that cannot be or whose weight is not
        trained; a name that `model` does not have.
    TypeError
        Something that is no module or module name.
    """
    wanted = modalities.names if names is None else tuple(names)
    if head is not None:
        modules = modules_of("head", head, model)
        finder = _Finder([*_roots(modalities), *modules], model, known)
        shared = _layers_of(finder, modules, "head")
        return _checked(dict.fromkeys(wanted, shared), known)
    if heads is None:
        return {name: [] for name in wanted}
    if not isinstance(heads, (Mapping, nn.ModuleDict)):
        raise TypeError(f"heads is a {type(heads).__name__}, expected a mapping from modality to head (or use head=)")
    for name in heads:
        modalities.check(name, "a key of heads")
    given: dict[str, list[nn.Module]] = {}
    for name in wanted:
        if name not in heads:
            raise ValueError(f"heads has no entry for {name!r}, expected one for each of {list(wanted)}")
        argument = f"heads[{name!r}]"
        given[name] = modules_of(argument, heads[name], model)
        for module in given[name]:
            modalities.include(name, module, argument)
    finder = _Finder(_roots(modalities), model, known)
    return _checked({name: _layers_of(finder, modules, name) for name, modules in given.items()}, known)


def scope_layers(
    modalities: Modalities,
    scope: float,
    model: nn.Module | None,
    *,
    names: Iterable[str] | None = None,
    known: Iterable[Layer] = (),
) -> dict[str, list[Layer]]:
    """Return each modality's layers from the output backwards until they hold the share `scope` of its parameters.

    The share is counted over the modality's trainable parameters, weight and bias of a taken layer together (Table 4);
    a tied weight counts once. `names` and `known` as for :func:`head_layers`.

    Raises
    ------
    ValueError
        A layer that cannot be projected stands before the share is reached; a modality without modules.
    """
    finder = _Finder(_roots(modalities), model, known)
    result: dict[str, list[Layer]] = {}
    for name in modalities.names if names is None else names:
        roots = modalities.modules[name]
        if not roots:
            raise ValueError(f"scope needs the modules of {name!r}, expected modalities[{name!r}] to list modules")
        found = list(finder.candidates(roots))
        for label, _, module in found:
            if isinstance(module, LazyModuleMixin) and module.has_uninitialized_params():
                raise ValueError(
                    f"scope={scope} takes in layer {label!r}, a {type(module).__name__} without sizes, expected a "
                    "forward pass before, from which it learns them"
                )
        wanted = scope * sum(parameter.numel() for parameter in modalities.listed[name])
        layers: dict[Layer, None] = {}
        taken = 0
        for label, relative, module in reversed(found):
            if taken >= wanted:
                break
            for layer in reversed(finder.layers(label, relative, module, f"scope={scope}")):
                if taken < wanted and layer not in layers:
                    layers[layer] = None
                    taken += layer.size(bias=True)
        result[name] = list(layers)[::-1]
    return _checked(result, known)


def projected_share(
    modalities: Modalities, layers: Mapping[str, Iterable[Layer]], *, augment: bool = False
) -> dict[str, float]:
    """Return, for each modality, the share of its trainable parameters whose gradient T acts on.

    What is shared with other modalities counts for each of them; biases count with `augment`.
    """
    shares = {}
    for name, mine in layers.items():
        moving = [p for _, members in modalities.active[name] for p in members if p.requires_grad]
        taken = sum(layer.size(bias=augment) for layer in dict.fromkeys(mine))
        shares[name] = taken / sum(p.numel() for p in moving) if moving else 0.0
    return shares


def pair_all(active: str, sources: Iterable[str], layers: Mapping[str, list[Layer]], rule: Rule) -> list[Pairs]:
    """Return the pairs of `active` with each of its `sources`, see :func:`pair`.

    Raises
    ------
    ValueError
        As :func:`pair`; a mapping that names a layer that no source has.
    """
    sources = list(sources)
    if sources and layers[active] and not isinstance(rule, str):
        theirs = {layer.name for source in sources for layer in layers[source]}
        for mine, other in _mapping(active, layers, rule).items():
            if other is not None and other not in theirs:
                raise ValueError(
                    f"pairing maps {mine!r} of {active!r} to {other!r}, expected a layer of one of its sources: "
                    + "; ".join(f"{source!r} has {_listed(layers[source])}" for source in sources)
                )
    return [pair(active, source, layers, rule) if layers[active] else [] for source in sources]


def pair(active: str, source: str, layers: Mapping[str, list[Layer]], rule: Rule = "position") -> Pairs:
    """Pair each projected layer of `active` with the layer of `source` whose T acts on it.

    Parameters
    ----------
    active, source : str
        Two modalities.
    layers : mapping of str to list of Layer
        The layers of every modality, input to output.
    rule : {"position", "name", "shape"} or mapping
        "position": a layer that both have is paired with itself; the others by their position counted from the
        output, where (G, d) agree: networks of unlike architecture share their deep layers only. "name": a layer that
        both have with itself, the others by their path below the head or modality. "shape": each layer with every
        layer of the source whose weight has the same shape, in the source's order, as the released code does; several
        T's act then. A mapping from a layer's name to that of the source's layer, or None for "not projected"; or such
        a mapping for each active modality.

    Raises
    ------
    ValueError
        Both have layers and none can be paired, or one would be paired twice; a mapping with an unknown name or
        unequal widths. The layers of both sides are named.
    """
    mine, theirs = layers[active], layers[source]
    if not isinstance(rule, str):
        return _by_mapping(active, source, layers, rule)
    if rule == "shape":
        pairs = [(layer, other) for layer in mine for other in theirs if _shape(layer) == _shape(other)]
        expected = "a weight of the same shape in both"
    elif rule == "name":
        pairs = _by_name(active, source, layers)
        expected = "layers of the same path below both"
    elif rule == "position":
        pairs = _by_position(active, source, layers)
        expected = "equal widths d at the same distance from the output"
    else:
        raise ValueError(f"pairing is {rule!r}, expected 'position', 'name', 'shape' or a mapping of layers")
    if mine and not pairs:
        raise ValueError(
            f"the heads of {active!r} and {source!r} have no layer in common: {_listed(mine)} against "
            f"{_listed(theirs)}; expected {expected}, or pairing= as a mapping"
        )
    return pairs


def _by_position(active: str, source: str, layers: Mapping[str, list[Layer]]) -> Pairs:
    mine, theirs = layers[active], layers[source]
    pairs: Pairs = []
    for position, layer in enumerate(reversed(mine), start=1):
        if layer in theirs:
            pairs.append((layer, layer))
        elif position <= len(theirs) and _size(theirs[-position]) == _size(layer):
            pairs.append((layer, theirs[-position]))
    taken: dict[Layer, Layer] = {}
    for layer, other in pairs:
        if other in taken:
            raise ValueError(
                f"the pairing of {active!r} with {source!r} is ambiguous: its layers {layer} and {taken[other]} both "
                f"meet {other}; expected a shared layer at the same distance from the output in both heads, of "
                f"{_listed(mine)} and {_listed(theirs)}"
            )
        taken[other] = layer
    return pairs[::-1]


def _by_name(active: str, source: str, layers: Mapping[str, list[Layer]]) -> Pairs:
    mine, theirs = layers[active], layers[source]
    pairs: Pairs = []
    for layer in mine:
        if layer in theirs:
            pairs.append((layer, layer))
            continue
        found = [other for other in theirs if other not in mine and other.relative == layer.relative]
        if len(found) > 1:
            raise ValueError(
                f"the pairing of {active!r} with {source!r} by name is ambiguous: {layer} meets {_listed(found)}, all "
                f"at {layer.relative!r}, of {_listed(mine)} and {_listed(theirs)}; expected one"
            )
        for other in found:
            _check_sizes(active, source, layer, other, layers)
            pairs.append((layer, other))
    return pairs


def _by_mapping(active: str, source: str, layers: Mapping[str, list[Layer]], rule: Mapping[str, Any]) -> Pairs:
    of_active = _mapping(active, layers, rule)
    theirs = {layer.name: layer for layer in layers[source]}
    pairs: Pairs = []
    for layer in layers[active]:
        other = theirs.get(of_active.get(layer.name) or "")
        if other is not None:
            _check_sizes(active, source, layer, other, layers)
            pairs.append((layer, other))
    return pairs


def _mapping(active: str, layers: Mapping[str, list[Layer]], rule: Mapping[str, Any]) -> Mapping[str, str | None]:
    """Return what a mapping says of `active`'s layers, all its names checked."""
    if not isinstance(rule, Mapping):
        raise TypeError(f"pairing is a {type(rule).__name__}, expected a word or a mapping of layers")
    everyone = {layer.name for mine in layers.values() for layer in mine}
    nested = any(isinstance(value, Mapping) for value in rule.values())
    if nested and not all(name in layers and isinstance(value, Mapping) for name, value in rule.items()):
        raise ValueError(
            f"pairing has the keys {list(rule)}, expected layers alone, or modalities alone with a mapping each: "
            f"{list(layers)}"
        )
    mine = {layer.name for layer in layers[active]}
    for name, other in (rule.get(active, {}) if nested else rule).items():
        for unknown in (name, *([] if other is None else [other])):
            if unknown not in (mine if nested and unknown is name else everyone):
                raise ValueError(
                    f"pairing names {unknown!r}, expected layers: "
                    + "; ".join(f"{modality!r} has {_listed(of_it)}" for modality, of_it in layers.items())
                )
    found = {name: other for name, other in (rule.get(active, {}) if nested else rule).items() if name in mine}
    if mine and not found:
        raise ValueError(
            f"pairing says nothing of {active!r}, expected an entry (or None) for one of its layers: "
            f"{_listed(layers[active])}"
        )
    return found


def _check_sizes(active: str, source: str, layer: Layer, other: Layer, layers: Mapping[str, list[Layer]]) -> None:
    if _size(layer) != _size(other):
        raise ValueError(
            f"the pairing of {active!r} with {source!r} gives {layer} the T of {other}, expected equal widths; the "
            f"layers are {_listed(layers[active])} against {_listed(layers[source])}"
        )


def _size(layer: Layer) -> tuple[int, int]:
    return layer.groups, layer.features


def _shape(layer: Layer) -> tuple[Any, ...]:
    """What must agree for the rule "shape"."""
    own = layer.weight if layer.rows is None else layer.weight[layer.rows]
    return *_size(layer), layer.transposed, *own.shape


def _listed(layers: Iterable[Layer]) -> str:
    return ", ".join(map(str, layers)) or "none"


def check_held(modalities: Modalities, layers: Mapping[str, list[Layer]]) -> None:
    """Raise ValueError where the weight of a projected layer does not move in its modality's turns."""
    for name, mine in layers.items():
        for layer in mine:
            if modalities.group_of(layer.weight, name) is None:
                raise ValueError(
                    f"the weight of projected layer {layer} of {name!r} is not held by the base optimizer, or "
                    "belongs to another modality alone; expected it in param_groups and in that modality or in none"
                )


def check_gradients(roots: Iterable[nn.Module]) -> None:
    """Raise ValueError for a layer whose gradients are sparse, before a step meets one."""
    for root in roots:
        for name, module in root.named_modules():
            if getattr(module, "sparse", False) is True and isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
                raise ValueError(
                    f"{type(module).__name__} {name or 'itself'!r} has sparse=True, expected sparse=False: sparse "
                    "gradients are not supported"
                )


def modules_of(argument: str, value: Any, model: nn.Module | None) -> list[nn.Module]:
    """Return the modules that `value`, a module, a name in `model` or a list of these, stands for."""
    if isinstance(value, nn.Module):
        return [value]
    if isinstance(value, str):
        found = dict(model.named_modules()).get(value) if model is not None else None
        if found is None:
            needed = "model=, to look it up" if model is None else "the name of one of model's modules"
            raise ValueError(f"{argument} is the name {value!r}, expected {needed}")
        return [found]
    if isinstance(value, Iterable) and not isinstance(value, torch.Tensor):
        return [module for member in value for module in modules_of(argument, member, model)]
    raise TypeError(f"{argument} is a {type(value).__name__}, expected a module, a module's name or a list of them")


def _key(weight: torch.Tensor, rows: slice | None) -> tuple[int, int]:
    """What makes a layer one and the same: its weight, or the part of it."""
    return id(weight), -1 if rows is None else rows.start


def _own(root: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules below `root` that hold parameters themselves; out_proj of an attention is the attention's."""
    inside: set[nn.Module] = set()
    for path, module in root.named_modules():
        if "parametrizations" in path.split(".") or module in inside:
            continue
        if isinstance(module, nn.MultiheadAttention):
            inside.add(module.out_proj)
        if any(True for _ in module.parameters(recurse=False)) or is_parametrized(module):
            yield path, module


def _roots(modalities: Modalities) -> list[nn.Module]:
    return [module for mine in modalities.modules.values() for _, module in mine]


def _layers_of(finder: _Finder, modules: list[nn.Module], label: str) -> list[Layer]:
    roots = [(label if len(modules) == 1 else f"{label}.{i}", module) for i, module in enumerate(modules)]
    found = [
        layer
        for name, relative, module in finder.candidates(roots)
        for layer in finder.layers(name, relative, module, "the head")
    ]
    if not found:
        kinds = ", ".join(type(module).__name__ for module in modules) or "nothing"
        raise ValueError(f"the head {label!r} ({kinds}) has no layer to project, expected at least one {KINDS}")
    return list(dict.fromkeys(found))


def _checked(layers: dict[str, list[Layer]], known: Iterable[Layer]) -> dict[str, list[Layer]]:
    """Return `layers`; ValueError where two of these and the `known` have one name, by which states know them."""
    named = {layer.name: layer for layer in known}
    for mine in layers.values():
        for layer in mine:
            if named.setdefault(layer.name, layer) is not layer:
                raise ValueError(f"two projected layers are called {layer.name!r}, expected model=, to tell them apart")
    return layers
