"""The projectors T of all modalities: made from Ȳ (Eq. 4), chosen by source (Alg. 1, lines 8-9), applied (Eq. 9)."""

from __future__ import annotations

import copy
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from . import _igm_rs
from ._covariance import Covariance, Turns
from ._layers import Layer, Pairs, Rule, pair_all
from ._warnings import warn

__all__ = ["Factor", "Made", "Projection", "ProjectionOptions", "Recursion", "noise"]


Factor = tuple[Any, ...]
"""(T,), or (R, M, scale) for T = scale (I − Rᵀ M R), see `_igm_rs.make_projector`."""


@dataclass(frozen=True)
class ProjectionOptions:
    """How T is made and kept; the names are those of :class:`igm_rs.IGMOptimizer`."""

    projector: str = "flat"
    control: str | None = None
    seed: int = 0
    features: str = "mean"
    life: float = 0.0
    route: str = "auto"
    alpha: float = 0.1
    batches: int | None = None
    normalise: bool = False
    pairing: Rule = "position"
    combine: str = "product"
    augment_bias: bool = False


@dataclass
class Made:
    """One T, the spectrum it was made from, and how; the orthogonal projector has no spectrum."""

    factor: Factor
    singular_values: torch.Tensor | None
    report: dict[str, Any]

    def state(self) -> dict[str, Any]:
        """Tensors and plain values for a state dict."""
        return {"factor": list(self.factor), "singular_values": self.singular_values, "report": dict(self.report)}

    @classmethod
    def of(cls, state: Mapping[str, Any], device: torch.device) -> Made:
        """Return what :meth:`state` gave, on `device`, in the precision it was saved with."""

        def there(value: Any) -> Any:
            return value.detach().to(device, copy=True) if isinstance(value, torch.Tensor) else value

        if "projector" in state:  # of version 2 and older
            return cls((there(state["projector"]),), there(state["singular_values"]), {})
        factor = tuple(there(part) for part in state["factor"])
        return cls(factor, there(state["singular_values"]), dict(state["report"]))


