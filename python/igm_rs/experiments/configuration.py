"""The configuration of a comparison: a readable file for each data set, every value of which can be overridden."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from math import isfinite
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

from .columns import NETWORKS

__all__ = [
    "BASES",
    "CHOICES",
    "DEVIATIONS",
    "LATER",
    "PROTOCOLS",
    "SCHEDULES",
    "Config",
    "cores",
    "count",
    "load_config",
    "override",
]

FOLDER = Path(__file__).resolve().with_name("configurations")
"""Where the files of the shipped data sets lie, and ``default.toml`` for all others."""

BASES = ("sgd", "adam")
PROTOCOLS = ("validation", "paper")
SCHEDULES = ("cosine", "plateau")

DEVIATIONS = (
    *("tensor-norm", "kept", "stale-head", "mixed-loss", "pass", "shape", "best", "rebuild", "step-lr", "macro-f1"),
)
"""What the released scripts do otherwise than the paper, each by itself: ε* normalised for each tensor; never taken
back; the head alone at θ + ε*, on the features of θ; the loss 0.7 of mixed examples at θ and 0.3 at θ + ε*; Ȳ from a
pass in evaluation mode; every T of equal shape; each turn begins at the best weights so far; with a new optimizer; with
a new StepLR; macro-F1 of the mean fusion chooses the best weights."""

CHOICES = {"base": BASES, "protocol": PROTOCOLS, "network": NETWORKS, "schedule": SCHEDULES}
"""Values of which there are few."""

LATER = ("network", "schedule", "patience", "released", "rho_head", "rate_passes")
"""Values that configurations kept with older results do not have; they were made with the defaults of today."""


def _option(default: Any, words: str) -> Any:
    """A field with the words that ``igm-rs --help`` says about it."""
    return field(default=default, metadata={"help": words})


@dataclass(frozen=True)
class Config:
    """What all runs of a comparison have in common; each field is an option of the command.

    Attributes
    ----------
    data : str
        Name of the data set.
    steps : int
        Budget: gradient steps that each modality gets. A joint step is a step of every modality; SAM's second pass
        belongs to its step.
    turn_steps : int
        Batches in a turn. A round is a turn of every modality.
    batch_size : int
        Examples in a batch.
    base : {"sgd", "adam"}
        The optimizer underneath.
    momentum, weight_decay : float
        Of the optimizer underneath; Adam has no momentum but its own.
    rho : float or mapping of str to float
        ρ of every method with SAM, in the unit of the weights; one for all modalities, or one for each.
    tau : float
        τ of the flat modification.
    trunk_tau : float
        The same on the shared trunk, where a strong one is needed.
    alpha : float
        α of MLA's recursion, which becomes ``alpha ** (1 + batch / batches)``.
    scope : float, optional
        What is modified: the layers from the output backwards that hold this share of each modality's parameters (the
        paper's Table 4); None is the heads.
    sources : mapping of str to str or None, optional
        Whose T acts on each modality, None is none (the paper's Table 3); by default the modality before it.
    rates : tuple of float
        Learning rates that are tried for every row.
    learning_rate : float, optional
        The learning rate of all rows; nothing is tuned then.
    tuning_seeds : tuple of int
        Seeds of the runs that choose the learning rate. No final run has one of them.
    first_seed, seeds : int
        Seed of the first final run of a row, and how many there are.
    protocol : {"validation", "paper"}
        Where the round is chosen: on the validation split, or on the test split as the released scripts do.
    network : {"default", "small", "pretrained", "frozen"}
        The encoders, see :class:`igm_rs.experiments.columns.Reading`.
    schedule : {"cosine", "plateau"}
        The learning rate on half a cosine, or divided by 10 when the training loss is saturated (the paper).
    patience : int
        Rounds without a smaller training loss after which it is.
    released : tuple of str
        Which of :data:`DEVIATIONS` the method "released" has.
    rho_head : float, optional
        ρ of the heads in the method "released", whose scripts have one of their own; None: that of the modality.
    rate_passes : int
        Passes of a turn after which the StepLR of "released" divides the learning rate by 10. It is stepped before a
        pass, so one earlier. The paper does not say after how many.
    """

    data: str = _option("watch", "data set")
    steps: int = _option(400, "gradient steps that each modality gets")
    turn_steps: int = _option(40, "batches in a turn")
    batch_size: int = _option(32, "examples in a batch")
    base: str = _option("sgd", "optimizer underneath: sgd or adam")
    momentum: float = _option(0.9, "momentum of sgd")
    weight_decay: float = _option(1e-4, "weight decay")
    rho: float | Mapping[str, float] = _option(
        0.05, "ρ of the methods with SAM, in the unit of the weights; or one for each modality: audio=0.05,video=0.02"
    )
    tau: float = _option(0.4, "τ of the flat modification")
    trunk_tau: float = _option(100.0, "τ of the flat modification of a shared trunk")
    alpha: float = _option(0.1, "α of MLA's recursion")
    scope: float | None = _option(None, "modify this share of each modality's parameters, 0 to 1; none: the heads")
    sources: Mapping[str, str | None] | None = _option(
        None, "whose T acts on each modality, such as audio=video,video=none; none: the one before it"
    )
    rates: tuple[float, ...] = _option((0.01, 0.03, 0.1), "learning rates that are tried for every row")
    learning_rate: float | None = _option(None, "one learning rate for all rows, nothing is tuned; none: tuned")
    tuning_seeds: tuple[int, ...] = _option((1000, 1001, 1002), "seeds of the runs that choose the learning rate")
    first_seed: int = _option(100, "seed of the first final run")
    seeds: int = _option(5, "final runs of every row")
    protocol: str = _option("validation", "where the round is chosen: validation, or paper (on the test split)")
    network: str = _option("default", "encoders: the set's own, small ones, pretrained ones, or pretrained and frozen")
    schedule: str = _option("cosine", "learning rate: half a cosine, or a tenth at each plateau of the training loss")
    patience: int = _option(5, "rounds without a smaller training loss that make a plateau")
    released: tuple[str, ...] = _option(DEVIATIONS, "deviations of the method released: " + ", ".join(DEVIATIONS))
    rho_head: float | None = _option(None, "ρ of the heads in the method released; none: that of the modality")
    rate_passes: int = _option(40, "passes of a turn after which StepLR of the method released divides the rate by 10")

    def __post_init__(self) -> None:
        """Check every value.

        Raises
        ------
        TypeError, ValueError
            Names the field, its value and what was expected.
        """
        for name in ("steps", "turn_steps", "batch_size", "seeds", "patience", "rate_passes"):
            _integer(name, getattr(self, name), 1)
        _integer("first_seed", self.first_seed, 0)
        if isinstance(self.rho, Mapping):
            object.__setattr__(self, "rho", dict(self.rho))
        for name, value in self.rho.items() if isinstance(self.rho, Mapping) else {"": self.rho}.items():
            _number(f"rho of {name}" if name else "rho", value, positive=False)
        for name in ("tau", "trunk_tau", "weight_decay"):
            _number(name, getattr(self, name), positive=False)
        if self.rho_head is not None:
            _number("rho_head", self.rho_head, positive=False)
        _number("alpha", self.alpha, positive=True)
        _number("momentum", self.momentum, positive=False)
        if not self.momentum < 1:
            raise ValueError(f"momentum is {self.momentum!r}, expected a number in [0, 1)")
        if self.scope is not None:
            _number("scope", self.scope, positive=False)
            if self.scope > 1:
                raise ValueError(f"scope is {self.scope!r}, expected a share in [0, 1] or none")
        if self.learning_rate is not None:
            _number("learning_rate", self.learning_rate, positive=True)
        for name, what in (("rates", "learning rate"), ("tuning_seeds", "seed")):
            values = getattr(self, name)
            if isinstance(values, str) or not isinstance(values, Sequence):
                raise TypeError(f"{name} is {values!r}, expected a list")
            if not values or len(set(values)) < len(values):
                raise ValueError(f"{name} is {list(values)!r}, expected one {what} or more, each once")
            object.__setattr__(self, name, tuple(values))
        for rate in self.rates:
            _number("rates", rate, positive=True)
        for seed in self.tuning_seeds:
            _integer("tuning_seeds", seed, 0)
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is {getattr(self, name)!r}, expected {' or '.join(map(repr, known))}")
        if isinstance(self.released, str) or not isinstance(self.released, Sequence):
            raise TypeError(f"released is {self.released!r}, expected a list")
        for name in self.released:
            if name not in DEVIATIONS:
                raise ValueError(f"released has {name!r}, expected some of {', '.join(DEVIATIONS)}")
        object.__setattr__(self, "released", tuple(name for name in DEVIATIONS if name in self.released))
        used = set(self.tuning_seeds) & set(self.final_seeds)
        if used:
            raise ValueError(
                f"tuning_seeds is {list(self.tuning_seeds)!r}, expected none of the final seeds "
                f"{self.first_seed} to {self.first_seed + self.seeds - 1}"
            )
        if self.sources is not None:
            if not isinstance(self.sources, Mapping):
                raise TypeError(f"sources is {self.sources!r}, expected a mapping of modality to modality or None")
            # TOML has no null
            plain = {name: None if source in (None, "none") else source for name, source in self.sources.items()}
            object.__setattr__(self, "sources", plain)

    def __hash__(self) -> int:
        return hash(repr(self.plain()))

    @property
    def final_seeds(self) -> range:
        """Seeds of the final runs."""
        return range(self.first_seed, self.first_seed + self.seeds)

    @property
    def has_sam(self) -> bool:
        """Whether any ρ is above 0."""
        return any(self.rho.values()) if isinstance(self.rho, Mapping) else self.rho > 0

    def rho_of(self, modalities: Sequence[str]) -> float | dict[str, float]:
        """Return ρ, or that of each of these modalities.

        Raises
        ------
        ValueError
            If one has none.
        """
        if not isinstance(self.rho, Mapping):
            return self.rho
        missing = [name for name in modalities if name not in self.rho]
        if missing:
            raise ValueError(
                f"rho has no {missing[0]!r}, expected one number, or one for each of {', '.join(modalities)}"
            )
        return {name: self.rho[name] for name in modalities}

    @property
    def turn_lengths(self) -> list[int]:
        """Batches of each turn, one entry a round; the last round may be short."""
        full, rest = divmod(self.steps, self.turn_steps)
        return [self.turn_steps] * full + [rest] * (rest > 0)

    def plain(self) -> dict[str, Any]:
        """Return all values as JSON has them."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}


def _integer(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} is {value!r}, expected an integer")
    if value < least:
        raise ValueError(f"{name} is {value!r}, expected an integer from {least}")


def _number(name: str, value: Any, *, positive: bool) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} is {value!r}, expected a number")
    if not isfinite(value) or value < 0 or (positive and value == 0):
        raise ValueError(f"{name} is {value!r}, expected a finite number {'> 0' if positive else '>= 0'}")


