"""The runs: learning rates chosen on validation, then final runs; side by side in processes, left and taken up."""

from __future__ import annotations

import concurrent.futures
import ctypes
import gc
import io
import json
import multiprocessing
import os
import queue as queues
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from igm_rs.analysis.sweeps import LOST

from .columns import Reading
from .configuration import Config, cores, count
from .data import DataSet, known_set, load
from .evaluation import JOINT, evaluate, of_fusion
from .feeding import Means, alike, lost_process_told
from .methods import Row
from .on_disk.faults import DataFault
from .registering import register_files
from .store import (
    RunRecord,
    code_digest,
    data_digest,
    fingerprint,
    finite,
    read_record,
    revision,
    split_digest,
    versions,
    write_curve,
    write_whole,
)
from .training import CHOSEN_BY, Progress, Stopped, Trained, Training

if TYPE_CHECKING:
    from multiprocessing.queues import Queue
    from multiprocessing.synchronize import Event

__all__ = [
    "Choice",
    "InterruptedRuns",
    "Job",
    "ProcessLostError",
    "RunRecord",
    "Source",
    "cores",
    "count",
    "peak_memory",
    "provenance",
    "run_all",
    "run_job",
    "tune",
    "versions",
    "watched",
    "without_warning_of_rho",
]

SAVE_EVERY = 10.0
"""Seconds between two savings of an unfinished run, so that a power cut costs no more; an interrupt saves at once."""

SAVE_SHARE = 50.0
"""How much longer than a saving itself the training before it lasts, so that large networks are saved less often."""

NOT_OF_A_RUN = ("rates", "tuning_seeds", "first_seed", "seeds", "learning_rate")
"""Values of the configuration that say which runs there are; one run does not depend on them."""


AS_IT_IS = Reading()
HERE = Means()


class ProcessLostError(RuntimeError):
    """A process that did runs is gone."""


class InterruptedRuns(KeyboardInterrupt):
    """Runs were interrupted; those under way were saved."""


@dataclass(frozen=True)
class Choice:
    """The learning rate that a row is run with in the end.

    Attributes
    ----------
    learning_rate : float
        Of the grid.
    tried : dict of float to float
        For each learning rate the validation accuracy at the best round, mean over the tuning seeds; empty where
        nothing was tuned.
    """

    learning_rate: float
    tried: dict[float, float]


@dataclass(frozen=True)
class Job:
    """One run.

    Attributes
    ----------
    config : Config
        Common to all rows.
    row : Row
        Method, modalities, overrides.
    seed : int
        Of the run.
    learning_rate : float
        At the start.
    final : bool
        Whether it is measured on the test split in the end. Else it is a tuning run, which gets a data set without a
        test split.
    """

    config: Config
    row: Row
    seed: int
    learning_rate: float
    final: bool

    @property
    def steps(self) -> int:
        """Gradient steps of all modalities together."""
        return self.row.config(self.config).steps * len(self.row.modalities)

    @property
    def passes(self) -> int:
        """Forward and backward passes, to begin with the longest run."""
        return self.steps * (2 if self.row.of.sam else 1)

    def folder(self, out: Path, digest: str) -> Path:
        """Return where the run lies in the store; `digest` is that of the data."""
        config = self.row.config(self.config).plain()
        settings = {
            "config": {name: value for name, value in config.items() if name not in NOT_OF_A_RUN},
            "method": self.row.method,
            "modalities": list(self.row.modalities),
            "learning_rate": self.learning_rate,
            "final": self.final,
            "data": digest,
            "code": [code_digest(), *_user_code(self.row)],
            "torch": versions()["torch"],
        }
        place = out / "runs" / self.config.data / self.row.key
        return place / fingerprint(settings) / f"seed-{self.seed}"


