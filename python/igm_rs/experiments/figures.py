"""The paper's figures on a data set: what each needs is trained, its numbers are taken, and both are written."""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import signal
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from itertools import cycle, islice
from pathlib import Path
from statistics import fmean
from typing import Any, Literal, TypeVar

import torch
from matplotlib.figure import Figure as Canvas
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm import tqdm

import igm_rs
from igm_rs import analysis
from igm_rs.analysis.drawing import save_figure

from . import finetuning
from .columns import Column
from .configuration import Config
from .data import DataSet
from .feeding import Means, at_once, batch_stream, feed
from .methods import Row
from .page import FIGURES
from .running import Job, Source, provenance, run_all, tune, watched, without_warning_of_rho
from .tables import PAPER_WARNING
from .training import Training

__all__ = ["SEEDS", "figure"]

SEEDS = {"1": 2, "3": 2, "4": 3, "5a": 5, "5b": 3, "5c": 1}
"""Runs of each method in a figure, unless told otherwise: so many that each takes two or three minutes, 5b half
an hour."""

WATCHED = 5
"""Figure 1 looks at every so many steps."""

POINTS = 21
"""Points along each direction of a loss surface."""

EXAMPLES = 512
"""Training examples, evenly taken, that a loss surface is made of."""

NUMBERS = 2**29
"""Numbers of one modality that are kept for a loss surface at most: of clips that lie in files fewer examples."""

HELD = 2
"""Batches of a set that lies in files that figure 5c takes again and again, decoded before it measures."""

TIMED = ("joint-sum", "joint-concat", "sam", "turns", "turns-sam", "mla", "igm-no-sam", "igm")
"""Methods of Figure 5 (c); the first is what the others are compared to."""

METHODS: dict[str, tuple[str, ...]] = {
    "1": ("mla", "igm-no-sam", "igm", "igm-shared"),
    "3": ("igm",),
    "4": ("mla", "igm-no-sam", "igm", "turns"),
    "5a": ("igm-no-sam", "igm"),
    "5b": tuple(finetuning.METHODS),
    "5c": TIMED,
}
"""Methods of each figure."""

SCORED = {"accuracy": "accuracy", "map": "MAP"}
"""Measures of Figure 3, with their names there."""

FUSED = "mean"
"""Fusion whose scores they are."""

TOLD = ("effective_perturbation", "cosine")
"""What a run keeps of what its steps did: means over the last steps of its turns."""

TIMING = 6.0
"""Seconds for which each of them is measured, at least."""


PACKAGED = Source()
"""The data sets that come with the package."""


@dataclass(frozen=True)
class Order:
    """What a figure is made of.

    Attributes
    ----------
    config : Config
        The configuration, with the number of seeds.
    data : DataSet
        The set, without its test split.
    out, workers, resume, source
        As in :func:`figure`.
    configs : mapping of str to Config
        Of figure 5b, the configuration for each network.
    """

    config: Config
    data: DataSet
    out: Path
    workers: int
    resume: bool
    source: Source
    configs: Mapping[str, Config]

    def row(self, key: str, **overrides: Any) -> Row:
        """Return a row of all modalities."""
        return Row(key, self.data.modalities, overrides)

    def rates(self, rows: Sequence[Row]) -> dict[Row, float]:
        """Return the learning rate of each row, chosen on validation like a table's; stored runs are used again."""
        chosen = tune(rows, self.config, self.out, self.workers, resume=self.resume, source=self.source)
        return {row: choice.learning_rate for row, choice in chosen.items()}


@dataclass(frozen=True)
class Made:
    """A figure: how it is painted, in how many inches, its numbers, and what is said below it."""

    size: tuple[float, float]
    paint: Callable[[Canvas], None]
    numbers: Mapping[str, Any]
    caption: str


