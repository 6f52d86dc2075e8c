"""Figure 1: the cosine between the gradients of the new and the old modality, before and after modification."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from igm_rs import _checks
from igm_rs._layers import Layer
from igm_rs.optimizer import IGMOptimizer

from ._model import as_it_was, check_labels
from .drawing import Picture, axes_for, bare, look

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["CosineWatch", "Cosines", "GradientCosines", "gradient_cosines"]

Which = Literal["before", "after", "change"]

TITLES: dict[Which, str] = {
    "before": "cosine of the new modality's gradient, as it is,\nwith the old modality's",
    "after": "cosine of the new modality's gradient, modified,\nwith the old modality's",
    "change": "cosine of the new modality's gradient before and\nafter modification (SAM's part included)",
}
"""What the horizontal axis says."""

BINS = 40
"""Bars of a histogram over [-1, 1]."""


@dataclass(frozen=True)
class Cosines:
    """The cosines of one training: one entry for each watched step and each source of its modality.

    j is the active, new modality, k the source, the old one, θ the weights before the step. All gradients are those of
    the layers that the optimizer pairs (:attr:`igm_rs.IGMOptimizer.pairs`), flattened into one vector. With

    - g = ∇L⁽ʲ⁾(θ), the new modality's gradient,
    - g′, what the base optimizer was given in its place: ∇L⁽ʲ⁾(θ + ε*) T⁽ᵏ⁾,
    - o = ∇L⁽ᵏ⁾(θ), the old modality's gradient on the same mini-batch, of its own paired layers,

    the three are

    Attributes
    ----------
    step : list of int
        Which step of the optimizer, from 1.
    active, source : list of str
        j and k.
    before : list of float
        cos(g, o). On parameters that both share it says whether the modalities want the same. Layers that are paired
        but not shared are compared entry by entry; they have no basis in common, so about 0 is what chance gives. NaN
        where no two paired layers have one shape, or where a gradient is zero.
    after : list of float
        cos(g′, o); NaN as above. An orthogonal projection drives it towards 0.
    change : list of float
        cos(g, g′), over all projected layers of j: 1 where the modification does nothing. SAM's part is in it.
    projected : list of bool
        Whether a T acted: before the first T of the source there is none.
    """

    step: list[int] = field(default_factory=list)
    active: list[str] = field(default_factory=list)
    source: list[str] = field(default_factory=list)
    before: list[float] = field(default_factory=list)
    after: list[float] = field(default_factory=list)
    change: list[float] = field(default_factory=list)
    projected: list[bool] = field(default_factory=list)

    def __len__(self) -> int:
        """Return the number of entries."""
        return len(self.step)

    @classmethod
    def joined(cls, several: Iterable[Cosines]) -> Cosines:
        """Return the entries of several trainings as one."""
        out = cls()
        for each in several:
            for name, values in vars(each).items():
                getattr(out, name).extend(values)
        return out

    def of(self, which: Which) -> np.ndarray[Any, np.dtype[np.float64]]:
        """Return one of the three, (n,), without NaNs, of projected steps; ``before`` of all if none was projected."""
        values = np.asarray(getattr(self, _checks.choice("which", which, tuple(TITLES))), dtype=np.float64)
        mask = np.asarray(self.projected, dtype=bool)
        chosen = values if which == "before" and not mask.any() else values[mask]
        return chosen[np.isfinite(chosen)]


class CosineWatch:
    """Watches the steps of one training for :func:`gradient_cosines`.

    Training goes on as it would without, to the bit: the losses are computed in evaluation mode, so that dropout draws
    nothing, BatchNorm's statistics stay and no features are gathered, and ``.grad`` is not touched. (With dropout or
    BatchNorm ``change`` therefore also has the difference between the two modes in it.)

    Parameters
    ----------
    model : torch.nn.Module
        All that the losses call.
    optimizer : IGMOptimizer
        With projected layers; what T acts on must be the gradient.
    every : int
        Watch the first of every so many steps; a watched step costs one forward and backward pass more for its
        modality and each source.

    Raises
    ------
    TypeError, ValueError
        Something else than an optimizer of ours; one that projects nothing, or the base optimizer's update.

    Examples
    --------
    >>> import torch, igm_rs
    >>> from igm_rs import analysis
    >>> linear = torch.nn.Linear
    >>> model = torch.nn.ModuleDict({"audio": linear(3, 4), "video": linear(5, 4), "head": linear(4, 2)})
    >>> encoders = {"audio": model["audio"], "video": model["video"]}
    >>> opt = igm_rs.IGMOptimizer(model.parameters(), encoders, head=model["head"], lr=0.1)
    >>> batch, labels = {"audio": torch.ones(6, 3), "video": torch.ones(6, 5)}, torch.tensor([0, 1, 0, 0, 1, 0])
    >>> def loss(name):
    ...     return torch.nn.functional.cross_entropy(model["head"](model[name](batch[name])), labels)
    >>> losses = {"audio": lambda: loss("audio"), "video": lambda: loss("video")}
    >>> watch = analysis.CosineWatch(model, opt)
    >>> for name in ("audio", "video", "audio"):
    ...     def closure():
    ...         opt.zero_grad()
    ...         value = losses[name]()
    ...         value.backward()
    ...         return value
    ...     with opt.turn(name), watch.step(losses):
    ...         value = opt.step(closure)
    >>> cosines = analysis.gradient_cosines({"IGM": watch})
    >>> len(cosines.series["IGM"])
    3
    """

    def __init__(self, model: nn.Module, optimizer: IGMOptimizer, *, every: int = 1) -> None:
        if not isinstance(optimizer, IGMOptimizer):
            raise TypeError(f"optimizer is a {type(optimizer).__name__}, expected an IGMOptimizer")
        if not any(pairs for of_source in optimizer.pairs.values() for pairs in of_source.values()):
            raise ValueError("optimizer projects no layer, expected one with heads, head or scope, and sources")
        if optimizer._core.project_update:
            raise ValueError("optimizer has project='update', expected 'gradient': the gradient is not modified")
        self._model = model
        self._optimizer = optimizer
        self._every = _checks.positive_integer("every", every)
        self._passed = 0
        self.cosines = Cosines()

    @contextmanager
    def step(self, losses: Mapping[str, Callable[[], Tensor]]) -> Iterator[None]:
        """Watch the one step that is taken inside the ``with`` block; the gradients must still be there at its end.

        Parameters
        ----------
        losses : mapping of str to callable
            For each modality what computes its loss on this mini-batch, without ``backward``.

        Raises
        ------
        ValueError
            If the loss of a modality is missing.
        RuntimeError
            If the block takes several steps, or clears the gradients after its step.
        """
        watched = self._passed % self._every == 0
        self._passed += 1
        if not watched:
            yield
            return
        core = self._optimizer._core
        turn = core.turn
        wanted = self._optimizer.modalities if turn is None else (turn, *self._optimizer.sources[turn])
        for name in wanted:
            if name not in losses:
                raise ValueError(f"losses has no {name!r}, expected one for each of {', '.join(wanted)}")
        gradients = {name: self._gradients(name, losses[name]) for name in dict.fromkeys(wanted)}
        begun = core.counters.steps
        yield
        taken = core.counters.steps - begun
        if taken > 1:
            raise RuntimeError(f"{taken} steps were taken inside CosineWatch.step, expected one")
        stats = self._optimizer.last_stats
        if taken == 1 and not stats["skipped"] and stats["active"] is not None:
            self._note(stats["active"], bool(stats["projected"]), int(stats["step"]), gradients)

    def _gradients(self, modality: str, loss: Callable[[], Tensor]) -> dict[str, Tensor]:
        """Return the gradient of each layer of `modality` that is projected or acts on others, as a flat vector."""
        layers = self._optimizer._core.projection.layers[modality]
        with as_it_was(self._model, training=False), torch.enable_grad():
            value = loss()
            found = torch.autograd.grad(value, [layer.weight for layer in layers], allow_unused=True)
        return {
            layer.name: _flat(layer, torch.zeros_like(layer.weight) if gradient is None else gradient)
            for layer, gradient in zip(layers, found, strict=True)
        }

    def _note(self, active: str, projected: bool, step: int, gradients: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Compare the step's gradient with those taken before it."""
        layers = {layer.name: layer for layer in self._optimizer._core.projection.layers[active]}
        for source, pairs in self._optimizer.pairs[active].items():
            if not pairs:
                continue
            mine = list(dict.fromkeys(one for one, _ in pairs))
            given = {}
            for name in mine:
                gradient = layers[name].weight.grad
                if gradient is None:
                    raise RuntimeError(
                        f"the gradient of {name!r} is gone after the step, expected no zero_grad() before the end of "
                        "the with block"
                    )
                given[name] = _flat(layers[name], gradient.detach())
            old = gradients[source]
            alike = [(one, other) for one, other in pairs if given[one].shape == old[other].shape]
            seen, out = self.cosines, [old[other] for _, other in alike]
            seen.step.append(step)
            seen.active.append(active)
            seen.source.append(source)
            seen.projected.append(projected)
            seen.before.append(_cosine([gradients[active][one] for one, _ in alike], out))
            seen.after.append(_cosine([given[one] for one, _ in alike], out))
            seen.change.append(_cosine([gradients[active][name] for name in mine], [given[name] for name in mine]))


