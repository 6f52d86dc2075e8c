"""The measures: accuracy, macro-F1 and negative log-likelihood of every branch and of every way to fuse them."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_f1_score

from igm_rs import fusion

from .data import DataSet
from .networks import Branches

__all__ = ["FUSIONS", "MEASURES", "Scores", "accuracy", "evaluate"]

FUSIONS = ("mean", "sum", "entropy", "calibrated")
"""Mean of the softmax outputs; softmax of the summed logits, which is what joint training optimises; MLA's entropy
weights; product of softmax outputs with temperatures fitted on the validation split."""

MEASURES = ("accuracy", "macro_f1", "nll")

Scores = dict[str, dict[str, float]]
"""Measure to (modality or fusion to value)."""


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


def evaluate(model: Branches, data: DataSet) -> tuple[Scores, dict[str, float]]:
    """Measure a finished model on the test split, which this opens once.

    The temperatures of the calibrated product are fitted on the validation split before the test split is opened.

    Parameters
    ----------
    model : Branches
        The model, with one modality or more.
    data : DataSet
        The set; its test split must be there.

    Returns
    -------
    Scores, dict of str to float
        Each measure for every modality of the model and, where there are several, every fusion; the temperatures.
    """
    product = fusion.fit(model.logits(data.validation.inputs), data.validation.labels)
    test = data.open_test()
    logits = model.logits(test.inputs)
    predictions = {name: torch.softmax(values, -1) for name, values in logits.items()}
    if len(logits) > 1:
        predictions |= {
            "mean": fusion.mean(logits),
            "sum": torch.softmax(torch.stack(list(logits.values())).sum(0), -1),
            "entropy": fusion.entropy_weighted(logits),
            "calibrated": product(logits),
        }
    scores: Scores = {measure: {} for measure in MEASURES}
    for name, probabilities in predictions.items():
        scores["accuracy"][name] = accuracy(probabilities, test.labels)
        scores["macro_f1"][name] = float(
            multiclass_f1_score(probabilities.argmax(-1), test.labels, data.classes, average="macro")
        )
        chosen = probabilities.gather(-1, test.labels[:, None]).double()
        scores["nll"][name] = float(-chosen.clamp_min(torch.finfo(torch.float64).tiny).log().mean())
    return scores, {str(name): value for name, value in product.temperatures.items()}