def figure(
    name: str,
    config: Config,
    out: Path,
    *,
    workers: int,
    command: str,
    seeds: int | None = None,
    resume: bool = False,
    source: Source = PACKAGED,
    configs: Mapping[str, Config] | None = None,
) -> tuple[Path, Path]:
    """Make a figure of the paper on a data set; write ``<out>/figures/figure-<name>-<data>.png`` and ``.json``.

    With the protocol "paper" the names end in ``-paper``, and picture and caption say that the test set has chosen.

    Parameters
    ----------
    name : str
        Of :data:`igm_rs.experiments.page.FIGURES`.
    config : Config
        What is trained, and on what.
    out : Path
        Folder of results; runs are stored there, and those that are there already are used again.
    workers : int
        Processes side by side.
    command : str
        The command that makes it, for the page of results.
    seeds : int, optional
        Runs of each method, in place of the configuration's; as :data:`SEEDS` has it by default.
    resume : bool
        Whether interrupted runs are continued.
    source : Source
        Where the data come from.
    configs : mapping of str to Config, optional
        Of figure 5b, and only there: the configuration for each of :data:`igm_rs.experiments.finetuning.NETWORKS`.

    Returns
    -------
    tuple of Path
        The picture and the numbers behind it.

    Raises
    ------
    ValueError
        If there is no such figure, or the set has one modality only.
    OSError
        If a file of the set cannot be read.
    """
    if name not in MAKERS:
        raise ValueError(f"figure is {name!r}, expected one of {', '.join(MAKERS)}")
    data = source.of(config).without_test()
    if len(data.modalities) < 2:
        raise ValueError(f"data is {config.data!r} with one modality, expected two or more to compare methods")
    count = SEEDS[name] if seeds is None else seeds
    config = replace(config, seeds=count)
    several = {network: replace(each, seeds=count) for network, each in (configs or {}).items()}
    made = MAKERS[name](Order(config, data, out, workers, resume, source, several))
    numbers = {
        "figure": name,
        "shows": FIGURES[name],
        "dataset": config.data,
        "title": data.title,
        "command": command,
        "caption": f"{PAPER_WARNING} {made.caption}" if config.protocol == "paper" else made.caption,
        "seeds": list(config.final_seeds),
        "config": config.plain(),
        **provenance(),
        "numbers": made.numbers,
    }
    paper = config.protocol == "paper"
    path = out / "figures" / f"figure-{name}-{config.data}{'-paper' * paper}.png"

    def paint(canvas: Canvas) -> None:
        canvas.suptitle(f"{data.title} (SELECTED ON THE TEST SET)" if paper else data.title, fontsize=11)
        made.paint(canvas)

    return save_figure(path, made.size, paint, numbers)


# ----------------------------------------------------------------------------------------------------------------------
# Trainings that are looked into, side by side


Found = TypeVar("Found")
OneTraining = TypeVar("OneTraining", bound=Training)


@dataclass(frozen=True)
class Task:
    """One training that is looked into."""

    config: Config
    row: Row
    seed: int
    learning_rate: float
    source: Source

    def training(self, kind: type[OneTraining]) -> OneTraining:
        """Return the training, not begun; it has no test split, which no figure but 3 looks at."""
        data = self.source.of(self.config).without_test()
        return kind(data, self.row, self.config, self.learning_rate, self.seed, self.source.means)


def _all(
    order: Order, keys: Mapping[str, str], look: Callable[[Task], Found], words: str
) -> tuple[dict[str, list[Found]], dict[str, float]]:
    """Train the rows of these methods with every seed; return what was found in each, and the rates, by label.

    `keys` has beside each method the one that it shares its learning rate with, which may be itself.
    """
    rows = [order.row(key) for key in keys]
    of_tuned = order.rates([order.row(key) for key in dict.fromkeys(keys.values())])
    rates = {row: of_tuned[order.row(keys[row.method])] for row in rows}
    tasks = [
        Task(order.config, row, seed, rates[row], order.source) for row in rows for seed in order.config.final_seeds
    ]
    found = _side_by_side(look, tasks, order.workers, words)
    count = order.config.seeds
    by_label = {row.label: found[place * count : (place + 1) * count] for place, row in enumerate(rows)}
    return by_label, {row.label: rates[row] for row in rows}


