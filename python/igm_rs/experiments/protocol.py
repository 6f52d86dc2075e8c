"""The rules of the comparison in words, as they are kept with the tables."""

from __future__ import annotations

from collections.abc import Mapping

from .configuration import Config
from .training import CHOSEN_BY

__all__ = ["protocol"]

WORDS = {
    "mean": "the mean of the softmax outputs",
    "entropy": "the entropy-weighted fusion",
    "sum": "the summed logits",
}
"""Fusions that can choose, in words."""

ONCE = "every origin (a person, a title; else each example) counting once"
"""How validation is counted where something is chosen."""


def protocol(config: Config, workers: int) -> list[str]:
    """Say how the comparison is made.

    Parameters
    ----------
    config : Config
        Common to all rows.
    workers : int
        Runs side by side.

    Returns
    -------
    list of str
        One paragraph an entry.
    """
    budget = (
        f"Budget: each modality gets {config.steps} gradient steps of {config.batch_size} examples in every "
        "method, its i-th step always on the same examples, from the same initial encoder. A step of joint training is "
        "a step of every modality. The second pass of SAM belongs to its step: it is not counted, but its time is. "
        f"ms/step is wall time over the steps of all modalities, T's included, on one thread, with up to {workers} "
        "runs side by side."
    )
    under = "Adam" if config.base == "adam" else f"SGD with momentum {config.momentum:g}"
    projected = (
        "the three-layer head of each modality"
        if config.scope is None
        else f"the layers of each modality that hold {config.scope:.0%} of its parameters, counted from the output"
    )
    rho = (
        ", ".join(f"{value:g} ({name})" for name, value in config.rho.items())
        if isinstance(config.rho, Mapping)
        else f"{config.rho:g}"
    )
    rates = (
        "on half a cosine"
        if config.schedule == "cosine"
        else f"divided by 10 after {config.patience} rounds without a smaller training loss"
    )
    methods = (
        f"Methods: {under} and weight decay {config.weight_decay:g}, learning rate {rates}; turns of "
        f"{config.turn_steps} batches; SAM with ρ = {rho}; flat modification with τ = {config.tau:g} in "
        f"{projected}; MLA with one linear head for all modalities, which take each batch one after another, and the "
        f"recursion of its paper for the orthogonal projection, kept for the whole training (α = {config.alpha:g}). "
        "Shared trunk: two layers that all modalities share, trained one modality after another in a single long turn "
        f"each, without SAM; its T has τ = {config.trunk_tau:g} and is made of the full second moment with the bias of "
        "all earlier modalities."
    )
    rounds = (
        f"the round with the highest validation accuracy of {WORDS[CHOSEN_BY]} (of a joint head: its own), {ONCE}"
        if config.protocol == "validation"
        else "THE ROUND WITH THE HIGHEST TEST ACCURACY, as the released scripts do"
    )
    if config.learning_rate is None:
        grid = ", ".join(f"{rate:g}" for rate in config.rates)
        seeds = "a seed" if len(config.tuning_seeds) == 1 else f"{len(config.tuning_seeds)} seeds"
        rate = (
            f"the learning rate (of {grid}) is chosen by the validation accuracy of {WORDS[CHOSEN_BY]} at its best "
            f"round, {ONCE}, mean over {seeds} that the final runs do not use; these runs hold no test data"
        )
    else:
        rate = f"every row has learning rate {config.learning_rate:g}"
    measured = (
        "Measures: accuracy; where it makes half a point or more, also the accuracy with each origin (a person, a "
        "title) counting once; mean average precision and macro-F1 over the classes; NLL in nats."
    )
    choice = f"Choice: {rate}. Each final run is measured at {rounds} and at the last round. "
    choice += (
        "It opens the test split once, after training and calibration."
        if config.protocol == "validation"
        else "It opens the test split before training."
    )
    return [budget, methods, choice, measured]
