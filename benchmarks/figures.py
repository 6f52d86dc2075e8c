"""What is no time of two sides: extra memory of a step, calls into Rust, the time of an import."""

from __future__ import annotations

import compileall
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.autograd.profiler import profile

import igm_rs

from .peers import PackageSAM
from .problems import Streams, closure_for, parameters
from .rows import Figure
from .setting import RHO, SGD, Setting
from .shapes import resnet18
from .steps import ADAMW

ON_THE_CPU_PAGE = {
    "calls.20": "the same calls on every device; counted on the CPU",
    "calls.200": "the same calls on every device; counted on the CPU",
    "import": "needs no device; measured on the CPU",
}
"""The figures that a run on a GPU leaves out, and why."""


def figures(setting: Setting) -> Iterator[tuple[str, Callable[[], Figure]]]:
    """Yield each figure's key, and how it is found."""
    yield "memory.sgd", lambda: _memory("memory.sgd", torch.optim.SGD, SGD, setting)
    yield "memory.adamw", lambda: _memory("memory.adamw", torch.optim.AdamW, ADAMW, setting)
    if not setting.cuda:
        yield "calls.20", lambda: _calls(20, None, setting)
        yield "calls.200", lambda: _calls(200, len(calls(20, setting)), setting)
        yield "import", lambda: _import_time(setting)


def _memory(key: str, base: type[torch.optim.Optimizer], options: dict[str, Any], setting: Setting) -> Figure:
    """The most that two steps hold beside weights, gradients, the base's state, T's and features gathered before."""
    streams = Streams.of(resnet18, 2, setting)
    closure = streams.closure()
    closure()
    ready = base(streams.params, **options)
    ready.step()  # its own state is there
    opt = streams.ours(ready, rho=RHO)
    ours = peak(lambda: opt.step(closure), setting)
    copy = sum(p.numel() * p.element_size() for p in streams.active.parameters())
    projectors = sum(T.numel() * T.element_size() for mine in opt.projectors.values() for T in mine.values())
    package = PackageSAM(list(streams.active.parameters()), base, **options)
    closure()
    package.optimizer.base_optimizer.step()
    theirs = peak(lambda: package.step(closure), setting)
    return Figure(
        key,
        f"extra memory of an IGM step around {base.__name__}",
        ours / (copy + projectors),
        "of one copy of the active parameters + the T's",
        "≤",
        1.0,
        f"{ours / 1e6:.1f} MB at most at once, of {copy / 1e6:.1f} MB for a copy and {projectors / 1e6:.1f} MB of T's; "
        f"pytorch_optimizer.SAM({base.__name__}) needs {theirs / 1e6:.1f} MB. Counted by torch's allocator over two "
        "steps, so temporaries count",
    )


def peak(step: Callable[[], Any], setting: Setting) -> int:
    """Return the most bytes that two steps hold at once above what was there before them, as the allocator tells."""
    if setting.cuda:
        torch.cuda.synchronize(setting.device)
        torch.cuda.reset_peak_memory_stats(setting.device)
        before = torch.cuda.memory_allocated(setting.device)
        for _ in range(2):
            step()
        torch.cuda.synchronize(setting.device)
        return torch.cuda.max_memory_allocated(setting.device) - before
    with profile(profile_memory=True) as watched:
        for _ in range(2):
            step()
    held = most = 0
    events = [event for event in watched.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def _calls(tensors: int, limit: float | None, setting: Setting) -> Figure:
    """Calls of functions of the compiled module in one step, once the optimizer has settled."""
    called = calls(tensors, setting)
    return Figure(
        f"calls.{tensors}",
        f"calls into Rust of a SAM + SGD step, {tensors} parameters",
        len(called),
        "calls",
        "≤",
        limit,
        f"{', '.join(sorted(set(called)))}" + ("" if limit is None else "; asked for: as many as for 20 parameters"),
    )


def calls(tensors: int, setting: Setting) -> list[str]:
    """Return the names of the compiled functions that one step of so many parameters calls."""
    params = parameters([(8,)] * tensors, setting)
    opt = igm_rs.IGMOptimizer(torch.optim.SGD(params, **SGD), rho=RHO)
    closure = closure_for(params)
    for _ in range(2):
        opt.step(closure)
    called: list[str] = []

    def see(frame: Any, event: str, function: Any) -> None:
        if event == "c_call" and str(getattr(function, "__module__", "")).endswith("_igm_rs"):
            called.append(function.__name__)

    before = sys.getprofile()
    sys.setprofile(see)
    try:
        opt.step(closure)
    finally:
        sys.setprofile(before)
    return called


def _import_time(setting: Setting) -> Figure:
    """Time of `import igm_rs` in fresh processes in which torch has been imported."""
    compileall.compile_dir(str(Path(igm_rs.__file__).parent), quiet=2)  # as an installation does
    code = "import time, torch; start = time.perf_counter(); import igm_rs; print(time.perf_counter() - start)"
    times = [
        float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout) * 1e3
        for _ in range(setting.fewest(7))
    ]
    return Figure(
        "import",
        "import of igm_rs, once torch is imported",
        median(times),
        "ms",
        "≤",
        50.0,
        f"median of {len(times)} fresh processes, {min(times):.0f} to {max(times):.0f} ms",
    )
