"""Late fusion: one prediction from the logits of several modalities.

Every function takes the logits of all modalities for the same samples, as a mapping from the modality's name to an
``(n, c)`` tensor or as a sequence of such tensors, and returns probabilities of shape ``(n, c)``. What is fused is each
modality's softmax output. The arithmetic runs in float32 at least (in float64 when an input is float64); the result has
the inputs' dtype, promoted where they differ, and their device. Nothing waits for the device and gradients flow
through, except in :func:`fit`, which works on a copy in CPU memory.

The calibrated product is the one to try first: its temperatures, fitted on validation data, take the overconfidence
out of each modality before the modalities vote.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["TEMPERATURE_RANGE", "CalibratedProduct", "entropy_weighted", "fit", "mean", "weighted"]

Logits = Mapping[str, Tensor] | Sequence[Tensor]

TEMPERATURE_RANGE = (1e-3, 1e3)
"""Bounds of a fitted temperature over the spread of its logits: separable logits have their optimum at 0, useless ones
at infinity. The spread is the root mean square of the logits after each row's mean is taken off."""


FAR = 30.0
"""How far past these bounds, in the logarithm, 1/t is still what is said of it."""


def mean(logits: Logits) -> Tensor:
    """Fuse by the plain mean of the modalities' probabilities.

    Parameters
    ----------
    logits : mapping of str to Tensor, or sequence of Tensor
        Unnormalised log-probabilities of each modality, ``(n, c)``, floating.

    Returns
    -------
    Tensor
        Probabilities ``(n, c)``; each row sums to 1.

    Raises
    ------
    TypeError
        If `logits` is neither a mapping nor a sequence of tensors.
    ValueError
        If there is no modality, or if shapes, devices or dtypes do not fit together.
    """
    named = _named(logits)
    return _mixed(named, [1.0 / len(named)] * len(named))


def weighted(logits: Logits, weights: Mapping[str, float] | Sequence[float]) -> Tensor:
    """Fuse by a weighted mean of the modalities' probabilities.

    Parameters
    ----------
    logits : mapping of str to Tensor, or sequence of Tensor
        Unnormalised log-probabilities of each modality, ``(n, c)``, floating.
    weights : mapping of str to float, or sequence of float
        One finite weight >= 0 for each modality, by name or in the order of `logits`. Only their ratios count: they
        are divided by their sum.

    Returns
    -------
    Tensor
        Probabilities ``(n, c)``; each row sums to 1.

    Raises
    ------
    TypeError
        If `logits` or a weight is of the wrong type.
    ValueError
        As in :func:`mean`; if `weights` does not name the same modalities; if a weight is negative or not finite, or
        all are zero.
    """
    named = _named(logits)
    if isinstance(weights, Mapping):
        _same_names(named, weights, "weights are given for")
        values = [weights[name] for name in named]
    else:
        values = list(weights)
        if len(values) != len(named):
            raise ValueError(f"weights: expected {len(named)}, one for each modality, got {len(values)}")
    for name, value in zip(named, values, strict=True):
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise TypeError(f"weight of modality {name!r}: expected a float, got {type(value).__name__}")
        if not math.isfinite(value) or value < 0:
            raise ValueError(f"weight of modality {name!r}: expected a finite number >= 0, got {value}")
    largest = max(values)
    if largest == 0:
        raise ValueError("weights: at least one must be positive, got only zeros")
    scaled = [float(value) / float(largest) for value in values]  # the sum cannot overflow
    total = math.fsum(scaled)
    return _mixed(named, [value / total for value in scaled])


