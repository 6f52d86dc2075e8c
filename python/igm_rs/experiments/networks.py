"""The networks: an encoder a modality by what it is, and heads: the paper's, one for all, joined, or on a trunk."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from .columns import Column, seeded
from .data import PADDING, DataSet
from .feeding import Means, at_once, in_order

__all__ = [
    "FEATURES",
    "Branches",
    "DenseEncoder",
    "Frozen",
    "Head",
    "PictureEncoder",
    "SeriesEncoder",
    "TitleEncoder",
    "frozen",
    "three_layer_head",
    "trunk",
]

FEATURES = 64
"""Size d of the output of every encoder here, so that one head can serve all modalities."""

AT_ONCE = 64
"""Examples of a column that are decoded and measured at a time, at most; see :func:`feeding.at_once`."""

READINGS = 4
"""The shortest series that :class:`SeriesEncoder` takes."""

PICTURE = 16
"""Pixels of a side of what :class:`PictureEncoder` looks at."""

Head = Literal["own", "shared", "shared-three-layer", "concat", "trunk"]


class SeriesEncoder(nn.Module):
    """Three strided convolutions over time and their mean: windows ``(n, channels, readings)`` to ``(n, 64)``.

    Normalised by groups of channels within each window: nothing is remembered from batch to batch, so a second
    forward pass of the same step (SAM) leaves no trace.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv1d(channels, 16, kernel_size=8, stride=4, padding=2),
            nn.GroupNorm(4, 16),
            nn.ReLU(),
            nn.Conv1d(16, 32, kernel_size=5, stride=2, padding=2),
            nn.GroupNorm(4, 32),
            nn.ReLU(),
            nn.Conv1d(32, FEATURES, kernel_size=5, stride=2, padding=2),
            nn.GroupNorm(4, FEATURES),
            nn.ReLU(),
        )

    def forward(self, windows: Tensor) -> Tensor:
        """Return the features ``(n, 64)``."""
        features: Tensor = self.layers(windows).mean(-1)
        return features


class PictureEncoder(nn.Module):
    """Four convolutions: pictures ``(n, channels, 16, 16)`` to ``(n, 64)``.

    Other sizes are averaged down, or repeated, to 16 × 16 first. Normalised like :class:`SeriesEncoder`. The third
    looks at all that is left; the last, 1 × 1, is as wide as :class:`TitleEncoder`'s layer, so that a T of the one can
    act on the other.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.AdaptiveAvgPool2d(PICTURE),
            nn.Conv2d(channels, 64, kernel_size=4, stride=4),
            nn.GroupNorm(4, 64),
            nn.ReLU(),
            nn.Conv2d(64, 96, kernel_size=3, stride=2, padding=1),
            nn.GroupNorm(4, 96),
            nn.ReLU(),
            nn.Conv2d(96, FEATURES, kernel_size=2),
            nn.GroupNorm(4, FEATURES),
            nn.ReLU(),
            nn.Conv2d(FEATURES, FEATURES, kernel_size=1),
            nn.GroupNorm(4, FEATURES),
            nn.ReLU(),
        )

    def forward(self, pictures: Tensor) -> Tensor:
        """Return the features ``(n, 64)``."""
        features: Tensor = self.layers(pictures).flatten(1)
        return features


class TitleEncoder(nn.Module):
    """The mean of the vectors of a title's words, normalised, and a dense layer: ids ``(n, length)`` to ``(n, 64)``.

    Padding (id 0) has no part in the mean; a title without a word has zeros for it. The vectors start small, so that
    those that training has not moved hardly count beside those that it has: with ordinary ones it was a matter of the
    seed how a title of mostly new words is taken.
    """

    def __init__(self, ids: int) -> None:
        super().__init__()
        self.table = nn.Embedding(ids, FEATURES, padding_idx=PADDING)
        self.layers = nn.Sequential(nn.LayerNorm(FEATURES), nn.Linear(FEATURES, FEATURES), nn.LayerNorm(FEATURES))
        with torch.no_grad():
            self.table.weight.mul_(0.01)

    def forward(self, titles: Tensor) -> Tensor:
        """Return the features ``(n, 64)``."""
        count = (titles != PADDING).sum(-1, keepdim=True).clamp_min(1)
        features: Tensor = self.layers(self.table(titles).sum(-2) / count)
        return features


class DenseEncoder(nn.Sequential):
    """Two dense layers: feature vectors ``(n, size)`` to ``(n, 64)``."""

    def __init__(self, size: int) -> None:
        super().__init__(nn.Linear(size, 128), nn.ReLU(), nn.Linear(128, FEATURES), nn.ReLU())


def three_layer_head(classes: int, size: int = FEATURES) -> nn.Sequential:
    """Return the paper's head, FC(size × 256), ReLU, FC(256 × 64), FC(64 × c) (its section 4.2)."""
    return nn.Sequential(nn.Linear(size, 256), nn.ReLU(), nn.Linear(256, 64), nn.Linear(64, classes))


