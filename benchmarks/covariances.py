"""Rows of Ȳ, Eq. (2): what a turn's batches cost, against an outer product at every batch."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch.nn.functional import unfold

from igm_rs import _igm_rs
from igm_rs._covariance import Covariance

from .peers import released_covariance
from .rows import Case, Comparison, Ratio
from .setting import Setting
from .shapes import Conv, convolutions

PEER = "outer product at every batch"
GATHERED = "gathered, as T needs it"
MATRIX = "gathered, and Ȳ as a matrix"

_TURNS = (("head", (512, 256, 64), 7.0), ("2304", (2304,), 40.0), ("4608", (4608,), 90.0))
"""Layers by their width, and the times asked for."""


def cases(setting: Setting) -> Iterator[Case]:
    """Yield a turn of a head, of two wide layers, and a batch of all convolutions of a ResNet18."""
    for key, widths, limit in _TURNS:
        widths_here = [setting.width(d) for d in widths]
        yield Case(f"covariance.{key}", "Ȳ", partial(_turn, widths_here, limit, setting))
    yield Case("covariance.convolutions", "Ȳ", partial(_convolutions, setting))


def _turn(widths: list[int], limit: float, setting: Setting) -> Comparison:
    """A whole turn: the features of 558 batches of 12 pass by, and the mean of each enters Ȳ."""
    generator = torch.Generator().manual_seed(0)
    batches = [
        [torch.randn(setting.batch, d, generator=generator).to(setting.device) for _ in range(setting.batches)]
        for d in widths
    ]

    def gathered() -> list[Covariance]:
        covariances = [Covariance(d) for d in widths]
        for covariance, of_layer in zip(covariances, batches, strict=True):
            for features in of_layer:
                covariance.add(_igm_rs.batch_rows(features, "mean"))
        return covariances

    def needed() -> list[torch.Tensor | None]:
        """What T is made of: the rows where there are fewer than d, else Ȳ as a matrix."""
        return [one.rows if one.matrix is None and one.used < one.d else one.value() for one in gathered()]

    shown = "-".join(map(str, widths))
    moved = sum(setting.batches * d * d * 16 for d in widths)
    return Comparison(
        f"Ȳ of a turn, {'head ' if len(widths) > 1 else 'd = '}{shown}",
        {
            GATHERED: needed,
            MATRIX: lambda: [covariance.value() for covariance in gathered()],
            PEER: lambda: [released_covariance(of_layer) for of_layer in batches],
        },
        [Ratio(GATHERED, PEER, "≥", limit), Ratio(MATRIX, PEER, "≥")],
        lambda: (
            f"{setting.batches} batches of {setting.batch}. While there are fewer rows than d only the rows are kept, "
            "as T is made from them; else one product serves up to 1024 batches, and Ȳ is a matrix. The peer moves "
            f"{moved / 1e9:.3g} GB: it writes each outer product, reads it again, reads and writes the sum. Ours reads "
            "the features and writes their means"
        ),
        blocks=3 if max(widths) > 4000 else 4,
        warm=max(widths) < 4000,
        needs=lambda: {"bytes": sum(setting.batches * d * (4 * setting.batch + setting.kept.itemsize) for d in widths)},
    )


def _convolutions(setting: Setting) -> Comparison:
    """One batch of 12 pictures of 224 × 224 at each convolution: batch mean, then each position is a row."""
    convs = convolutions(setting)
    generator = torch.Generator().manual_seed(0)
    inputs = [
        torch.randn(setting.batch, conv.module.in_channels, *conv.inputs, generator=generator).to(setting.device)
        for conv in convs
    ]

    def positions(conv: Conv, features: torch.Tensor) -> torch.Tensor:
        module = conv.module
        unfolded = unfold(
            features.mean(0, keepdim=True), module.kernel_size, module.dilation, conv.padding, module.stride
        )
        return unfolded[0].T

    def gathered() -> list[torch.Tensor | None]:
        values = []
        for conv, features in zip(convs, inputs, strict=True):
            covariance = Covariance(conv.d)
            covariance.add(_rows_of(conv, features))
            values.append(covariance.value())
        return values

    def theirs() -> list[torch.Tensor]:
        totals = []
        for conv, features in zip(convs, inputs, strict=True):
            total = torch.zeros(conv.d, conv.d, device=setting.device)
            rows = positions(conv, features)
            total += torch.mm(rows.T, rows)
            totals.append(total)
        return totals

    kept = str(setting.kept).removeprefix("torch.")
    flops = sum(2 * conv.positions * conv.d**2 for conv in convs)
    peer = "F.unfold + a float32 product"
    return Comparison(
        "Ȳ of one batch, all convolutions of a ResNet18",
        {MATRIX: gathered, peer: theirs},
        [Ratio(MATRIX, peer, "≥")],
        lambda: (
            f"{len(convs)} layers, {sum(conv.positions for conv in convs)} rows; ours adds in {kept}, the peer in "
            "float32. Ȳ is symmetric, so half of the operations would do"
        ),
        blocks=4,
        needs=lambda: {"flops": flops},
    )


def _rows_of(conv: Conv, features: torch.Tensor) -> torch.Tensor:
    """The rows of a batch as igm_rs makes them."""
    module = conv.module
    padding = [(side, side) for side in conv.padding]
    return _igm_rs.conv_rows(
        features, "mean", list(module.kernel_size), list(module.stride), padding, list(module.dilation), "zeros"
    )