@dataclass
class Recursion:
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
        self.layers: dict[str, list[Layer]] = {}
        self.sources: dict[str, list[str]] = {}
        self.pairs: dict[str, list[Pairs]] = {}
        self.options = options
        self.covariances: dict[str, dict[str, Turns]] = {}
        self.made: dict[str, dict[str, Made]] = {}
        self.gathered: dict[str, dict[str, Covariance]] = {}
        """With ``combine="sum"``: Ȳ as it was when T was last made of it."""
        self.summed: dict[str, dict[str, Made]] = {}
        """With ``combine="sum"``: the T of each modality's layers, made from the sum of its sources' Ȳ."""
        self.recursions: dict[str, Recursion] = {}
        self.failures = 0
        self._ready: dict[str, tuple[list[Layer], list[list[Factor]]]] = {}
        self.extend(layers, sources)

    def extend(self, layers: Mapping[str, list[Layer]], sources: Mapping[str, list[str]]) -> None:
        """Take in further modalities with their `layers`; `sources` are those of all modalities from now on.

        Nothing has changed where the layers cannot be paired.
        """
        everyone = self.layers | dict(layers)
        pairs = {name: pair_all(name, sources[name], everyone, self.options.pairing) for name in everyone}
        for of_source in pairs.values():
            for layer, other in (pair for listed in of_source for pair in listed):
                if self.width(layer) != self.width(other):
                    raise ValueError(
                        f"layer {layer} is paired with {other} and only one of them has a bias that is trained, "
                        "expected both or none with augment_bias=True, or pairing= as a mapping"
                    )
        for layer in (layer for mine in layers.values() for layer in mine):
            if layer.groups > 1 and self.options.projector == "orthogonal":
                raise ValueError(f"projector is 'orthogonal' and layer {layer} is grouped, expected another projector")
        self._check_biases(everyone)
        self.layers, self.sources, self.pairs = everyone, dict(sources), pairs
        for name, mine in layers.items():
            self.covariances[name] = {layer.name: self._turns(layer) for layer in mine}
            self.made[name], self.gathered[name], self.summed[name] = {}, {}, {}
            if self.options.projector == "orthogonal":
                self.recursions |= {layer.name: Recursion() for layer in mine if layer.name not in self.recursions}
        self._ready.clear()

    def _check_biases(self, layers: Mapping[str, list[Layer]]) -> None:
        """Raise ValueError where T's of several layers would act on one bias: each would begin with its gradient."""
        owners: dict[tuple[Any, ...], Layer] = {}
        for layer in dict.fromkeys(layer for mine in layers.values() for layer in mine):
            if layer.bias is not None and self.augmented(layer):
                part = None if layer.bias_rows is None else (layer.bias_rows.start, layer.bias_rows.stop)
                owner = owners.setdefault((layer.bias, part), layer)
                if owner is not layer:
                    raise ValueError(
                        f"the layers {owner} and {layer} have one bias, expected a bias each with augment_bias=True"
                    )

    def augmented(self, layer: Layer) -> bool:
        """Whether T of `layer` acts on its bias, too."""
        return self.options.augment_bias and layer.bias is not None

    def width(self, layer: Layer) -> int:
        """The columns of one group's T."""
        return layer.features + self.augmented(layer)

    def _turns(self, layer: Layer) -> Turns:
        return Turns(self.width(layer), groups=layer.groups, only_rows=self.options.projector == "orthogonal")

    def checkpoint(self) -> Callable[[], None]:
        """Return a function that puts everything back; tensors are shared with it, as none is ever changed."""
        turns = [
            (one, one.past, one.present, dict(vars(one.present)))
            for mine in self.covariances.values()
            for one in mine.values()
        ]
        made = {name: dict(by_layer) for name, by_layer in self.made.items()}
        gathered = {name: dict(by_layer) for name, by_layer in self.gathered.items()}
        summed = {name: dict(by_layer) for name, by_layer in self.summed.items()}
        recursions = {name: replace(one, updates=dict(one.updates)) for name, one in self.recursions.items()}
        failures = self.failures

        def put_back() -> None:
            for one, past, present, attributes in turns:
                one.past, one.present = past, present
                vars(present).update(attributes)
            self.made, self.recursions, self.failures = made, recursions, failures
            self.gathered, self.summed = gathered, summed
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

    def add(self, modality: str, rows: Sequence[tuple[str, torch.Tensor]], usable: torch.Tensor | None = None) -> None:
        """Add rows of `modality`'s layers to its Ȳ; those of other layers are passed over.

        `usable`: what only the device knows, whether they count; if not, they are zeros.
        """
        mine = self.covariances[modality]
        before = self._left_out(modality)
        for name, new in rows:
            if name in mine:
                mine[name].present.add(new, usable)
        self._warn_left_out(modality, self._left_out(modality) - before)

    def empty(self, modality: str) -> dict[str, Covariance]:
        """Return an empty Ȳ for each layer of `modality`, for a pass that collects."""
        return {layer.name: self.covariances[modality][layer.name].empty() for layer in self.layers[modality]}

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

    def refresh(self, modality: str, tau: Callable[[Layer, str], float]) -> None:
        """Make T of `modality` from its Ȳ, with `tau` of a layer and a modality; without any row T stays as it was.

        A decomposition that fails leaves T as it was; it is counted in `failures` and warned about.
        """
        made: dict[str, Made] = {}
        before = self._left_out(modality)
        for turns in self.covariances[modality].values():
            turns.present.left_out = int(turns.present.left_out)
        self._warn_left_out(modality, self._left_out(modality) - before)
        summing = self.options.combine == "sum"
        for layer in self.layers[modality]:
            turns = self.covariances[modality][layer.name]
            everything = turns.all()
            strength = tau(layer, modality)
            if strength == 0 or self.options.projector == "identity":
                self.made[modality].pop(layer.name, None)
                self.gathered[modality].pop(layer.name, None)
                continue
            if not everything:
                continue
            if self.options.projector == "orthogonal":
                found = self._attempt(modality, layer, self._recur, modality, layer, everything)
                turns.clear()
            else:
                found = self._attempt(modality, layer, self._make, modality, layer, everything, strength)
            if found is None:
                continue
            made[layer.name] = found
            if summing:
                self.gathered[modality][layer.name] = copy.copy(everything)
        self.made[modality] |= made
        if summing:
            for active, listed in self.sources.items():
                if modality in listed:
                    self.sum_up(active, tau)
        self._ready.clear()

    def _attempt(self, modality: str, layer: Layer, make: Callable[..., Made], *arguments: Any) -> Made | None:
        """Return what is made; None, counted and warned about, where it cannot be."""
        try:
            return make(*arguments)
        except ArithmeticError as error:
            self.failures += 1
            warn(f"the projector of {modality!r}, layer {layer.name!r}, was left as it was: {error}", RuntimeWarning)
            return None

    def sum_up(self, active: str, tau: Callable[[Layer, str], float]) -> None:
        """Make one T for each layer of `active` from the sum of its sources' Ȳ."""
        for layer in self.layers[active]:
            total: Covariance | None = None
            for source, theirs in self._partners(active, layer):
                one = self.gathered[source].get(theirs.name)
                if one is not None:
                    total = self.covariances[source][theirs.name].empty() if total is None else total
                    total.merge(one.around_its_mean() if self.options.features == "centred" else one)
            strength = tau(layer, active)
            if total is None or strength == 0:
                self.summed[active].pop(layer.name, None)
                continue
            found = self._attempt(active, layer, self._make, active, layer, total, strength)
            if found is not None:
                self.summed[active][layer.name] = found

    def _partners(self, active: str, layer: Layer) -> list[tuple[str, Layer]]:
        """The layers whose T's act on `layer`, each with its modality, in the order in which they act."""
        return [
            (source, theirs)
            for source, pairs in zip(self.sources[active], self.pairs[active], strict=True)
            for mine, theirs in pairs
            if mine is layer
        ]

    def acting(self, active: str, layer: Layer) -> dict[tuple[str | None, str], Made]:
        """The T's that act on `layer` of `active` now, in their order, by source (None: of several) and its layer."""
        if self.options.combine == "sum":
            one = self.summed[active].get(layer.name)
            return {} if one is None else {(None, layer.name): one}
        partners = self._partners(active, layer)
        found: dict[tuple[str | None, str], Made] = {
            (source, theirs.name): self.made[source][theirs.name]
            for source, theirs in partners
            if theirs.name in self.made[source]
        }
        if not self.recursions:
            return found
        by_layer = {name: (source, one) for (source, name), one in reversed(found.items())}
        return {(source, name): one for name, (source, one) in reversed(by_layer.items())}

    def for_step(self, active: str) -> tuple[list[Layer], list[list[Factor]]]:
        """Return the layers of `active` that are projected now, with the factors of each; no T yet means T = I."""
        if active not in self._ready:
            layers: list[Layer] = []
            factors: list[list[Factor]] = []
            for layer in self.layers[active]:
                found = self.acting(active, layer)
                if found:
                    layers.append(layer)
                    factors.append([one.factor for one in found.values()])
            self._ready[active] = layers, factors
        return self._ready[active]

    def told(self, active: str) -> dict[str, Made]:
        """The T's that act on `active` now and have a spectrum, by layer of the source (``"source: layer"``)."""
        several = len(self.sources[active]) > 1
        return {
            f"{source}: {name}" if several and source is not None else name: one
            for layer in self.layers[active]
            for (source, name), one in self.acting(active, layer).items()
            if one.singular_values is not None
        }

    def projectors(self) -> dict[str, dict[str, torch.Tensor]]:
        """T by modality and layer, (d, d) or (G, d, d); a layer without T yet is absent (its T is I)."""
        return {
            name: {layer: _igm_rs.dense_projector(one.factor) for layer, one in made.items()}
            for name, made in self.made.items()
        }

    def spectrum(self, modality: str) -> dict[str, np.ndarray[Any, np.dtype[np.float64]]]:
        """Singular values λ of Ȳ by layer, descending, (d,) or (G, d) float64, from the rows gathered so far."""
        result = {}
        for name, turns in self.covariances[modality].items():
            value = turns.all().value(centred=self.options.features == "centred")
            if value is not None:
                several = [value] if value.dim() == 2 else list(value)
                values = [_igm_rs.singular_values(one) for one in several]
                result[name] = values[0] if value.dim() == 2 else np.stack(values)
        return result

    def changed(self) -> None:
        """Forget what has been looked up: T's have come from elsewhere."""
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

    def _make(self, modality: str, layer: Layer, everything: Covariance, tau: float) -> Made:
        """Eq. (4), or another projector: from the rows where there are fewer than d (Gram), else from Ȳ."""
        options = self.options
        centred = options.features == "centred"
        arguments: dict[str, Any] = {"dtype": "float64" if layer.weight.dtype == torch.float64 else "float32"}
        if options.control == "scalar":
            arguments["scalar"] = True
        elif options.control == "random":
            arguments["noise"] = noise(options.seed, modality, layer.name, everything.d).to(layer.weight.device)
        strength = tau if options.projector == "flat" else options.alpha
        rows = everything.rows
        few = rows is not None and rows.shape[0] < everything.d and everything.matrix is None and layer.groups == 1
        if options.route in ("auto", "gram") and few and rows is not None and not centred:
            one = Made(*_igm_rs.make_projector_from_rows(rows, options.projector, strength, **arguments))
            if 2 * rows.shape[0] > everything.d and len(one.factor) > 1 and options.control != "scalar":
                one.factor = (_igm_rs.dense_projector(one.factor),)  # which is less to multiply with
            return one
        value = everything.value(centred=centred)
        assert value is not None, "a covariance that holds rows has a value"
        route = "eigh" if options.route == "gram" or (layer.groups > 1 and options.route != "svd") else options.route
        return Made(*_igm_rs.make_projector(value, options.projector, strength, route=route, **arguments))

    def _recur(self, modality: str, layer: Layer, everything: Covariance) -> Made:
        """MLA's recursion over the rows since the last refresh (method.md §6); P belongs to the layer."""
        recursion = self.recursions[layer.name]
        rows = everything.rows
        assert rows is not None, "the orthogonal projector keeps rows only"
        if float(everything.count) != rows.shape[0]:
            rows = rows[rows.any(1)]  # on a device those that do not count are zeros
        if recursion.projector is None or recursion.restart:
            P = torch.eye(everything.d, dtype=rows.dtype, device=rows.device)
        else:
            P = recursion.projector.clone()
        seen = recursion.updates.get(modality, 0)
        alphas = [self._alpha(seen + i) for i in range(rows.shape[0])]
        _igm_rs.orthogonal_projector_(P, rows, alphas, normalise=self.options.normalise)
        updates = recursion.updates | {modality: seen + rows.shape[0]}
        self.recursions[layer.name] = Recursion(P, updates, restart=False)
        one = Made((P.to(torch.float64 if layer.weight.dtype == torch.float64 else torch.float32),), None, {})
        for name, mine in self.layers.items():
            if layer in mine:
                self.made[name][layer.name] = one
        return one

    def _alpha(self, update: int) -> float:
        """α of the `update`-th row: α^(1 + batch/batches), or α itself where no number of batches is given."""
        alpha, batches = self.options.alpha, self.options.batches
        return alpha if batches is None else float(alpha ** (1 + (update % batches) / batches))


def noise(seed: int, modality: str, layer: str, d: int) -> torch.Tensor:
    """Return the Gaussian numbers, (d, d) float64, of which the random basis of a layer's T is made: always the same.

    torch's own generators are left alone.
    """
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{modality}/{layer}".encode()))
    return torch.randn(d, d, dtype=torch.float64, generator=generator)