@dataclass(frozen=True)
class GradientCosines(Picture):
    """What :func:`gradient_cosines` gives.

    Attributes
    ----------
    series : dict of str to Cosines
        By the name of the training.
    """

    series: dict[str, Cosines]

    @property
    def size(self) -> tuple[float, float]:  # type: ignore[override]
        """Width and height in inches: the higher, the more trainings there are."""
        return 5.6, 1.6 + 0.75 * len(self.series)

    def numbers(self) -> dict[str, Any]:
        """Return every cosine, and the median of each kind, by training."""
        return {
            label: {"median": {which: self.median(label, which) for which in TITLES}, **vars(cosines)}
            for label, cosines in self.series.items()
        }

    def median(self, label: str, which: Which = "after") -> float | None:
        """Return the median of one kind of cosine of one training, over projected steps; None if there is none."""
        values = self.series[label].of(which)
        return float(np.median(values)) if values.size else None

    def draw(self, ax: Axes | None = None, which: Which = "after") -> Axes:
        """Draw a histogram of the watched steps for each training, one above the other, with their medians.

        Parameters
        ----------
        ax : Axes, optional
            Where; a new figure by default.
        which : {"before", "after", "change"}
            Which cosine, see :class:`Cosines`.
        """
        _checks.choice("which", which, tuple(TITLES))
        ax = axes_for(ax, self.size)
        values = {label: cosines.of(which) for label, cosines in self.series.items()}
        there = np.concatenate(list(values.values()))
        low, high = (float(there.min()), float(there.max())) if there.size else (-1.0, 1.0)
        low, high = max(-1.0, low - 0.05), min(1.0, high + 0.05)
        edges = np.linspace(low, high, BINS + 1)
        shares = {label: np.histogram(mine, edges)[0] / max(1, len(mine)) for label, mine in values.items()}
        tallest = max(float(share.max()) for share in shares.values()) or 1.0
        for place, (label, share) in enumerate(shares.items()):
            colour, _, _ = look(place)
            ground = len(shares) - 1 - place
            ax.stairs(ground + 0.72 * share / tallest, edges, baseline=ground, fill=True, color=colour, alpha=0.75)
            ax.axhline(ground, color="black", linewidth=0.6)
            if not values[label].size:
                acted = which == "before" or any(self.series[label].projected)
                words = "no layers of one shape to compare" if acted else "no T acted in these steps"
                ax.text(0.5, ground + 0.3, words, transform=ax.get_yaxis_transform(), ha="center", fontsize=8.5)
                continue
            median = float(np.median(values[label]))
            ax.plot([median, median], [ground, ground + 0.92], color="black", linewidth=1.2)
            left = median > (low + high) / 2
            words = f"median {median:.3f}".replace("-0.000", "0.000").replace("-", "−")
            ax.annotate(words, (median, ground + 0.92), xytext=(-4 if left else 4, 0), va="top",
                        ha="right" if left else "left", textcoords="offset points", fontsize=8.5)  # fmt: skip
        ax.set_xlim(low, high)
        ax.set_ylim(0, len(shares))
        ax.set_yticks([each + 0.4 for each in range(len(shares))][::-1], list(shares))
        ax.tick_params(axis="y", length=0)
        ax.set_xlabel(TITLES[which])
        ax.set_title(f"height: share of the steps, {100 * tallest:.0f} % at most", fontsize=8.5, loc="right")
        bare(ax, "top", "right", "left")
        ax.grid(visible=False, axis="y")
        return ax

    def _paint(self, ax: Axes) -> None:
        self.draw(ax)