def _user_code(row: Row) -> list[str]:
    """Return the source of a method that is a user's own: of the files that it and its base classes stand in.

    A base class without one, such as an extension's, counts by its name.

    Raises
    ------
    ValueError
        If the method itself stands in no file, as in a notebook: its runs could not be told from another's.
    """
    import inspect

    found = []
    for kind in type(row.of).__mro__:
        if kind.__module__.partition(".")[0] in ("igm_rs", "torch", *sys.stdlib_module_names):
            continue
        try:
            found.append(inspect.getsource(sys.modules[kind.__module__]))
        except (KeyError, OSError, TypeError) as error:
            if kind is type(row.of):
                raise ValueError(
                    f"method {row.of.key!r} stands in no file, expected one: save it as one, name it with --register"
                ) from error
            found.append(f"{kind.__module__}.{kind.__qualname__}")
    return list(dict.fromkeys(found))


@dataclass(frozen=True)
class Source:
    """Where data sets and methods come from, beside the package, and what computes: told to every process.

    Attributes
    ----------
    folder : Path, optional
        Of the data set's files, see :func:`igm_rs.experiments.data.load`.
    register : tuple of Path
        Python files that register data sets or methods.
    reading : Reading
        How a set in a folder of the user's is read; its network is that of the configuration.
    means : Means
        Device, and processes that decode.
    """

    folder: Path | None = None
    register: tuple[Path, ...] = ()
    reading: Reading = AS_IT_IS
    means: Means = HERE

    def load(self, name: str, network: str = "default") -> DataSet:
        """Read a data set for a network, once a process."""
        register_files(self.register)
        return _loaded(name, self.folder, replace(self.reading, network=network))

    def known(self, name: str) -> None:
        """Refuse a name that no set has.

        Raises
        ------
        ValueError
            If none has it.
        """
        register_files(self.register)
        known_set(name)

    def of(self, config: Config) -> DataSet:
        """Return the data set of a configuration."""
        return self.load(config.data, config.network)

    def digest(self, config: Config) -> str:
        """Return the hash of what a training sees of it."""
        register_files(self.register)
        return _digest(config.data, self.folder, replace(self.reading, network=config.network))


@cache
def _loaded(name: str, folder: Path | None, reading: Reading) -> DataSet:
    return load(name, folder, reading)


@cache
def _digest(name: str, folder: Path | None, reading: Reading) -> str:
    return data_digest(_loaded(name, folder, reading))


# ----------------------------------------------------------------------------------------------------------------------
# One run

Tell = Callable[[Progress], None]


def run_job(
    job: Job,
    data: DataSet,
    folder: Path,
    tell: Tell,
    stop: Callable[[], bool],
    *,
    resume: bool = False,
    made_by: Mapping[str, Any] | None = None,
    means: Means | None = None,
) -> RunRecord | None:
    """Do one run, keep its record, and if it is a final one, measure it on the test split.

    Parameters
    ----------
    job : Job
        What to run.
    data : DataSet
        The set of that name.
    folder : Path
        Of the run: ``run.json``, ``metrics.csv``, TensorBoard's events, and while it is unfinished ``checkpoint.pt``.
    tell : callable
        Told about progress.
    stop : callable
        Asked before each step whether to stop there; the run is then saved.
    resume : bool
        Whether a saved run is continued. It begins anew otherwise.
    made_by : mapping, optional
        What :func:`provenance` says, where another process has asked already.
    means : Means, optional
        Device, and processes that decode; the CPU, and none, by default.

    Returns
    -------
    dict or None
        The record; None if the run was stopped.

    Raises
    ------
    ValueError
        If what was saved cannot be read.
    """
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = folder / "checkpoint.pt"
    means = HERE if means is None else means
    held = begin_memory(means.device)
    visible = data if job.final else data.without_test()
    training = Training(visible, job.row, job.config, job.learning_rate, job.seed, means)
    before: dict[str, Any] = {"started": datetime.now(timezone.utc).isoformat(timespec="seconds"), "seconds": 0.0}
    if resume and checkpoint.is_file():
        before = _load(checkpoint, training)
        tell(Progress(training.done, training.loss, None))
    began = time.perf_counter()

    def save() -> None:
        spent = before["seconds"] + time.perf_counter() - began
        _save(checkpoint, training, {**before, "seconds": spent})

    saved, cost = began, 0.0

    def save_now_and_then() -> None:
        nonlocal saved, cost
        now = time.perf_counter()
        if now - saved > max(SAVE_EVERY, SAVE_SHARE * cost) and training.done < training.total:
            save()
            saved = time.perf_counter()
            cost = saved - now

    with _log(folder, training.done) as note:

        def report(progress: Progress) -> None:
            if progress.point is not None:
                note(training.curve, progress.point)
            tell(progress)

        try:
            trained = training.run(report, stop, save_now_and_then)
        except Stopped:
            save()
            return None
    seconds = before["seconds"] + time.perf_counter() - began
    peak = max(0, peak_memory(means.device) - held)
    record = _record(job, visible, training, trained, before["started"], seconds, peak, made_by or provenance())
    write_whole(folder / "run.json", (json.dumps(record, ensure_ascii=False, indent=1) + "\n").encode())
    checkpoint.unlink(missing_ok=True)
    return record


