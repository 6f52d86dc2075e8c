"""How time is taken: blocks of all sides in turn, in changing order, each run for itself."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from statistics import median, quantiles
from typing import Any

import torch

from .setting import Setting

Work = Callable[[], Any]

_QUEUED = 16
"""Runs that may wait on a GPU before the host waits for them."""


def interleave(
    sides: Mapping[str, Work], setting: Setting, fewest: int, *, warm: bool = True
) -> dict[str, list[float]]:
    """Run blocks of all sides in turn for about ``setting.seconds`` per side; return each run's milliseconds.

    Unless `warm` is False, each side runs once before, unmeasured.
    """
    times: dict[str, list[float]] = {label: [] for label in sides}
    if warm:
        for work in sides.values():
            work()
    begin = time.perf_counter()
    blocks = 0
    while blocks < fewest or time.perf_counter() - begin < setting.seconds * len(sides):
        order = list(sides) if blocks % 2 else list(sides)[::-1]
        for label in order:
            times[label] += _block_cuda(sides[label], setting) if setting.cuda else _block(sides[label], setting.block)
        blocks += 1
    return times


def summary(times: list[float]) -> dict[str, float]:
    """Return median, interquartile range and number of runs."""
    quarters = quantiles(times) if len(times) > 1 else [times[0]] * 3
    return {"ms": median(times), "iqr_ms": quarters[2] - quarters[0], "runs": len(times)}


def _block(work: Work, seconds: float) -> list[float]:
    times = []
    block = start = time.perf_counter()
    while start - block < seconds:
        work()
        end = time.perf_counter()
        times.append((end - start) * 1e3)
        start = end
    return times


def _block_cuda(work: Work, setting: Setting) -> list[float]:
    """A block on a GPU: an event before and after each run, read when the device has come to rest."""
    times = []
    torch.cuda.synchronize(setting.device)
    block = time.perf_counter()
    while time.perf_counter() - block < setting.block:
        events = []
        for _ in range(_QUEUED):
            begin, end = (torch.Event(setting.device, enable_timing=True) for _ in range(2))
            begin.record()
            work()
            end.record()
            events.append((begin, end))
            if time.perf_counter() - block >= setting.block:
                break
        torch.cuda.synchronize(setting.device)
        times += [begin.elapsed_time(end) for begin, end in events]
    return times
