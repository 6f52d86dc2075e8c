"""A modality that comes later: what the first view of ``mfeat`` forgets while a shared trunk learns the others.

``python -m igm_rs.experiments.later`` runs it. Each view has an input layer and a classifier of its own; the trunk
between them is shared. The views are trained one after another; each but the first is taken in by ``add_modality``.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import copy
import json
import math
import multiprocessing
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, Literal

import torch
from torch import Tensor, nn

import igm_rs

from .extra import what_to_install

try:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from tqdm import tqdm

    from igm_rs.analysis.drawing import BLUE, GREY, ORANGE

    from .data import DataSet, load
    from .evaluation import accuracy
    from .feeding import batch_stream
    from .grids import markdown
    from .running import cores, count
    from .sets import ARCHIVES
    from .statistics import half_width
    from .store import versions
except ModuleNotFoundError as missing:
    sys.exit(what_to_install(missing))

__all__ = ["METHODS", "Later", "Method", "Outcome", "Setting", "main", "run"]

WIDTH = 64
"""Of the trunk: its input, its hidden layer and its output."""

RATES = (0.01, 0.03, 0.1, 0.3)
"""Learning rates tried for every method."""

ALPHAS = (10.0, 30.0, 100.0)
"""Strengths tried for the ridge projector."""

STEPS = 600
"""Gradient steps of each view, unless told otherwise."""

BATCH, MOMENTUM = 32, 0.9

TUNING_SEEDS, FIRST_SEED = (1000, 1001), 100
"""Of the runs that choose the settings; of the first final run."""

EDGE: dict[str, Any] = {"markeredgecolor": "black", "markeredgewidth": 0.6}
"""Of the dots that stand for means."""


@dataclass(frozen=True)
class Method:
    """One way of training the views after one another.

    Attributes
    ----------
    key, label : str
        In the files; in table and picture.
    options : mapping
        Of :class:`igm_rs.IGMOptimizer`.
    trunk : {"shared", "frozen", "own"}
        Trained by all views; by the first only; a trunk for each view.
    alphas : sequence of float
        Strengths tried, for the ridge projector.
    """

    key: str
    label: str
    options: Mapping[str, Any] = field(default_factory=dict)
    trunk: Literal["shared", "frozen", "own"] = "shared"
    alphas: Sequence[float | None] = (None,)


NONE: dict[str, Any] = {"projector": "identity"}
FULL: dict[str, Any] = {"features": "samples", "augment_bias": True, "sources": "earlier"}
FLAT: dict[str, Any] = {"tau": 100.0, **FULL}

METHODS = {
    method.key: method
    for method in (
        Method("none", "no projection", NONE),
        Method("paper", "flat, τ = 0.4, batch means", {"tau": 0.4}),
        Method("flat", "flat, τ = 100", FLAT),
        Method("ridge", "ridge", {"projector": "ridge", **FULL}, alphas=ALPHAS),
        Method("random", "flat, τ = 100, random basis", {"control": "random", **FLAT}),
        Method("scalar", "flat, τ = 100, scalar", {"control": "scalar", **FLAT}),
        Method("frozen", "trunk frozen after the first view", NONE, "frozen"),
        Method("own", "a trunk for each view", NONE, "own"),
    )
}
"""Every method by key, in the order of the table."""


@dataclass(frozen=True)
class Setting:
    """What a run is made with; `strength` is the ridge projector's α."""

    method: str
    rate: float
    strength: float | None
    seed: int
    steps: int
    final: bool


@dataclass(frozen=True)
class Outcome:
    """Share of correct predictions, in [0, 1], by view: after its own training, and after all training.

    Of the validation split, or for a final run of the test split. `cosine` is that of a projected layer's gradient
    before and after T, the mean over the last steps of the later views; None where nothing was projected.
    """

    after_own: dict[str, float]
    after_all: dict[str, float]
    cosine: float | None

    @property
    def forgetting(self) -> float:
        """What the first view has lost since its own training."""
        first = next(iter(self.after_own))
        return self.after_own[first] - self.after_all[first]

    @property
    def mean(self) -> float:
        """Mean of all views, after all training."""
        return fmean(self.after_all.values())


