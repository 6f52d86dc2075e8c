"""Where and with what was measured: date, commit, versions, processor, threads, and what the machine can do."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch

import igm_rs

from .setting import Setting


def facts(setting: Setting) -> dict[str, Any]:
    """Return what the figures depend on."""
    return {
        "date": date.today().isoformat(),
        "revision": revision(),
        "device": torch.cuda.get_device_name(setting.device) if setting.cuda else processor(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "quick": setting.quick,
        "block_s": setting.block,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "igm_rs": igm_rs.__version__,
        "pytorch_optimizer": version("pytorch_optimizer"),
        "transformers": version("transformers"),
        "copy_gb_per_s": copy_speed(setting) / 1e9,
        "float32_gflops": product_speed(torch.float32, setting) / 1e9,
        "float64_gflops": product_speed(torch.float64, setting) / 1e9,
    }


def copy_speed(setting: Setting) -> float:
    """Bytes a second that a copy of 256 MB moves (read and written), the median of 9."""
    source = torch.ones(1_000_000 if setting.quick else 64_000_000, device=setting.device)
    target = torch.empty_like(source)
    return 2 * source.numel() * 4 / _time(lambda: target.copy_(source), setting)


def product_speed(dtype: torch.dtype, setting: Setting) -> float:
    """Floating-point operations a second of a matrix product, n = 2048, the median of 9."""
    n = 64 if setting.quick else 2048
    matrix = torch.randn(n, n, dtype=dtype, device=setting.device)
    return 2 * n**3 / _time(lambda: matrix @ matrix, setting)


def processor() -> str:
    """Return the processor's name as the system tells it."""
    if platform.system() == "Linux":
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def revision() -> str:
    """Return the commit that was measured, marked when files have changed since."""
    if shutil.which("git") is None:
        return "unknown"
    done = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def _time(work: Any, setting: Setting) -> float:
    times = []
    work()
    for _ in range(9):
        if setting.cuda:
            torch.cuda.synchronize(setting.device)
        start = time.perf_counter()
        work()
        if setting.cuda:
            torch.cuda.synchronize(setting.device)
        times.append(time.perf_counter() - start)
    return median(times)