def load_config(data: str, overrides: Mapping[str, Any] | None = None, file: Path | None = None) -> Config:
    """Return the configuration of a data set.

    Parameters
    ----------
    data : str
        Name of the data set. A set without a file of its own takes ``default.toml``; for a network that `overrides`
        name there may be a file beside its own, such as ``openclipart-frozen.toml``.
    overrides : mapping of str to value, optional
        Values that win over the file's.
    file : Path, optional
        A TOML file in place of the shipped one.

    Raises
    ------
    FileNotFoundError
        If `file` does not exist.
    TypeError, ValueError
        If a name or a value is not as expected; of a file, it is named.
    """
    path = file
    if path is None:
        network = (overrides or {}).get("network", "default")
        names = (f"{data}-{network}", data, "default")
        path = next(own for name in names if (own := FOLDER / f"{name}.toml").is_file() or name == "default")
    if not path.is_file():
        raise FileNotFoundError(f"configuration file {path} does not exist, expected a TOML file")
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"configuration file {path} is no TOML file that can be read: {error}") from error
    try:
        return override(Config(data=data), {**values, **(overrides or {}), "data": data})
    except (TypeError, ValueError) as error:
        raise type(error)(f"configuration {path.name}: {error}") from error


def override(config: Config, values: Mapping[str, Any]) -> Config:
    """Return the configuration with other values.

    Raises
    ------
    TypeError, ValueError
        If a name or a value is not as expected.
    """
    known = {each.name for each in fields(Config)}
    for name in values:
        if name not in known:
            raise ValueError(f"there is no setting {name!r}, expected some of {', '.join(sorted(known))}")
    return replace(config, **values)


def cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def count(text: str) -> int:
    """Read a positive integer.

    Raises
    ------
    argparse.ArgumentTypeError
        If it is none.
    """
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive integer")
    return value