def _side_by_side(look: Callable[[Task], Found], tasks: Sequence[Task], workers: int, words: str) -> list[Found]:
    """Do the tasks in processes of their own, one thread each, and return what they give in their order."""
    if workers == 1:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return [look(task) for task in tqdm(tasks, desc=words, unit="run", dynamic_ncols=True)]
        finally:
            torch.set_num_threads(threads)
    others = set(multiprocessing.active_children())
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(min(workers, len(tasks)), context, _prepare) as pool:
        futures = [pool.submit(look, task) for task in tasks]
        done = concurrent.futures.as_completed(futures)
        with watched(others):
            for each in tqdm(done, total=len(tasks), desc=words, unit="run", dynamic_ncols=True):
                each.result()
    return [each.result() for each in futures]


def _prepare() -> None:
    """Prepare a process: one thread, and interrupts left to the process that started it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)


# ----------------------------------------------------------------------------------------------------------------------
# Figure 1


class Watched(Training):
    """A training whose gradients are looked at, in every so many steps."""

    def __init__(
        self, data: DataSet, row: Row, config: Config, learning_rate: float, seed: int, means: Means | None = None
    ) -> None:
        super().__init__(data, row, config, learning_rate, seed, means)
        assert isinstance(self.optimizer, igm_rs.IGMOptimizer), "every method of Figure 1 has one"
        self.watch = analysis.CosineWatch(self.model, self.optimizer, every=WATCHED)

    def step_on(self, active: tuple[str, ...], chosen: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
        """Take a step, looked at now and then; what is not active is looked at without random crops and the like."""

        def of(name: str) -> Callable[[], Tensor]:
            return lambda: cross_entropy(
                self.model.branch(name, inputs[name] if name in inputs else self.examples(name, chosen)),
                self.labels(chosen),
            )

        with self.watch.step({name: of(name) for name in self.row.modalities}):
            return super().step_on(active, chosen, inputs)


def _cosines(task: Task) -> analysis.Cosines:
    training = task.training(Watched)
    training.run()
    return training.watch.cosines


def _figure_1(order: Order) -> Made:
    kinds: tuple[Literal["before", "after", "change"], ...] = ("before", "after", "change")
    keys = {key: key for key in METHODS["1"]}
    found, rates = _all(order, keys, _cosines, "figure 1: trainings, gradients looked at")
    result = analysis.GradientCosines({label: analysis.Cosines.joined(each) for label, each in found.items()})

    def paint(canvas: Canvas) -> None:
        places = canvas.subplots(1, 3)
        for ax, which in zip(places, kinds, strict=True):
            result.draw(ax, which=which)
        left, middle, right = places
        ends = [*left.get_xlim(), *middle.get_xlim()]
        for ax in (left, middle):
            ax.set_xlim(min(ends), max(ends))
        for ax in (middle, right):
            ax.set_yticks([])

    medians = {label: " / ".join(_number(result.median(label, which)) for which in kinds) for label in found}
    said = "; ".join(f"{label} {words}" for label, words in medians.items())
    caption = (
        f"Cosines in every {WATCHED}th step of {_runs(order)} of each method, once there is a T. Left: the gradient of "
        "the modality that is trained, as it is, with that of the modality whose T modifies it, on the same batch (own "
        "heads: entry by entry, where chance gives 0). Middle: the same, modified. Right: the gradient before and "
        "after modification, 1 where that does nothing; SAM's part is in it. Medians from left to right: "
        f"{said}. {_rates(rates)}"
    )
    numbers = {"learning_rates": rates, "cosines": result.numbers()}
    return Made((15.0, result.size[1] + 0.3), paint, numbers, caption)


# ----------------------------------------------------------------------------------------------------------------------
# Figure 3


def _figure_3(order: Order) -> Made:
    grids = {"tau": analysis.TAUS, "rho": analysis.RHOS}
    igm = order.row("igm")
    rate = order.rates([igm])[igm]
    rows = {
        (parameter, value): igm if value == getattr(order.config, parameter) else order.row("igm", **{parameter: value})
        for parameter, grid in grids.items()
        for value in grid
    }
    different = list(dict.fromkeys(rows.values()))
    jobs = [Job(order.config, row, seed, rate, True) for row in different for seed in order.config.final_seeds]
    with without_warning_of_rho():
        records = run_all(jobs, order.out, order.workers, "figure 3: sweeps", resume=order.resume, source=order.source)
    count = order.config.seeds
    by_row = {row: records[at * count : (at + 1) * count] for at, row in enumerate(different)}
    by_place = {place: by_row[row] for place, row in rows.items()}
    sweeps = [
        _sweep(parameter, {value: by_place[parameter, value] for value in grid}) for parameter, grid in grids.items()
    ]

    def paint(canvas: Canvas) -> None:
        for ax, sweep in zip(canvas.subplots(1, 2), sweeps, strict=True):
            sweep.draw(ax)

    means = {each.parameter: [100 * fmean(mine) for mine in each.scores["accuracy"]] for each in sweeps}
    lost = sweeps[-1].inert()
    arrives = (
        f"Up to ρ = {lost[-1]:g} less than half of the perturbation arrives at the float32 weights: that part of the "
        "sweep has no SAM, however flat it is."
        if lost
        else "All values of ρ arrive at the weights."
    )
    caption = (
        f"IGM, test accuracy and MAP of the {FUSED} fusion at the {_chosen(order)}; small dots are the seeds of "
        f"{_runs(order)}, at IGM's learning rate, {rate:g}. Black, right axes: what the value did. Accuracy goes from "
        f"{min(means['tau']):.1f} to {max(means['tau']):.1f} % over τ and from {min(means['rho']):.1f} to "
        f"{max(means['rho']):.1f} % over ρ. {arrives}"
    )
    numbers = {"learning_rate": rate, **{each.parameter: each.numbers() for each in sweeps}}
    return Made((12.5, 4.5), paint, numbers, caption)


def _sweep(parameter: str, runs: Mapping[float, Sequence[Mapping[str, Any]]]) -> analysis.Sweep:
    """Return stored runs as a sweep."""
    return analysis.Sweep(
        parameter,
        list(runs),
        {
            words: [[run["chosen"]["scores"][measure][FUSED] for run in each] for each in runs.values()]
            for measure, words in SCORED.items()
        },
        {
            name: [[run[name] for run in each] for each in runs.values()]
            for name in ("effective_perturbation", "cosine")
        },
    )


# ----------------------------------------------------------------------------------------------------------------------
# Figure 4


def _surface(task: Task) -> analysis.LossSurface:
    training = task.training(Training)
    training.run()
    chosen = _shown_examples(training.data)
    model, labels = training.model, training.labels(chosen)
    inputs = {name: training.examples(name, chosen) for name in training.row.modalities}
    size = at_once(training.data.train.inputs.values(), len(chosen)) or len(chosen)
    parts = [slice(begin, begin + size) for begin in range(0, len(chosen), size)]

    def of(name: str, part: slice) -> Tensor:
        share = len(labels[part]) / len(labels)
        return share * cross_entropy(model.branch(name, inputs[name][part]), labels[part])

    def loss() -> Tensor:
        return torch.stack([torch.stack([of(name, part) for part in parts]).sum() for name in inputs]).mean()

    return analysis.loss_surface(model, loss, points=POINTS, progress=False)


def _shown_examples(data: DataSet) -> Tensor:
    """Return which of the training examples a surface is made of."""
    count = len(data.train)
    most = at_once(data.train.inputs.values(), EXAMPLES, NUMBERS) or EXAMPLES
    return torch.arange(count)[:: -(-count // most)]


def _figure_4(order: Order) -> Made:
    keys = {key: key if key == "mla" else "igm" for key in METHODS["4"]}
    found, rates = _all(order, keys, _surface, "figure 4: trainings and surfaces")
    result = analysis.compare_surfaces(found)

    def paint(canvas: Canvas) -> None:
        *places, last = canvas.subplots(2, 2).flat
        for ax, (label, mine) in zip(places, found.items(), strict=False):
            mine[0].draw(ax, levels=result.levels(), rise=True)
            ax.set_title(f"{label}: loss {mine[0].centre:.3f} at the weights", fontsize=10)
        result.draw(last)

    said = "; ".join(f"{label} {_spread(result.rise(label))}" for label in found)
    caption = (
        f"Rise of the training loss, mean of the branches, on {len(_shown_examples(order.data))} of "
        f"{len(order.data.train)} examples, around the weights of the last round on two random directions, each filter "
        f"scaled to its own length (Li et al. 2018); of the first of {_runs(order)}, with the same contours for all. "
        f"Last panel: its mean by distance, and that of turns. At distance 1 it is {said}. Turns and both kinds of IGM "
        "are one network at one learning rate; MLA has one linear head for all in place of three layers for each, and "
        f"a learning rate of its own, so that against it the network is compared, too. {_rates(rates)}"
    )
    return Made((9.6, 8.2), paint, {"learning_rates": rates, "surfaces": result.numbers()}, caption)


# ----------------------------------------------------------------------------------------------------------------------
# Figure 5


def _spectra(task: Task) -> analysis.LayerSpectra:
    training = task.training(Training)
    training.run()
    model, split, names = training.model.eval(), training.data.train, training.row.modalities
    parts = {name: model.parts_of(name) for name in names}
    gatherer = igm_rs.IGMOptimizer(model.parameters(), parts, model=model, scope=1.0, lr=task.learning_rate)
    for name in names:
        with gatherer.collect(name), torch.no_grad():
            batches = batch_stream(len(split), task.config.batch_size, task.seed)  # shuffled, as in training
            for _ in range(max(1, len(split) // task.config.batch_size)):
                model.branch(name, split.inputs[name][next(batches)].to(model.device))
    return analysis.layer_spectra(gatherer)


def _figure_5a(order: Order) -> Made:
    keys = dict.fromkeys(METHODS["5a"], "igm")
    found, rates = _all(order, keys, _spectra, "figure 5a: trainings and spectra")
    result = analysis.LayerSpectra.joined(found)
    without, with_sam = (result.by_layer(label) for label in found)
    learned = [place for place in without if without[place] != with_sam[place]]
    lower = sum(fmean(with_sam[place]) < fmean(without[place]) for place in learned)
    in_all = sum(max(one - two for one, two in zip(with_sam[p], without[p], strict=True)) < 0 for p in learned)
    equal = len(without) - len(learned)
    firsts = len({name for name, _ in without})  # each modality's first layer sees the data, whatever is learned
    layers = "layer that sees the data itself is" if equal == 1 else f"{equal} layers that see the data themselves are"
    left_out = f" The {layers} equal and not counted." if equal else ""
    if equal > firsts:
        left_out = (
            f" The {equal} layers that are equal to the last digit are not counted: they see the data themselves, or "
            "nothing of ρ has arrived in front of them."
        )
    told = (
        f"With SAM the mean over the runs is the smaller one in {lower} of {len(learned)} layers, in {in_all} of them "
        f"in every run.{left_out}"
        if learned
        else "With and without SAM they are the same to the last digit: nothing of ρ has arrived at the weights."
    )
    caption = (
        "Mean singular value of Ȳ by layer, Ȳ of one pass over the training split at the weights of the last round; "
        f"small dots are the seeds of {_runs(order)}. {told} {_rates(rates)}"
    )
    size = result.size[0], result.size[1] + 0.3
    return Made(size, lambda canvas: _on_one(canvas, result), {"learning_rates": rates, **result.numbers()}, caption)


Batches = Iterable[tuple[Tensor, Tensor]]
"""Of a modality: the examples chosen, and their inputs on the device."""


def _held(training: Training) -> dict[str, Batches]:
    """Return each modality's first batches where one lies in files, decoded as in training, by as many processes."""
    size, means, inputs = training.config.batch_size, training.means, training.data.train.inputs
    held: dict[str, Batches] = {}
    if not any(isinstance(values, Column) for values in inputs.values()):
        return held
    taken = list(islice(batch_stream(len(training.data.train), size, training.seed), HELD))
    for name, values in inputs.items():
        if isinstance(values, Column):
            batches = islice(feed(values, size, training.seed, 0, means), HELD)
            held[name] = [(chosen, batch.to(means.device)) for batch, chosen in zip(batches, taken, strict=True)]
        else:
            held[name] = [(chosen, training.examples(name, chosen)) for chosen in taken]
    return held


