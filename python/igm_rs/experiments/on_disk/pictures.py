"""Pictures: some of a clip's, or one by itself; cropped and mirrored at random in training, whole for measuring."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from igm_rs.experiments.columns import Column, seeded

from .media import Home
from .threads import one_thread

__all__ = [
    "CLIP",
    "IMAGENET",
    "SIDE",
    "SMALL_SIDE",
    "FramesColumn",
    "Look",
    "PictureColumn",
    "frame_places",
    "picture",
]

SIDE = 224
"""Pixels of a side of a picture as OGM-GE (CVPR 2022) and the released scripts have it."""

SMALL_SIDE = 32
"""Pixels of a side for the small networks."""

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
"""Mean and standard deviation of red, green and blue over ImageNet, between 0 and 1, as torchvision's networks have it;
OGM-GE and the released scripts for CREMA-D and Kinetics-Sounds take them."""

CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
"""The same of what CLIP was trained on; the released scripts for text and image take them."""


@dataclass(frozen=True)
class Look:
    """How a picture becomes numbers.

    Attributes
    ----------
    side : int
        Pixels of a side.
    scale : tuple of float
        The least and the greatest share of a picture that a crop takes in training; torchvision's own by default, as
        OGM-GE has it.
    cubic : bool
        Whether resizing is bicubic, instead of bilinear.
    normal : tuple of tuple of float
        Mean and standard deviation of the three channels.
    """

    side: int = SIDE
    scale: tuple[float, float] = (0.08, 1.0)
    cubic: bool = False
    normal: tuple[tuple[float, ...], tuple[float, ...]] = IMAGENET

    def __str__(self) -> str:
        """Say it in a line, for a digest."""
        way = "bicubic" if self.cubic else "bilinear"
        return f"side {self.side}, crops {self.scale}, {way}, normal {self.normal}"

    def transform(self, *, training: bool) -> v2.Compose:
        """Return what makes a tensor ``(3, side, side)`` of a picture.

        In training a crop of 3:4 to 4:3 is resized, and half of the pictures are mirrored, by torch's generator; else
        the whole picture is resized, whatever its form.
        """
        way = v2.InterpolationMode.BICUBIC if self.cubic else v2.InterpolationMode.BILINEAR
        size = [self.side, self.side]
        shape: list[v2.Transform] = [v2.Resize(size, way)]
        if training:
            shape = [v2.RandomResizedCrop(size, self.scale, interpolation=way), v2.RandomHorizontalFlip()]
        mean, deviation = map(list, self.normal)
        return v2.Compose([*shape, v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, deviation)])


def picture(path: Path, home: Home) -> Image.Image:
    """Return a picture in red, green and blue, decoded to its end.

    Raises
    ------
    DataFault
        If it cannot be decoded: names the file.
    """
    try:
        with Image.open(path) as opened:
            shown: Image.Image = opened.convert("RGB")
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise home.undecodable(path, error) from error
    return shown


def frame_places(count: int, wanted: int, *, training: bool) -> list[int]:
    """Choose pictures of a clip, in order.

    Parameters
    ----------
    count : int
        How many the clip has, 1 or more.
    wanted : int
        How many are chosen. A clip that has fewer gives some of them more than once.
    training : bool
        Whether they are drawn, by torch's generator; else they are the middles of equal parts of the clip.

    Returns
    -------
    list of int
        Places from 0, ascending.
    """
    if training and count >= wanted:
        return sorted(torch.randperm(count)[:wanted].tolist())
    return [(2 * place + 1) * count // (2 * wanted) for place in range(wanted)]


@dataclass(frozen=True)
class FramesColumn(Column):
    """Some pictures of each clip: ``(n, 3, frames, side, side)``, float32, normalised.

    In training they are drawn, for measuring evenly placed; each is cropped and mirrored by itself. So OGM-GE (CVPR
    2022) describes it. The scripts, OGM-GE's and those released with the paper, draw places too, but then take the
    first pictures of the folder whatever was drawn, in the order in which the file system lists them.

    Attributes
    ----------
    clips : tuple of tuple of Path
        The pictures of each clip in order, one or more.
    frames : int
        How many are taken.
    home : Home
        The set's folder.
    look : Look
        How a picture becomes numbers.
    """

    clips: tuple[tuple[Path, ...], ...] = field(repr=False)
    frames: int
    home: Home
    look: Look = Look()

    def __len__(self) -> int:
        """Return the number of clips."""
        return len(self.clips)

    @property
    def shape(self) -> tuple[int, ...]:
        """``(n, 3, frames, side, side)``."""
        return len(self.clips), 3, self.frames, self.look.side, self.look.side

    def example(self, place: int, seed: int | None) -> Tensor:
        """Decode a clip's pictures, see :meth:`Column.example`."""
        clip, training = self.clips[place], seed is not None
        transform = self.look.transform(training=training)
        with one_thread(), seeded(0 if seed is None else seed):  # for measuring nothing is drawn
            places = frame_places(len(clip), self.frames, training=training)
            return torch.stack([transform(picture(clip[each], self.home)) for each in places], dim=1)

    def digest_lines(self) -> Iterable[str]:
        """Yield how pictures are chosen and decoded, then every file."""
        yield f"frames {self.frames}, {self.look}"
        for clip in self.clips:
            yield from self.home.lines(clip)


@dataclass(frozen=True)
class PictureColumn(Column):
    """One picture an example: ``(n, 3, side, side)``, float32, normalised; cropped and mirrored at random in training.

    Attributes
    ----------
    paths : tuple of Path
        The file of each example.
    home : Home
        The set's folder.
    look : Look
        How a picture becomes numbers.
    """

    paths: tuple[Path, ...] = field(repr=False)
    home: Home
    look: Look = Look()

    def __len__(self) -> int:
        """Return the number of pictures."""
        return len(self.paths)

    @property
    def shape(self) -> tuple[int, ...]:
        """``(n, 3, side, side)``."""
        return len(self.paths), 3, self.look.side, self.look.side

    def example(self, place: int, seed: int | None) -> Tensor:
        """Decode a picture, see :meth:`Column.example`."""
        shown = picture(self.paths[place], self.home)
        transform = self.look.transform(training=seed is not None)
        with one_thread(), seeded(0 if seed is None else seed):
            decoded: Tensor = transform(shown)
        return decoded

    def digest_lines(self) -> Iterable[str]:
        """Yield how a picture is decoded, then every file."""
        yield str(self.look)
        yield from self.home.lines(self.paths)
