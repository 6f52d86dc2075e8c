"""Figure 4: the loss around the weights on a plane of two random, filter-normalised directions (Li et al. 2018)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from igm_rs import _checks

from ._model import as_it_was, check_labels, restored
from .drawing import Picture, axes_for, bar, bare, look

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["LossSurface", "LossSurfaces", "compare_surfaces", "loss_surface"]

Floats = npt.NDArray[np.float64]

LEVELS = 12
"""Contour lines of a surface."""

FINEST = 40
"""The first contour lies at this part of the highest rise: finer ones would lie within one cell of the grid."""


@dataclass(frozen=True)
class LossSurface(Picture):
    """What :func:`loss_surface` gives.

    Attributes
    ----------
    offsets : ndarray
        (points,), how far along each direction, 0 in the middle; 1 is as long as the weights themselves, filter by
        filter.
    losses : ndarray
        (points, points): ``losses[i, k]`` at ``offsets[i]`` along the first and ``offsets[k]`` along the second
        direction.
    seed : int
        Of the directions.
    """

    offsets: Floats
    losses: Floats
    seed: int
    size = (5.0, 4.1)

    @property
    def centre(self) -> float:
        """The loss at the weights themselves."""
        middle = len(self.offsets) // 2
        return float(self.losses[middle, middle])

    def profile(self) -> tuple[Floats, Floats, Floats, Floats]:
        """Return (distance, mean, lowest, highest): by how much the loss has risen at each distance from the weights.

        Each (n,). A ring holds the points whose distance rounds to the same multiple of the grid's step; rings that the
        grid does not hold whole are left out.
        """
        step = float(self.offsets[1] - self.offsets[0])
        distance = np.hypot(self.offsets[:, None], self.offsets[None, :])
        ring = np.rint(distance / step).astype(int)
        rise = self.losses - self.centre
        rings = range(len(self.offsets) // 2 + 1)
        parts = [rise[ring == number] for number in rings]
        mean, low, high = (np.array([float(f(part)) for part in parts]) for f in (np.mean, np.min, np.max))
        return step * np.arange(len(rings), dtype=np.float64), mean, low, high

    def numbers(self) -> dict[str, Any]:
        """Return offsets, losses, the loss in the middle, its mean rise by distance, and the seed."""
        distance, mean, _, _ = self.profile()
        return {
            "offsets": self.offsets,
            "losses": self.losses,
            "centre": self.centre,
            "distance": distance,
            "mean_rise": mean,
            "seed": self.seed,
        }

    def draw(self, ax: Axes | None = None, levels: npt.ArrayLike | None = None, *, rise: bool = False) -> Axes:
        """Draw contours of the loss, a cross at the weights.

        Parameters
        ----------
        ax : Axes, optional
            Where; a new figure by default.
        levels : array, optional
            The loss, or its rise, at each contour, ascending; for several surfaces the same, to compare them. Spread
            over this surface's own by default, in equal steps of the logarithm.
        rise : bool
            Draw how far the loss lies above that at the weights, and not the loss itself: what flatness is about.
        """
        ax = axes_for(ax, self.size)
        self._paint(ax, levels, rise=rise)
        return ax

    def _paint(self, ax: Axes, levels: npt.ArrayLike | None = None, *, rise: bool = False) -> None:
        from matplotlib.colors import BoundaryNorm

        heights = self.losses - self.centre if rise else self.losses
        chosen = np.asarray(_levels([heights], rise=rise) if levels is None else levels, dtype=np.float64)
        shown = np.clip(np.nan_to_num(heights.T, nan=np.inf, posinf=np.inf), None, chosen[-1] + 1)
        beyond: Literal["max", "both"] = "both" if (shown < chosen[0]).any() else "max"
        norm = BoundaryNorm(chosen, 256, extend=beyond)
        filled = ax.contourf(self.offsets, self.offsets, shown, levels=chosen, cmap="cividis", norm=norm, extend=beyond)
        ax.contour(self.offsets, self.offsets, shown, levels=chosen, colors="white", linewidths=0.5, alpha=0.7)
        ax.plot([0], [0], "+", color="white", markersize=10, markeredgewidth=2)
        ax.set_aspect("equal")
        marks = np.linspace(self.offsets[0], self.offsets[-1], 5)
        ax.set_xticks(marks)
        ax.set_yticks(marks)
        ax.set_xlabel("along direction 1 (1 = length of the weights)")
        ax.set_ylabel("along direction 2")
        figure = ax.get_figure()
        words = "rise of the loss" if rise else "loss"
        beside = figure.colorbar(filled, ax=ax, label=words, format="%.2g" if rise else "%.3g")  # type: ignore[union-attr]
        beside.ax.tick_params(labelsize=8)


@dataclass(frozen=True)
class LossSurfaces(Picture):
    """What :func:`compare_surfaces` gives.

    Attributes
    ----------
    surfaces : dict of str to list of LossSurface
        By name, one a run, each around its own weights.
    """

    surfaces: dict[str, list[LossSurface]]

    def numbers(self) -> dict[str, Any]:
        """Return the numbers of each surface, and the mean rise over all surfaces of a name, by distance."""
        return {
            label: {
                "mean_rise": np.mean([each.profile()[1] for each in mine], 0),
                "runs": [each.numbers() for each in mine],
            }
            for label, mine in self.surfaces.items()
        }

    def levels(self) -> Floats:
        """Return contour levels that fit the rise of the first surface of every name, for :meth:`LossSurface.draw`."""
        return _levels([mine[0].losses - mine[0].centre for mine in self.surfaces.values()], rise=True)

    def rise(self, label: str) -> list[float]:
        """Return by how much the loss of each run has risen on average at the edge, the farthest whole ring."""
        return [float(each.profile()[1][-1]) for each in self.surfaces[label]]

    def _paint(self, ax: Axes) -> None:
        """Draw the mean rise of the loss by distance, with its range over the runs, or over the directions of one."""
        for place, (label, mine) in enumerate(self.surfaces.items()):
            colour, marker, line = look(place)
            profiles = [each.profile() for each in mine]
            means = np.array([mean for _, mean, _, _ in profiles])
            distance, _, low, high = profiles[0]
            if len(mine) > 1:
                low, high = means.min(0), means.max(0)
            ax.fill_between(distance, low, high, color=colour, alpha=0.13, linewidth=0)
            ax.plot(distance, means.mean(0), color=colour, marker=marker, markersize=3.5, linestyle=line, label=label)
        runs = max(map(len, self.surfaces.values()))
        ax.set_xlim(left=0)
        ax.set_xlabel("distance from the weights (1 = their length)")
        ax.set_ylabel("rise of the loss")
        bands = f"bands: range of {runs} runs" if runs > 1 else "bands: range over directions"
        ax.legend(frameon=False, fontsize=8.5, loc="upper left", title=bands, title_fontsize=8.5, alignment="left")
        bare(ax)


def loss_surface(
    model: nn.Module,
    loss: Callable[[], Tensor | float],
    *,
    span: float = 1.0,
    points: int = 21,
    seed: int = 0,
    mode: Literal["eval", "train"] = "eval",
    progress: bool = True,
) -> LossSurface:
    """Return the loss on a square plane around the weights, along two random filter-normalised directions.

    A direction is Gaussian; then, as Li et al. have it, each filter of it (row of a weight with two or more dimensions:
    the weights of one output) is scaled to the norm of that filter in the model, and it is zero for biases, norm layers
    and everything else with fewer than two dimensions. So scaling a layer up and the next one down changes nothing.

    Afterwards weights, buffers (BatchNorm's running statistics among them), modes and torch's random state are as
    before, to the bit, also if `loss` raises or Ctrl-C is pressed. Nothing is gathered by an optimizer.

    Parameters
    ----------
    model : torch.nn.Module
        Whose weights are moved, in place.
    loss : callable
        Computes the loss at the model's present weights: a number, or a tensor with one element.
    span : float
        How far to go in each direction, > 0; at 1 each filter is moved by its own length.
    points : int
        Points along each direction, odd, 3 or more; ``points**2`` losses are computed.
    seed : int
        Of the directions: models of the same shapes get the same ones, each to the scale of its own filters.
    mode : {"eval", "train"}
        Mode of the model: with "train" BatchNorm uses the batch's statistics, and dropout draws the same mask at every
        point.
    progress : bool
        Whether a progress bar is shown.

    Returns
    -------
    LossSurface
        The numbers; ``draw()`` and ``save(path)`` make a picture of them.

    Raises
    ------
    ValueError, TypeError
        For an argument out of its range; a model without a weight of two or more dimensions; a loss of several numbers.

    References
    ----------
    Li et al.: Visualizing the Loss Landscape of Neural Nets, NeurIPS 2018.
    """
    _checks.positive("span", span)
    _checks.positive_integer("points", points)
    if points < 3 or points % 2 == 0:
        raise ValueError(f"points is {points}, expected an odd number from 3: the weights themselves are in the middle")
    _checks.choice("mode", mode, ("eval", "train"))
    weights = [each for each in model.parameters() if each.dim() > 1]
    if not weights:
        raise ValueError("model has no weight of two or more dimensions, expected one or more: there is no filter")
    generator = torch.Generator().manual_seed(seed)
    first, second = ([_direction(weight, generator) for weight in weights] for _ in range(2))
    offsets = np.linspace(-span, span, points)
    offsets[points // 2] = 0.0
    losses = np.empty((points, points))
    own = [weight.detach().clone() for weight in weights]
    with torch.no_grad(), restored(model), bar(points * points, "loss surface", progress) as done:
        for i, a in enumerate(offsets.tolist()):
            for k, b in enumerate(offsets.tolist()):
                for weight, before, one, two in zip(weights, own, first, second, strict=True):
                    weight.copy_(before + a * one + b * two)
                with as_it_was(model, training=mode == "train"):
                    losses[i, k] = _number(loss())
                done(1)
    return LossSurface(offsets, losses, seed)


def compare_surfaces(surfaces: Mapping[str, LossSurface | Sequence[LossSurface]]) -> LossSurfaces:
    """Return several surfaces side by side; what is drawn of them is how far the loss rises with the distance.

    Parameters
    ----------
    surfaces : mapping of str to LossSurface or a list of them
        By name; a list holds the runs of several seeds.

    Raises
    ------
    ValueError
        If there is none, or they have not all the same offsets.
    """
    check_labels("surfaces", surfaces)
    named = {label: [given] if isinstance(given, LossSurface) else list(given) for label, given in surfaces.items()}
    for label, mine in named.items():
        check_labels(f"surfaces[{label!r}]", mine)
    every = [each for mine in named.values() for each in mine]
    if any(not np.array_equal(each.offsets, every[0].offsets) for each in every):
        raise ValueError("surfaces differ in their offsets, expected the same span and points for all")
    return LossSurfaces(named)


def _direction(weight: Tensor, generator: torch.Generator) -> Tensor:
    """Return a Gaussian tensor like `weight`, each filter (dimension 0) as long as the weight's."""
    noise = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
    flat, own = noise.flatten(1), weight.detach().double().cpu().flatten(1)
    scaled = flat * (own.norm(dim=1, keepdim=True) / flat.norm(dim=1, keepdim=True))
    out: Tensor = scaled.reshape(weight.shape).to(weight)
    return out


def _number(value: Tensor | float) -> float:
    if isinstance(value, Tensor) and value.numel() != 1:
        raise ValueError(f"loss gave a tensor of shape {tuple(value.shape)}, expected one number")
    return float(value)


def _levels(surfaces: Sequence[Floats], *, rise: bool) -> Floats:
    """Return levels from the lowest loss (of a rise: from 0) up, in equal steps of the logarithm of what lies above it.

    So that the middle, which is what is looked at, has contours too where the corners are far up.
    """
    every = np.concatenate([heights.ravel() for heights in surfaces])
    every = every[np.isfinite(every)]
    if not every.size:
        return np.linspace(0.0, 1.0, LEVELS)
    low, high = 0.0 if rise else float(every.min()), float(np.quantile(every, 0.98))
    if high - low <= 1e-9 * max(1.0, abs(low)):
        return low + np.linspace(0.0, 1.0, LEVELS) * max(1.0, abs(low)) * 1e-6
    return np.concatenate([[low], low + np.geomspace((high - low) / FINEST, high - low, LEVELS - 1)])
