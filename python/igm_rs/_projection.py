"""The projectors T of all modalities: made from Ȳ (Eq. 4), chosen by source (Alg. 1, lines 8-9), applied (Eq. 9)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from . import _igm_rs
from ._checks import is_number
from ._covariance import Covariance, Turns
from ._layers import Layer, pair
from ._warnings import warn

__all__ = ["Projection", "ProjectionOptions"]


@dataclass(frozen=True)
class ProjectionOptions:
    """How T is made and kept; the names are those of :class:`igm_rs.IGMOptimizer`."""

    projector: str = "flat"
    features: str = "mean"
    life: float = 0.0
    route: str = "auto"
    alpha: float = 0.1
    batches: int | None = None
    normalise: bool = False


@dataclass
class _Made:
    """One T with the spectrum it was made from; the orthogonal projector has none."""

    projector: torch.Tensor
    singular_values: torch.Tensor | None


@dataclass
class _Recursion:
    """What MLA's recursion remembers of a layer: P, the rows taken by modality, whether it begins at I next."""

    projector: torch.Tensor | None = None
    updates: dict[str, int] = field(default_factory=dict)
    restart: bool = True


class Projection:
    """Covariances and projectors of all modalities, and who is projected by whom.

    Parameters
    ----------
    layers : mapping of str to list of Layer
        The projected layers of each modality, input to output.
    sources : mapping of str to list of str
        For each modality those whose T acts on it, in the order in which the T's multiply.
    options : ProjectionOptions
        How T is made.
    """

    def __init__(
        self, layers: Mapping[str, list[Layer]], sources: Mapping[str, list[str]], options: ProjectionOptions
    ) -> None:
        self.layers = dict(layers)
        self.sources = dict(sources)
        self.options = options
        self.pairs = {
            name: [pair(name, source, self.layers) for source in sources[name]] if layers[name] else []
            for name in self.layers
        }
        only_rows = options.projector == "orthogonal"
        self.covariances = {
            name: {layer.name: Turns(layer.features, only_rows=only_rows) for layer in mine}
            for name, mine in self.layers.items()
        }
        self.made: dict[str, dict[str, _Made]] = {name: {} for name in self.layers}
        self.recursions = {layer.name: _Recursion() for mine in self.layers.values() for layer in mine if only_rows}
        self.failures = 0
        self._ready: dict[str, tuple[list[Layer], list[torch.Tensor]]] = {}

    def checkpoint(self) -> Callable[[], None]:
        """Return a function that puts everything back; tensors are shared with it, as none is ever changed."""
        turns = [
            (one, one.past, one.present, dict(vars(one.present)))
            for mine in self.covariances.values()
            for one in mine.values()
        ]
        made = {name: dict(by_layer) for name, by_layer in self.made.items()}
        recursions = {name: replace(one, updates=dict(one.updates)) for name, one in self.recursions.items()}
        failures = self.failures

        def put_back() -> None:
            for one, past, present, attributes in turns:
                one.past, one.present = past, present
                vars(present).update(attributes)
            self.made, self.recursions, self.failures = made, recursions, failures
            self._ready.clear()

        return put_back

    def begin(self, modality: str) -> None:
        """Start a turn of `modality`: its Ȳ is reset, kept or decayed."""
        for name, turns in self.covariances[modality].items():
            turns.begin(self.options.life)
            if self.options.life == 0 and name in self.recursions:
                self.recursions[name].restart = True
                self.recursions[name].updates[modality] = 0

    def discard(self, modality: str) -> None:
        """Forget what the present turn of `modality` has brought; T stays."""
        for turns in self.covariances[modality].values():
            turns.restart()

    def add(self, modality: str, rows: Sequence[tuple[str, torch.Tensor]]) -> None:
        """Add rows of `modality`'s layers to its Ȳ; those of other layers are passed over."""
        mine = self.covariances[modality]
        before = self._left_out(modality)
        for name, new in rows:
            if name in mine:
                mine[name].present.add(new)
        self._warn_left_out(modality, self._left_out(modality) - before)

    def empty(self, modality: str) -> dict[str, Covariance]:
        """Return an empty Ȳ for each layer of `modality`, for a pass that collects."""
        only_rows = self.options.projector == "orthogonal"
        return {layer.name: Covariance(layer.features, only_rows=only_rows) for layer in self.layers[modality]}

    def put(self, modality: str, gathered: Mapping[str, Covariance]) -> None:
        """Let what a pass has `gathered` be the present Ȳ of `modality`."""
        for name, covariance in gathered.items():
            self.covariances[modality][name].present = covariance
        self._warn_left_out(modality, sum(int(covariance.left_out) for covariance in gathered.values()))

    def unseen(self, modality: str) -> list[Layer]:
        """The layers of `modality` that have brought no row at all, sound or not, since its turn began."""
        return [
            layer
            for layer in self.layers[modality]
            for present in [self.covariances[modality][layer.name].present]
            if not present and isinstance(present.left_out, int) and not present.left_out
        ]

    def refresh(self, modality: str, tau: Mapping[str, float]) -> None:
        """Make T of `modality` from its Ȳ, with `tau` by layer name; without any row T stays as it was.

        A decomposition that fails leaves T as it was; it is counted in `failures` and warned about.
        """
        made: dict[str, _Made] = {}
        before = self._left_out(modality)
        for turns in self.covariances[modality].values():
            turns.present.left_out = int(turns.present.left_out)
        self._warn_left_out(modality, self._left_out(modality) - before)
        for layer in self.layers[modality]:
            turns = self.covariances[modality][layer.name]
            everything = turns.all()
            if tau[layer.name] == 0:
                self.made[modality].pop(layer.name, None)
                continue
            if not everything:
                continue
            dtype = "float64" if layer.weight.dtype == torch.float64 else "float32"
            try:
                if self.options.projector == "orthogonal":
                    made[layer.name] = self._recur(modality, layer, everything, dtype)
                    turns.clear()
                else:
                    made[layer.name] = self._flat(everything, tau[layer.name], dtype)
            except ArithmeticError as error:
                self.failures += 1
                warn(
                    f"the projector of {modality!r}, layer {layer.name!r}, was left as it was: {error}", RuntimeWarning
                )
        self.made[modality] |= made
        self._ready.clear()

    def for_step(self, active: str) -> tuple[list[Layer], list[torch.Tensor]]:
        """Return the layers of `active` that are projected now, with the T of each; no T yet means T = I."""
        if active not in self._ready:
            layers: list[Layer] = []
            projectors: list[torch.Tensor] = []
            for layer in self.layers[active]:
                by_source = {
                    theirs.name if self.recursions else (source, theirs.name): self.made[source][theirs.name].projector
                    for source, pairs in zip(self.sources[active], self.pairs[active], strict=True)
                    for mine, theirs in pairs
                    if mine is layer and theirs.name in self.made[source]
                }
                found = list(by_source.values())
                if found:
                    layers.append(layer)
                    projectors.append(found[0] if len(found) == 1 else _igm_rs.multiply(found))
            self._ready[active] = layers, projectors
        return self._ready[active]

    def spectra_for(self, active: str) -> dict[str, torch.Tensor]:
        """The singular values behind the T's that act on `active` now, by layer of the source."""
        several = len(self.sources[active]) > 1
        return {
            f"{source}: {theirs.name}" if several else theirs.name: values
            for source, pairs in zip(self.sources[active], self.pairs[active], strict=False)
            for _, theirs in pairs
            if theirs.name in self.made[source]
            and (values := self.made[source][theirs.name].singular_values) is not None
        }

    def projectors(self) -> dict[str, dict[str, torch.Tensor]]:
        """T by modality and layer, (d, d) each; a layer without T yet is absent (its T is I)."""
        return {name: {layer: one.projector for layer, one in made.items()} for name, made in self.made.items()}

    def spectrum(self, modality: str) -> dict[str, np.ndarray[Any, np.dtype[np.float64]]]:
        """Singular values λ of Ȳ by layer, descending, (d,) float64, from the rows gathered so far."""
        result = {}
        for name, turns in self.covariances[modality].items():
            value = turns.all().value(centred=self.options.features == "centred")
            if value is not None:
                result[name] = _igm_rs.singular_values(value)
        return result

    def state(self) -> dict[str, Any]:
        """Tensors and plain values for a state dict."""
        return {
            "projector": self.options.projector,
            "features": self.options.features,
            "covariances": {
                name: {
                    layer: {"past": turns.past.state(), "present": turns.present.state()}
                    for layer, turns in mine.items()
                }
                for name, mine in self.covariances.items()
            },
            "projectors": {
                name: {
                    layer: {"projector": one.projector, "singular_values": one.singular_values}
                    for layer, one in made.items()
                }
                for name, made in self.made.items()
            },
            "recursions": {
                name: {"projector": one.projector, "updates": dict(one.updates), "restart": one.restart}
                for name, one in self.recursions.items()
            },
            "failures": self.failures,
        }

    def check(self, state: Mapping[str, Any]) -> None:
        """Raise ValueError, naming both sides, unless `state` is of the same options, modalities, layers, widths."""
        missing = [key for key in self.state() if key not in state]
        if missing:
            raise ValueError(f"the state dict's projection has no {missing[0]!r}, expected what state_dict() returned")
        for option in ("projector", "features"):
            if state[option] != getattr(self.options, option):
                raise ValueError(
                    f"the state dict is of {option}={state[option]!r}, expected {getattr(self.options, option)!r}"
                )
        mine = {name: {layer.name: layer.features for layer in layers} for name, layers in self.layers.items()}
        saved = state["covariances"]
        if not isinstance(saved, Mapping) or list(saved) != list(mine):
            raise ValueError(f"the state dict is of modalities {list(saved)}, expected {list(mine)}")
        for name, layers in mine.items():
            if set(saved[name]) != set(layers):
                raise ValueError(
                    f"the state dict projects layers {sorted(saved[name])} of {name!r}, expected {sorted(layers)}"
                )
            for layer, d in layers.items():
                where = f"layer {layer!r} of {name!r}"
                halves = _parts(f"the covariance of {where}", saved[name][layer], {"past", "present"})
                for part in halves.values():
                    _check_covariance(where, _parts(f"the covariance of {where}", part, set(Covariance(d).state())), d)
            made = state["projectors"].get(name) if isinstance(state["projectors"], Mapping) else None
            if not isinstance(made, Mapping) or not set(made) <= set(layers):
                raise ValueError(
                    f"the state dict's projectors of {name!r} are {_shown(made)}, expected some of {sorted(layers)}"
                )
            for layer, one in made.items():
                where = f"layer {layer!r} of {name!r}"
                _parts(f"the projector of {where}", one, {"projector", "singular_values"})
                if one["projector"] is None:
                    raise ValueError(f"the projector of {where} in the state dict is None, expected a tensor")
                _check_tensor(where, "projector", one["projector"], layers[layer])
                _check_vector(where, "singular_values", one["singular_values"], layers[layer])
        widths = {layer: d for layers in mine.values() for layer, d in layers.items()}
        recursions = _parts("the recursions", state["recursions"], set(self.recursions))
        for layer, one in recursions.items():
            _parts(f"the recursion of layer {layer!r}", one, {"projector", "updates", "restart"})
            _check_tensor(f"layer {layer!r}", "projector", one["projector"], widths[layer])
        if type(state["failures"]) is not int or state["failures"] < 0:
            raise ValueError(f"the state dict's failures are {state['failures']!r}, expected an integer >= 0")

    def load(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state` gave; tensors keep their own precision and go to their layer's device."""
        devices = {layer.name: layer.weight.device for mine in self.layers.values() for layer in mine}
        for name, mine in self.covariances.items():
            for layer, turns in mine.items():
                turns.past.load(state["covariances"][name][layer]["past"], devices[layer])
                turns.present.load(state["covariances"][name][layer]["present"], devices[layer])
            self.made[name] = {
                layer: _Made(
                    one["projector"].detach().to(devices[layer], copy=True),
                    None
                    if one["singular_values"] is None
                    else one["singular_values"].detach().to(devices[layer], copy=True),
                )
                for layer, one in state["projectors"][name].items()
            }
        for name, one in state["recursions"].items():
            projector = one["projector"]
            if projector is not None:
                projector = projector.detach().to(devices[name], copy=True)
            self.recursions[name] = _Recursion(projector, dict(one["updates"]), one["restart"])
        self.failures = state["failures"]
        self._ready.clear()

    def _left_out(self, modality: str) -> int:
        """How many rows of the present turn are known to be left out; on CUDA they are not known before a refresh."""
        counts = (turns.present.left_out for turns in self.covariances[modality].values())
        return sum(count for count in counts if isinstance(count, int))

    @staticmethod
    def _warn_left_out(modality: str, count: int) -> None:
        if count:
            warn(
                f"{count} rows of features of {modality!r} held a NaN or an infinity and were left out of its "
                "covariance; look at the encoder's output",
                RuntimeWarning,
            )

    def _flat(self, everything: Covariance, tau: float, dtype: str) -> _Made:
        """Eq. (4): from the rows where there are fewer than d (Gram), else from Ȳ."""
        options = self.options
        centred = options.features == "centred"
        rows = everything.rows
        few = rows is not None and rows.shape[0] < everything.d and everything.matrix is None
        if options.route == "auto" and not centred and few and rows is not None:
            return _Made(*_igm_rs.flat_projector_from_rows(rows, tau, dtype=dtype))
        value = everything.value(centred=centred)
        assert value is not None, "a covariance that holds rows has a value"
        route = "eigh" if options.route == "auto" else options.route
        return _Made(*_igm_rs.flat_projector(value, tau, route=route, dtype=dtype))

    def _recur(self, modality: str, layer: Layer, everything: Covariance, dtype: str) -> _Made:
        """MLA's recursion over the rows since the last refresh (method.md §6); P belongs to the layer."""
        recursion = self.recursions[layer.name]
        rows = everything.rows
        assert rows is not None, "the orthogonal projector keeps rows only"
        if recursion.projector is None or recursion.restart:
            P = torch.eye(layer.features, dtype=rows.dtype, device=rows.device)
        else:
            P = recursion.projector.clone()
        seen = recursion.updates.get(modality, 0)
        alphas = [self._alpha(seen + i) for i in range(rows.shape[0])]
        _igm_rs.orthogonal_projector_(P, rows, alphas, normalise=self.options.normalise)
        updates = recursion.updates | {modality: seen + rows.shape[0]}
        self.recursions[layer.name] = _Recursion(P, updates, restart=False)
        one = _Made(P.to(torch.float64 if dtype == "float64" else torch.float32), None)
        for name, mine in self.layers.items():
            if layer in mine:
                self.made[name][layer.name] = one
        return one

    def _alpha(self, update: int) -> float:
        """α of the `update`-th row: α^(1 + batch/batches), or α itself where no number of batches is given."""
        alpha, batches = self.options.alpha, self.options.batches
        return alpha if batches is None else float(alpha ** (1 + (update % batches) / batches))


def _check_tensor(layer: str, key: str, tensor: Any, d: int) -> None:
    """Raise ValueError unless what a state dict holds of a layer is a matrix of its width, of numbers."""
    if tensor is None:
        return
    where = f"{key!r} of {layer} in the state dict"
    if not isinstance(tensor, torch.Tensor):
        raise ValueError(f"{where} is a {type(tensor).__name__}, expected a tensor")
    if tensor.ndim != 2 or tensor.shape[1] != d:
        width = tensor.shape[-1] if tensor.ndim else 0
        raise ValueError(f"the state dict has width {width} for {layer}, expected {d}")
    if key != "rows" and tensor.shape[0] != d:
        raise ValueError(f"{where} has the shape {tuple(tensor.shape)}, expected {(d, d)}")
    if not tensor.is_floating_point():
        raise ValueError(f"{where} is {tensor.dtype}, expected a real floating dtype")
    if tensor.is_meta:
        raise ValueError(f"{where} is on meta, expected a tensor that holds numbers")
    if not bool(torch.isfinite(tensor).all()):
        raise ValueError(f"{where} holds a NaN or an infinity, expected finite numbers")


def _check_vector(layer: str, key: str, tensor: Any, d: int) -> None:
    """Raise ValueError unless what a state dict holds of a layer is a vector of its width, or None."""
    if tensor is not None and not (isinstance(tensor, torch.Tensor) and tensor.shape == (d,) and not tensor.is_meta):
        raise ValueError(f"{key!r} of {layer} in the state dict is {_shown(tensor)}, expected a tensor of shape {(d,)}")


def _check_covariance(layer: str, part: Mapping[str, Any], d: int) -> None:
    for key in ("rows", "matrix"):
        _check_tensor(layer, key, part[key], d)
    _check_vector(layer, "total", part["total"], d)
    for key in ("count", "left_out"):
        if not is_number(part[key]) or part[key] < 0:
            raise ValueError(f"{key!r} of {layer} in the state dict is {part[key]!r}, expected a number >= 0")


def _parts(what: str, found: Any, keys: set[str]) -> Mapping[str, Any]:
    """Return `found` if it is a mapping with these keys; ValueError otherwise."""
    if not isinstance(found, Mapping) or set(found) != keys:
        raise ValueError(f"{what} in the state dict is {_shown(found)}, expected a mapping with {sorted(keys)}")
    return found


def _shown(found: Any) -> str:
    if isinstance(found, Mapping):
        return f"a mapping with {sorted(map(str, found))}"
    if isinstance(found, torch.Tensor):
        return f"a tensor of shape {tuple(found.shape)}"
    return repr(found)
