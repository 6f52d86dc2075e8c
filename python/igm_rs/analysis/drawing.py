"""What all pictures have in common: colours, how one is drawn and saved with its numbers, and progress bars."""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "BLACK",
    "BLUE",
    "EDGE",
    "GREEN",
    "GREY",
    "LOOKS",
    "ORANGE",
    "PURPLE",
    "SKY",
    "VERMILION",
    "Picture",
    "axes_for",
    "bar",
    "bare",
    "look",
    "plain",
    "save_figure",
]

ORANGE, GREEN, BLUE, VERMILION, PURPLE, SKY = "#E69F00", "#009E73", "#0072B2", "#D55E00", "#CC79A7", "#56B4E9"
"""Okabe and Ito's colours, which readers with any colour vision can tell apart."""

BLACK, GREY = "#000000", "#555555"

EDGE: dict[str, Any] = {"markeredgecolor": "black", "markeredgewidth": 0.6}
"""Outline of a marker that stands for a mean."""

LOOKS: tuple[tuple[str, str, Any], ...] = (
    (BLUE, "o", "-"),
    (VERMILION, "s", "--"),
    (GREEN, "^", "-."),
    (PURPLE, "D", ":"),
    (ORANGE, "v", (0, (5, 1, 1, 1, 1, 1))),
    (BLACK, "P", (0, (1, 1))),
    (SKY, "X", (0, (8, 2))),
)
"""Colour, marker and line style of the first, second, … thing in a picture: told apart without colour, too."""

DPI = 160
"""Dots per inch of a saved picture."""


def look(place: int) -> tuple[str, str, Any]:
    """Return colour, marker and line style of the thing at `place`, from 0; after seven they begin again."""
    return LOOKS[place % len(LOOKS)]


class Picture(ABC):
    """Numbers that can be drawn and saved."""

    size: tuple[float, float] = (5.2, 3.6)
    """Width and height in inches of a picture with nothing else in it."""

    @abstractmethod
    def numbers(self) -> dict[str, Any]:
        """Return the numbers behind the picture: what :meth:`save` writes as JSON."""

    @abstractmethod
    def _paint(self, ax: Axes) -> None:
        """Draw onto the axes."""

    def draw(self, ax: Axes | None = None) -> Axes:
        """Draw.

        Parameters
        ----------
        ax : matplotlib.axes.Axes, optional
            Where; a new figure by default, which a notebook shows below the cell.

        Returns
        -------
        Axes
            Where it was drawn, to be changed at will.

        Raises
        ------
        ModuleNotFoundError
            If Matplotlib is missing.
        """
        ax = axes_for(ax, self.size)
        self._paint(ax)
        return ax

    def save(self, path: str | Path) -> tuple[Path, Path]:
        """Write the picture, ``<path>.png``, and the numbers behind it, ``<path>.json``.

        Parameters
        ----------
        path : str or Path
            With or without ``.png``; its folder is made if need be.

        Returns
        -------
        tuple of Path
            The picture and the numbers.

        Raises
        ------
        ValueError
            If the path ends in something else than ``.png``.
        """
        return save_figure(path, self.size, lambda figure: self._paint(figure.subplots()), self.numbers())


def save_figure(
    path: str | Path, size: tuple[float, float], paint: Callable[[Figure], None], numbers: Mapping[str, Any]
) -> tuple[Path, Path]:
    """Let `paint` fill a figure of `size` inches; write it and its numbers as :meth:`Picture.save` does."""
    place = Path(path)
    if place.suffix not in ("", ".png"):
        raise ValueError(f"path is {str(place)!r}, expected one that ends in .png or has no ending")
    figure = _matplotlib().figure.Figure(figsize=size, layout="constrained")
    paint(figure)
    picture, text = place.with_suffix(".png"), place.with_suffix(".json")
    place.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=DPI)
    text.write_text(json.dumps(plain(numbers), indent=1, allow_nan=False) + "\n", encoding="utf-8")
    return picture, text


def axes_for(ax: Axes | None, size: tuple[float, float]) -> Axes:
    """Return `ax`, or the axes of a new pyplot figure of `size` inches."""
    if ax is not None:
        return ax
    _matplotlib()
    import matplotlib.pyplot as plt

    made: Axes = plt.subplots(figsize=size, layout="constrained")[1]
    return made


def bare(ax: Axes, *sides: str) -> None:
    """Take away the frame at these sides, top and right by default, and put a light grid behind."""
    ax.spines[list(sides or ("top", "right"))].set_visible(False)
    ax.grid(color="#DDDDDD", linewidth=0.6)
    ax.set_axisbelow(True)


def plain(value: Any) -> Any:
    """Return `value` as what JSON can hold: arrays as lists; NaN and the infinities, which it has no word for, as None.

    Raises
    ------
    TypeError
        For what is neither a number, text, None, nor a mapping, sequence or array of these.
    """
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, Mapping):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, Sequence):
        return [plain(each) for each in value]
    if isinstance(value, (float, np.floating, np.integer)):
        return float(value) if math.isfinite(value) else None
    raise TypeError(f"{type(value).__name__} cannot be written as JSON, expected numbers, text, mappings or sequences")


@contextmanager
def bar(total: int, words: str, show: bool) -> Iterator[Callable[[int], Any]]:
    """Show a progress bar of `total` units below `words`; what is yielded is called with the units done since.

    Raises
    ------
    ModuleNotFoundError
        If it is to be shown and tqdm is missing.
    """
    if not show:
        yield lambda done: None
        return
    try:
        from tqdm import tqdm
    except ModuleNotFoundError as missing:
        raise _lacking("progress=True", "tqdm") from missing
    with tqdm(total=total, desc=words, ncols=80) as shown:
        yield shown.update


def _matplotlib() -> Any:
    """Return Matplotlib with its figures imported."""
    try:
        import matplotlib.figure
    except ModuleNotFoundError as missing:
        raise _lacking("drawing", "matplotlib") from missing
    return matplotlib


def _lacking(what: str, package: str) -> ModuleNotFoundError:
    words = f"{what} needs {package}: pip install 'igm-rs[experiments]'"
    return ModuleNotFoundError(words, name=package)


def finite(values: Iterable[float | None]) -> list[float]:
    """Return the numbers among `values` that are there and finite."""
    return [float(value) for value in values if value is not None and math.isfinite(value)]
