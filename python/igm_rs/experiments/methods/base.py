"""What a method is: a class in a file of its own; a row of a table: a method, its modalities, and what differs."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from igm_rs.experiments.configuration import Config, override
from igm_rs.experiments.networks import Branches, Head

if TYPE_CHECKING:
    from igm_rs.experiments.training import Training

__all__ = ["METHODS", "PARTICULAR", "Method", "Row", "Schedule", "base_optimizer", "control_options", "keyed", "method"]

PARTICULAR = ("rho", "tau", "trunk_tau", "alpha", "scope", "sources", "released", "rho_head", "rate_passes")
"""Values of the configuration that are not for every method."""

Schedule = Literal["single", "joint", "turns", "batches", "once"]


class Method:
    """One way of training the same branches; :func:`method` makes a subclass known by its key.

    Attributes
    ----------
    key, label : str
        As given on the command line; as shown in tables and pictures, ``{}`` stands for a single modality's name.
    head : {"own", "shared", "shared-three-layer", "concat", "trunk"}
        Heads of the network, see :meth:`igm_rs.experiments.networks.Branches.of`.
    schedule : {"single", "joint", "turns", "batches", "once"}
        One modality, nothing else; all of them in each step, through one loss; one after another in turns of many
        batches; one after another within each batch; one after another, each in a single long turn.
    sam, modifies : bool
        Whether a step has SAM's second pass; whether gradients are modified by a T.
    """

    key: ClassVar[str]
    label: ClassVar[str]
    head: ClassVar[Head] = "own"
    schedule: ClassVar[Schedule]
    sam: ClassVar[bool] = False
    modifies: ClassVar[bool] = False

    @property
    def uses(self) -> tuple[str, ...] | None:
        """Which of :data:`PARTICULAR` values of the configuration it goes by; None: it does not say."""
        return None

    def optimizer(
        self,
        model: Branches,
        modalities: Sequence[str],
        config: Config,
        learning_rate: float,
        batches: int,
        seed: int = 0,
    ) -> torch.optim.Optimizer:
        """Return the optimizer that trains `model`.

        Parameters
        ----------
        model : Branches
            The network, with this method's head.
        modalities : sequence of str
            Those that are trained, in order.
        config : Config
            What all methods have in common.
        learning_rate : float
            At the start.
        batches : int
            Batches in one pass over the training split.
        seed : int
            Of the run.
        """
        raise NotImplementedError

    def take_step(
        self,
        model: Branches,
        optimizer: torch.optim.Optimizer,
        active: Sequence[str],
        inputs: Mapping[str, Tensor],
        labels: Tensor,
        config: Config,
    ) -> Tensor:
        """Take one optimizer step and return the loss at the first pass, detached.

        Parameters
        ----------
        model : Branches
            The network.
        optimizer : Optimizer
            What :meth:`optimizer` has returned.
        active : sequence of str
            The modalities that the step moves. Of one the loss is that of its branch, of several that of the network's
            joint logits.
        inputs : mapping of str to Tensor
            A batch of each of them.
        labels : Tensor
            ``(n,)``, int64, its classes.
        config : Config
            What all methods have in common.
        """

        def closure() -> Tensor:
            optimizer.zero_grad()
            logits = model.joint(inputs) if len(active) > 1 else model.branch(active[0], inputs[active[0]])
            loss = torch.nn.functional.cross_entropy(logits, labels)
            loss.backward()  # type: ignore[no-untyped-call]
            return loss

        loss: Tensor = optimizer.step(closure)  # type: ignore[arg-type, assignment]  # torch's stub has a float here
        return loss.detach()

    def begin_turn(self, training: Training, modality: str | None) -> None:
        """Do what comes before a turn of `modality` (None: of all): nothing, but for methods that say otherwise."""

    def goes_back(self, config: Config) -> bool:
        """Whether turns begin at the best weights so far, which are then looked for after each turn."""
        return False

    def by_macro_f1(self, config: Config) -> bool:
        """Whether the macro-F1 of the mean fusion chooses, in place of the accuracy of the summed logits."""
        return False

    def rate_factor(self, config: Config, passes: int) -> float | None:
        """Return the factor of the learning rate after so many passes of a turn; None: as the schedule has it."""
        return None


METHODS: dict[str, Method] = {}
"""Every method by key, in the order of the tables; a user's own come last."""