def entropy_weighted(logits: Logits) -> Tensor:
    r"""Fuse by weights from each sample's prediction entropy, as MLA does at test time.

    The weight of modality j for a sample is :math:`w_j \propto \exp(\max_i H_i - H_j)`, normalised over the modalities,
    with :math:`H_j` the entropy (in nats) of modality j's softmax output for that sample: who is sure has more to say.

    Parameters
    ----------
    logits : mapping of str to Tensor, or sequence of Tensor
        Unnormalised log-probabilities of each modality, ``(n, c)``, floating.

    Returns
    -------
    Tensor
        Probabilities ``(n, c)``; each row sums to 1.

    Raises
    ------
    TypeError
        If `logits` is neither a mapping nor a sequence of tensors.
    ValueError
        If there is no modality, or if shapes, devices or dtypes do not fit together.

    References
    ----------
    Zhang et al., "Multimodal Representation Learning by Alternating Unimodal Adaptation" (MLA), CVPR 2024.
    """
    named = _named(logits)
    probabilities = torch.stack([_working(tensor).softmax(dim=1) for tensor in named.values()])
    entropy = torch.special.entr(probabilities).sum(dim=2)
    weights = torch.softmax(entropy.amax(dim=0) - entropy, dim=0)
    return (weights.unsqueeze(2) * probabilities).sum(dim=0).to(_result_dtype(named))


class CalibratedProduct:
    r"""Fuse by the product of the modalities' softmax outputs, each with a temperature of its own.

    :math:`p \propto \prod_j \operatorname{softmax}(z_j / t_j)`. The temperatures :math:`t_j > 0` are those that make
    the negative log-likelihood of held-out labels smallest; :meth:`fit` finds them.

    Attributes
    ----------
    temperatures : dict of str (or int) to float
        The fitted :math:`t_j` by name (by position when fitted on a sequence), each within :data:`TEMPERATURE_RANGE`
        times the spread of its logits; 1 for logits that are the same for all classes. RuntimeError before :meth:`fit`.

    Examples
    --------
    >>> import torch
    >>> from igm_rs import fusion
    >>> audio, video = torch.randn(64, 3), torch.randn(64, 3)
    >>> fuse = fusion.fit({"audio": audio, "video": video}, labels=torch.arange(64) % 3)
    >>> fuse({"audio": audio, "video": video}).shape
    torch.Size([64, 3])
    """

    def __init__(self) -> None:
        self._temperatures: dict[str | int, float] | None = None

    @property
    def temperatures(self) -> dict[str | int, float]:
        """Fitted temperature of each modality."""
        if self._temperatures is None:
            raise RuntimeError("CalibratedProduct has no temperatures yet: call fit(logits, labels) first")
        return dict(self._temperatures)

    def fit(self, logits: Logits, labels: Tensor) -> CalibratedProduct:
        """Find the temperatures on validation data.

        L-BFGS with a strong-Wolfe line search on log t, in float64 on the CPU, from the spread of each modality's
        logits; the same input gives the same temperatures, and scaled logits give scaled ones. In 1/t the problem is
        convex, so there is no local optimum to end in. Temperatures stay within :data:`TEMPERATURE_RANGE` times the
        spread; its ends stand for an optimum at 0 or at infinity.

        Parameters
        ----------
        logits : mapping of str to Tensor, or sequence of Tensor
            Unnormalised log-probabilities of each modality on held-out samples, ``(n, c)``, floating, finite, n >= 1.
        labels : Tensor
            Classes of the samples, ``(n,)``, of an integer dtype, in [0, c).

        Returns
        -------
        CalibratedProduct
            This object.

        Raises
        ------
        TypeError
            If `logits` is neither a mapping nor a sequence of tensors, or `labels` no tensor.
        ValueError
            As in :func:`mean`; if logits are NaN or infinite; if there is no sample; if `labels` has another length,
            is not of an integer dtype or holds a class out of range. Earlier temperatures are kept then.
        """
        named = _named(logits)
        stacked = torch.stack([tensor.detach().to("cpu", torch.float64) for tensor in named.values()])
        for name, tensor in zip(named, stacked, strict=True):
            if not bool(tensor.isfinite().all()):
                raise ValueError(f"logits of modality {name!r}: expected finite values, found NaN or infinity")
        fitted = _fitted_temperatures(stacked, _checked_labels(labels, *stacked.shape[1:]))
        self._temperatures = dict(zip(named, fitted, strict=True))
        return self

    def __call__(self, logits: Logits) -> Tensor:
        """Fuse with the fitted temperatures.

        Parameters
        ----------
        logits : mapping of str to Tensor, or sequence of Tensor
            Unnormalised log-probabilities ``(n, c)`` of the modalities that were fitted; names may come in any order.

        Returns
        -------
        Tensor
            Probabilities ``(n, c)``; each row sums to 1.

        Raises
        ------
        RuntimeError
            Before :meth:`fit`.
        TypeError
            If `logits` is neither a mapping nor a sequence of tensors.
        ValueError
            As in :func:`mean`; if the modalities are not the fitted ones.
        """
        temperatures = self.temperatures
        named = _named(logits)
        _same_names(named, temperatures, "fitted were")
        scores = [torch.log_softmax(_working(tensor) / temperatures[name], dim=1) for name, tensor in named.items()]
        return torch.stack(scores).sum(dim=0).softmax(dim=1).to(_result_dtype(named))


