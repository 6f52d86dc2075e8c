"""The command ``python -m igm_rs.experiments``: settings chosen, every method trained, tables and pictures made."""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import igm_rs

try:
    from . import figures, tables
    from .data import DATASETS, DataSet, load
    from .methods import METHODS, Row, Settings, rows
    from .protocol import protocol
    from .running import (
        FIRST_SEED,
        LEARNING_RATES,
        TUNING_SEEDS,
        UNTUNED_RATE,
        Choice,
        Job,
        Outcome,
        ProcessLostError,
        choose,
        run_all,
    )
except ModuleNotFoundError as missing:
    package = str(missing.name).split(".")[0]
    if package in ("matplotlib", "torchmetrics", "tqdm"):
        sys.exit(f"error: the experiments need {package}: pip install 'igm-rs[experiments]'")
    raise

__all__ = ["main"]

STEPS = 600
"""Gradient steps of each modality, unless told otherwise."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status: 0; 1 after a failure; 130 after an interrupt."""
    options = _parser().parse_args(arguments)
    try:
        sets = [load(name, options.data) for name in options.datasets]
        options.out.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    try:
        _run(sets, options)
    except ProcessLostError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted: no results were written", file=sys.stderr)
        return 130
    return 0


def _run(sets: Sequence[DataSet], options: argparse.Namespace) -> None:
    """Choose, train, sum up, write, print."""
    began = time.monotonic()
    lines = [(data, row) for data in sets for row in rows(options.methods, data.modalities)]
    settings = Settings(options.steps, scope=options.scope)
    words = protocol(settings, options.seeds, options.workers, tuned=options.tuning)
    print("\n\n".join(words), flush=True)
    choices = _choices(lines, settings, options)
    jobs = [
        Job(data.name, row, settings, choice.learning_rate, seed, choice.keep)
        for (data, row), choice in zip(lines, choices, strict=True)
        for seed in range(FIRST_SEED, FIRST_SEED + options.seeds)
    ]
    outcomes = run_all(jobs, options.data, options.workers, "training")
    parts: dict[str, list[tables.Line]] = {data.name: [] for data in sets}
    for at, ((data, row), choice) in enumerate(zip(lines, choices, strict=True)):
        begin = at * options.seeds
        runs = outcomes[begin : begin + options.seeds]
        parts[data.name].append((row, settings, choice, runs))
    summed = [tables.dataset_results(data, parts[data.name]) for data in sets]
    results = {
        "protocol": words,
        "options": {name: value for name, value in vars(options).items() if not isinstance(value, Path)},
        "versions": _versions(),
        "seconds": round(time.monotonic() - began, 1),
        "datasets": summed,
    }
    paths = [*tables.write(options.out, results), *figures.write(options.out, summed)]
    for part in summed:
        print(f"\n{part['title']}\n\n{tables.plain(*tables.table(part))}")
        print("\n".join(tables.remarks(part)))
    print(f"\n{results['seconds']:.0f} s. Written: {', '.join(map(str, paths))}")


def _choices(lines: Sequence[tuple[DataSet, Row]], settings: Settings, options: argparse.Namespace) -> list[Choice]:
    """Choose learning rate and round of every row on validation, or take the default and the last round."""
    if not options.tuning:
        last = len(settings.turn_lengths)
        return [Choice(UNTUNED_RATE, last, {})] * len(lines)
    jobs = [
        Job(data.name, row, settings, rate, seed, None)
        for data, row in lines
        for rate in LEARNING_RATES
        for seed in TUNING_SEEDS
    ]
    outcomes = run_all(jobs, options.data, options.workers, "choosing settings")
    found: dict[tuple[str, Row], list[tuple[float, Outcome]]] = {}
    for job, outcome in zip(jobs, outcomes, strict=True):
        found.setdefault((job.dataset, job.row), []).append((job.learning_rate, outcome))
    return [choose(found[data.name, row]) for data, row in lines]


def _versions() -> dict[str, str]:
    """Versions of what made the numbers."""
    others = {name: version(name) for name in ("torch", "numpy", "torchmetrics")}
    return {"igm-rs": igm_rs.__version__, "Python": platform.python_version(), **others}


def _parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m igm_rs.experiments",
        description="Train IGM and its alternatives on recorded data, all tuned alike; make tables and pictures.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder with watch.npz and mfeat.npz")
    parser.add_argument("--out", type=Path, default=Path("results/demo"), help="folder for tables and pictures")
    parser.add_argument("--seeds", type=_count, default=3, help="final runs of every method")
    parser.add_argument("--steps", type=_count, default=STEPS, help="gradient steps that each modality gets")
    parser.add_argument("--datasets", nargs="+", choices=list(DATASETS), default=list(DATASETS), help="data sets")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS), help="methods")
    parser.add_argument("--workers", type=_count, default=_cores(), help="runs side by side, one thread each")
    parser.add_argument(
        "--scope", type=_share, help="project this share of each modality's parameters, 0 to 1, in place of the heads"
    )
    parser.add_argument(
        "--no-tuning", dest="tuning", action="store_false", help="take one learning rate and the last round for all"
    )
    return parser


def _count(text: str) -> int:
    """Read a positive integer."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive integer")
    return value


def _share(text: str) -> float:
    """Read a number from 0 to 1."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a share from 0 to 1")
    return value


def _cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


if __name__ == "__main__":
    sys.exit(main())