class Later(nn.Module):
    """An input layer and a classifier for each view, and a trunk, shared or one for each."""

    def __init__(self, widths: Mapping[str, int], classes: int, *, own_trunks: bool, seed: int) -> None:
        super().__init__()
        self.inputs, self.trunks, self.classifiers = nn.ModuleDict(), nn.ModuleDict(), nn.ModuleDict()
        with torch.random.fork_rng(devices=[]):
            for place, (view, width) in enumerate(widths.items()):
                torch.manual_seed(1000 * seed + place)
                self.inputs[view] = nn.Sequential(nn.Linear(width, WIDTH), nn.ReLU())
                self.classifiers[view] = nn.Linear(WIDTH, classes)
                trunk = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU())
                self.trunks[view] = trunk if own_trunks or place == 0 else next(iter(self.trunks.values()))

    def forward(self, view: str, values: Tensor) -> Tensor:
        """Return the logits ``(n, c)``."""
        logits: Tensor = self.classifiers[view](self.trunks[view](self.inputs[view](values)))
        return logits


def run(data: DataSet, setting: Setting) -> Outcome:
    """Train the views after one another and measure each; the test split is opened once, when all is trained."""
    method, views = METHODS[setting.method], data.modalities
    widths = {view: data.train.inputs[view].shape[1] for view in views}
    model = Later(widths, data.classes, own_trunks=method.trunk == "own", seed=setting.seed)
    strength = {} if setting.strength is None else {"alpha": setting.strength}
    optimizer: igm_rs.IGMOptimizer | None = None
    snapshots: dict[str, Later] = {}
    cosines: list[float] = []
    for view in views:
        members = [model.inputs[view], model.classifiers[view]]
        if optimizer is None or method.trunk != "frozen":
            members.append(model.trunks[view])
        if optimizer is None:
            held = [p for member in members for p in member.parameters()]
            base = torch.optim.SGD(held, lr=setting.rate, momentum=MOMENTUM)
            options = {"rho": 0.0, "reset": "momentum", **method.options, **strength}
            optimizer = igm_rs.IGMOptimizer(base, {view: members}, heads={view: model.trunks[view]}, **options)
        elif method.trunk == "shared":
            optimizer.add_modality(view, members, head=model.trunks[view])
        else:  # nothing is projected
            optimizer.add_modality(view, members, head=model.classifiers[view], sources=[])
        _train(model, optimizer, view, data, setting)
        if view != views[0]:
            cosines += [layer["cosine"] for layer in optimizer.last_stats["projected"].values()]
        snapshots[view] = copy.deepcopy(model)
    split = data.open_test() if setting.final else data.validation
    return Outcome(
        {view: _accuracy(snapshot, view, split.inputs[view][:], split.labels) for view, snapshot in snapshots.items()},
        {view: _accuracy(model, view, split.inputs[view][:], split.labels) for view in views},
        fmean(cosines) if cosines else None,
    )


def _train(model: Later, optimizer: igm_rs.IGMOptimizer, view: str, data: DataSet, setting: Setting) -> None:
    """Train one view, with the learning rate on half a cosine."""
    inputs, labels = data.train.inputs[view], data.train.labels
    stream = batch_stream(len(labels), BATCH, setting.seed)
    with optimizer.turn(view):
        for step in range(setting.steps):
            for group in optimizer.param_groups:
                group["lr"] = setting.rate * 0.5 * (1 + math.cos(math.pi * step / setting.steps))
            chosen = next(stream)
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(view, inputs[chosen]), labels[chosen])
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()


@torch.no_grad()
def _accuracy(model: Later, view: str, inputs: Tensor, labels: Tensor) -> float:
    return accuracy(model(view, inputs), labels)


@cache
def _loaded(folder: Path) -> DataSet:
    return load("mfeat", folder)


def _run(setting: Setting, folder: Path) -> Outcome:
    """Do a run in a process of its own, on one thread."""
    torch.set_num_threads(1)
    data = _loaded(folder)
    return run(data if setting.final else data.without_test(), setting)


