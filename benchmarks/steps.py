"""Rows of steps: the optimizer's side of SAM + SGD and of AdamW, with and without projection."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch

import igm_rs

from .peers import Copy, ForeachSAM, PackageSAM
from .problems import Streams, closure_for, parameters, shapes_of
from .rows import Case, Comparison, Ratio
from .setting import RHO, SGD, Setting
from .shapes import bert, resnet18, resnet50

IGM_SGD = "IGMOptimizer(SGD)"
PACKAGE = "pytorch_optimizer.SAM(SGD)"
COPY = "a copy that moves 36 B a parameter"
ADAMW: dict[str, Any] = {"lr": 1e-3, "weight_decay": 1e-2}

Shapes = Sequence[torch.Size | tuple[int, ...]]


def cases(setting: Setting) -> Iterator[Case]:
    """Yield the rows of steps."""
    yield Case("step.sam", "Steps", partial(_sam, setting))
    yield Case("step.projection", "Steps", partial(_projection, setting))
    yield Case("step.igm", "Steps", partial(_igm, setting))
    yield Case("step.small", "Steps", partial(_small, setting))
    yield Case("step.adamw", "Steps", partial(_adamw, setting))
    yield Case("step.sam_adamw", "Steps", partial(_sam_adamw, setting))
    yield Case("step.resnet50", "Steps", partial(_large, "ResNet50", shapes_of(resnet50, setting), setting))
    yield Case("step.bert", "Steps", partial(_large, "BERT-base", shapes_of(bert, setting), setting))


def sam_sides(shapes: Shapes, setting: Setting) -> dict[str, Callable[[], Any]]:
    """A SAM + SGD step of igm_rs and of the package, each on its own tensors, and the copy of as many bytes."""
    params, others = parameters(shapes, setting), parameters(shapes, setting)
    mine, theirs = closure_for(params), closure_for(others)
    ours = igm_rs.IGMOptimizer(torch.optim.SGD(params, **SGD), rho=RHO)
    package = PackageSAM(others)
    return {
        IGM_SGD: lambda: ours.step(mine),
        PACKAGE: lambda: package.step(theirs),
        COPY: Copy(36 * count(shapes), setting.device),
    }


def count(shapes: Shapes) -> int:
    """Return how many parameters these shapes have."""
    return sum(torch.Size(shape).numel() for shape in shapes)


def _named(what: str, shapes: Shapes) -> str:
    return f"{what}, {count(shapes) / 1e6:.1f} M parameters in {len(shapes)} tensors"


def _moved(shapes: Shapes) -> str:
    n = count(shapes)
    return (
        "momentum and weight decay; 36 B a parameter: the perturbation reads θ and g, writes θ + ε and the copy of θ "
        "(16 B); way back and step in one pass read the copy, g and the momentum, write θ and the momentum (20 B). The "
        f"norm of g before it reads 4 B more, {4 * n / 1e6:.0f} MB"
    )


def _sam(setting: Setting) -> Comparison:
    shapes = shapes_of(resnet18, setting)
    return Comparison(
        _named("SAM + SGD step", shapes),
        sam_sides(shapes, setting),
        [Ratio(IGM_SGD, PACKAGE, "≤", 0.4), Ratio(IGM_SGD, COPY, "≤", 1.3)],
        lambda: _moved(shapes),
        needs=lambda: {"bytes": 36 * count(shapes)},
    )


def _large(name: str, shapes: Shapes, setting: Setting) -> Comparison:
    return Comparison(
        _named(f"SAM + SGD step, {name} with its head", shapes),
        sam_sides(shapes, setting),
        [Ratio(IGM_SGD, PACKAGE, "≤"), Ratio(IGM_SGD, COPY, "≤")],
        lambda: _moved(shapes),
        needs=lambda: {"bytes": 36 * count(shapes)},
        blocks=4,
    )


def _projection(setting: Setting) -> Comparison:
    """SAM off: what looking at the gradient, features and T cost beside torch's own step."""
    mine, theirs = Streams.of(resnet18, 2, setting), Streams.of(resnet18, 2, setting)
    opt = mine.ours(torch.optim.SGD(mine.params, **SGD), rho=0.0)
    base = torch.optim.SGD(list(theirs.active.parameters()), **SGD)
    of_mine, of_theirs = mine.closure(), theirs.closure()
    peer = "torch.optim.SGD"
    n = count([p.shape for p in mine.active.parameters()])
    return Comparison(
        "SGD step with projection, SAM off, two ResNet18 streams",
        {IGM_SGD: lambda: opt.step(of_mine), peer: lambda: base.step(of_theirs)},
        [Ratio(IGM_SGD, peer, "≤", 1.1)],
        lambda: (
            f"one stream steps, {n / 1e6:.1f} M parameters, its head's three layers are projected and their features "
            "gathered; both sides run the head forward. SGD moves 20 B a parameter: it reads θ, g and the momentum, "
            "writes θ and the momentum"
        ),
        needs=lambda: {"bytes": 20 * n},
    )


