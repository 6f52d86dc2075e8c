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
from .feeding import Means
from .networks import Branches

__all__ = [
    "FUSIONS",
    "JOINT",
    "JOINT_CALIBRATED",
    "MEASURES",
    "Calibration",
    "Evaluation",
    "Scores",
    "Watched",
    "accuracy",
    "accuracy_by_origin",
    "calibrated",
    "evaluate",
    "macro_f1",
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

JOINT_CALIBRATED = "joint-calibrated"
"""Name of the same prediction with a temperature that is fitted like those of the calibrated product."""

MEASURES = ("accuracy", "by_origin", "map", "macro_f1", "nll")
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


def accuracy_by_origin(scores: Tensor, labels: Tensor, origins: Tensor) -> float:
    """Return the mean over the origins of the accuracy on the examples of each, in [0, 1].

    Examples of one origin, such as the windows of a person or the pictures of one title, are no independent evidence;
    so each origin counts once, however many examples it has. Where every example is an origin, or all are one, it is
    the accuracy.

    Parameters
    ----------
    scores : Tensor
        ``(n, c)``, logits or probabilities.
    labels : Tensor
        ``(n,)``, classes.
    origins : Tensor
        ``(n,)``, int64, where each example comes from.
    """
    right = (scores.argmax(-1) == labels).double()
    _, place, count = torch.unique(origins, return_inverse=True, return_counts=True)
    return float((right / count[place]).sum() / len(count))


def macro_f1(scores: Tensor, labels: Tensor) -> float:
    """Return the mean over the classes of the F1 score, in [0, 1].

    A class of which there is no example is left out if it is never predicted either.

    Parameters
    ----------
    scores : Tensor
        ``(n, c)``, logits or probabilities.
    labels : Tensor
        ``(n,)``, int64, classes.
    """
    return float(multiclass_f1_score(scores.argmax(-1), labels, scores.shape[-1], average="macro"))


def measures(probabilities: Tensor, labels: Tensor, origins: Tensor) -> dict[str, float]:
    """Return all :data:`MEASURES` of one prediction.

    Parameters
    ----------
    probabilities : Tensor
        ``(n, c)``, rows that sum to 1.
    labels : Tensor
        ``(n,)``, int64, classes.
    origins : Tensor
        ``(n,)``, int64, where each example comes from.

    Returns
    -------
    dict of str to float
        ``accuracy``, the share of examples whose largest probability is that of their label; ``by_origin``, the same
        with every origin counting once, see :func:`accuracy_by_origin`; ``map``, the mean over the
        classes of the average precision of telling this class from all others; ``macro_f1``, see :func:`macro_f1`;
        ``nll``, the mean negative log-likelihood in nats. A class of which there is no example has no average precision
        and is left out of that mean.
    """
    classes = probabilities.shape[-1]
    # torchmetrics takes numbers past 1, even those of rounding, for logits
    precision = multiclass_average_precision(probabilities.clamp(0, 1), labels, classes, average="none")
    present = torch.bincount(labels, minlength=classes) > 0
    chosen = probabilities.gather(-1, labels[:, None]).double()
    return {
        "accuracy": accuracy(probabilities, labels),
        "by_origin": accuracy_by_origin(probabilities, labels, origins),
        "map": float(precision[present].mean()),
        "macro_f1": macro_f1(probabilities, labels),
        "nll": float(-chosen.clamp_min(torch.finfo(torch.float64).tiny).log().mean()),
    }


@dataclass(frozen=True)
class Calibration:
    """Temperatures of a network, fitted on held-out logits by :func:`calibrated`.

    Attributes
    ----------
    branches : CalibratedProduct
        Of the modalities' branches; of a single modality it is that modality's temperature.
    joint : CalibratedProduct, optional
        Of the logits of a joint head, where there is one.
    """

    branches: fusion.CalibratedProduct
    joint: fusion.CalibratedProduct | None

    @property
    def temperatures(self) -> dict[str, float]:
        """By modality, and of a joint head under its name."""
        found = {**self.branches.temperatures, **({} if self.joint is None else self.joint.temperatures)}
        return {str(name): value for name, value in found.items()}


def predictions(
    model: Branches, split: Split, calibration: Calibration | None, means: Means | None = None
) -> dict[str, Tensor]:
    """Return the probabilities ``(n, c)``, float64, of each modality, of each fusion, and of a joint head.

    Parameters
    ----------
    model : Branches
        The network, with one modality or more; of a single modality there is no fusion, only its own calibrated
        probabilities.
    split : Split
        The examples.
    calibration : Calibration, optional
        Of the same network; None: there is nothing ``calibrated``.
    means : Means, optional
        Processes that decode; none by default.
    """
    measured, joined = model.measured(split.inputs, means)
    logits = {name: values.double() for name, values in measured.items()}
    out = {name: torch.softmax(values, -1) for name, values in logits.items()}
    if len(logits) > 1:
        out |= {"mean": fusion.mean(logits), "entropy": fusion.entropy_weighted(logits)}
    if calibration is not None:
        out["calibrated"] = calibration.branches(logits)
    if len(logits) > 1:
        out["sum"] = torch.softmax(torch.stack(list(logits.values())).sum(0), -1)
    if joined is not None:
        joint = joined.double()
        out[JOINT] = torch.softmax(joint, -1)
        if calibration is not None and calibration.joint is not None:
            out[JOINT_CALIBRATED] = calibration.joint({JOINT: joint})
    return out


def calibrated(model: Branches, data: DataSet, means: Means | None = None) -> Calibration:
    """Return the temperatures of a network's branches, and of its joint head, fitted on the validation split."""
    labels = data.validation.labels
    logits, joined = model.measured(data.validation.inputs, means)
    joint = None if joined is None else fusion.fit({JOINT: joined}, labels)
    return Calibration(fusion.fit(logits, labels), joint)


def score(model: Branches, split: Split, calibration: Calibration, means: Means | None = None) -> Scores:
    """Return all :data:`MEASURES` of all :func:`predictions` on a split; parameters as there."""
    found = predictions(model, split, calibration, means)
    of = {name: measures(values, split.labels, split.origins) for name, values in found.items()}
    return {measure: {name: values[measure] for name, values in of.items()} for measure in MEASURES}


@dataclass(frozen=True)
class Watched:
    """What is looked at between two rounds, of every prediction but the calibrated ones.

    Attributes
    ----------
    accuracy : dict of str to float
        By modality and fusion, see :func:`accuracy`.
    by_origin : dict of str to float
        Likewise, see :func:`accuracy_by_origin`.
    macro_f1 : float
        Of the mean fusion, by which the released scripts choose, in [0, 1]; see :func:`macro_f1`.
    """

    accuracy: dict[str, float]
    by_origin: dict[str, float]
    macro_f1: float


def watched(model: Branches, split: Split, means: Means | None = None) -> Watched:
    """Return the accuracies of a network on a split, for training curves and for the choice of a round."""
    found = predictions(model, split, None, means)
    return Watched(
        {name: accuracy(values, split.labels) for name, values in found.items()},
        {name: accuracy_by_origin(values, split.labels, split.origins) for name, values in found.items()},
        macro_f1(of_fusion(found, "mean"), split.labels),
    )


@dataclass(frozen=True)
class Evaluation:
    """What a finished run gives on the test split.

    Attributes
    ----------
    scores : dict of str to Scores
        For each set of weights, by the name given to it.
    temperatures : dict of str to dict
        For each set of weights, the temperature of each modality in the calibrated product, and of a joint head.
    """

    scores: dict[str, Scores]
    temperatures: dict[str, dict[str, float]]


def evaluate(model: Branches, data: DataSet, weights: Mapping[str, Weights], means: Means | None = None) -> Evaluation:
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
    means : Means, optional
        Processes that decode; none by default.

    Raises
    ------
    ValueError
        If there are no weights.
    """
    if not weights:
        raise ValueError("weights: expected at least one state dict to measure, got none")
    own = {name: {key: value.clone() for key, value in values.items()} for name, values in weights.items()}
    calibrations = {}
    for name, values in own.items():
        model.load_state_dict(values)
        calibrations[name] = calibrated(model, data, means)
    test = data.open_test()
    scores = {}
    for name, values in own.items():
        model.load_state_dict(values)
        scores[name] = score(model, test, calibrations[name], means)
    return Evaluation(scores, {name: calibration.temperatures for name, calibration in calibrations.items()})


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
        That fusion's value; of a joint head, which is fused already, its own, and of a single modality its own: in the
        calibrated column with a temperature, where there is one.
    """
    if JOINT in scores:
        return scores[JOINT_CALIBRATED if fusion == "calibrated" and JOINT_CALIBRATED in scores else JOINT]
    return scores[fusion] if fusion in scores else next(iter(scores.values()))