def _run_all(settings: Sequence[Setting], folder: Path, workers: int, what: str) -> list[Outcome]:
    """Do all runs, side by side, with one bar; the outcomes are in the order of `settings`."""
    context = multiprocessing.get_context("spawn")
    with (
        concurrent.futures.ProcessPoolExecutor(min(workers, len(settings)), context) as pool,
        tqdm(total=len(settings), desc=what, unit="run", dynamic_ncols=True) as bar,
    ):
        futures = {pool.submit(_run, setting, folder): setting for setting in settings}
        try:
            for future in concurrent.futures.as_completed(futures):
                bar.set_postfix_str(
                    f"{METHODS[futures[future].method].label}, {future.result().mean:.1%}", refresh=False
                )
                bar.update()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
        return [future.result() for future in futures]


def _choose(folder: Path, steps: int, workers: int) -> dict[str, Setting]:
    """Return for each method the settings whose mean over views and seeds is the best on validation."""
    tried = [
        Setting(method.key, rate, strength, seed, steps, final=False)
        for method in METHODS.values()
        for rate in RATES
        for strength in method.alphas
        for seed in TUNING_SEEDS
    ]
    found: dict[str, dict[tuple[float, float | None], list[float]]] = {key: {} for key in METHODS}
    for setting, outcome in zip(tried, _run_all(tried, folder, workers, "choosing settings"), strict=True):
        found[setting.method].setdefault((setting.rate, setting.strength), []).append(outcome.mean)
    best = {key: max(of, key=lambda each: fmean(of[each])) for key, of in found.items()}
    return {key: Setting(key, rate, strength, 0, steps, final=True) for key, (rate, strength) in best.items()}


def results(folder: Path, seeds: int, steps: int, workers: int) -> dict[str, Any]:
    """Choose settings, run all methods, and sum up in plain values."""
    began = time.monotonic()
    chosen = _choose(folder, steps, workers)
    final = [
        Setting(key, one.rate, one.strength, seed, steps, final=True)
        for key, one in chosen.items()
        for seed in range(FIRST_SEED, FIRST_SEED + seeds)
    ]
    runs: dict[str, list[Outcome]] = {}
    for setting, outcome in zip(final, _run_all(final, folder, workers, "final runs"), strict=True):
        runs.setdefault(setting.method, []).append(outcome)
    rows = []
    for key, mine in runs.items():
        beside = [one.mean - other.mean for one, other in zip(mine, runs["none"], strict=True)]
        rows.append(
            {
                "key": key,
                "label": METHODS[key].label,
                "learning_rate": chosen[key].rate,
                "alpha": chosen[key].strength,
                "cosine": None if mine[0].cosine is None else fmean(one.cosine or 0.0 for one in mine),
                "forgetting": [one.forgetting for one in mine],
                "after_own": [one.after_own for one in mine],
                "after_all": [one.after_all for one in mine],
                "mean": [one.mean for one in mine],
                "against_none": {"mean": fmean(beside), "half_width_95": half_width(beside)},
            }
        )
    return {
        "protocol": _protocol(seeds, steps),
        "seeds": seeds,
        "steps": steps,
        "versions": versions(),
        "seconds": round(time.monotonic() - began, 1),
        "rows": rows,
    }


def _protocol(seeds: int, steps: int) -> str:
    rates, alphas = (", ".join(f"{value:g}" for value in values) for values in (RATES, ALPHAS))
    return (
        f"mfeat, views fou, zer, mor in this order, {steps} steps of {BATCH} examples each, SGD with momentum "
        f"{MOMENTUM:g} that starts anew with each view, learning rate on half a cosine, no weight decay, no SAM. Each "
        f"view has an input layer and a classifier of its own; the trunk, two layers of {WIDTH}, is shared and "
        "projected; the later views are taken in by add_modality. Flat with τ = 100 and ridge take the full second "
        f"moment, the bias, and all earlier views as sources. Learning rate (of {rates}) and ridge's α (of {alphas}) "
        "are chosen for each row on validation, by the mean accuracy of the three views after all training, with "
        f"{len(TUNING_SEEDS)} seeds that the final runs do not use. The test split is opened once a run, when all is "
        "trained, for the final weights and for copies kept after each view. "
        f"Figures are test accuracies in percent, mean ± standard deviation over {seeds} seeds; forgetting is fou's "
        "accuracy after its own training minus after all; the last column is the mean of the three minus that of no "
        "projection, seed by seed, ± its 95 % interval, in percentage points."
    )