def trunk(size: int = FEATURES) -> nn.Sequential:
    """Return what all modalities may share: two dense layers, features ``(n, size)`` to ``(n, size)``."""
    return nn.Sequential(nn.Linear(size, size), nn.ReLU(), nn.Linear(size, size), nn.ReLU())


class Frozen(nn.Module):
    """An encoder that is left as it is: no gradients, always in evaluation mode, as it came."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> Frozen:
        """Switch the mode, which changes nothing."""
        self.training = mode
        return self

    @torch.no_grad()
    def forward(self, inputs: Tensor) -> Tensor:
        """Return the encoder's features."""
        features: Tensor = self.encoder(inputs)
        return features


def frozen(make: Callable[[], nn.Module]) -> Frozen:
    """Return what `make` gives, frozen; for ``functools.partial``."""
    return Frozen(make())


class Branches(nn.Module):
    """An encoder for each modality, and what makes logits of their features. :meth:`of` builds it.

    Attributes
    ----------
    encoders : ModuleDict
        By modality, to ``(n, d)``: d = 64, or as the set's own encoders have it.
    heads : ModuleDict
        By modality; empty where there is one head for all.
    head : Module or None
        The head for all: MLA's linear layer, or a three-layer head, of one modality's features at a time or over those
        of all side by side.
    trunk : Module or None
        What all modalities share between encoder and head.
    joined : bool
        Whether the head takes the features of all modalities at once.
    narrow : ModuleDict
        By modality, a layer that makes an encoder's features as wide as the others' (text-image: 1000 to 768). Heads of
        their own begin with it; where modalities share something it stands between the encoder and that.
    """

    def __init__(
        self,
        encoders: nn.ModuleDict,
        heads: nn.ModuleDict,
        head: nn.Module | None,
        trunk: nn.Module | None,
        joined: bool,
        narrow: nn.ModuleDict | None = None,
    ) -> None:
        super().__init__()
        self.encoders, self.heads, self.head, self.trunk = encoders, heads, head, trunk
        self.narrow = nn.ModuleDict() if narrow is None else narrow
        self.joined = joined

    @classmethod
    def of(cls, data: DataSet, modalities: Sequence[str], *, head: Head, seed: int) -> Branches:
        """Return the network for `modalities` of a data set.

        Parameters
        ----------
        data : DataSet
            Its kinds of modalities decide on the encoders.
        modalities : sequence of str
            Those that the network has.
        head : {"own", "shared", "shared-three-layer", "concat", "trunk"}
            A three-layer head for each modality (the paper); one linear layer for all (MLA); one three-layer head for
            all; one over all features side by side; a trunk for all, and a linear layer for each.
        seed : int
            Of the initial weights. Those of a modality's encoder, and of the head that is its own, depend on the seed
            and on the modality's place in the data set only: every method starts a modality alike.

        Raises
        ------
        ValueError
            If `head` is unknown, or a modality is, or a series is too short for the encoder.
        """
        if head not in get_args(Head):
            raise ValueError(f"head is {head!r}, expected one of {', '.join(map(repr, get_args(Head)))}")
        for name in modalities:
            if name not in data.modalities:
                raise ValueError(f"modality is {name!r}, expected one of {', '.join(data.modalities)}")
        encoders, heads, narrow = nn.ModuleDict(), nn.ModuleDict(), nn.ModuleDict()
        common: nn.Module | None = None
        between: nn.Module | None = None
        width = _common_width(data, modalities) if head != "own" else 0
        for name in modalities:
            with seeded(1000 * seed + data.modalities.index(name)):
                encoders[name] = _encoder(data, name)
                given, narrowed = _widths(data, name)
                if head == "own":
                    made = three_layer_head(data.classes, narrowed)
                    heads[name] = made if narrowed == given else nn.Sequential(nn.Linear(given, narrowed), *made)
                    continue
                if narrowed != given:
                    narrow[name] = nn.Linear(given, narrowed)
                if head == "trunk":
                    heads[name] = nn.Linear(width, data.classes)
        with seeded(1000 * seed + len(data.modalities)):
            if head == "shared":
                common = nn.Linear(width, data.classes)
            elif head == "shared-three-layer":
                common = three_layer_head(data.classes, width)
            elif head == "concat":
                common = three_layer_head(data.classes, width * len(modalities))
            elif head == "trunk":
                between = trunk(width)
        return cls(encoders, heads, common, between, head == "concat", narrow)

    @property
    def modalities(self) -> tuple[str, ...]:
        """Names of the modalities, in order."""
        return tuple(self.encoders)

    def head_of(self, modality: str) -> nn.Module:
        """Return the head that makes this modality's logits."""
        return self.heads[modality] if self.head is None else self.head

    def parts_of(self, modality: str) -> list[nn.Module]:
        """Return everything that a step of this modality trains, from the input to the output."""
        narrow = self.narrow[modality] if modality in self.narrow else None  # noqa: SIM401  # no get
        parts = (self.encoders[modality], narrow, self.trunk, self.head_of(modality))
        return [part for part in parts if part is not None]

    def features(self, modality: str, inputs: Tensor) -> Tensor:
        """Return what the head of one modality gets, but for a trunk: ``(n, d)``."""
        features: Tensor = self.encoders[modality](inputs)
        return self.narrow[modality](features) if modality in self.narrow else features

    def branch(self, modality: str, inputs: Tensor) -> Tensor:
        """Return the logits ``(n, c)`` of one modality; a joined head is given zeros for the other features."""
        features = self.features(modality, inputs)
        if self.joined:
            none = torch.zeros_like(features)
            features = torch.cat([features if name == modality else none for name in self.encoders], -1)
        elif self.trunk is not None:
            features = self.trunk(features)
        logits: Tensor = self.head_of(modality)(features)
        return logits

    def joint(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Return the logits ``(n, c)`` of all modalities: of a joined head its own, else the sum of the branches'."""
        if self.joined and self.head is not None:
            logits: Tensor = self.head(torch.cat([self.features(name, inputs[name]) for name in self.encoders], -1))
            return logits
        return torch.stack([self.branch(name, inputs[name]) for name in self.encoders]).sum(0)

    @torch.no_grad()
    def measured(
        self, inputs: Mapping[str, Tensor | Column], means: Means | None = None
    ) -> tuple[dict[str, Tensor], Tensor | None]:
        """Return logits ``(n, c)`` of every modality and of a joint head, without gradients, in evaluation mode.

        They are on the CPU. What lies in files is decoded a part at a time, by `means`; no example depends on what it
        stands with. Without a joint head the second is None.
        """
        parts, joint = [], []
        with _evaluated(self):
            for own in self._portions(inputs, Means() if means is None else means):
                parts.append({name: self.branch(name, own[name]).cpu() for name in self.encoders})
                if self.joined:
                    joint.append(self.joint(own).cpu())
        logits = {name: torch.cat([part[name] for part in parts]) for name in self.encoders}
        return logits, torch.cat(joint) if joint else None

    def logits(self, inputs: Mapping[str, Tensor | Column]) -> dict[str, Tensor]:
        """Return the first of what :meth:`measured` does."""
        return self.measured(inputs)[0]

    def _portions(self, inputs: Mapping[str, Tensor | Column], means: Means) -> Iterator[dict[str, Tensor]]:
        """Yield the examples on the network's device: all at once, or of columns so many at a time."""
        own = {name: inputs[name] for name in self.encoders}
        count = len(next(iter(own.values())))
        size = at_once(own.values(), AT_ONCE)
        portions = [in_order(values, size or count, means) for values in own.values()]
        for values in zip(*portions, strict=True):
            yield {name: each.to(self.device) for name, each in zip(own, values, strict=True)}

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.parameters()).device


