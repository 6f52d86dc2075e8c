"""The measures: accuracy, mean average precision, macro-F1 and NLL of every branch and of every way to fuse them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor
from torchmetrics.functional.classification import (
    multiclass_accuracy,
    multiclass_average_precision,
    multiclass_f1_score,
)

from igm_rs import fusion

from .data import DataSet, Split
from .networks import Branches

__all__ = [
    "FUSIONS",
    "JOINT",
    "MEASURES",
    "Evaluation",
    "Scores",
    "accuracy",
    "calibrated",
    "evaluate",
    "measures",
    "of_fusion",
    "predictions",
    "score",
    "watched",
]

FUSIONS = ("mean", "entropy", "calibrated", "sum")
"""Mean of the softmax outputs; MLA's entropy weights; product of softmax outputs with temperatures fitted on the
validation split; softmax of the summed logits, which is what joint training by summation optimises."""

JOINT = "joint"
"""Name of the prediction of a head that takes all modalities at once; such a network has it beside its fusions."""

MEASURES = ("accuracy", "map", "macro_f1", "nll")
"""All but the last are better when larger."""

Scores = dict[str, dict[str, float]]
"""Measure to (modality or fusion to value)."""

Weights = Mapping[str, Tensor]
"""A state dict."""


def accuracy(scores: Tensor, labels: Tensor) -> float:
    """Return the share of examples whose largest score is that of their label, in [0, 1].

    Parameters
    ----------
    scores : Tensor
        ``(n, c)``, logits or probabilities.
    labels : Tensor
        ``(n,)``, classes.
    """
    return float(multiclass_accuracy(scores.argmax(-1), labels, scores.shape[-1], average="micro"))


def measures(probabilities: Tensor, labels: Tensor) -> dict[str, float]:
    """Return all :data:`MEASURES` of one prediction.

    Parameters
    ----------
    probabilities : Tensor
        ``(n, c)``, rows that sum to 1.
    labels : Tensor
        ``(n,)``, int64, classes.

    Returns
    -------
    dict of str to float
        ``accuracy``, the share of examples whose largest probability is that of their label; ``map``, the mean over the
        classes of the average precision of telling this class from all others; ``macro_f1``, the mean over the classes
        of the F1 score; ``nll``, the mean negative log-likelihood in nats. A class of which there is no example has no
        average precision and is left out of that mean; it is left out of macro-F1 if it is never predicted either.
    """
    classes = probabilities.shape[-1]
    # torchmetrics takes numbers past 1, even those of rounding, for logits
    precision = multiclass_average_precision(probabilities.clamp(0, 1), labels, classes, average="none")
    present = torch.bincount(labels, minlength=classes) > 0
    chosen = probabilities.gather(-1, labels[:, None]).double()
    return {
        "accuracy": accuracy(probabilities, labels),
        "map": float(precision[present].mean()),
        "macro_f1": float(multiclass_f1_score(probabilities.argmax(-1), labels, classes, average="macro")),
        "nll": float(-chosen.clamp_min(torch.finfo(torch.float64).tiny).log().mean()),
    }


def predictions(model: Branches, split: Split, product: fusion.CalibratedProduct | None) -> dict[str, Tensor]:
    """Return the probabilities ``(n, c)``, float64, of each modality, of each fusion, and of a joint head.

    Parameters
    ----------
    model : Branches
        The network, with one modality or more; of a single modality there is no fusion.
    split : Split
        The examples.
    product : CalibratedProduct, optional
        Fitted on logits of the same network; None: there is no ``calibrated`` fusion.
    """
    logits = {name: values.double() for name, values in model.logits(split.inputs).items()}
    out = {name: torch.softmax(values, -1) for name, values in logits.items()}
    if len(logits) > 1:
        out |= {
            "mean": fusion.mean(logits),
            "entropy": fusion.entropy_weighted(logits),
            **({} if product is None else {"calibrated": product(logits)}),
            "sum": torch.softmax(torch.stack(list(logits.values())).sum(0), -1),
        }
    if model.joined:
        out[JOINT] = torch.softmax(model.joint_logits(split.inputs).double(), -1)
    return out


def calibrated(model: Branches, data: DataSet) -> fusion.CalibratedProduct:
    """Return the calibrated product of a network's branches, its temperatures fitted on the validation split."""
    return fusion.fit(model.logits(data.validation.inputs), data.validation.labels)


def score(model: Branches, split: Split, product: fusion.CalibratedProduct) -> Scores:
    """Return all :data:`MEASURES` of all :func:`predictions` on a split; parameters as there."""
    of = {name: measures(values, split.labels) for name, values in predictions(model, split, product).items()}
    return {measure: {name: values[measure] for name, values in of.items()} for measure in MEASURES}


def watched(model: Branches, split: Split, product: fusion.CalibratedProduct | None) -> dict[str, float]:
    """Return the accuracy of all :func:`predictions` on a split, for training curves; parameters as there."""
    return {name: accuracy(values, split.labels) for name, values in predictions(model, split, product).items()}


@dataclass(frozen=True)
class Evaluation:
    """What a finished run gives on the test split.

    Attributes
    ----------
    scores : dict of str to Scores
        For each set of weights, by the name given to it.
    temperatures : dict of str to dict
        For each set of weights, the temperature of each modality in the calibrated product.
    """

    scores: dict[str, Scores]
    temperatures: dict[str, dict[str, float]]


def evaluate(model: Branches, data: DataSet, weights: Mapping[str, Weights]) -> Evaluation:
    """Measure finished weights on the test split, which this opens once for all of them.

    All temperatures are fitted on the validation split before the test split is opened.

    Parameters
    ----------
    model : Branches
        The network; it has the last of the weights afterwards.
    data : DataSet
        The set; its test split must be there.
    weights : mapping of str to state dict
        What is measured, such as the weights of the chosen and of the last round; those of the network itself may be
        among them.

    Raises
    ------
    ValueError
        If there are no weights.
    """
    if not weights:
        raise ValueError("weights: expected at least one state dict to measure, got none")
    own = {name: {key: value.clone() for key, value in values.items()} for name, values in weights.items()}
    products = {}
    for name, values in own.items():
        model.load_state_dict(values)
        products[name] = calibrated(model, data)
    test = data.open_test()
    scores = {}
    for name, values in own.items():
        model.load_state_dict(values)
        scores[name] = score(model, test, products[name])
    temperatures = {
        name: {str(modality): value for modality, value in product.temperatures.items()}
        for name, product in products.items()
    }
    return Evaluation(scores, temperatures)


Value = TypeVar("Value")


def of_fusion(scores: Mapping[str, Value], fusion: str) -> Value:
    """Return what stands in a fusion's column of a table.

    Parameters
    ----------
    scores : mapping of str to float, or to anything else
        One measure, by modality or fusion.
    fusion : str
        Of :data:`FUSIONS`.

    Returns
    -------
    float, or what the mapping holds
        That fusion's value; of a joint head, which is fused already, its own; of a single modality, its own.
    """
    if JOINT in scores:
        return scores[JOINT]
    if len(scores) == 1:
        return next(iter(scores.values()))
    return scores[fusion]