def table(found: Mapping[str, Any]) -> str:
    """Return the table in Markdown."""
    views = list(found["rows"][0]["after_all"][0])
    heads = ["trunk", "settings", f"forgetting of {views[0]}", f"{views[0]} after its own training"]
    heads += [f"{view} after all" for view in views] + ["mean of all", "vs no projection"]
    body = []
    for row in found["rows"]:
        words = f"lr {row['learning_rate']:g}" + ("" if row["alpha"] is None else f", α {row['alpha']:g}")
        columns = [row["forgetting"], [one[views[0]] for one in row["after_own"]]]
        columns += [[one[view] for one in row["after_all"]] for view in views] + [row["mean"]]
        half = row["against_none"]["half_width_95"]
        beside = f"{100 * row['against_none']['mean']:+.1f}" + ("" if half is None else f" ± {100 * half:.1f}")
        body.append([row["label"], words, *map(_cell, columns), "–" if row["key"] == "none" else beside])
    return markdown(heads, body)


def _cell(values: Sequence[float]) -> str:
    mean = f"{100 * fmean(values):.1f}"
    return mean if len(values) < 2 else f"{mean} ± {100 * stdev(values):.1f}"


def figure(found: Mapping[str, Any]) -> Figure:
    """Draw the forgetting of the first view, and the mean accuracy of all, by method: seeds, and their means."""
    drawn = Figure(figsize=(10.4, 4.2), layout="constrained")
    left, right = drawn.subplots(1, 2, sharey=True)
    rows = found["rows"]
    _panel(left, rows, "forgetting", "forgetting of the first view (percentage points)", ORANGE)
    _panel(right, rows, "mean", "mean test accuracy of the three views, after all (%)", BLUE)
    left.axvline(0, color=GREY, linewidth=0.8)
    left.set_yticks(range(len(rows)), [row["label"] for row in rows])
    left.set_ylim(len(rows) - 0.5, -0.5)
    return drawn


def _panel(axes: Axes, rows: Sequence[Mapping[str, Any]], key: str, name: str, colour: str) -> None:
    for place, row in enumerate(rows):
        values = [100 * value for value in row[key]]
        axes.plot(values, [place] * len(values), ".", color=colour, markersize=6, alpha=0.6, markeredgewidth=0)
        axes.plot(fmean(values), place, "o", color=colour, markersize=7, **EDGE)
        if place % 2:
            axes.axhspan(place - 0.5, place + 0.5, color="#F2F2F2", zorder=0, linewidth=0)
    axes.grid(axis="x", color="#CCCCCC", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel(name)
    axes.spines[["top", "right", "left"]].set_visible(False)


def write(folder: Path, found: Mapping[str, Any]) -> list[Path]:
    """Write ``results.json``, ``table.md`` and ``forgetting.png`` and return their paths."""
    paths = [folder / name for name in ("results.json", "table.md", "forgetting.png")]
    paths[0].write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    made_with = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    parts = ["# A modality that comes later", found["protocol"], table(found), f"Made with {made_with}."]
    paths[1].write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    figure(found).savefig(paths[2], dpi=160)
    return paths


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status: 0; 1 after a failure; 130 after an interrupt."""
    parser = argparse.ArgumentParser(
        prog="python -m igm_rs.experiments.later",
        description="Train views of mfeat after one another on a shared trunk; tell what the first one forgets.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--data", type=Path, default=ARCHIVES, help="folder with mfeat.npz")
    parser.add_argument("--out", type=Path, default=Path("results/later"), help="folder for table and picture")
    parser.add_argument("--seeds", type=count, default=5, help="final runs of every method")
    parser.add_argument("--steps", type=count, default=STEPS, help="gradient steps of each view")
    parser.add_argument("--workers", type=count, default=cores(), help="runs side by side, one thread each")
    options = parser.parse_args(arguments)
    try:
        _loaded(options.data)
        options.out.mkdir(parents=True, exist_ok=True)
        found = results(options.data, options.seeds, options.steps, options.workers)
        paths = write(options.out, found)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted: no results were written", file=sys.stderr)
        return 130
    print(f"{found['protocol']}\n\n{table(found)}\n\n{found['seconds']:.0f} s. Written: {', '.join(map(str, paths))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
