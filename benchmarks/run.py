"""The command line: measures every row, prints the tables, writes JSON, plots and the page."""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # the allocator's profiler complains where there is no GPU

import torch
from tqdm import tqdm

from . import covariances, growth, page, projectors, steps
from .facts import facts
from .figures import ON_THE_CPU_PAGE, figures
from .rows import Case, Figure
from .setting import Setting

Task = Callable[[Callable[[str], None]], dict[str, Any]]
"""Makes one entry of the results; hears where to tell how far it is."""


def main() -> None:
    """Measure on one device; with ``--only`` print alone, else write everything into the folder given."""
    arguments = _arguments()
    setting = Setting(torch.device(arguments.device), arguments.quick, 0.02 if arguments.quick else arguments.seconds)
    if setting.cuda and not torch.cuda.is_available():
        sys.exit("benchmarks: --device cuda, but torch sees no CUDA device; expected a GPU and a torch built for it")
    begin = time.perf_counter()
    results: dict[str, Any] = facts(setting) | _measured(setting, arguments.only)
    results["minutes"] = (time.perf_counter() - begin) / 60
    print(page.table(results["rows"]))
    print(page.figure_table(results["figures"]))
    if not arguments.only:
        _write(arguments.out, results, setting)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where everything runs")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="where the results go")
    parser.add_argument("--seconds", type=float, default=3.0, help="about how long each side of a row runs")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: shows that everything runs, measures nothing")
    parser.add_argument("--only", default="", help="only rows whose key contains this; prints, writes nothing")
    return parser.parse_args()


def _measured(setting: Setting, only: str) -> dict[str, Any]:
    """Run everything, with one progress bar over rows, figures and points of curves."""
    results: dict[str, Any] = {
        "rows": [],
        "figures": [],
        "growth": [],
        "left_out": ON_THE_CPU_PAGE if setting.cuda else {},
    }
    work = [(key, kind, do) for key, kind, do in _work(setting) if only in key]
    with tqdm(total=len(work), unit="row") as bar:
        for key, kind, do in work:
            bar.set_postfix_str(key)
            results[kind].append(do(bar.set_postfix_str))
            gc.collect()  # what one row held is not in the way of the next
            bar.update()
    return results


def _work(setting: Setting) -> Iterator[tuple[str, str, Task]]:
    """Yield the key of each row, figure and curve, the list that it belongs to, and how it is made."""
    for module in (steps, covariances, projectors):
        for case in module.cases(setting):
            yield case.key, "rows", partial(_row, case, setting)
    for key, find in figures(setting):
        yield key, "figures", partial(_figure, find)
    for curve, points in growth.growths(setting):
        yield f"growth.{curve.key}", "growth", partial(growth.measure, curve, points, setting)


def _row(case: Case, setting: Setting, _: Callable[[str], None]) -> dict[str, Any]:
    return case.build().measure(case.key, case.section, setting)


def _figure(find: Callable[[], Figure], _: Callable[[str], None]) -> dict[str, Any]:
    return find().told()


def _write(out: Path, results: dict[str, Any], setting: Setting) -> None:
    """Write JSON and plots of this run, and the page of this run and of the last other ones."""
    plots = out / "plots"
    plots.mkdir(parents=True, exist_ok=True)
    for curve in results["growth"]:
        growth.draw(curve, plots / f"{'cuda-' if setting.cuda else ''}{curve['key']}.png")
    text = json.dumps(results, indent=2, ensure_ascii=False) + "\n"
    (out / page.RESULTS[setting.device.type]).write_text(text, encoding="utf-8")
    page.write(out)


if __name__ == "__main__":
    main()
