"""The runs: settings chosen on validation with seeds of their own, then the final runs; side by side in processes."""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import queue as queues
import signal
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from .data import DataSet, load
from .evaluation import Scores, evaluate
from .methods import Row, Settings
from .training import Point, train

if TYPE_CHECKING:
    from multiprocessing.queues import Queue

__all__ = [
    "FIRST_SEED",
    "LEARNING_RATES",
    "TUNING_SEEDS",
    "UNTUNED_RATE",
    "Choice",
    "Job",
    "Outcome",
    "ProcessLostError",
    "choose",
    "run_all",
    "run_job",
]

LEARNING_RATES = (0.01, 0.03, 0.1)
"""The grid, the same for every row of every table."""

UNTUNED_RATE = 0.03
"""Learning rate of every row where nothing is tuned."""

TUNING_SEEDS = (1000, 1001)
"""Seeds of the runs that choose settings."""

FIRST_SEED = 100
"""Seed of the first final run; the others follow it. Seeds 0 to 2 had served to settle the encoders and the budget."""


class ProcessLostError(RuntimeError):
    """A process that did runs is gone."""


@dataclass(frozen=True)
class Choice:
    """The settings that a row of the table is run with in the end.

    Attributes
    ----------
    learning_rate : float
        Of the grid.
    keep : int
        The round whose weights are kept, from 1.
    tried : dict of float to float
        For each learning rate the validation accuracy at its best round, as :func:`choose` has it; empty where nothing
        was tuned.
    """

    learning_rate: float
    keep: int
    tried: dict[float, float]


@dataclass(frozen=True)
class Job:
    """One run.

    Attributes
    ----------
    dataset : str
        Name of the data set.
    row : Row
        Method and modalities.
    settings : Settings
        The budget and what else all runs have in common.
    learning_rate : float
        Of the grid.
    seed : int
        Of the run.
    keep : int or None
        For a final run, the round whose weights are measured on the test split. None: a tuning run, which gets a data
        set without a test split.
    """

    dataset: str
    row: Row
    settings: Settings
    learning_rate: float
    seed: int
    keep: int | None

    @property
    def steps(self) -> int:
        """Gradient steps of all modalities together."""
        return self.settings.steps * len(self.row.modalities)


@dataclass(frozen=True)
class Outcome:
    """What a run gave.

    Attributes
    ----------
    seed, kept, curve, seconds_per_step, skipped, cosine, effective_perturbation, projected_share
        As in :class:`igm_rs.experiments.training.Trained`.
    scores, temperatures : dict
        On the test split; empty for a tuning run.
    """

    seed: int
    kept: int
    curve: list[Point]
    seconds_per_step: float
    skipped: int
    cosine: float | None
    effective_perturbation: float | None
    scores: Scores
    temperatures: dict[str, float]
    projected_share: float | None = None


Told = tuple[int, str, int, float, float | None]
"""Progress: gradient steps since last time, label, seed, loss, validation accuracy once there is one."""


def run_job(job: Job, data: DataSet, tell: Callable[[Told], None]) -> Outcome:
    """Do one run and, if it is a final one, measure it on the test split.

    Parameters
    ----------
    job : Job
        What to run.
    data : DataSet
        The set of that name.
    tell : callable
        Called with progress after each turn.
    """
    visible = data.without_test() if job.keep is None else data
    trained = train(
        visible,
        job.row,
        job.settings,
        job.learning_rate,
        job.seed,
        keep=job.keep,
        report=lambda steps, loss, right: tell((steps, job.row.label, job.seed, loss, right)),
    )
    scores, temperatures = ({}, {}) if job.keep is None else evaluate(trained.model, visible)
    return Outcome(
        seed=job.seed,
        kept=trained.kept,
        curve=trained.curve,
        seconds_per_step=trained.seconds_per_step,
        skipped=trained.skipped,
        cosine=trained.cosine,
        effective_perturbation=trained.effective_perturbation,
        scores=scores,
        temperatures=temperatures,
        projected_share=trained.projected_share,
    )


