"""Figure 5 (a): the mean singular value of Ȳ by layer, with and without SAM."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any

import numpy as np

from igm_rs.optimizer import IGMOptimizer

from ._model import check_labels
from .drawing import EDGE, Picture, bare, look

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["LayerSpectra", "layer_spectra"]

Figures = dict[str, dict[str, list[float]]]


@dataclass(frozen=True)
class LayerSpectra(Picture):
    """What :func:`layer_spectra` gives.

    Attributes
    ----------
    mean : dict of str to dict
        By training, modality and layer (in the order of the forward pass): the mean over the d singular values λ of Ȳ,
        which is trace(Ȳ)/d, one figure a run.
    top_share : dict of str to dict
        Likewise λ_max/Σλ: how much of Ȳ lies in one direction, in (0, 1].
    """

    mean: dict[str, Figures]
    top_share: dict[str, Figures]

    @property
    def size(self) -> tuple[float, float]:  # type: ignore[override]
        """Width and height in inches: the wider, the more layers there are."""
        return max(5.2, 1.8 + 0.62 * len(self._places())), 4.2

    def _places(self) -> list[tuple[str, str]]:
        """Return every (modality, layer)."""
        found = [(name, layer) for of in self.mean.values() for name, layers in of.items() for layer in layers]
        names = list(dict.fromkeys(name for name, _ in found))
        return sorted(dict.fromkeys(found), key=lambda place: names.index(place[0]))

    @classmethod
    def joined(cls, several: Mapping[str, Sequence[LayerSpectra]]) -> LayerSpectra:
        """Return spectra of one training each as one, each list as the runs of its name."""
        out = cls({}, {})
        for label, runs in several.items():
            for each in runs:
                for mine, theirs in ((out.mean, each.mean), (out.top_share, each.top_share)):
                    (of,) = theirs.values()
                    for name, layers in of.items():
                        for layer, values in layers.items():
                            mine.setdefault(label, {}).setdefault(name, {}).setdefault(layer, []).extend(values)
        return out

    def by_layer(self, label: str) -> dict[tuple[str, str], list[float]]:
        """Return the mean singular values of one training, one a run, by (modality, layer)."""
        return {(name, layer): runs for name, layers in self.mean[label].items() for layer, runs in layers.items()}

    def numbers(self) -> dict[str, Any]:
        """Return mean and top share by training, modality and layer."""
        return {"mean_singular_value": self.mean, "top_share": self.top_share}

    def _paint(self, ax: Axes) -> None:
        places = self._places()
        count = len(self.mean)
        for number, (label, of) in enumerate(self.mean.items()):
            colour, marker, _ = look(number)
            shift = 0.5 * ((number + 0.5) / count - 0.5)
            for x, (name, layer) in enumerate(places):
                runs = of.get(name, {}).get(layer, [])
                if not runs:
                    continue
                ax.plot([x + shift] * len(runs), runs, marker, color=colour, markersize=3, alpha=0.4, markeredgewidth=0)
                ax.plot([x + shift], [fmean(runs)], marker, color=colour, markersize=7, **EDGE)
            ax.plot([], [], marker, color=colour, markersize=7, label=label)
        ax.set_yscale("log")
        layers = [".".join(part for part in layer.split(".") if part != name) or layer for name, layer in places]
        ax.set_xticks(range(len(places)), layers, rotation=40, ha="right", fontsize=8.5)
        ax.set_xlim(-0.6, len(places) - 0.4)
        names = [name for name, _ in places]
        for name in dict.fromkeys(names):
            first, last = names.index(name), len(names) - 1 - names[::-1].index(name)
            ax.text((first + last) / 2, 1.01, name, transform=ax.get_xaxis_transform(), ha="center", va="bottom")
            if first:
                ax.axvline(first - 0.5, color="black", linewidth=0.8)
        ax.set_xlabel("layer, from input to output")
        ax.set_ylabel("mean singular value of Ȳ (unit of Z², log)")
        bare(ax)
        ax.grid(visible=False, axis="x")
        ax.legend(frameon=False, fontsize=8.5, loc="upper center", bbox_to_anchor=(0.5, 1.17), ncols=count)


def layer_spectra(
    optimizers: IGMOptimizer | Mapping[str, IGMOptimizer | Sequence[IGMOptimizer]],
) -> LayerSpectra:
    """Return the mean singular values of Ȳ by layer, of one training or of several (Fig. 5 a).

    Ȳ is what each optimizer has gathered since it last began one: a sum over batches, so compare trainings whose turns
    have as many. For layers that are not projected make an optimizer with ``scope=1.0`` for the trained model, forward
    the batches in its ``collect(modality)``, and give that one: nothing is trained by it.

    Parameters
    ----------
    optimizers : IGMOptimizer, or mapping of str to IGMOptimizer or a list of them
        By name of the training; a list holds the runs of several seeds.

    Returns
    -------
    LayerSpectra
        The numbers; ``draw()`` and ``save(path)`` make a picture of them.

    Raises
    ------
    ValueError
        If there is none, or one of them has gathered nothing.
    """
    named = {"training": optimizers} if isinstance(optimizers, IGMOptimizer) else dict(optimizers)
    check_labels("optimizers", named)
    mean: dict[str, Figures] = {}
    top: dict[str, Figures] = {}
    for label, given in named.items():
        mean[label], top[label] = {}, {}
        for optimizer in [given] if isinstance(given, IGMOptimizer) else given:
            spectra = optimizer.spectrum()
            if not any(spectra.values()):
                raise ValueError(f"optimizers: {label!r} has gathered no features, expected a turn or collect() before")
            for name, layers in spectra.items():
                for layer, of_groups in layers.items():
                    values = np.asarray(of_groups)
                    total = float(values.sum())
                    mean[label].setdefault(name, {}).setdefault(layer, []).append(float(values.mean()))
                    share = float(values.max()) / total if total > 0 else float("nan")
                    top[label].setdefault(name, {}).setdefault(layer, []).append(share)
    return LayerSpectra(mean, top)