def gradient_cosines(watches: CosineWatch | Mapping[str, CosineWatch]) -> GradientCosines:
    """Return the cosines between gradients of new and old modality that one or several trainings have shown (Fig. 1).

    Parameters
    ----------
    watches : CosineWatch or mapping of str to CosineWatch
        Of one training, or of several by name.

    Returns
    -------
    GradientCosines
        The numbers; ``draw(which=…)`` and ``save(path)`` make a histogram of them.

    Raises
    ------
    ValueError
        If there is none, or one of them has seen no step.
    """
    named = {"training": watches} if isinstance(watches, CosineWatch) else dict(watches)
    check_labels("watches", named)
    for label, watch in named.items():
        if not len(watch.cosines):
            raise ValueError(f"watches: {label!r} has seen no step with a source, expected one or more")
    return GradientCosines({label: watch.cosines for label, watch in named.items()})


def _flat(layer: Layer, tensor: Tensor) -> Tensor:
    """Return the layer's part of a tensor like its weight, as a vector in float64."""
    return layer.matrix(tensor).reshape(-1).double()


def _cosine(one: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    """Return the cosine of two lists of vectors, each as one long vector; NaN without a direction."""
    if not one:
        return float("nan")
    a, b = torch.cat(list(one)), torch.cat(list(other))
    norms = float(a.norm()) * float(b.norm())
    return max(-1.0, min(1.0, float(a @ b) / norms)) if norms > 0 else float("nan")