def _drawn(training: Training, name: str, held: Mapping[str, Batches]) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield batches of a modality, those that are held again and again."""
    yield from cycle(held.get(name, ()))
    for chosen in batch_stream(len(training.data.train), training.config.batch_size, training.seed):
        yield chosen, training.examples(name, chosen)


def _rounds(training: Training, held: Mapping[str, Batches]) -> Callable[[], None]:
    """Return what trains one round more: a turn of every modality, with the T's that are made in it."""
    turns = [turn for turn in training.turns if turn.stretches[0].round == 1]
    streams = {name: _drawn(training, name, held) for name in training.row.modalities}
    optimizer = training.optimizer

    def one() -> None:
        for turn in turns:
            entered: AbstractContextManager[object] = nullcontext()
            if turn.modality is not None and isinstance(optimizer, igm_rs.IGMOptimizer):
                entered = optimizer.turn(turn.modality)
            with entered:
                for active in turn.stretches[0].steps:
                    drawn = {name: next(streams[name]) for name in active}
                    chosen = drawn[active[0]][0]  # the same for all
                    training.step_on(active, chosen, {name: batch for name, (_, batch) in drawn.items()})

    return one


def _figure_5c(order: Order) -> Made:
    config = order.config
    rate = config.rates[0] if config.learning_rate is None else config.learning_rate
    means = order.source.means
    trainings = {
        row.label: Training(order.data, row, config, rate, config.first_seed, means) for row in map(order.row, TIMED)
    }
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        held = _held(next(iter(trainings.values())))
        result = analysis.training_time(
            {label: _rounds(training, held) for label, training in trainings.items()},
            seconds=TIMING,
            calls=config.steps / config.turn_lengths[0],
        )
    finally:
        torch.set_num_threads(threads)

    def paint(canvas: Canvas) -> None:
        _on_one(canvas, result)
        words = f"time of one training ({result.unit}): median, line = quartiles of its rounds"
        canvas.axes[0].set_xlabel(words)

    first, *others = result.seconds
    place = "on one thread" if means.device == "cpu" else f"on {means.device}"
    uncounted = "validation and decoding" if held else "validation"
    caption = (
        f"Time of one training, {config.steps} steps of each modality, {place}, {uncounted} not counted; the "
        f"methods are measured in turn, round by round. Beside {first}: "
        + ", ".join(f"{label} ×{result.ratio(label):.2f}" for label in others)
        + "."
    )
    return Made((result.size[0] + 0.8, result.size[1] + 0.3), paint, result.numbers(), caption)


def _on_one(canvas: Canvas, picture: analysis.Picture) -> None:
    picture.draw(canvas.subplots())


MAKERS: dict[str, Callable[[Order], Made]] = {
    "1": _figure_1,
    "3": _figure_3,
    "4": _figure_4,
    "5a": _figure_5a,
    "5b": finetuning.figure_5b,
    "5c": _figure_5c,
}
"""What makes each figure."""


def _runs(order: Order) -> str:
    count = order.config.seeds
    return "one run" if count == 1 else f"{count} runs"


def _chosen(order: Order) -> str:
    """Which round the scores are of, in words."""
    on = {"validation": "validation", "paper": "the test split, as the released scripts do"}[order.config.protocol]
    return f"round chosen on {on}"


def _rates(rates: Mapping[str, float]) -> str:
    """Return the learning rates in words."""
    if len(set(rates.values())) == 1:
        return f"Learning rate {next(iter(rates.values())):g}."
    return f"Learning rates: {', '.join(f'{label} {rate:g}' for label, rate in rates.items())}."


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}".replace("-0.000", "0.000").replace("-", "−")


def _spread(values: Sequence[float]) -> str:
    mean = f"{fmean(values):.3f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.3f} to {max(values):.3f})"
