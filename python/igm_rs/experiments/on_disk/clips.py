"""Clips of video: the frames of a window, their crop, and what is made of them: colours, depth, or optical flow."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from igm_rs.experiments.columns import Column, seeded

from .media import Home

__all__ = [
    "CHANNELS",
    "FLOW_LIMIT",
    "FULL",
    "SMALL",
    "Clip",
    "ClipColumn",
    "ClipForm",
    "Shown",
    "frames_said",
    "optical_flow",
]

Shown = Literal["colour", "depth", "flow"]
"""What a clip shows."""

CHANNELS: dict[Shown, int] = {"colour": 3, "depth": 1, "flow": 2}
"""Of each; of flow the pixels to the right and down that a place moves by from a frame to the next."""

FLOW_LIMIT = 20.0
"""Pixels that become ±1; more count as as many. Carreira and Zisserman (2017) cut there, too."""

FARNEBACK: dict[str, Any] = {
    "pyr_scale": 0.5,
    "levels": 3,
    "winsize": 15,
    "iterations": 3,
    "poly_n": 5,
    "poly_sigma": 1.2,
    "flags": 0,
}
"""Settings of OpenCV's ``calcOpticalFlowFarneback``, those of its manual. I3D's own flow is TV-L1, which OpenCV has in
opencv-contrib only; the released scripts read flow from files and do not say how these were made."""

Frames = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Clip:
    """A window of a file.

    Attributes
    ----------
    path : Path
        The file.
    first, end : int
        Its first frame, from 0, and the first one behind it.
    """

    path: Path
    first: int
    end: int


@dataclass(frozen=True)
class ClipForm:
    """Sizes of a clip.

    Attributes
    ----------
    window : int
        Frames of a window, and of a clip as it is measured on. A longer window is cut, of a shorter one the last frame
        stands still.
    frames : int
        Frames of a clip in training, one after another, beginning anywhere in the window.
    resized : int
        Pixels of a side to which a frame is made first, whatever its shape.
    size : int
        Pixels of a side of what is cut out then: from anywhere in training, the middle for measuring.
    """

    window: int
    frames: int
    resized: int
    size: int


FULL = ClipForm(window=80, frames=64, resized=256, size=224)
"""Of the released scripts, which measure on all frames of the window, too. They normalise colours by ImageNet's mean
and deviation, have depth in [0, 1], and fill up a short window with zeros; here all are in [−1, 1], as I3D was trained,
and the last frame stands still."""

SMALL = ClipForm(window=10, frames=8, resized=36, size=32)
"""To try a folder out."""


class ClipColumn(Column):
    """Clips ``(channels, frames, size, size)``, float32 in [−1, 1], decoded by PyAV.

    Nothing is turned left to right: a hand that moves to the left means something else than one that moves right. A
    seed gives the same window and crop whatever the clip shows.

    Parameters
    ----------
    home : Home
        The set's folder.
    clips : sequence of Clip
        One an example.
    shown : {"colour", "depth", "flow"}
        What is made of a file: its colours, its shades of grey, or the flow between its frames, computed at the size of
        the clip; behind the last frame there is none, so that the last flow stands twice.
    form : ClipForm
        The sizes.
    """

    def __init__(self, home: Home, clips: Sequence[Clip], shown: Shown, form: ClipForm) -> None:
        self._home, self._clips, self._shown, self._form = home, tuple(clips), shown, form

    def __len__(self) -> int:
        return len(self._clips)

    @property
    def shape(self) -> tuple[int, ...]:
        """``(n, channels, frames, size, size)``, of clips as they are measured on: the whole window."""
        form = self._form
        return len(self), CHANNELS[self._shown], form.window, form.size, form.size

    def example(self, place: int, seed: int | None) -> Tensor:
        """Decode a clip: the window and its middle, or with a seed any part of it of the length for training."""
        form, clip = self._form, self._clips[place]
        frames = _decoded(self._home, clip, form, grey=self._shown == "depth")
        margin, spare = form.resized - form.size, form.window - form.frames
        if seed is None:
            first, count, top, left = 0, form.window, margin // 2, margin // 2
        else:
            with seeded(seed):
                first, top, left = (int(torch.randint(most + 1, ())) for most in (spare, margin, margin))
            count = form.frames
        cut = frames[first : first + count, top : top + form.size, left : left + form.size]
        shown = optical_flow(cut) / FLOW_LIMIT if self._shown == "flow" else cut.astype(np.float32) / 127.5 - 1
        return torch.from_numpy(np.ascontiguousarray(shown.transpose(3, 0, 1, 2)))

    def digest_lines(self) -> Iterator[str]:
        """Yield what is shown and the sizes, then path, bytes and window of every clip."""
        yield f"{self._shown} {self._form} {FARNEBACK if self._shown == 'flow' else ''}".rstrip()
        for clip in self._clips:
            yield f"{self._home.line(clip.path)} {clip.first} {clip.end}"


def optical_flow(frames: Frames) -> npt.NDArray[np.float32]:
    """Return how far each place moves from a frame to the next.

    Parameters
    ----------
    frames : ndarray of uint8
        Colours, ``(count, height, width, 3)``.

    Returns
    -------
    ndarray of float32
        Pixels to the right and down, ``(count, height, width, 2)``, within ±:data:`FLOW_LIMIT`. The last is the one
        before it, or 0 where there is one frame only.
    """
    import cv2

    count, height, width, _ = frames.shape
    flow = np.zeros((count, height, width, 2), np.float32)
    grey = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in frames]
    threads = cv2.getNumThreads()
    cv2.setNumThreads(0)  # in a process that decodes there are others beside it
    try:
        for place in range(count - 1):
            cv2.calcOpticalFlowFarneback(grey[place], grey[place + 1], flow[place], **FARNEBACK)
    finally:
        cv2.setNumThreads(threads)
    flow[-1] = flow[max(count - 2, 0)]
    return flow.clip(-FLOW_LIMIT, FLOW_LIMIT)


def frames_said(path: Path) -> int:
    """Return how many frames an AVI file says that it has; 0 if it does not say."""
    with path.open("rb") as file:
        head = file.read(52)
    return int.from_bytes(head[48:52], "little") if head[24:28] == b"avih" else 0


def _decoded(home: Home, clip: Clip, form: ClipForm, grey: bool) -> Frames:
    """Return all frames of a window, ``(window, resized, resized, 1 or 3)``.

    Decoded from the file's beginning: where a frame depends on others, jumping to it is not exact.
    """
    import av

    kept: list[Frames] = []
    end = min(clip.end, clip.first + form.window)
    try:
        # absolute: "a:b" would be a protocol; of the metadata nothing is read
        with av.open(str(clip.path.absolute()), metadata_errors="replace") as file:
            for place, frame in enumerate(file.decode(video=0)):
                if place >= clip.first:
                    size = {"width": form.resized, "height": form.resized, "interpolation": "BILINEAR"}
                    kept.append(frame.to_ndarray(format="gray" if grey else "rgb24", **size))
                if place + 1 >= end:
                    break
    except (av.FFmpegError, IndexError, OSError, ValueError) as error:
        raise home.undecodable(clip.path, error) from error
    if not kept:
        raise home.undecodable(clip.path, f"it has no frame {clip.first}, where its window begins")
    kept += [kept[-1]] * (form.window - len(kept))
    return np.stack(kept).reshape(form.window, form.resized, form.resized, -1)
