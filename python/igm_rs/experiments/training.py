"""The training: one loop for every method, the same batches and budget for all; it can be left and taken up."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import ReduceLROnPlateau

import igm_rs

from .columns import Column
from .configuration import Config
from .data import DataSet
from .evaluation import Watched, of_fusion, watched
from .feeding import Means, alike, batch_stream, feed, lost_process_told
from .methods import Row
from .networks import Branches

__all__ = ["CHOSEN_BY", "Progress", "Stopped", "Trained", "Training", "turns_of"]

CHOSEN_BY = "sum"
"""The fusion whose accuracy by origin chooses round and learning rate: the sum of logits, which joint training
optimises. A modality alone and a joint head have one prediction, which stands for all fusions."""

TELL_EVERY = 2.0
"""Seconds between two reports of a long stretch, and two occasions to save it."""

Active = tuple[str, ...]
"""The modalities that one optimizer step moves."""

Weights = dict[str, Tensor]


class Stopped(Exception):  # noqa: N818  # nothing went wrong
    """Training was asked to stop between two steps; :meth:`Training.state` takes it up again there."""


@dataclass(frozen=True)
class Progress:
    """What is told about a training while it goes on.

    Attributes
    ----------
    steps : int
        Gradient steps of all modalities since the last time.
    loss : float
        Of the last step's first pass.
    accuracy : dict of str to float, optional
        On validation, by modality and fusion; None before there is one.
    point : dict, optional
        The entry of the training curve, where a round has just ended.
    """

    steps: int
    loss: float
    accuracy: Mapping[str, float] | None
    point: Mapping[str, Any] | None = None


@dataclass
class Trained:
    """The result of :meth:`Training.run`.

    Attributes
    ----------
    model : Branches
        With the weights of the last round.
    weights : dict of str to state dict
        ``"chosen"``: of the round that the protocol chooses; ``"last"``: of the last round.
    rounds : dict of str to int
        Rounds behind these weights, counted from 1.
    curve : list of dict
        One entry a round: ``round``; ``steps``, gradient steps that each modality has had, on average where they come
        one after another; ``loss``, mean over the round, first passes only; ``accuracy`` and ``by_origin`` on
        validation by modality and fusion, see :class:`igm_rs.experiments.evaluation.Watched`.
    after_turn : list of dict
        One entry a turn, ``round``, ``modality`` and ``scores`` on validation; the first is that of the initial
        weights, round 0 and modality ``""``. Empty where there are no turns.
    seconds_per_step : float
        Wall time of training, the making of T's with it, over the gradient steps of all modalities; validation not
        counted.
    skipped : int
        Steps that the optimizer left out for a zero or non-finite gradient.
    cosine : float or None
        Mean cosine of a projected layer's gradient before and after projection, taken at the last step of each turn
        (or of each round, where turns last one batch); None without projection.
    kept : float or None
        Likewise the mean of the gradient's norm after over that before: how much of it is left.
    effective_perturbation : float or None
        Mean of ‖realised ε‖/ρ at the same steps; None without SAM.
    projected_share : float or None
        Share of the parameters whose gradient a T can act on, mean over the modalities; None without projection.
    """

    model: Branches
    weights: dict[str, Weights]
    rounds: dict[str, int]
    curve: list[dict[str, Any]]
    after_turn: list[dict[str, Any]]
    seconds_per_step: float
    skipped: int
    cosine: float | None
    kept: float | None
    effective_perturbation: float | None
    projected_share: float | None


@dataclass(frozen=True)
class Stretch:
    """Steps without a break, after which validation is looked at.

    Attributes
    ----------
    round : int
        From 1.
    steps : sequence of tuple of str
        The modalities that each step moves.
    factor : float
        Of the learning rate.
    ends_round : bool
        Whether the round ends with it.
    """

    round: int
    steps: Sequence[Active]
    factor: float
    ends_round: bool


@dataclass(frozen=True)
class Turn:
    """What lies between two makings of T: stretches of one modality, or of all (`modality` is None)."""

    modality: str | None
    stretches: list[Stretch]


def turns_of(row: Row, config: Config) -> list[Turn]:
    """Return all turns of a training (Algorithm 1, lines 1-3).

    In every schedule each modality gets ``config.steps`` steps, there are as many rounds, and the learning rate follows
    half a cosine from 1 to 0: over the rounds, or, where modalities come one after another, over the steps of each.
    """
    names, lengths = row.modalities, config.turn_lengths
    rounds = len(lengths)
    factors = [0.5 * (1 + math.cos(math.pi * done / rounds)) for done in range(rounds)]
    schedule = row.of.schedule
    if schedule == "once":
        turns = []
        for place, name in enumerate(names):
            stretches = []
            for at, (length, factor) in enumerate(zip(lengths, factors, strict=True)):
                number, rest = divmod(place * rounds + at + 1, len(names))
                stretches.append(Stretch(number + (rest > 0), [(name,)] * length, factor, rest == 0))
            turns.append(Turn(name, stretches))
        return turns
    turns = []
    for number, (length, factor) in enumerate(zip(lengths, factors, strict=True), start=1):
        if schedule == "turns":
            for name in names:
                turns.append(Turn(name, [Stretch(number, [(name,)] * length, factor, name == names[-1])]))
        elif schedule == "batches":
            turns.append(Turn(None, [Stretch(number, [(name,) for name in names] * length, factor, True)]))
        else:
            turns.append(Turn(None, [Stretch(number, [names] * length, factor, True)]))
    return turns


@dataclass
class _Position:
    """Where a training stands: finished turns, stretches of the open turn, steps of the open stretch."""

    turn: int = 0
    stretch: int = 0
    step: int = 0
    draws: dict[str, int] = field(default_factory=dict)
    done: int = 0


@dataclass
class _Witness:
    """What IGMOptimizer tells of a run: of projected gradients cosines and what is left; perturbations; shares."""

    cosines: list[float] = field(default_factory=list)
    kept: list[float] = field(default_factory=list)
    perturbations: list[float] = field(default_factory=list)
    shares: list[float] = field(default_factory=list)

    def note(self, optimizer: torch.optim.Optimizer) -> None:
        """Read the figures of the last step."""
        if isinstance(optimizer, igm_rs.IGMOptimizer):
            told = optimizer.last_stats
            self.cosines += [layer["cosine"] for layer in told["projected"].values()]
            norms = [(layer["norm_before"], layer["norm_after"]) for layer in told["projected"].values()]
            self.kept += [after / before for before, after in norms if before > 0]
            if told["projected"] and told["active"] is not None:
                self.shares.append(optimizer.projected_share[told["active"]])
            if told["effective_perturbation"] is not None:
                self.perturbations.append(told["effective_perturbation"])


class Training:
    """The training of one row of a table on the training split, watched on the validation split.

    The test split is not used but under the protocol "paper", which chooses the round on it.

    Parameters
    ----------
    data : DataSet
        The set; its test split may be shut.
    row : Row
        The method, its modalities and what it overrides.
    config : Config
        The budget and what else all trainings have in common.
    learning_rate : float
        At the start.
    seed : int
        Of the initial weights and of the order of the batches.
    means : Means
        Device, and processes that decode.
    """

    def __init__(
        self, data: DataSet, row: Row, config: Config, learning_rate: float, seed: int, means: Means | None = None
    ) -> None:
        self.data, self.row, self.learning_rate, self.seed = data, row, learning_rate, seed
        self.means = Means() if means is None else means
        self.config = row.config(config)
        examples = len(data.train)
        self.model = Branches.of(data, row.modalities, head=row.of.head, seed=seed).to(self.means.device)
        batches = max(1, examples // self.config.batch_size)
        self.optimizer = row.of.optimizer(self.model, row.modalities, self.config, learning_rate, batches, seed)
        self._plateau = self._new_plateau() if self.config.schedule == "plateau" else None
        self.turns = turns_of(row, self.config)
        self.total = self.config.steps * len(row.modalities)
        self._choosing = data.open_test() if self.config.protocol == "paper" and data.has_test else data.validation
        self._streams = {name: batch_stream(examples, self.config.batch_size, seed) for name in row.modalities}
        self._feeds: dict[str, Iterator[Tensor]] = {}
        self._position = _Position(draws=dict.fromkeys(row.modalities, 0))
        self._witness = _Witness()
        self._losses: list[float] = []
        self._curve: list[dict[str, Any]] = []
        self._after_turn: list[dict[str, Any]] = []
        self._chosen: tuple[int, float, Weights] = (0, -math.inf, {})
        self._seconds = 0.0
        with self._own_random():
            torch.manual_seed(seed)
            self._random = self._random_now()

    @property
    def best(self) -> Weights:
        """The weights that would be chosen now; empty before there are any."""
        return self._chosen[2]

    @property
    def turn_before(self) -> str | None:
        """The modality of the turn before the present one; None in the first."""
        return None if self._position.turn == 0 else self.turns[self._position.turn - 1].modality

    @property
    def curve(self) -> list[dict[str, Any]]:
        """The training curve so far, see :class:`Trained`."""
        return self._curve

    @property
    def loss(self) -> float:
        """Of the last step's first pass; NaN before the first."""
        return self._losses[-1] if self._losses else self._curve[-1]["loss"] if self._curve else math.nan

    @property
    def done(self) -> int:
        """Gradient steps of all modalities so far."""
        return self._position.done

    @property
    def parameters(self) -> int:
        """Numbers that the network has."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    def run(
        self,
        report: Callable[[Progress], None] | None = None,
        stop: Callable[[], bool] | None = None,
        save: Callable[[], None] | None = None,
    ) -> Trained:
        """Train to the end, from where it stands.

        Parameters
        ----------
        report : callable, optional
            Told about progress after each stretch of steps, and every few seconds in a long one.
        stop : callable, optional
            Asked before each step whether to stop there.
        save : callable, optional
            Called between two turns, and every few seconds in a long one, where :meth:`state` may be kept.

        Raises
        ------
        Stopped
            If `stop` says so.
        ChildProcessError
            If a process that decodes is gone.
        """
        with self._own_random(), alike():
            torch.set_rng_state(self._random[0])
            for state in self._random[1:]:
                torch.cuda.set_rng_state(state, self.means.device)
            try:
                with lost_process_told():  # torch tells of one wherever the training is
                    self._run(report or _silent, stop or _never, save or _nothing)
            finally:
                self._random = self._random_now()
                self._feeds.clear()
        told, (number, _, weights) = self._witness, self._chosen
        skipped = self.optimizer.skipped_steps if isinstance(self.optimizer, igm_rs.IGMOptimizer) else 0
        return Trained(
            model=self.model,
            weights={"chosen": weights, "last": copy.deepcopy(self.model.state_dict())},
            rounds={"chosen": number, "last": self._curve[-1]["round"]},
            curve=self._curve,
            after_turn=self._after_turn,
            seconds_per_step=self._seconds / self.done,
            skipped=skipped,
            cosine=_mean(told.cosines),
            kept=_mean(told.kept),
            effective_perturbation=_mean(told.perturbations),
            projected_share=_mean(told.shares),
        )

    def _own_random(self) -> AbstractContextManager[None]:
        """Return what puts torch's generators back as they were."""
        device = torch.device(self.means.device)
        return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])

    def _random_now(self) -> list[Tensor]:
        """Return the state of torch's generator, and of the device's where that has its own."""
        cuda = torch.device(self.means.device).type == "cuda"
        return [torch.get_rng_state(), *([torch.cuda.get_rng_state(self.means.device)] if cuda else [])]

    def _new_plateau(self) -> ReduceLROnPlateau:
        """Return what divides the learning rate by 10 when the training loss is saturated (the paper's section 4.2)."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate
        return ReduceLROnPlateau(self.optimizer, factor=0.1, patience=self.config.patience)

    def _run(self, report: Callable[[Progress], None], stop: Callable[[], bool], save: Callable[[], None]) -> None:
        at = self._position
        if at.done == 0 and self.turns[0].modality is not None:
            found = watched(self.model, self.data.validation, self.means)
            self._after_turn = [{"round": 0, "modality": "", "scores": {"accuracy": found.accuracy}}]
        while at.turn < len(self.turns):
            turn = self.turns[at.turn]
            if at.stretch == at.step == 0:
                self._begin_turn(turn)
            with self._entered(turn):
                while at.stretch < len(turn.stretches):
                    self._walk(turn, turn.stretches[at.stretch], report, stop, save)
                    at.stretch, at.step = at.stretch + 1, 0
                ended = time.perf_counter()  # the turn ends with a new T
            self._seconds += time.perf_counter() - ended
            at.turn, at.stretch = at.turn + 1, 0
            self._random = self._random_now()
            save()

    def _begin_turn(self, turn: Turn) -> None:
        """Do what a method does before a turn; where modalities come one after another, each has the full rate."""
        self.row.of.begin_turn(self, turn.modality)
        if self._plateau is not None and self.row.of.schedule == "once":
            self._plateau = self._new_plateau()

    def _entered(self, turn: Turn) -> AbstractContextManager[object]:
        """Return the optimizer's turn where there is one; else a context that does nothing."""
        if turn.modality is not None and isinstance(self.optimizer, igm_rs.IGMOptimizer):
            return self.optimizer.turn(turn.modality)
        return nullcontext()

    def _walk(
        self,
        turn: Turn,
        stretch: Stretch,
        report: Callable[[Progress], None],
        stop: Callable[[], bool],
        save: Callable[[], None],
    ) -> None:
        """Take the steps of a stretch that are left, then look at validation and tell."""
        at, before = self._position, self._position.done
        passes = max(1, len(self.data.train) // self.config.batch_size)
        began = told = time.perf_counter()
        try:
            while at.step < len(stretch.steps):
                if stop():
                    raise Stopped
                self._set_rate(stretch, at.step // passes)
                self._losses.append(self._step(stretch.steps[at.step]))
                at.done += len(stretch.steps[at.step])
                at.step += 1
                if at.step < len(stretch.steps) and time.perf_counter() - told > TELL_EVERY:
                    report(Progress(at.done - before, self._losses[-1], None))
                    before = at.done
                    self._seconds += time.perf_counter() - began
                    self._random = self._random_now()
                    save()
                    began = told = time.perf_counter()
        finally:
            self._seconds += time.perf_counter() - began
        self._witness.note(self.optimizer)
        found, point = None, None
        ends_turn = turn.modality is not None and stretch is turn.stretches[-1]
        if ends_turn or stretch.ends_round:
            found = watched(self.model, self.data.validation, self.means)
            if ends_turn:
                entry = {"round": stretch.round, "modality": turn.modality, "scores": {"accuracy": found.accuracy}}
                self._after_turn.append(entry)
                if not stretch.ends_round and self.row.of.goes_back(self.config):
                    self._choose(stretch.round, found, usable=math.isfinite(self._losses[-1]))
        loss = self._losses[-1]
        if stretch.ends_round and found is not None:
            point = self._end_round(stretch.round, found)
        report(Progress(at.done - before, loss, None if found is None else found.accuracy, point))

    def _set_rate(self, stretch: Stretch, passes: int) -> None:
        """Set the learning rate of the next step, after so many passes of its turn; a plateau has set it already."""
        factor = self.row.of.rate_factor(self.config, passes)
        if factor is None and self._plateau is None:
            factor = stretch.factor
        if factor is not None:
            for group in self.optimizer.param_groups:
                group["lr"] = self.learning_rate * factor

    def _step(self, active: Active) -> float:
        """Take one optimizer step and return the loss at the first pass."""
        for name in active:
            chosen = next(self._streams[name])  # the same for all: one seed, as many draws
        inputs = {name: self._next(name, chosen) for name in active}
        for name in active:
            self._position.draws[name] += 1
        return float(self.step_on(active, chosen, inputs))

    def _next(self, name: str, chosen: Tensor) -> Tensor:
        """Return a modality's next batch: the chosen examples, with random crops and the like where it has any."""
        values = self.data.train.inputs[name]
        if not isinstance(values, Column):
            return self.examples(name, chosen)
        if name not in self._feeds:
            done = self._position.draws[name]
            self._feeds[name] = feed(values, self.config.batch_size, self.seed, done, self.means)
        return next(self._feeds[name]).to(self.means.device, non_blocking=True)

    def examples(self, name: str, chosen: Tensor) -> Tensor:
        """Return a modality's chosen training examples as they are measured on, on the device."""
        return self.data.train.inputs[name][chosen].to(self.means.device)

    def one_pass(self, name: str) -> Iterator[Tensor]:
        """Yield one pass over a modality's training split in batches, crops and the like as in training."""
        count, size = len(self.data.train), self.config.batch_size
        batches = max(1, count // size)
        values = self.data.train.inputs[name]
        if isinstance(values, Column):  # other random numbers than those of the steps
            seed = self.seed + 1_000_003 * (self._position.turn + 1)
            yield from (
                batch.to(self.means.device) for batch in islice(feed(values, size, seed, 0, self.means), batches)
            )
            return
        for chosen in islice(batch_stream(count, size, self.seed), batches):
            yield self.examples(name, chosen)

    def labels(self, chosen: Tensor) -> Tensor:
        """Return the labels of the chosen training examples, on the device."""
        return self.data.train.labels[chosen].to(self.means.device)

    def step_on(self, active: Active, chosen: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
        """Take one optimizer step on the chosen training examples and return the loss; a subclass may look at it."""
        return self.row.of.take_step(self.model, self.optimizer, active, inputs, self.labels(chosen), self.config)

    def _end_round(self, number: int, found: Watched) -> dict[str, Any]:
        """Note the round in the curve, and its weights if it is the best so far; of equals the later one is."""
        steps = self._position.done // len(self.row.modalities)
        point: dict[str, Any] = {
            "round": number,
            "steps": steps,
            "loss": sum(self._losses) / len(self._losses),
            "accuracy": found.accuracy,
            "by_origin": found.by_origin,
        }
        self._losses.clear()
        self._curve.append(point)
        if self._plateau is not None and math.isfinite(point["loss"]):
            self._plateau.step(point["loss"])
        self._choose(number, found, usable=math.isfinite(point["loss"]))
        return point

    def _choose(self, number: int, found: Watched, *, usable: bool) -> None:
        """Keep the weights if they are the best so far; of equals the later ones are."""
        on_validation, value = self._choosing is self.data.validation, -math.inf
        if usable:
            seen = found if on_validation else watched(self.model, self._choosing, self.means)
            if self.row.of.by_macro_f1(self.config):
                value = seen.macro_f1
            else:  # by accuracy on the test split, as the released scripts do, every example counts
                value = of_fusion(seen.by_origin if on_validation else seen.accuracy, CHOSEN_BY)
        if value >= self._chosen[1]:
            self._chosen = (number, value, copy.deepcopy(self.model.state_dict()))

    # ------------------------------------------------------------------------------------------------------------------
    # Leaving and taking up

    def state(self) -> dict[str, Any]:
        """Return everything that :meth:`load_state` needs to go on as if nothing had happened, to the bit."""
        return copy.deepcopy(
            {
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "position": vars(self._position),
                "witness": vars(self._witness),
                "losses": self._losses,
                "curve": self._curve,
                "after_turn": self._after_turn,
                "chosen": self._chosen,
                "seconds": self._seconds,
                "random": self._random,
                "plateau": None if self._plateau is None else self._plateau.state_dict(),
            }
        )

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state` returned, of a training made with the same arguments."""
        state = copy.deepcopy(dict(state))
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self._position = _Position(**state["position"])
        self._witness = _Witness(**state["witness"])
        self._losses, self._curve, self._after_turn = state["losses"], state["curve"], state["after_turn"]
        self._chosen, self._seconds = state["chosen"], state["seconds"]
        if len(state["random"]) != len(self._random):
            raise ValueError(f"its random numbers are those of another kind of device, expected {self.means.device}")
        self._random = state["random"]
        if self._plateau is not None:
            self._plateau.load_state_dict(state["plateau"])
        self._feeds.clear()
        for name, stream in self._streams.items():
            for _ in range(self._position.draws[name]):
                next(stream)


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _silent(_: Progress) -> None:
    """Tell nobody."""


def _never() -> bool:
    """Do not stop."""
    return False


def _nothing() -> None:
    """Keep nothing."""