def fit(logits: Logits, labels: Tensor) -> CalibratedProduct:
    """Fit a :class:`CalibratedProduct` on validation data.

    Parameters
    ----------
    logits : mapping of str to Tensor, or sequence of Tensor
        Unnormalised log-probabilities of each modality on held-out samples, ``(n, c)``, floating, finite, n >= 1.
    labels : Tensor
        Classes of the samples, ``(n,)``, of an integer dtype, in [0, c).

    Returns
    -------
    CalibratedProduct
        Called with logits, it returns probabilities ``(n, c)``.

    Raises
    ------
    TypeError, ValueError
        As in :meth:`CalibratedProduct.fit`.
    """
    return CalibratedProduct().fit(logits, labels)


def _named(logits: Logits) -> dict[Any, Tensor]:
    """Return the logits by name (sequences: by position) after checking that they fit together."""
    if isinstance(logits, Mapping):
        named: dict[Any, Tensor] = dict(logits)
    elif isinstance(logits, Sequence):
        named = dict(enumerate(logits))
    else:
        raise TypeError(f"logits: expected a mapping or a sequence of tensors, got {type(logits).__name__}")
    if not named:
        raise ValueError("logits: expected at least one modality, got none")
    first: Tensor | None = None
    for name, tensor in named.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"logits of modality {name!r}: expected a tensor, got {type(tensor).__name__}")
        if tensor.dim() != 2 or tensor.shape[1] == 0:
            raise ValueError(f"logits of modality {name!r}: expected shape (n, c), got {tuple(tensor.shape)}")
        if not tensor.is_floating_point():
            raise ValueError(f"logits of modality {name!r}: expected a floating dtype, got {tensor.dtype}")
        first = tensor if first is None else first
        if tensor.shape[1] != first.shape[1]:
            raise ValueError(
                f"logits of modality {name!r}: expected {first.shape[1]} classes as in the first modality, "
                f"got {tensor.shape[1]}"
            )
        if tensor.shape[0] != first.shape[0]:
            raise ValueError(
                f"logits of modality {name!r}: expected {first.shape[0]} samples as in the first modality, "
                f"got {tensor.shape[0]}"
            )
        if tensor.device != first.device:
            raise ValueError(
                f"logits of modality {name!r}: expected device {first.device} as in the first modality, "
                f"got {tensor.device}"
            )
    return named


def _same_names(named: Mapping[Any, Tensor], others: Mapping[Any, float], what: str) -> None:
    """Raise ValueError when `others` does not have the modalities of `named`."""
    if named.keys() != others.keys():
        raise ValueError(f"logits are of the modalities {list(named)}, but {what} {list(others)}")


