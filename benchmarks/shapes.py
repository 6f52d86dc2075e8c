"""Real networks: ResNet18, ResNet50 and BERT-base from their configurations (nothing is downloaded), with heads."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn
from transformers import BertConfig, BertModel, ResNetConfig, ResNetModel

from .setting import Setting

CLASSES = 6


class Stream(nn.Module):
    """One modality: an encoder and the head d-256-64-classes of the released code."""

    def __init__(self, encoder: nn.Module, d: int, setting: Setting) -> None:
        super().__init__()
        middle, small = setting.width(256), setting.width(64)
        self.encoder = encoder
        self.head = nn.Sequential(
            nn.Linear(d, middle), nn.ReLU(), nn.Linear(middle, small), nn.ReLU(), nn.Linear(small, CLASSES)
        )
        self.d = d


def resnet18(setting: Setting) -> Stream:
    """Make a ResNet18 with its head 512-256-64-6: 11.3 M parameters."""
    widths = [setting.width(width) for width in (64, 128, 256, 512)]
    return Stream(ResNetModel(_basic(widths)), widths[-1], setting)


def resnet50(setting: Setting) -> Stream:
    """Make a ResNet50 with its head 2048-256-64-6: 24.0 M parameters."""
    widths = [setting.width(width) for width in (256, 512, 1024, 2048)]
    config = ResNetConfig(hidden_sizes=widths, embedding_size=setting.width(64))
    return Stream(ResNetModel(config), widths[-1], setting)


def bert(setting: Setting) -> Stream:
    """Make a BERT-base with its head 768-256-64-6: 109.7 M parameters."""
    width = setting.width(768)
    config = BertConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_attention_heads=12,
        vocab_size=64 if setting.quick else 30522,
    )
    return Stream(BertModel(config), width, setting)


@dataclass(frozen=True)
class Conv:
    """A convolution of a network, and what a batch brings to its Ȳ: `positions` rows of width `d`."""

    name: str
    module: nn.Conv2d
    inputs: tuple[int, int]
    positions: int

    @property
    def d(self) -> int:
        """The columns of an unfolded row, C_in · kernel."""
        return self.module.weight[0].numel()

    @property
    def padding(self) -> tuple[int, int]:
        """Zeros added at either side of height and width."""
        height, width = map(int, self.module.padding)
        return height, width


def convolutions(setting: Setting) -> list[Conv]:
    """Return all 20 convolutions of a ResNet18, with the size of their inputs for a picture of 224 × 224."""
    size = 32 if setting.quick else 224
    found: list[Conv] = []

    def see(name: str, module: nn.Conv2d, inputs: torch.Tensor, output: torch.Tensor) -> None:
        _, _, height, width = inputs.shape
        found.append(Conv(name, module, (height, width), output[0, 0].numel()))

    with torch.device("meta"):
        encoder = resnet18(setting).encoder.eval()
        handles = [
            module.register_forward_hook(
                lambda module, arguments, output, name=name: see(name, module, arguments[0], output)
            )
            for name, module in encoder.named_modules()
            if isinstance(module, nn.Conv2d)
        ]
        encoder(torch.empty(1, 3, size, size))
    for handle in handles:
        handle.remove()
    return found


def widths(setting: Setting) -> Iterator[tuple[str, list[int]]]:
    """Yield sets of layers by name with the width d of each: heads of two networks, and a ResNet18's convolutions."""
    width = setting.width
    yield "head of a ResNet18", [width(512), width(256), width(64)]
    yield "heads of BERT-base and ResNet50", [width(d) for d in (768, 256, 64, 2048, 256, 64)]
    yield "all convolutions of a ResNet18", [conv.d for conv in convolutions(setting)]


def _basic(widths: list[int]) -> ResNetConfig:
    return ResNetConfig(layer_type="basic", depths=[2, 2, 2, 2], hidden_sizes=widths, embedding_size=widths[0])
