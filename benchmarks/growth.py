"""How each cost grows: T with d and with rows, a step with parameters and with modalities; and the plots of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib as mpl
import torch
from matplotlib.figure import Figure as Canvas

from .peers import Copy, PackageSAM, released_projector
from .problems import Streams, shapes_of
from .projectors import DENSE, FACTORED, PEER, features, ours
from .setting import RHO, SGD, TAU, Setting
from .shapes import bert, resnet18, resnet50
from .steps import COPY, IGM_SGD, PACKAGE, count, sam_sides
from .timing import Work, interleave

Point = tuple[float, Callable[[], dict[str, Work]]]


@dataclass
class Growth:
    """Milliseconds of several sides along one quantity."""

    key: str
    title: str
    quantity: str
    logarithmic: bool
    cold: float = float("inf")
    """Points from here on run without a warm-up, as one run takes long."""
    series: dict[str, dict[float, float]] = field(default_factory=dict)
    runs: int = 0

    def told(self) -> dict[str, Any]:
        """Return the curve as it stands in the JSON file: for each side the points (x, ms)."""
        told = asdict(self)
        del told["cold"]
        return told | {"series": {label: list(points.items()) for label, points in self.series.items()}}


def growths(setting: Setting) -> Iterator[tuple[Growth, list[Point]]]:
    """Yield each curve, empty, with its points: where they stand, and how their sides are made."""
    rows = setting.batches
    wide = setting.width(2304)
    widths = sorted({setting.width(d) for d in (64, 128, 256, 512, 768, 1024, 1536, 2304, 3072, 4608)})
    yield (
        Growth("d", f"T from {rows} rows", "width of the layer, d", True, cold=3000),
        [(d, partial(_projector, d, rows, setting)) for d in widths],
    )
    many = sorted({setting.width(n) for n in (64, 128, 256, 512, 1024, 1536, 2048, 3072, 4608)})
    yield (
        Growth("rows", f"T at d = {wide}", "rows that the turn has brought", True),
        [(n, partial(_projector, wide, n, setting)) for n in many],
    )
    yield (
        Growth("parameters", "SAM + SGD step", "parameters", True),
        [(count(shapes), partial(sam_sides, shapes, setting)) for shapes in _sizes(setting)],
    )
    yield (
        Growth("modalities", "IGM step of one of several ResNet18 streams", "modalities", False),
        [(m, partial(_modalities, m, setting)) for m in (2, 3, 5)],
    )


def measure(growth: Growth, points: list[Point], setting: Setting, told: Callable[[str], None]) -> dict[str, Any]:
    """Measure the points one after the other, the sides of each interleaved; `told` hears of each point."""
    fewest = []
    setting = replace(setting, seconds=setting.seconds / 4)
    for x, build in points:
        told(f"{growth.quantity} {x:g}")
        times = interleave(build(), setting, setting.fewest(1), warm=x < growth.cold)
        for label, of_side in times.items():
            growth.series.setdefault(label, {})[x] = median(of_side)
            fewest.append(len(of_side))
    growth.runs = min(fewest)
    return growth.told()


def draw(curve: dict[str, Any], path: Path) -> None:
    """Draw one curve as a picture."""
    with mpl.rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
        canvas = Canvas(figsize=(7, 4.2), dpi=110, layout="constrained")
        axes = canvas.subplots()
        for (label, points), marker in zip(curve["series"].items(), "osd^v", strict=False):
            axes.plot(*zip(*points, strict=True), marker=marker, markersize=5, label=label)
        places = sorted({x for points in curve["series"].values() for x, _ in points})
        if curve["logarithmic"]:
            axes.set_xscale("log")
            axes.set_yscale("log")
        else:
            axes.set_ylim(bottom=0)
        if places[-1] < 100_000:  # short enough to be written at each point
            axes.set_xticks(places, labels=[f"{x:g}" for x in places])
            axes.minorticks_off()
        axes.set_xlabel(curve["quantity"])
        axes.set_ylabel("ms, median")
        axes.set_title(curve["title"])
        axes.grid(visible=True, which="major", alpha=0.3)
        axes.legend(frameon=False)
        canvas.savefig(path, metadata={"Software": None})


def _projector(d: int, rows: int, setting: Setting) -> dict[str, Work]:
    seen = features(d, rows, setting)
    exact = seen.T @ seen
    single = exact.float()
    dense, factored = ours(seen, exact)
    sides: dict[str, Work] = {DENSE: dense, PEER: lambda: released_projector(single, TAU)}
    if rows < d:
        sides[FACTORED] = factored
    return sides


def _sizes(setting: Setting) -> list[list[torch.Size]]:
    """The parameters of four networks, and of parts of the smallest: its head, and its first tensors."""
    streams = [shapes_of(make, setting) for make in (resnet18, resnet50, bert)]
    smallest = streams[0]
    return sorted([smallest[:6], smallest[-6:], smallest[:30], smallest[:45], *streams], key=count)


def _modalities(m: int, setting: Setting) -> dict[str, Work]:
    """A step of one stream, its T from the stream before it or from all others; SAM of all parameters together."""
    sides: dict[str, Work] = {}
    for sources in ("previous", "others"):
        streams = Streams.of(resnet18, m, setting)
        opt = streams.ours(torch.optim.SGD(streams.params, **SGD), rho=RHO, sources=sources)
        closure = streams.closure()
        sides[f"{IGM_SGD}, T of {sources}"] = partial(opt.step, closure)
    streams = Streams.of(resnet18, m, setting)
    package, closure = PackageSAM(streams.params), streams.closure()
    sides[PACKAGE] = lambda: package.step(closure)
    moved = 36 * count([p.shape for p in streams.active.parameters()])
    sides[COPY] = Copy(moved, setting.device)
    return sides