def method(made: type[Method]) -> type[Method]:
    """Make a method known; stands above its class.

    Raises
    ------
    TypeError
        If it is no subclass of :class:`Method`, or lacks an attribute that it must have.
    ValueError
        If its key is unfit, or another class has it.
    """
    if not (isinstance(made, type) and issubclass(made, Method)):
        raise TypeError(f"method is {made!r}, expected a subclass of Method")
    for name in ("key", "label", "schedule"):
        if not hasattr(made, name):
            raise TypeError(f"method {made.__name__} has no {name}, expected one")
    if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", made.key):
        raise ValueError(f"method {made.__name__} has the key {made.key!r}, expected small letters, digits and '-'")
    other = METHODS.get(made.key)
    if other is not None and type(other).__module__ != made.__module__:
        raise ValueError(f"method {made.__name__} has the key {made.key!r}, which {type(other).__name__} has already")
    METHODS[made.key] = made()
    return made


def keyed(key: str) -> Method:
    """Return a method by its key.

    Raises
    ------
    ValueError
        If there is none.
    """
    if key not in METHODS:
        raise ValueError(f"method is {key!r}, expected one of {', '.join(METHODS)}")
    return METHODS[key]


def base_optimizer(model: Branches, config: Config, learning_rate: float) -> torch.optim.Optimizer:
    """Return the optimizer underneath, of all of the network's parameters but frozen ones."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if config.base == "adam":
        return torch.optim.Adam(parameters, lr=learning_rate, weight_decay=config.weight_decay)
    return torch.optim.SGD(parameters, lr=learning_rate, momentum=config.momentum, weight_decay=config.weight_decay)


def control_options(control: str | None, seed: int) -> dict[str, Any]:
    """Return the options of IGMOptimizer for a control in the place of T; each run has a random basis of its own."""
    return {"control": control, "seed": seed} if control == "random" else {"control": control}


@dataclass(frozen=True)
class Row:
    """A row of a table.

    Attributes
    ----------
    method : str
        Key of the method.
    modalities : tuple of str
        Those that it trains, in order; one for ``"single"``.
    overrides : mapping
        Values of the configuration that are this row's own, such as ``{"scope": 0.3}``.
    """

    method: str
    modalities: tuple[str, ...]
    overrides: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check that there is such a method, and that a single modality is one.

        Raises
        ------
        ValueError
            If not.
        """
        object.__setattr__(self, "modalities", tuple(self.modalities))
        alone = keyed(self.method).schedule == "single"
        if not self.modalities or alone != (len(self.modalities) == 1):
            wanted = "one modality" if alone else "two modalities or more"
            raise ValueError(f"method {self.method} has {list(self.modalities)}, expected {wanted}")

    def __hash__(self) -> int:
        return hash(self.key)

    @property
    def of(self) -> Method:
        """The method itself."""
        return METHODS[self.method]

    @property
    def key(self) -> str:
        """Name in the results and of a folder, such as ``"igm"``, ``"single-gyroscope"`` or ``"igm-scope-0.3"``."""
        parts = [self.method]
        if self.of.schedule == "single":
            parts.append(self.modalities[0])
        for name, value in sorted(self.overrides.items()):
            parts += [name, _word(value)]
        return "-".join(parts)

    @property
    def label(self) -> str:
        """Name in tables and pictures."""
        changed = [f"{name} {_word(value)}" for name, value in sorted(self.overrides.items())]
        return ", ".join([self.of.label.format(self.modalities[0]), *changed])

    def config(self, config: Config) -> Config:
        """Return the configuration with this row's own values."""
        return override(config, self.overrides)


def _word(value: Any) -> str:
    """Return a value in letters that a file's name can have."""
    if isinstance(value, Mapping):
        return "-".join(f"{name}.{source or 'none'}" for name, source in value.items())
    if isinstance(value, tuple | list):
        return "-".join(map(_word, value))
    return f"{value:g}" if isinstance(value, float) else str(value).lower()
