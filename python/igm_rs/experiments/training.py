"""The training: one loop for every method, the same batches and the same budget for all."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

import igm_rs

from .data import DataSet, Split
from .evaluation import accuracy
from .methods import Row, Settings, make_optimizer
from .networks import Branches

__all__ = ["Point", "Trained", "batch_stream", "train"]

Report = Callable[[int, float, float | None], None]
"""Called with the gradient steps done since the last call, the last loss, and the last validation accuracy if any."""


@dataclass(frozen=True)
class Point:
    """What validation says after a round.

    Attributes
    ----------
    steps : int
        Gradient steps that each modality has had.
    loss : float
        Mean training loss of the round, first passes only.
    accuracy : dict
        Share of correct predictions in [0, 1], by modality.
    fused : float
        The same for the sum of the logits of all modalities that were trained.
    """

    steps: int
    loss: float
    accuracy: dict[str, float]
    fused: float


@dataclass
class Trained:
    """The result of :func:`train`.

    Attributes
    ----------
    model : Branches
        With the weights after round `kept`.
    kept : int
        Rounds behind the weights of `model`, counted from 1.
    curve : list of Point
        One entry a round.
    seconds_per_step : float
        Wall time of training over the gradient steps of all modalities; validation not counted.
    skipped : int
        Steps that the optimizer left out for a zero or non-finite gradient.
    cosine : float or None
        Mean cosine of a projected layer's gradient before and after projection, taken at the last step of each turn
        (or of each round, where turns last one batch); None without projection.
    effective_perturbation : float or None
        Mean of ‖realised ε‖/ρ at the same steps; None without SAM.
    projected_share : float or None
        Share of the parameters whose gradient a T can act on, mean over the modalities; None without projection.
    """

    model: Branches
    kept: int
    curve: list[Point]
    seconds_per_step: float
    skipped: int
    cosine: float | None
    effective_perturbation: float | None
    projected_share: float | None = None


@dataclass
class _Witness:
    """What IGMOptimizer tells of a run: cosines of projected gradients, effective perturbations."""

    cosines: list[float] = field(default_factory=list)
    perturbations: list[float] = field(default_factory=list)
    shares: list[float] = field(default_factory=list)

    def note(self, optimizer: torch.optim.Optimizer) -> None:
        """Read the figures of the last step."""
        if isinstance(optimizer, igm_rs.IGMOptimizer):
            told = optimizer.last_stats
            self.cosines += [layer["cosine"] for layer in told["projected"].values()]
            if told["projected"] and told["active"] is not None:
                self.shares.append(optimizer.projected_share[told["active"]])
            if told["effective_perturbation"] is not None:
                self.perturbations.append(told["effective_perturbation"])


def batch_stream(examples: int, batch_size: int, seed: int) -> Iterator[Tensor]:
    """Yield the indices of one batch after another for ever, in a new order each pass; a short last batch is left out.

    Every modality of a run draws from a stream of its own with the run's seed: its i-th gradient step sees the same
    examples whatever the method.
    """
    generator = torch.Generator().manual_seed(seed)
    size = min(batch_size, examples)
    while True:
        order = torch.randperm(examples, generator=generator)
        for start in range(0, examples - size + 1, size):
            yield order[start : start + size]


def train(
    data: DataSet,
    row: Row,
    settings: Settings,
    learning_rate: float,
    seed: int,
    keep: int | None = None,
    report: Report | None = None,
) -> Trained:
    """Train one row of the table on the training split, watched on the validation split. The test split is not used.

    Parameters
    ----------
    data : DataSet
        The set; its test split may be shut.
    row : Row
        The method and its modalities.
    settings : Settings
        The budget and what else all trainings have in common.
    learning_rate : float
        At the start; it follows half a cosine over the rounds, down to zero after the last.
    seed : int
        Of the initial weights and of the order of the batches.
    keep : int, optional
        The round, from 1, whose weights are returned; the last by default. The whole budget is used in any case.
    report : callable, optional
        Told about progress after each turn.

    Returns
    -------
    Trained
        The model and what was seen on the way.

    Raises
    ------
    ValueError
        If `keep` is no round of this budget.
    """
    lengths = settings.turn_lengths
    keep = len(lengths) if keep is None else keep
    if not 1 <= keep <= len(lengths):
        raise ValueError(f"keep is {keep}, expected a round from 1 to {len(lengths)}")
    names, examples = row.modalities, len(data.train)
    model = Branches.of(data, names, shared_head=row.method.orthogonal, seed=seed)
    optimizer = make_optimizer(row, model, settings, learning_rate, max(1, examples // settings.batch_size))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(_half_cosine, len(lengths)))
    streams = {name: batch_stream(examples, settings.batch_size, seed) for name in names}
    witness, kept = _Witness(), None
    curve: list[Point] = []
    seconds, done = 0.0, 0
    for number, length in enumerate(lengths, start=1):
        losses: list[Tensor] = []
        for turn in _turns(row, length):
            began = time.perf_counter()
            with _turn(optimizer, row, turn):
                for active in turn:
                    chosen = [next(streams[name]) for name in active]  # the same for all: one seed, as many draws
                    losses.append(_step(model, optimizer, active, chosen[0], data.train))
            seconds += time.perf_counter() - began
            witness.note(optimizer)
            steps = sum(map(len, turn))
            done += steps
            if report is not None:
                report(steps, float(losses[-1]), curve[-1].fused if curve else None)
        schedule.step()
        curve.append(_watch(model, data, sum(lengths[:number]), float(torch.stack(losses).mean())))
        if number == keep:
            kept = copy.deepcopy(model.state_dict())
    if kept is not None:
        model.load_state_dict(kept)
    return Trained(
        model=model,
        kept=keep,
        curve=curve,
        seconds_per_step=seconds / done,
        skipped=optimizer.skipped_steps if isinstance(optimizer, igm_rs.IGMOptimizer) else 0,
        cosine=_mean(witness.cosines),
        effective_perturbation=_mean(witness.perturbations),
        projected_share=_mean(witness.shares),
    )


def _half_cosine(rounds: int, done: int) -> float:
    """Return the factor of the learning rate after `done` of all rounds, from 1 to 0."""
    return 0.5 * (1 + math.cos(math.pi * done / rounds))


Active = tuple[str, ...]
"""The modalities that one optimizer step moves."""


def _turns(row: Row, length: int) -> list[list[Active]]:
    """Return the turns of one round, each a list of optimizer steps (Algorithm 1, lines 1-3)."""
    names = row.modalities
    if row.method.schedule == "turns":
        return [[(name,)] * length for name in names]
    if row.method.schedule == "batches":
        return [[(name,) for _ in range(length) for name in names]]
    return [[names] * length]


def _turn(optimizer: torch.optim.Optimizer, row: Row, turn: list[Active]) -> AbstractContextManager[object]:
    """Return the optimizer's turn where the method has turns; else a context that does nothing."""
    if row.method.schedule == "turns" and isinstance(optimizer, igm_rs.IGMOptimizer):
        return optimizer.turn(turn[0][0])
    return nullcontext()


def _step(model: Branches, optimizer: torch.optim.Optimizer, active: Active, chosen: Tensor, split: Split) -> Tensor:
    """Take one optimizer step on the sum of the active modalities' logits and return the loss at the first pass."""
    inputs = {name: split.inputs[name][chosen] for name in active}
    labels = split.labels[chosen]

    def closure() -> Tensor:
        optimizer.zero_grad()
        logits = torch.stack([model.branch(name, values) for name, values in inputs.items()]).sum(0)
        loss = torch.nn.functional.cross_entropy(logits, labels)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    loss: Tensor = optimizer.step(closure)  # type: ignore[arg-type, assignment]  # torch's stub has a float here
    return loss.detach()


def _watch(model: Branches, data: DataSet, steps: int, loss: float) -> Point:
    """Return what validation says now."""
    logits, labels = model.logits(data.validation.inputs), data.validation.labels
    each = {name: accuracy(values, labels) for name, values in logits.items()}
    return Point(steps, loss, each, accuracy(torch.stack(list(logits.values())).sum(0), labels))


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None