def provenance() -> dict[str, Any]:
    """Return what makes the numbers: versions, revision, and the hash of the code."""
    return {"versions": versions(), "revision": revision(), "code": code_digest()}


def _record(
    job: Job,
    data: DataSet,
    training: Training,
    trained: Trained,
    started: str,
    seconds: float,
    peak: int,
    made_by: Mapping[str, Any],
) -> RunRecord:
    """Return what is kept of a run; of a final one the test split is opened here, once."""
    chosen: dict[str, Any] = {"round": trained.rounds["chosen"]}
    last: dict[str, Any] = {"round": trained.rounds["last"]}
    temperatures: dict[str, float] = {}
    if job.final:
        try:
            with lost_process_told(), alike():
                found = evaluate(trained.model, data, trained.weights, training.means)
        except DataFault:  # a file of the test split: not the training's fault
            raise
        except ValueError as error:
            raise ValueError(
                f"{job.row.label}, seed {job.seed}, learning rate {job.learning_rate:g} cannot be measured, most "
                f"likely because training has diverged ({error})"
            ) from error
        chosen["scores"], last["scores"] = found.scores["chosen"], found.scores["last"]
        temperatures = found.temperatures["chosen"]
    record = {
        "dataset": job.config.data,
        "method": job.row.method,
        "row": job.row.key,
        "label": job.row.label,
        "modalities": list(job.row.modalities),
        "overrides": dict(job.row.overrides),
        "seed": job.seed,
        "learning_rate": job.learning_rate,
        "final": job.final,
        "config": training.config.plain(),
        "versions": made_by["versions"],
        "revision": made_by["revision"],
        "device": training.means.device,
        "digests": {
            "data": data_digest(data),
            "test": split_digest(replace(data).open_test()) if job.final else None,
            "code": made_by["code"],
        },
        "started": started,
        "curve": trained.curve,
        "chosen": chosen,
        "last": last,
        "temperatures": temperatures,
        "after_turn": trained.after_turn,
        "seconds_per_step": trained.seconds_per_step,
        "seconds": seconds,
        "peak_memory": peak,
        "skipped": trained.skipped,
        "cosine": trained.cosine,
        "kept": trained.kept,
        "effective_perturbation": trained.effective_perturbation,
        "projected_share": trained.projected_share,
        "parameters": training.parameters,
    }
    plain: RunRecord = json.loads(json.dumps(finite(record)))  # as it will be read again
    return plain


def begin_memory(device: str | torch.device = "cpu") -> int:
    """Give back what can be given back, and return the memory in bytes that is held before a run.

    On the CPU the resident memory of this process; of a GPU what torch's tensors hold there. From here on
    :func:`peak_memory` counts, where the system can be told so (Linux).
    """
    gc.collect()
    if torch.device(device).type == "cuda":
        torch.cuda.init()  # type: ignore[no-untyped-call]  # the next call takes it for done if the device has a number
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    with suppress(OSError, AttributeError):  # glibc's own
        ctypes.CDLL(None).malloc_trim(0)
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return _memory("VmRSS")


def peak_memory(device: str | torch.device = "cpu") -> int:
    """Return the largest memory in bytes since :func:`begin_memory`.

    On the CPU the resident memory of this process, torch and data included, where the system is not Linux since the
    process began; of a GPU what torch's tensors held there.
    """
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return _memory("VmHWM")


