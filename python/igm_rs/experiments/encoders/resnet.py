"""ResNets of torchvision as encoders: spectrograms and frames (ResNet18), pictures (ResNet50 with its classifier)."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from .bert import SMALL_WIDTH, WIDTH
from .spec import EncoderSpec
from .weights import digest, load_file

__all__ = ["ResNetEncoder", "audio_resnet18", "frames_resnet18", "image_resnet50"]

DIVISOR = 8
"""By how much the channels of the small networks are fewer."""

CLASSES, SMALL_CLASSES = 1000, 80
"""Outputs of ResNet50's classifier, those of ImageNet; of the small one."""

_DEPTHS: dict[str, tuple[type[BasicBlock | Bottleneck], list[int]]] = {
    "ResNet18": (BasicBlock, [2, 2, 2, 2]),
    "ResNet50": (Bottleneck, [3, 4, 6, 3]),
}


class ResNetEncoder(ResNet):  # type: ignore[misc]  # torchvision has no types
    """torchvision's ResNet, its tensors named as there, over pictures, spectrograms or frames.

    Parameters
    ----------
    name : {"ResNet18", "ResNet50"}
        The architecture.
    channels : int
        Of the input.
    classes : int
        Outputs of the classifier; 0: none, the features are the means over the last layer's positions.
    small : bool
        Whether there are an eighth of the channels.
    """

    def __init__(self, name: str, channels: int, classes: int, small: bool) -> None:
        self.divisor = DIVISOR if small else 1
        block, depths = _DEPTHS[name]
        super().__init__(block, depths)
        stem = 64 // self.divisor
        if small or channels != 3:
            self.conv1 = nn.Conv2d(channels, stem, kernel_size=7, stride=2, padding=3, bias=False)
            nn.init.kaiming_normal_(self.conv1.weight, mode="fan_out", nonlinearity="relu")
            self.bn1 = nn.BatchNorm2d(stem)
        self.fc = nn.Linear(self.inplanes, classes) if classes else nn.Identity()

    def _make_layer(
        self, block: type[BasicBlock | Bottleneck], planes: int, blocks: int, stride: int = 1, dilate: bool = False
    ) -> nn.Sequential:
        """Make one of the four layers, with fewer channels where the network is small."""
        if planes == 64:
            self.inplanes //= self.divisor
        layer: nn.Sequential = super()._make_layer(block, planes // self.divisor, blocks, stride, dilate)
        return layer

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the features ``(n, d)`` of ``(n, channels, height, width)``, or of ``(n, channels, frames, h, w)``.

        Each frame goes through the network by itself; the features are the mean over the frames.
        """
        if inputs.dim() == 5:
            frames = inputs.transpose(1, 2)
            each: Tensor = super().forward(frames.flatten(0, 1))
            return each.view(*frames.shape[:2], -1).mean(1)
        features: Tensor = super().forward(inputs)
        return features


def audio_resnet18(small: bool = False, weights: Path | None = None) -> EncoderSpec:
    """Return a ResNet18 for log-spectrograms, without classifier: ``(n, 1, frequencies, frames)`` to ``(n, 512)``.

    Parameters
    ----------
    small : bool
        Whether the network has an eighth of the channels: ``(n, 64)``.
    weights : Path, optional
        A file with a state dict of torchvision's ``resnet18``. Its classifier is left out; a first convolution for
        three channels is averaged over them. By default random weights, as torchvision draws them.

    Raises
    ------
    FileNotFoundError, IsADirectoryError
        If `weights` is no file. What does not fit is a ValueError when the encoder is made.
    """
    return EncoderSpec(partial(_made, "ResNet18", 1, 0, small, weights), _width(512, small), digest=digest(weights))


def frames_resnet18(small: bool = False, weights: Path | None = None) -> EncoderSpec:
    """Return a ResNet18 for frames, without classifier: ``(n, 3, frames, height, width)`` to ``(n, 512)``.

    Every frame by itself, then the mean over positions and frames. Parameters and errors as in
    :func:`audio_resnet18`.
    """
    return EncoderSpec(partial(_made, "ResNet18", 3, 0, small, weights), _width(512, small), digest=digest(weights))


def image_resnet50(small: bool = False, weights: Path | None = None, *, narrowed: int | None = None) -> EncoderSpec:
    """Return a ResNet50 with its classifier, as released: pictures ``(n, 3, height, width)`` to ``(n, 1000)``.

    Parameters
    ----------
    small : bool
        Whether the network has an eighth of the channels: ``(n, 80)``.
    weights : Path, optional
        A file with a state dict of torchvision's ``resnet50``, classifier and all. By default random weights.
    narrowed : int, optional
        The width of the text's features, which the head's additional layer makes of the classifier's outputs; by
        default BERT-base's 768, or the small one's 32.

    Raises
    ------
    FileNotFoundError, IsADirectoryError
        If `weights` is no file. What does not fit is a ValueError when the encoder is made.
    """
    classes = SMALL_CLASSES if small else CLASSES
    text = SMALL_WIDTH if small else WIDTH
    return EncoderSpec(
        partial(_made, "ResNet50", 3, classes, small, weights),
        classes,
        narrowed=text if narrowed is None else narrowed,
        digest=digest(weights),
    )


def _width(full: int, small: bool) -> int:
    return full // DIVISOR if small else full


def _made(name: str, channels: int, classes: int, small: bool, weights: Path | None) -> ResNetEncoder:
    network = ResNetEncoder(name, channels, classes, small)
    if weights is not None:
        told = f"a{' small' if small else ''} {name}"
        load_file(network, weights, told, stem="conv1.weight", classifier="fc")
    return network