def choose(outcomes: Iterable[tuple[float, Outcome]]) -> Choice:
    """Choose learning rate and round by the validation accuracy of the fused prediction.

    A round counts with its neighbours: its figure is the mean over the runs of a learning rate and over this round, the
    one before and the one after, so that one lucky round does not win.

    Parameters
    ----------
    outcomes : iterable of (float, Outcome)
        Learning rate and outcome of every tuning run of one row.

    Returns
    -------
    Choice
        Where several are equally good, the latest round, and of these the first learning rate given.

    Raises
    ------
    ValueError
        If there is no run.
    """
    curves: dict[float, list[list[float]]] = {}
    for rate, outcome in outcomes:
        curves.setdefault(rate, []).append([point.fused for point in outcome.curve])
    if not curves:
        raise ValueError("there is no tuning run to choose from")
    best = {}
    for rate, runs in curves.items():
        means = [fmean(values) for values in zip(*runs, strict=True)]
        smooth = [fmean(means[max(0, at - 1) : at + 2]) for at in range(len(means))]
        best[rate] = max((accuracy, number) for number, accuracy in enumerate(smooth, start=1))
    rate = max(best, key=lambda tried: best[tried])
    return Choice(rate, best[rate][1], {tried: accuracy for tried, (accuracy, _) in best.items()})


def run_all(jobs: Sequence[Job], folder: Path, workers: int, what: str) -> list[Outcome]:
    """Do all runs and show one progress bar over their gradient steps.

    Parameters
    ----------
    jobs : sequence of Job
        The runs.
    folder : Path
        Where the data lie.
    workers : int
        Processes side by side, one thread each; 1 runs everything in this process. The outcomes do not depend on it.
    what : str
        Shown before the bar.

    Returns
    -------
    list of Outcome
        In the order of `jobs`.

    Raises
    ------
    ProcessLostError
        If a process dies, for instance for want of memory.
    """
    total = sum(job.steps for job in jobs)
    with tqdm(total=total, desc=what, unit="step", smoothing=0.05, dynamic_ncols=True) as bar:

        def show(told: Told) -> None:
            steps, label, seed, loss, right = told
            seen = "" if right is None else f", validation {right:.1%}"
            bar.set_postfix_str(f"{label}, seed {seed}, loss {loss:.3f}{seen}", refresh=False)
            bar.update(steps)

        if workers == 1:
            outcomes = [_run_here(job, folder, show) for job in jobs]
        else:
            outcomes = _run_beside(jobs, folder, min(workers, len(jobs)), show)
        bar.update(total - bar.n)  # the last reports of a process may still be on their way
        return outcomes


def _run_here(job: Job, folder: Path, tell: Callable[[Told], None]) -> Outcome:
    """Do a run in this process, on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return run_job(job, _loaded(job.dataset, folder), tell)
    finally:
        torch.set_num_threads(threads)


def _run_beside(jobs: Sequence[Job], folder: Path, workers: int, show: Callable[[Told], None]) -> list[Outcome]:
    """Do the runs in processes that send their progress through a queue."""
    context = multiprocessing.get_context("spawn")
    others = set(multiprocessing.active_children())
    told: Queue[Told] = context.Queue()
    with concurrent.futures.ProcessPoolExecutor(workers, context, _start_worker, (told,)) as pool:
        longest_first = sorted(range(len(jobs)), key=lambda index: -_passes(jobs[index]))
        futures = {index: pool.submit(_run_in_worker, jobs[index], folder) for index in longest_first}
        waiting = set(futures.values())
        try:
            while waiting:
                finished, waiting = concurrent.futures.wait(waiting, timeout=0.1, return_when="FIRST_EXCEPTION")
                for future in finished:
                    future.result()
                _drain(told, show)
        except concurrent.futures.process.BrokenProcessPool as error:
            raise ProcessLostError(
                "a process ended before its run did, most likely for want of memory: try again with --workers 1"
            ) from error
        except BaseException:
            for process in set(multiprocessing.active_children()) - others:
                process.terminate()
            raise
        _drain(told, show)
        return [futures[index].result() for index in range(len(jobs))]


def _passes(job: Job) -> int:
    """Forward and backward passes of a run, to begin with the longest."""
    return job.steps * (2 if job.row.method.rho > 0 else 1)


def _drain(told: Queue[Told], show: Callable[[Told], None]) -> None:
    """Show what the processes have sent by now."""
    with suppress(queues.Empty):
        while True:
            show(told.get_nowait())


_queue: list[Any] = []
"""In a process of the pool: where its progress goes."""


def _start_worker(told: Queue[Told]) -> None:
    """Prepare a process: one thread, the queue, and interrupts left to the process that started it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    _queue[:] = [told]


def _run_in_worker(job: Job, folder: Path) -> Outcome:
    """Do a run in a process of the pool."""
    return run_job(job, _loaded(job.dataset, folder), _queue[0].put)


@cache
def _loaded(name: str, folder: Path) -> DataSet:
    """Read a data set once a process."""
    return load(name, folder)
