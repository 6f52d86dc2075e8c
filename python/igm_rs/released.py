"""The ways in which the released scripts leave the paper (method.md §4), each a switch of its own; their mixup."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from . import _checks

__all__ = ["Released", "mixup", "mixup_loss"]

_SEEDS = 2**63 - 1
"""Seeds of a generator of λ are drawn below it: what an int64 tensor holds."""


@dataclass(frozen=True)
class Released:
    r"""What a step of ``IGMOptimizer(mode=...)`` has of the released scripts; ``mode="released"`` is ``Released()``.

    A step of the active modality: g = ∇L(θ); each tensor p of θ⁽ʲ⁾ gets other memory that holds p + ρ g_p/‖g_p‖₂; F is
    the loss of the head there, on the features that the encoder gave at θ; the gradient is that of
    (1 − w) L + w F, w the `flat_ratio`; a Linear layer's gradient is multiplied by the T's of all source layers of its
    shape; the base steps from the perturbed weights. A tensor without a gradient other than zero is not perturbed (the
    scripts divide by zero there).

    Parameters
    ----------
    norm : {"tensor", "all"}
        What ε is divided by: the norm of each tensor's gradient, so that ε of each has the length ρ; or that of all of
        θ⁽ʲ⁾ (Eq. 7).
    rho_head : float, optional
        ρ ≥ 0 of the tensors of the head (the optimizer's `heads` or `head`), whose groups have no ``"rho"`` of their
        own. None: that of the others, the optimizer's `rho`.
    restore : bool
        Whether ε is taken back before the base steps (Eq. 8). False: the step starts at the perturbed weights.
    second_pass : {"head", "whole"}
        What is evaluated at the perturbed weights: the head on the features of the first pass, by the callable that the
        closure returns; or the closure once more, as in Eq. (8), whose loss is F then.
    flat_ratio : float
        w in [0, 1].
    gather : {"pass", "turn"}
        Where the features of Ȳ come from: :meth:`igm_rs.IGMOptimizer.collect` alone, a pass in evaluation mode over the
        training data between two turns; or the steps of the turn, whose end makes T.
    layers : {"linear", "all"}
        Which layers of `heads`, `head` or `scope` are projected: Linear layers alone, of which each modality
        must then have one; or convolutions and attention, too.
    pairing : {"position", "name", "shape"} or mapping
        Of the optimizer, of the same name: by equal shape of the weights, several T's for one layer.
    reset : subset of {"momentum", "lr"}
        Of the optimizer, of the same name: the scripts build a new optimizer for each turn. A scheduler of the turn is
        made, and stepped before its first epoch, inside the ``turn()`` block.

    Raises
    ------
    ValueError, TypeError
        A value that is none of these.

    Notes
    -----
    What the backward pass sees of the perturbation follows from what autograd has saved (measured, torch 2.11, without
    torch.compile): convolutions and normalisation layers save the parameter itself, so they hand the gradient on by
    their perturbed weights; a Linear layer saves a view of the old memory and hands it on by the weights of the forward
    pass. So ε of an encoder changes the gradients below its convolutions, though no loss is evaluated there.
    BatchNorm layers record their statistics in the first pass alone.

    ``Released(norm="all", restore=True, second_pass="whole", flat_ratio=1.0, gather="turn", layers="all",
    pairing="position", reset=())`` is the paper's step, where ρ > 0.

    Not part of a step are the scripts' mixup (:func:`mixup`), their schedule (a new StepLR for each turn, stepped
    before each epoch; turns of unlike lengths) and their choice of the best checkpoint on the test set.

    A step needs one process, and waits for both gradient norms on CUDA.

    References
    ----------
    Jiang, Chi, Yang: Interactive Multimodal Learning via Flat Gradient Modification, IJCAI 2025; its public scripts.

    Examples
    --------
    >>> import torch, igm_rs
    >>> from torch.nn.functional import cross_entropy
    >>> encoder, head = torch.nn.Linear(4, 3), torch.nn.Linear(3, 2)
    >>> base = torch.optim.SGD([*encoder.parameters(), *head.parameters()], lr=0.1)
    >>> opt = igm_rs.IGMOptimizer(base, {"audio": encoder}, heads={"audio": head}, mode="released")
    >>> x, y = torch.ones(2, 4), torch.tensor([0, 1])
    >>> def closure():
    ...     mixed, y_a, y_b, lam = igm_rs.released.mixup(x, y, alpha=1.0)
    ...     features = encoder(mixed)
    ...     loss = igm_rs.released.mixup_loss(head(features), y_a, y_b, lam)
    ...     return loss, lambda: cross_entropy(head(features), y)
    >>> with opt.turn("audio"):
    ...     loss = opt.step(closure)
    >>> opt.last_stats["second_pass"]
    'head'
    >>> with opt.collect("audio"), torch.no_grad():  # the features of its T: a pass after the turn, in eval()
    ...     logits = head(encoder(x))
    >>> list(opt.projectors["audio"])
    ['audio']
    """

    norm: str = "tensor"
    rho_head: float | None = None
    restore: bool = False
    second_pass: str = "head"
    flat_ratio: float = 0.3
    gather: str = "pass"
    layers: str = "linear"
    pairing: str | Mapping[str, Any] = "shape"
    reset: str | tuple[str, ...] = ("momentum", "lr")

    def __post_init__(self) -> None:
        _checks.choice("norm", self.norm, ("tensor", "all"))
        if self.rho_head is not None:
            _checks.non_negative("rho_head", self.rho_head)
        _checks.flag("restore", self.restore)
        _checks.choice("second_pass", self.second_pass, ("head", "whole"))
        _checks.share("flat_ratio", self.flat_ratio)
        _checks.choice("gather", self.gather, ("pass", "turn"))
        _checks.choice("layers", self.layers, ("linear", "all"))
        if not isinstance(self.pairing, Mapping):
            _checks.choice("pairing", self.pairing, ("position", "name", "shape"))
        _checks.names("reset", self.reset, ("momentum", "lr"))


def mixup(
    x: torch.Tensor, y: torch.Tensor, alpha: float = 1.0, generator: torch.Generator | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, float]:
    """Mix each sample of a batch with another one of it: λ x + (1 − λ) x', λ ~ Beta(α, α), one λ for the batch.

    Parameters
    ----------
    x : torch.Tensor
        Samples of floating point, shape (n_B, …), n_B ≥ 1. Not changed.
    y : torch.Tensor
        Their labels, shape (n_B, …).
    alpha : float
        α ≥ 0; 0 is no mixup, λ = 1.
    generator : torch.Generator, optional
        Where λ and the partners are drawn from; torch's own by default.

    Returns
    -------
    mixed : torch.Tensor
        As `x`.
    y_a, y_b : torch.Tensor
        The labels `y`, and those of each sample's partner.
    lam : float
        λ in [0, 1].

    Raises
    ------
    TypeError
        Something that is no tensor of floating point, or no tensor.
    ValueError
        An empty batch; another number of labels than samples; an `alpha` below 0.

    References
    ----------
    Zhang et al.: mixup: Beyond Empirical Risk Minimization, ICLR 2018.
    """
    if not (isinstance(x, torch.Tensor) and x.is_floating_point()):
        what = str(x.dtype) if isinstance(x, torch.Tensor) else f"a {type(x).__name__}"
        raise TypeError(f"x is {what}, expected a tensor of floating point: samples that can be mixed")
    if not isinstance(y, torch.Tensor):
        raise TypeError(f"y is a {type(y).__name__}, expected a tensor of labels")
    if x.dim() == 0 or len(x) == 0:
        raise ValueError(f"x has the shape {tuple(x.shape)}, expected (n_B, …) with n_B >= 1")
    if y.dim() == 0 or len(y) != len(x):
        raise ValueError(f"y has the shape {tuple(y.shape)}, expected a label for each of the {len(x)} samples of x")
    strength = _checks.non_negative("alpha", alpha)
    where = torch.device("cpu") if generator is None else generator.device
    partners = torch.randperm(len(x), generator=generator, device=where).to(x.device)
    lam = 1.0
    if strength > 0:
        seed = int(torch.randint(_SEEDS, (), generator=generator, device=where))
        lam = float(np.random.default_rng(seed).beta(strength, strength))
    return lam * x + (1 - lam) * x[partners], y, y[partners.to(y.device)], lam


def mixup_loss(logits: torch.Tensor, y_a: torch.Tensor, y_b: torch.Tensor, lam: float) -> torch.Tensor:
    """Return λ CE(logits, y_a) + (1 − λ) CE(logits, y_b), the mean over the batch, for what :func:`mixup` returned.

    Parameters
    ----------
    logits : torch.Tensor
        Shape (n_B, classes).
    y_a, y_b : torch.Tensor
        Shape (n_B,), int64.
    lam : float
        λ in [0, 1].

    Raises
    ------
    ValueError, TypeError
        A λ out of [0, 1]; torch's own for shapes and dtypes.
    """
    weight = _checks.share("lam", lam)
    return weight * cross_entropy(logits, y_a) + (1 - weight) * cross_entropy(logits, y_b)