def _igm(setting: Setting) -> Comparison:
    """The whole of Algorithm 1 around the second pass."""
    mine, theirs = Streams.of(resnet18, 2, setting), Streams.of(resnet18, 2, setting)
    opt = mine.ours(torch.optim.SGD(mine.params, **SGD), rho=RHO)
    package = PackageSAM(list(theirs.active.parameters()))
    of_mine, of_theirs = mine.closure(), theirs.closure()
    return Comparison(
        "IGM step: SAM, features and projection, two ResNet18 streams",
        {IGM_SGD: lambda: opt.step(of_mine), PACKAGE: lambda: package.step(of_theirs)},
        [Ratio(IGM_SGD, PACKAGE, "≤")],
        lambda: "Algorithm 1 with heads 512-256-64-6 beside plain SAM, which projects nothing",
        needs=lambda: {"bytes": 36 * count([p.shape for p in mine.active.parameters()])},
    )


def _small(setting: Setting) -> Comparison:
    shapes = [(8,)] * 124
    params, others = parameters(shapes, setting), parameters(shapes, setting)
    mine, theirs = closure_for(params), closure_for(others)
    ours, foreach = igm_rs.IGMOptimizer(torch.optim.SGD(params, **SGD), rho=RHO), ForeachSAM(others)
    peer = "SGD(foreach=True) + SAM with torch._foreach_*"
    return Comparison(
        "SAM + SGD step, 124 tensors of 8 elements",
        {IGM_SGD: lambda: ours.step(mine), peer: lambda: foreach.step(theirs)},
        [Ratio(IGM_SGD, peer, "≤", 1.0)],
        lambda: "momentum and weight decay; all overhead: Python, the boundary to Rust, launches",
    )


def _adamw(setting: Setting) -> Comparison:
    """No SAM and no projection: the way back from a failing step, and looking at the gradient."""
    shapes = shapes_of(resnet18, setting)
    peer = "torch.optim.AdamW"
    sides: dict[str, Callable[[], Any]] = {}
    for atomic in (True, False):
        params = parameters(shapes, setting)
        ours = igm_rs.IGMOptimizer(torch.optim.AdamW(params, **ADAMW), rho=0.0, atomic=atomic)
        closure = closure_for(params)
        sides[f"IGMOptimizer(AdamW, atomic={atomic})"] = partial(ours.step, closure)
    others = parameters(shapes, setting)
    base, of_theirs = torch.optim.AdamW(others, **ADAMW), closure_for(others)
    return Comparison(
        _named("AdamW step, no SAM, no projection", shapes),
        sides | {peer: lambda: base.step(of_theirs)},
        [Ratio(label, peer, "≤") for label in sides],
        lambda: "AdamW moves 28 B a parameter: it reads θ, g and both moments, writes all but g",
        needs=lambda: {"bytes": 28 * count(shapes)},
    )


def _sam_adamw(setting: Setting) -> Comparison:
    shapes = shapes_of(resnet18, setting)
    params, others = parameters(shapes, setting), parameters(shapes, setting)
    mine, theirs = closure_for(params), closure_for(others)
    ours = igm_rs.IGMOptimizer(torch.optim.AdamW(params, **ADAMW), rho=RHO)
    package = PackageSAM(others, torch.optim.AdamW, **ADAMW)
    label, peer = "IGMOptimizer(AdamW)", "pytorch_optimizer.SAM(AdamW)"
    return Comparison(
        _named("SAM + AdamW step", shapes),
        {label: lambda: ours.step(mine), peer: lambda: package.step(theirs)},
        [Ratio(label, peer, "≤")],
        lambda: "44 B a parameter: 16 of the perturbation, 28 of AdamW from the copy of θ",
        needs=lambda: {"bytes": 44 * count(shapes)},
    )