def _memory(name: str) -> int:
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith(f"{name}:"):
                return 1024 * int(line.split()[1])
    import resource

    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _save(path: Path, training: Training, before: Mapping[str, Any]) -> None:
    """Keep an unfinished run."""
    held = io.BytesIO()
    torch.save({"training": training.state(), **before}, held)
    write_whole(path, held.getvalue())


def _load(path: Path, training: Training) -> dict[str, Any]:
    """Take up an unfinished run and return when it was started and how long it ran."""
    try:
        kept = torch.load(path, map_location="cpu", weights_only=True)
        training.load_state(kept["training"])
        return {"started": kept["started"], "seconds": kept["seconds"]}
    except Exception as error:
        raise ValueError(f"checkpoint {path} cannot be read ({error}); delete it to begin anew") from error


@contextmanager
def _log(folder: Path, done: int) -> Iterator[Callable[[Sequence[Mapping[str, Any]], Mapping[str, Any]], None]]:
    """Give what notes a round: all of the curve as CSV, the last point for TensorBoard."""
    if not done:
        for stale in folder.glob("events.out.tfevents.*"):
            stale.unlink()
    writer = SummaryWriter(str(folder))

    def note(curve: Sequence[Mapping[str, Any]], point: Mapping[str, Any]) -> None:
        write_curve(folder / "metrics.csv", curve)
        writer.add_scalar("training loss", point["loss"], point["steps"])
        for name, value in point["accuracy"].items():
            writer.add_scalar(f"validation accuracy/{name}", value, point["steps"])

    try:
        yield note
    finally:
        writer.close()


# ----------------------------------------------------------------------------------------------------------------------
# Many runs

Told = tuple[int, Progress]
"""Which job, and how it goes on."""


def run_all(
    jobs: Sequence[Job],
    out: Path,
    workers: int,
    what: str = "training",
    *,
    resume: bool = False,
    source: Source = Source(),  # frozen
) -> list[RunRecord]:
    """Do all runs that are not in the store yet, with one progress bar over their gradient steps.

    Parameters
    ----------
    jobs : sequence of Job
        The runs; equal ones are done once.
    out : Path
        Folder of results; the store is ``runs`` in it.
    workers : int
        Processes side by side, one thread each; 1 runs everything in this process. The records do not depend on it but
        for times and memory.
    what : str
        Shown before the bar.
    resume : bool
        Whether interrupted runs are continued, bit for bit; they begin anew otherwise.
    source : Source
        Where the data come from.

    Returns
    -------
    list of dict
        The records, in the order of `jobs`.

    Raises
    ------
    InterruptedRuns
        After Ctrl-C: runs under way were saved. A second Ctrl-C does not wait for that.
    ProcessLostError
        If a process dies, for instance for want of memory.
    """
    unique = list(dict.fromkeys(jobs))
    folders = {job: job.folder(out, source.digest(job.row.config(job.config))) for job in unique}
    records: dict[Job, RunRecord] = {}
    for job in unique:
        found = read_record(folders[job], source.of(job.row.config(job.config)) if job.final else None)
        if found is not None:
            records[job] = found
    left = [job for job in unique if job not in records]
    if not left:
        return [records[job] for job in jobs]
    begun = 0 if resume else sum((folders[job] / "checkpoint.pt").is_file() for job in left)
    if begun:
        said = "1 interrupted run begins" if begun == 1 else f"{begun} interrupted runs begin"
        print(f"{said} anew; --resume goes on where it was left", file=sys.stderr)
    total = sum(job.steps for job in left)
    with (
        tqdm(total=total, desc=what, unit="step", smoothing=0.05, dynamic_ncols=True) as bar,
        _interrupts() as interrupted,
    ):
        seen: dict[int, str] = {}

        def show(told: Told) -> None:
            index, progress = told
            if progress.accuracy is not None:
                shown = (*left[index].row.modalities, CHOSEN_BY, JOINT)
                seen[index] = ", ".join(
                    f"{name} {value:.1%}" for name, value in progress.accuracy.items() if name in shown
                )
            job = left[index]
            words = [job.row.label, f"seed {job.seed}", f"loss {progress.loss:.3f}", seen.get(index, "")]
            bar.set_postfix_str(", ".join(filter(None, words)), refresh=False)
            bar.update(progress.steps)

        tasks = [_Task(job, folders[job], source, resume, provenance()) for job in left]
        if workers == 1:
            done = _run_here(tasks, show, interrupted)
        else:
            done = _run_beside(tasks, min(workers, len(left)), show, interrupted)
        if interrupted():
            raise InterruptedRuns
        bar.update(total - bar.n)  # the last reports of a process may still be on their way
    records |= {job: record for job, record in zip(left, done, strict=True) if record is not None}
    return [records[job] for job in jobs]


