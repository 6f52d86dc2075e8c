"""I3D: Inception-v1 inflated to three dimensions, an encoder of clips (Carreira and Zisserman 2017, arXiv 1705.07750).

Tensors are named as in the usual PyTorch checkpoints (``rgb_imagenet.pt``, ``flow_imagenet.pt``), which therefore load.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool1d, max_pool3d, pad, relu

from .spec import EncoderSpec
from .weights import digest, load_file

__all__ = ["I3D", "i3d"]

DIVISOR = 16
"""By how much the channels of the small network are fewer."""

WIDTH = 1024
"""Features of a clip."""

_BLOCKS: dict[str, Sequence[int]] = {
    "Mixed_3b": (64, 96, 128, 16, 32, 32),
    "Mixed_3c": (128, 128, 192, 32, 96, 64),
    "MaxPool3d_4a_3x3": (3, 2),
    "Mixed_4b": (192, 96, 208, 16, 48, 64),
    "Mixed_4c": (160, 112, 224, 24, 64, 64),
    "Mixed_4d": (128, 128, 256, 24, 64, 64),
    "Mixed_4e": (112, 144, 288, 32, 64, 64),
    "Mixed_4f": (256, 160, 320, 32, 128, 128),
    "MaxPool3d_5a_2x2": (2, 2),
    "Mixed_5b": (256, 160, 320, 32, 128, 128),
    "Mixed_5c": (384, 192, 384, 48, 128, 128),
}
"""What follows the three convolutions: of an inception block the channels of b0, b1a, b1b, b2a, b2b, b3b, as in
Inception-v1 (Szegedy et al. 2014, table 1); of a pooling layer kernel and stride."""

_Size = tuple[int, int, int]


def _padded(clips: Tensor, kernel: _Size, stride: _Size) -> Tensor:
    """Zeros around ``(n, c, frames, h, w)``, so that there are ⌈size/stride⌉ positions; the odd one stands behind.

    TensorFlow's "SAME", in which the published weights were trained. What is pooled is never negative, so that zeros
    do there, too.
    """
    around: list[int] = []
    for size, k, s in zip(reversed(clips.shape[2:]), reversed(kernel), reversed(stride), strict=True):
        total = max((-(-size // s) - 1) * s + k - size, 0)
        around += [total // 2, total - total // 2]
    return pad(clips, around) if any(around) else clips


class _Pool(nn.Module):
    """The largest of each neighbourhood."""

    def __init__(self, kernel: _Size, stride: _Size) -> None:
        super().__init__()
        self.kernel, self.stride = kernel, stride

    def forward(self, clips: Tensor) -> Tensor:
        return max_pool3d(_padded(clips, self.kernel, self.stride), self.kernel, self.stride)


class _Unit(nn.Module):
    """Convolution, batch norm, ReLU."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1) -> None:
        super().__init__()
        self.kernel, self.stride = (kernel, kernel, kernel), (stride, stride, stride)
        self.conv3d = nn.Conv3d(inputs, outputs, self.kernel, self.stride, bias=False)
        self.bn = nn.BatchNorm3d(outputs, eps=1e-3, momentum=0.01)

    def forward(self, clips: Tensor) -> Tensor:
        return relu(self.bn(self.conv3d(_padded(clips, self.kernel, self.stride))))


class _Inception(nn.Module):
    """Four branches side by side: 1, 1 then 3, 1 then 3, largest of 3 then 1."""

    def __init__(self, inputs: int, channels: Sequence[int]) -> None:
        super().__init__()
        b0, b1a, b1b, b2a, b2b, b3b = channels
        self.b0 = _Unit(inputs, b0, 1)
        self.b1a, self.b1b = _Unit(inputs, b1a, 1), _Unit(b1a, b1b, 3)
        self.b2a, self.b2b = _Unit(inputs, b2a, 1), _Unit(b2a, b2b, 3)
        self.b3a, self.b3b = _Pool((3, 3, 3), (1, 1, 1)), _Unit(inputs, b3b, 1)
        self.outputs = b0 + b1b + b2b + b3b

    def forward(self, clips: Tensor) -> Tensor:
        branches = (self.b0(clips), self.b1b(self.b1a(clips)), self.b2b(self.b2a(clips)), self.b3b(self.b3a(clips)))
        return torch.cat(branches, 1)


class I3D(nn.Sequential):
    """Clips ``(n, channels, frames, height, width)`` to ``(n, 1024)``, without classifier and its dropout.

    Parameters
    ----------
    channels : int
        Of the input: 3 for RGB, 2 for optical flow, 1 for depth.
    small : bool
        Whether there are a sixteenth of the channels.
    """

    def __init__(self, channels: int, small: bool = False) -> None:
        divisor = DIVISOR if small else 1
        first, second = 64 // divisor, 192 // divisor
        layers: OrderedDict[str, nn.Module] = OrderedDict(
            Conv3d_1a_7x7=_Unit(channels, first, 7, stride=2),
            MaxPool3d_2a_3x3=_Pool((1, 3, 3), (1, 2, 2)),
            Conv3d_2b_1x1=_Unit(first, first, 1),
            Conv3d_2c_3x3=_Unit(first, second, 3),
            MaxPool3d_3a_3x3=_Pool((1, 3, 3), (1, 2, 2)),
        )
        inputs = second
        for name, numbers in _BLOCKS.items():
            if name.startswith("MaxPool"):
                kernel, stride = numbers
                layers[name] = _Pool((kernel, kernel, kernel), (stride, stride, stride))
            else:
                layers[name] = block = _Inception(inputs, [number // divisor for number in numbers])
                inputs = block.outputs
        super().__init__(layers)

    def forward(self, clips: Tensor) -> Tensor:
        """Return the features ``(n, 1024)``.

        As published: the mean over positions and each two frames that follow each other, then over time, so that the
        first and the last of several frames count half.
        """
        for layer in self:
            clips = layer(clips)
        over_time = clips.mean((3, 4))
        if over_time.shape[2] > 1:
            over_time = avg_pool1d(over_time, 2, 1)
        return over_time.mean(2)


def i3d(small: bool = False, weights: Path | None = None, channels: int = 3) -> EncoderSpec:
    """Return an I3D for clips ``(n, channels, frames, height, width)`` to ``(n, 1024)``.

    Parameters
    ----------
    small : bool
        Whether the network has a sixteenth of the channels: ``(n, 64)``.
    weights : Path, optional
        A file with a state dict, such as ``rgb_imagenet.pt`` or ``flow_imagenet.pt``. Its classifier is left out; a
        first convolution for three channels is averaged over them where there is one (depth). By default random ones.
    channels : int
        3 for RGB, 2 for optical flow, 1 for depth.

    Raises
    ------
    FileNotFoundError, IsADirectoryError
        If `weights` is no file. What does not fit is a ValueError when the encoder is made.
    """
    width = WIDTH // DIVISOR if small else WIDTH
    return EncoderSpec(partial(_made, small, weights, channels), width, digest=digest(weights))


def _made(small: bool, weights: Path | None, channels: int) -> I3D:
    network = I3D(channels, small)
    if weights is not None:
        told = f"a{' small' if small else 'n'} I3D of {channels} channel{'s' if channels > 1 else ''}"
        load_file(network, weights, told, stem="Conv3d_1a_7x7.conv3d.weight", classifier="logits")
    return network
