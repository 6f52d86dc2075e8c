"""Figure 5 (b): pretrained encoders, as they are and trained on, by plain training, by MLA and by IGM."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any

from matplotlib.figure import Figure as Canvas

from igm_rs.analysis.drawing import bare, look

from .evaluation import FUSIONS, of_fusion
from .methods import Row
from .running import Job, RunRecord, run_all, tune, without_warning_of_rho
from .statistics import Difference, paired_difference, summary

if TYPE_CHECKING:
    from .figures import Made, Order

__all__ = ["FUSED", "METHODS", "NETWORKS", "figure_5b"]

METHODS = {"joint-sum": "plain", "mla-three-layer": "MLA", "igm": "IGM"}
"""What trains on the encoders' features, with its name in the picture: each with three-layer heads, as in the paper's
section 4.6; MLA has one for all modalities."""

OTHERS = tuple(key for key in METHODS if key != "igm")
"""Those that IGM is compared with."""

NETWORKS = {"frozen": "encoders frozen", "pretrained": "encoders trained on"}
"""What is done with the encoders, with its name in the picture."""

FUSED = "mean"
"""Fusion whose accuracy is shown."""

COUNTED = {"by_origin": "each origin once", "accuracy": "every example"}
"""The accuracies, with what counts in them."""

MEASURE = "by_origin"
"""The one that is shown; on validation, rounds and learning rates are chosen by it, too."""

APART = 0.005
"""How far the other one is from it where that is told."""

Runs = dict[tuple[str, str], list[RunRecord]]
"""By network and method."""


def figure_5b(order: Order) -> Made:
    """Train every method on both kinds of encoders, and measure each on the test split."""
    from .figures import Made

    runs: Runs = {}
    rates: dict[str, dict[str, float]] = {}
    for network, label in NETWORKS.items():
        config = order.configs[network]
        rows = [Row(key, order.data.modalities) for key in METHODS]
        chosen = tune(rows, config, order.out, order.workers, resume=order.resume, source=order.source)
        rates[network] = {row.method: chosen[row].learning_rate for row in rows}
        jobs = [Job(config, row, seed, rates[network][row.method], True) for row in rows for seed in config.final_seeds]
        with without_warning_of_rho():
            words = f"figure 5b: {label}"
            records = run_all(jobs, order.out, order.workers, words, resume=order.resume, source=order.source)
        for place, key in enumerate(METHODS):
            runs[network, key] = records[place * config.seeds : (place + 1) * config.seeds]
    numbers = {
        "fusion": FUSED,
        "measure": MEASURE,
        "learning_rates": rates,
        "configs": {network: order.configs[network].plain() for network in NETWORKS},
        "runs": {network: {key: list(map(_kept, runs[network, key])) for key in METHODS} for network in NETWORKS},
        "differences": _differences(runs),
    }
    return Made((9.6, 4.6), lambda canvas: _paint(canvas, runs), numbers, _caption(order, runs, rates))


def _kept(run: RunRecord) -> dict[str, Any]:
    """Return what is kept of a run: scores of branches and fusions at the chosen round."""
    scores = run["chosen"]["scores"]
    kept = {measure: {name: round(value, 6) for name, value in scores[measure].items()} for measure in SCORED}
    return {"seed": run["seed"], "round": run["chosen"]["round"], "parameters": run["parameters"], **kept}


SCORED = ("accuracy", "by_origin", "macro_f1", "nll")
"""Measures that are kept."""


def _scores(runs: Sequence[RunRecord], measure: str = MEASURE, fusion: str = FUSED) -> dict[int, float]:
    """Return a test score of a fusion by seed."""
    return {run["seed"]: of_fusion(run["chosen"]["scores"][measure], fusion) for run in runs}


def _differences(runs: Runs) -> dict[str, Any]:
    """Return IGM minus each other method, by network, method, measure and fusion."""
    found: dict[str, Any] = {}
    for network in NETWORKS:
        found[network] = {}
        for key in OTHERS:
            found[network][key] = {measure: {} for measure in COUNTED}
            for measure, each in found[network][key].items():
                for fusion in FUSIONS:
                    gain = _gain(runs, network, key, measure, fusion)
                    each[fusion] = {"mean": gain.mean, "half_width_95": gain.half_width}
    return found


def _gain(runs: Runs, network: str, key: str, measure: str = MEASURE, fusion: str = FUSED) -> Difference:
    """Return IGM minus another method, seed by seed."""
    mine, theirs = (_scores(runs[network, each], measure, fusion) for each in ("igm", key))
    return paired_difference(mine, theirs)


def _paint(canvas: Canvas, runs: Runs) -> None:
    """Draw every run of a method on a kind of encoders as a mark, and their mean as a line with its number."""
    ax = canvas.subplots()
    width = 0.8 / len(METHODS)
    for place, (key, label) in enumerate(METHODS.items()):
        colour, marker, _ = look(place)
        for group, network in enumerate(NETWORKS):
            values = [100 * value for value in _scores(runs[network, key]).values()]
            x, mean = group + (place - (len(METHODS) - 1) / 2) * width, fmean(values)
            ax.plot([x] * len(values), values, marker, color=colour, alpha=0.6, label=None if group else label)
            ax.hlines(mean, x - 0.3 * width, x + 0.3 * width, color=colour, linewidth=2.5)
            ax.annotate(f"{mean:.1f}", (x + 0.3 * width, mean), (4, 0), textcoords="offset points", va="center")
    ax.set_xticks(range(len(NETWORKS)), list(NETWORKS.values()))
    ax.set_xlim(-0.5, len(NETWORKS) - 0.5)
    ax.set_ylabel(f"test accuracy, {COUNTED[MEASURE]},\n{FUSED} fusion (%)")
    ax.margins(y=0.1)
    ax.legend(frameon=False, ncols=len(METHODS), loc="upper center", bbox_to_anchor=(0.5, -0.08))
    bare(ax, "top", "right")
    ax.grid(visible=False, axis="x")


def _caption(order: Order, runs: Runs, rates: Mapping[str, Mapping[str, float]]) -> str:
    """Say what is shown, the numbers, and what the differences come to."""
    seeds = order.configs["pretrained"].seeds
    over = "one run" if seeds == 1 else f"mean ± standard deviation over {seeds} runs"
    on = {"validation": "validation", "paper": "the test split by every example, as the released scripts do"}[
        order.config.protocol
    ]
    told = " ".join(_of_network(order, runs, rates, network) for network in NETWORKS)
    return (
        f"Test accuracy of the {FUSED} fusion, {COUNTED[MEASURE]}, at the round chosen on {on}: {over} of each method "
        "(every run a mark, the mean a line). All have the paper's three-layer head, plain and IGM one for each "
        f"modality, MLA one for all, on which its projection acts. {told}"
    )


def _of_network(order: Order, runs: Runs, rates: Mapping[str, Mapping[str, float]], network: str) -> str:
    """Say what one kind of encoders gives."""
    config, label = order.configs[network], NETWORKS[network]
    fixed = "as configured" if config.learning_rate is not None else "chosen on validation"
    reached = ", ".join(f"{_spread(runs, network, key)} ({rates[network][key]:g})" for key in METHODS)
    gains = ", ".join(f"over {METHODS[key]} {_told(_gain(runs, network, key))}" for key in OTHERS)
    interval = " (95 % interval)" if config.seeds > 1 else ""
    told = (
        f"{label[0].upper()}{label[1:]}, {config.steps} steps of each modality, learning rates {fixed}: {reached}; IGM "
        f"{gains} points{interval}."
    )
    pairs = [(_scores(runs[network, key]), _scores(runs[network, key], "accuracy")) for key in METHODS]
    if any(abs(fmean(one.values()) - fmean(other.values())) >= APART for one, other in pairs):
        reached = ", ".join(_spread(runs, network, key, "accuracy") for key in METHODS)
        gains = ", ".join(f"over {METHODS[key]} {_told(_gain(runs, network, key, 'accuracy'))}" for key in OTHERS)
        told += f" With {COUNTED['accuracy']} counting: {reached}; IGM {gains}."
    return told


def _spread(runs: Runs, network: str, key: str, measure: str = MEASURE) -> str:
    found = summary([100 * value for value in _scores(runs[network, key], measure).values()])
    return f"{METHODS[key]} {found.mean:.1f}" + ("" if found.sd is None else f" ± {found.sd:.1f}")


def _told(gain: Difference) -> str:
    half = "" if gain.half_width is None else f" ± {100 * gain.half_width:.1f}"
    return f"{100 * gain.mean:+.1f}{half}".replace("-", "−")