@contextmanager
def without_warning_of_rho() -> Iterator[None]:
    """Keep quiet, here and in new processes, that a ρ is lost in rounding: the figure or table is there to show it."""
    before = os.environ.get("PYTHONWARNINGS")
    os.environ["PYTHONWARNINGS"] = ",".join(filter(None, [before, "ignore:rho =:UserWarning"]))
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=LOST)
            yield
    finally:
        if before is None:
            del os.environ["PYTHONWARNINGS"]
        else:
            os.environ["PYTHONWARNINGS"] = before


@dataclass(frozen=True)
class _Task:
    """A job as a process gets it."""

    job: Job
    folder: Path
    source: Source
    resume: bool
    made_by: Mapping[str, Any]

    def do(self, tell: Tell, stop: Callable[[], bool]) -> RunRecord | None:
        data = replace(self.source.of(self.job.row.config(self.job.config)), test_openings=0)
        means = self.source.means
        return run_job(self.job, data, self.folder, tell, stop, resume=self.resume, made_by=self.made_by, means=means)


@contextmanager
def _interrupts() -> Iterator[Callable[[], bool]]:
    """Turn the first Ctrl-C into a note that is asked for, the second one into an interrupt."""
    noted: list[int] = []

    def note(number: int, frame: object) -> None:
        if noted:
            raise KeyboardInterrupt
        noted.append(number)

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: bool(noted)
    finally:
        signal.signal(signal.SIGINT, before)


def _run_here(
    tasks: Sequence[_Task], show: Callable[[Told], None], interrupted: Callable[[], bool]
) -> list[RunRecord | None]:
    """Do the runs in this process, on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    out: list[RunRecord | None] = []
    try:
        for index, task in enumerate(tasks):
            if interrupted():
                break

            def tell(progress: Progress, index: int = index) -> None:
                show((index, progress))

            out.append(task.do(tell, interrupted))
    finally:
        torch.set_num_threads(threads)
    return out


@contextmanager
def watched(others: set[Any]) -> Iterator[None]:
    """Within a pool of processes: say so if one is gone; end all but `others` when anything else is raised.

    Raises
    ------
    ProcessLostError
        If a process dies, for instance for want of memory.
    """
    try:
        yield
    except concurrent.futures.process.BrokenProcessPool as error:
        raise ProcessLostError(
            "a process ended before its run did, most likely for want of memory: try again with --workers 1"
        ) from error
    except BaseException:
        for process in set(multiprocessing.active_children()) - others:
            process.terminate()
        raise


def _run_beside(
    tasks: Sequence[_Task], workers: int, show: Callable[[Told], None], interrupted: Callable[[], bool]
) -> list[RunRecord | None]:
    """Do the runs in processes that send their progress through a queue; the longest begin."""
    context = multiprocessing.get_context("spawn")
    others = set(multiprocessing.active_children())
    told: Queue[Told] = context.Queue()
    stop = context.Event()
    with concurrent.futures.ProcessPoolExecutor(workers, context, _start_worker, (told, stop)) as pool:
        order = sorted(range(len(tasks)), key=lambda index: -tasks[index].job.passes)
        futures = {index: pool.submit(_run_in_worker, index, tasks[index]) for index in order}
        waiting = set(futures.values())
        with watched(others):
            while waiting:
                finished, waiting = concurrent.futures.wait(waiting, timeout=0.1, return_when="FIRST_EXCEPTION")
                for future in finished:
                    if not future.cancelled():
                        future.result()
                _drain(told, show)
                if interrupted() and not stop.is_set():
                    stop.set()
                    for future in waiting:
                        future.cancel()
        _drain(told, show)
        return [None if futures[index].cancelled() else futures[index].result() for index in range(len(tasks))]


def _drain(told: Queue[Told], show: Callable[[Told], None]) -> None:
    """Show what the processes have sent by now."""
    with suppress(queues.Empty):
        while True:
            show(told.get_nowait())


_worker: list[Any] = []
"""In a process of the pool: where its progress goes, and what says that it shall stop."""


def _start_worker(told: Queue[Told], stop: Event) -> None:
    """Prepare a process: one thread, queue and event, and interrupts left to the process that started it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    _worker[:] = [told, stop]