def _widths(data: DataSet, modality: str) -> tuple[int, int]:
    """Return the width of an encoder's features, and what its head narrows them to, which may be the same."""
    if modality not in data.encoders:
        return FEATURES, FEATURES
    spec = data.encoders[modality]
    return spec.width, spec.width if spec.narrowed is None else spec.narrowed


def _common_width(data: DataSet, modalities: Sequence[str]) -> int:
    """Return the width that features have where modalities share something.

    Raises
    ------
    ValueError
        If it is not one.
    """
    widths = {name: _widths(data, name)[1] for name in modalities}
    if len(set(widths.values())) > 1:
        said = ", ".join(f"{name} {width}" for name, width in widths.items())
        raise ValueError(f"features are of unlike widths ({said}), expected one to share a head or a trunk")
    return next(iter(widths.values()))


def _encoder(data: DataSet, modality: str) -> nn.Module:
    if modality in data.encoders:
        return data.encoders[modality].make()
    kind = data.kinds[modality]
    if kind == "title":
        return TitleEncoder(data.vocabulary[modality])
    channels, *sizes = data.train.inputs[modality].shape[1:]
    if kind == "series" and sizes[0] < READINGS:
        raise ValueError(f"{modality} has series of {sizes[0]} readings, expected {READINGS} or more")
    return {"vector": DenseEncoder, "series": SeriesEncoder, "picture": PictureEncoder}[kind](channels)


@contextmanager
def _evaluated(model: nn.Module) -> Iterator[None]:
    """Hold a model in evaluation mode."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
