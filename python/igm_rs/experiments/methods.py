"""The methods that are compared: one table, and what each makes of the optimizer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

import igm_rs

from .networks import Branches

__all__ = ["METHODS", "RHO", "TAU", "Method", "Row", "Settings", "make_optimizer", "rows"]

RHO = 0.05
"""ρ of every method with SAM, in the unit of the weights. The paper's 1e-15 and 1e-10 do nothing in float32."""

TAU = 0.4
"""τ of the flat projection, the paper's."""

ALPHA = 0.1
"""α of MLA's recursion, which becomes ``0.1 ** (1 + batch / batches)``."""


@dataclass(frozen=True)
class Method:
    """One way of training the same branches.

    Attributes
    ----------
    key, label : str
        As given on the command line; as shown in tables and pictures.
    schedule : {"single", "joint", "turns", "batches"}
        One modality, nothing else; all of them in each step, through one loss on the sum of their logits; one after
        another in turns of many batches; one after another within each batch.
    rho : float
        ρ of SAM; 0 is none.
    tau : float
        τ of the flat projection of the heads' gradients; 0 is none.
    orthogonal : bool
        MLA's orthogonal projection, of one head that all modalities share.
    """

    key: str
    label: str
    schedule: Literal["single", "joint", "turns", "batches"]
    rho: float = 0.0
    tau: float = 0.0
    orthogonal: bool = False


METHODS = {
    method.key: method
    for method in (
        Method("single", "{} alone", "single"),
        Method("joint", "joint", "joint"),
        Method("sam", "joint + SAM", "joint", rho=RHO),
        Method("turns", "turns", "turns"),
        Method("turns-sam", "turns + SAM", "turns", rho=RHO),
        Method("mla", "MLA", "batches", orthogonal=True),
        Method("igm-no-sam", "IGM without SAM", "turns", tau=TAU),
        Method("igm", "IGM", "turns", rho=RHO, tau=TAU),
    )
}
"""Every method by key, in the order of the tables."""


@dataclass(frozen=True)
class Row:
    """A line of a table: a method and the modalities that it trains."""

    method: Method
    modalities: tuple[str, ...]

    @property
    def key(self) -> str:
        """Name in the results, such as ``"igm"`` or ``"single-gyroscope"``."""
        return f"single-{self.modalities[0]}" if self.method.schedule == "single" else self.method.key

    @property
    def label(self) -> str:
        """Name in tables and pictures."""
        return self.method.label.format(self.modalities[0])


@dataclass(frozen=True)
class Settings:
    """What all trainings of a comparison have in common.

    Attributes
    ----------
    steps : int
        Budget: gradient steps that each modality gets. A joint step is a step of every modality; SAM's second pass
        belongs to its step.
    turn_steps : int
        Batches in a turn, about one pass over the training split. A round is a turn of every modality.
    batch_size : int
        Examples in a batch.
    momentum, weight_decay : float
        Of the SGD underneath, the paper's.
    scope : float, optional
        What the flat projection acts on: the layers from the output backwards that hold this share of each modality's
        parameters (the paper's Table 4); None is the heads.
    """

    steps: int
    turn_steps: int = 40
    batch_size: int = 32
    momentum: float = 0.9
    weight_decay: float = 1e-4
    scope: float | None = None

    @property
    def turn_lengths(self) -> list[int]:
        """Batches of each turn, one entry a round; the last round may be short."""
        full, rest = divmod(self.steps, self.turn_steps)
        return [self.turn_steps] * full + [rest] * (rest > 0)


def rows(keys: Sequence[str], modalities: Sequence[str]) -> list[Row]:
    """Return the lines of a table in the order of :data:`METHODS`; "single" is one line a modality.

    Raises
    ------
    ValueError
        If a key is unknown.
    """
    for key in keys:
        if key not in METHODS:
            raise ValueError(f"method is {key!r}, expected one of {', '.join(METHODS)}")
    out = []
    for key, method in METHODS.items():
        if key in keys:
            groups = [(name,) for name in modalities] if method.schedule == "single" else [tuple(modalities)]
            out += [Row(method, group) for group in groups]
    return out


def make_optimizer(
    row: Row, model: Branches, settings: Settings, learning_rate: float, batches: int
) -> torch.optim.Optimizer:
    """Return the optimizer that trains `model` by the row's method.

    Plain SGD for the methods that need nothing else; :class:`igm_rs.IGMOptimizer` around the same SGD for all others.

    Parameters
    ----------
    row, model, settings
        What is trained, and how.
    learning_rate : float
        At the start.
    batches : int
        Batches in one pass over the training split (MLA's recursion counts them).
    """
    method = row.method
    sgd = torch.optim.SGD(
        model.parameters(), lr=learning_rate, momentum=settings.momentum, weight_decay=settings.weight_decay
    )
    if method.schedule in ("single", "joint"):
        return igm_rs.IGMOptimizer(sgd, rho=method.rho) if method.rho > 0 else sgd
    parts = {name: [model.encoders[name], model.head_of(name)] for name in row.modalities}
    if method.orthogonal:
        return igm_rs.IGMOptimizer(
            sgd,
            parts,
            head=model.head,
            rho=method.rho,
            projector="orthogonal",
            covariance="kept",
            alpha=ALPHA,
            batches=batches,
        )
    if settings.scope is not None:
        return igm_rs.IGMOptimizer(sgd, parts, scope=settings.scope, rho=method.rho, tau=method.tau)
    heads = {name: model.head_of(name) for name in row.modalities}
    return igm_rs.IGMOptimizer(sgd, parts, heads=heads, rho=method.rho, tau=method.tau)