def _run_in_worker(index: int, task: _Task) -> RunRecord | None:
    """Do a run in a process of the pool."""
    told, stop = _worker
    if stop.is_set():  # the pool had it at hand already
        return None
    return task.do(lambda progress: told.put((index, replace(progress, point=None))), stop.is_set)


# ----------------------------------------------------------------------------------------------------------------------
# Choosing


def tune(
    rows: Sequence[Row],
    config: Config,
    out: Path,
    workers: int,
    *,
    resume: bool = False,
    source: Source = Source(),  # frozen
) -> dict[Row, Choice]:
    """Choose the learning rate of each row on validation, with seeds that no final run has and no test split at hand.

    Every row gets the same budget and the same grid. A rate's figure is the validation accuracy of the fusion
    :data:`igm_rs.experiments.training.CHOSEN_BY` at its best round, every origin counting once, mean over the tuning
    seeds; 0 where training diverged. What was tried is kept in ``tuning`` in the folder of results.

    Parameters
    ----------
    rows : sequence of Row
        The rows.
    config : Config
        Has the grid, or one learning rate for all, in which case nothing is run.
    out, workers, resume, source
        As in :func:`run_all`.

    Returns
    -------
    dict of Row to Choice
        One entry a row.
    """
    rows = list(dict.fromkeys(rows))
    if config.learning_rate is not None:
        return {row: Choice(config.learning_rate, {}) for row in rows}
    config = replace(config, protocol="validation")
    grid = [(row, rate, seed) for row in rows for rate in config.rates for seed in config.tuning_seeds]
    jobs = [Job(config, row, seed, rate, final=False) for row, rate, seed in grid]
    records = run_all(jobs, out, workers, "choosing learning rates", resume=resume, source=source)
    found: dict[Row, dict[float, list[float]]] = {}
    for (row, rate, _), record in zip(grid, records, strict=True):
        diverged = any(point["loss"] is None for point in record["curve"])
        best = 0.0 if diverged else max(of_fusion(point["by_origin"], CHOSEN_BY) for point in record["curve"])
        found.setdefault(row, {}).setdefault(rate, []).append(best)
    choices = {}
    for row, by_rate in found.items():
        means = {rate: fmean(values) for rate, values in by_rate.items()}
        choices[row] = Choice(max(means, key=lambda rate: means[rate]), means)
    _log_tuning(out, config, found, choices)
    return choices


def _log_tuning(
    out: Path, config: Config, found: Mapping[Row, Mapping[float, Sequence[float]]], choices: Mapping[Row, Choice]
) -> None:
    """Keep what was tried, a file for each row."""
    folder = out / "tuning" / config.data
    folder.mkdir(parents=True, exist_ok=True)
    for row, by_rate in found.items():
        told = {
            "row": row.key,
            "config": row.config(config).plain(),
            "chosen": choices[row].learning_rate,
            "tried": [
                {
                    "learning_rate": rate,
                    "validation_accuracy": dict(zip(map(str, config.tuning_seeds), values, strict=True)),
                }
                for rate, values in by_rate.items()
            ],
        }
        text = json.dumps(told, ensure_ascii=False, indent=1) + "\n"
        write_whole(folder / f"{row.key}.json", text.encode())
