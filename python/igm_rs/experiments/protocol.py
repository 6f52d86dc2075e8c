"""The rules of the comparison in words, as they are printed above the tables and kept with the results."""

from __future__ import annotations

from .methods import RHO, TAU, Settings
from .running import FIRST_SEED, LEARNING_RATES, TUNING_SEEDS, UNTUNED_RATE

__all__ = ["protocol"]


def protocol(settings: Settings, seeds: int, workers: int, *, tuned: bool) -> list[str]:
    """Say how the comparison is made.

    Parameters
    ----------
    settings : Settings
        Common to all rows.
    seeds, workers : int
        Final runs of every row; runs side by side.
    tuned : bool
        Whether learning rate and round are chosen for each row.

    Returns
    -------
    list of str
        One paragraph an entry.
    """
    budget = (
        f"Budget: each modality gets {settings.steps} gradient steps of {settings.batch_size} examples in every "
        "method, its i-th step always on the same examples, from the same initial encoder. A step of joint training is "
        "a step of every modality. The second pass of SAM belongs to its step: it is not counted, but its time is. "
        f"ms/step is wall time over the steps of all modalities, on one thread, with up to {workers} runs side by side."
    )
    projected = (
        "the three-layer head of each modality"
        if settings.scope is None
        else f"the layers of each modality that hold {settings.scope:.0%} of its parameters, counted from the output"
    )
    methods = (
        f"Methods: SGD with momentum {settings.momentum:g} and weight decay {settings.weight_decay:g}, learning rate "
        f"on half a cosine; turns of {settings.turn_steps} batches; SAM with ρ = {RHO:g}; flat projection with "
        f"τ = {TAU:g} in {projected}; MLA with one linear head for all modalities, which "
        "take each batch one after another, and its orthogonal projection."
    )
    if tuned:
        grid = ", ".join(f"{rate:g}" for rate in LEARNING_RATES)
        choice = (
            f"Choice: learning rate (of {grid}) and round are chosen for each row by the validation accuracy of its "
            f"fused prediction (sum of logits), mean over {len(TUNING_SEEDS)} seeds that the final runs do not use and "
            "over three neighbouring rounds. These runs hold no test data. A final run opens the test split once, "
            f"after training and calibration. Final seeds begin at {FIRST_SEED}: test results of seeds 0 to 2 had been "
            "seen while the width of the encoders and the budget were settled."
        )
    else:
        choice = (
            f"Choice: none. Every row has learning rate {UNTUNED_RATE:g} and keeps the weights of the last round. A "
            "run opens the test split once, after training and calibration."
        )
    columns = (
        f"Columns: test accuracy and macro-F1 in percent, mean ± standard deviation over {seeds} "
        f"seed{'s' * (seeds > 1)}, of each "
        "modality's branch and of three fusions: the mean of the softmax outputs; the sum of the logits, which is what "
        "joint training optimises; the calibrated product, whose temperatures are fitted on validation. The column "
        '"vs joint" is the accuracy minus that of joint training, both calibrated, seed by seed, ± its 95 % interval, '
        "in percentage points."
    )
    return [budget, methods, choice, columns]