def _working(tensor: Tensor) -> Tensor:
    """Return the tensor in the dtype of the arithmetic: float64 stays, all else becomes float32."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _result_dtype(named: Mapping[Any, Tensor]) -> torch.dtype:
    """Return the promoted dtype of all modalities."""
    dtypes = [tensor.dtype for tensor in named.values()]
    result = dtypes[0]
    for dtype in dtypes[1:]:
        result = torch.promote_types(result, dtype)
    return result


def _mixed(named: Mapping[Any, Tensor], shares: Sequence[float]) -> Tensor:
    """Return the mean of the softmax outputs with shares that sum to 1."""
    parts = [share * _working(tensor).softmax(dim=1) for share, tensor in zip(shares, named.values(), strict=True)]
    return torch.stack(parts).sum(dim=0).to(_result_dtype(named))


def _checked_labels(labels: Tensor, samples: int, classes: int) -> Tensor:
    """Return the labels as int64 on the CPU after checking length, dtype and range."""
    if not isinstance(labels, Tensor):
        raise TypeError(f"labels: expected a tensor, got {type(labels).__name__}")
    if labels.dtype == torch.bool or labels.is_floating_point() or labels.is_complex():
        raise ValueError(f"labels: expected an integer dtype, got {labels.dtype}")
    if tuple(labels.shape) != (samples,):
        raise ValueError(f"labels: expected shape ({samples},) as the logits have samples, got {tuple(labels.shape)}")
    if samples == 0:
        raise ValueError("labels: expected at least one sample, got none")
    labels = labels.detach().to("cpu", torch.int64)
    lowest, highest = int(labels.min()), int(labels.max())
    if lowest < 0 or highest >= classes:
        raise ValueError(f"labels: expected classes in [0, {classes}), got {lowest if lowest < 0 else highest}")
    return labels


def _fitted_temperatures(logits: Tensor, labels: Tensor) -> list[float]:
    """Minimise the NLL of the product over log t; logits (m, n, c) float64, labels (n,) int64, both on the CPU."""
    lower, upper = (math.log(bound) for bound in TEMPERATURE_RANGE)
    largest = logits.abs().amax(dim=(1, 2), keepdim=True)
    logits = logits / largest.where(largest > 0, 1.0)  # the squares below stay in range
    logits = logits - logits.mean(dim=2, keepdim=True)
    spread = logits.square().mean(dim=(1, 2), keepdim=True).sqrt()
    flat = spread <= torch.finfo(torch.float64).eps
    spread = spread.where(~flat, 1.0)
    logits = logits.where(~flat, 0.0) / spread
    of_label = logits.gather(2, labels.expand(len(logits), -1).unsqueeze(2)).squeeze(2)
    log_t = torch.zeros(len(logits), dtype=torch.float64, device="cpu")

    def nll() -> Tensor:
        # log p = Σ_j z_j/t_j − log Σ_c exp(…), so ∂NLL/∂(log t_j) = mean(z_j[label] − Σ_c p_c z_j[c]) / t_j.
        # Past its bounds log t pays a quadratic price; within them the minimum is that of the NLL alone. Far past them
        # 1/t stays what it was, so that no step of the line search, however long, makes it infinite.
        inverse = torch.exp(-log_t.clamp(lower - FAR, upper + FAR))
        log_p = torch.log_softmax(torch.einsum("j,jnc->nc", inverse, logits), dim=1)
        expected = torch.einsum("nc,jnc->jn", log_p.exp(), logits)
        beyond = log_t - log_t.clamp(lower, upper)
        log_t.grad = inverse * (of_label - expected).mean(dim=1) + 2 * beyond
        return beyond.square().sum() - log_p.gather(1, labels.unsqueeze(1)).mean()

    optimizer = torch.optim.LBFGS(
        [log_t], max_iter=200, tolerance_grad=1e-10, tolerance_change=1e-14, line_search_fn="strong_wolfe"
    )
    optimizer.step(nll)  # type: ignore[no-untyped-call]  # torch leaves this one without annotations
    temperatures = log_t.exp().clamp(*TEMPERATURE_RANGE) * (spread * largest).flatten()
    return [float(value) for value in temperatures.where(~flat.flatten(), 1.0)]
