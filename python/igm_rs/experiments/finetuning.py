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
        "learning_rates": rates,
        "configs": {network: order.configs[network].plain() for network in NETWORKS},
        "runs": {network: {key: list(map(_kept, runs[network, key])) for key in METHODS} for network in NETWORKS},
        "differences": _differences(runs),
    }
    return Made((9.6, 4.6), lambda canvas: _paint(canvas, runs), numbers, _caption(order, runs, rates))


def _kept(run: RunRecord) -> dict[str, Any]:
    """Return what is kept of a run: accuracy and macro-F1 of branches and fusions, at the chosen round."""
    scores = run["chosen"]["scores"]
    kept = {measure: {name: round(value, 6) for name, value in scores[measure].items()} for measure in SCORED}
    return {"seed": run["seed"], "round": run["chosen"]["round"], "parameters": run["parameters"], **kept}


SCORED = ("accuracy", "by_origin", "macro_f1", "nll")
"""Measures that are kept."""


def _accuracies(runs: Sequence[RunRecord], fusion: str = FUSED) -> dict[int, float]:
    """Return the test accuracy of a fusion by seed."""
    return {run["seed"]: of_fusion(run["chosen"]["scores"]["accuracy"], fusion) for run in runs}


def _differences(runs: Runs) -> dict[str, dict[str, dict[str, dict[str, float | None]]]]:
    """Return IGM minus each other method, by network, method and fusion."""
    found: dict[str, dict[str, dict[str, dict[str, float | None]]]] = {}
    for network in NETWORKS:
        found[network] = {}
        for key in OTHERS:
            gains = {fusion: _gain(runs, network, key, fusion) for fusion in FUSIONS}
            found[network][key] = {
                fusion: {"mean": gain.mean, "half_width_95": gain.half_width} for fusion, gain in gains.items()
            }
    return found


def _gain(runs: Runs, network: str, key: str, fusion: str = FUSED) -> Difference:
    """Return IGM minus another method, seed by seed."""
    return paired_difference(_accuracies(runs[network, "igm"], fusion), _accuracies(runs[network, key], fusion))


def _paint(canvas: Canvas, runs: Runs) -> None:
    """Draw every run of a method on a kind of encoders as a mark, and their mean as a line with its number."""
    ax = canvas.subplots()
    width = 0.8 / len(METHODS)
    for place, (key, label) in enumerate(METHODS.items()):
        colour, marker, _ = look(place)
        for group, network in enumerate(NETWORKS):
            values = [100 * value for value in _accuracies(runs[network, key]).values()]
            x, mean = group + (place - (len(METHODS) - 1) / 2) * width, fmean(values)
            ax.plot([x] * len(values), values, marker, color=colour, alpha=0.6, label=None if group else label)
            ax.hlines(mean, x - 0.3 * width, x + 0.3 * width, color=colour, linewidth=2.5)
            ax.annotate(f"{mean:.1f}", (x + 0.3 * width, mean), (4, 0), textcoords="offset points", va="center")
    ax.set_xticks(range(len(NETWORKS)), list(NETWORKS.values()))
    ax.set_xlim(-0.5, len(NETWORKS) - 0.5)
    ax.set_ylabel(f"test accuracy of the {FUSED} fusion (%)")
    ax.margins(y=0.1)
    ax.legend(frameon=False, ncols=len(METHODS), loc="upper center", bbox_to_anchor=(0.5, -0.08))
    bare(ax, "top", "right")
    ax.grid(visible=False, axis="x")


def _caption(order: Order, runs: Runs, rates: Mapping[str, Mapping[str, float]]) -> str:
    """Say what is shown, the numbers, and what the differences come to."""
    parts = []
    for network, label in NETWORKS.items():
        config = order.configs[network]
        said = []
        for key, name in METHODS.items():
            found = summary([100 * value for value in _accuracies(runs[network, key]).values()])
            spread = "" if found.sd is None else f" ± {found.sd:.1f}"
            said.append(f"{name} {found.mean:.1f}{spread} (learning rate {rates[network][key]:g})")
        compared = []
        for key in OTHERS:
            gain = _gain(runs, network, key)
            half = "" if gain.half_width is None else f" ± {100 * gain.half_width:.1f}"
            compared.append(f"over {METHODS[key]} {100 * gain.mean:+.1f}{half}".replace("-", "−"))
        parts.append(
            f"{label[0].upper()}{label[1:]}, {config.steps} steps of each modality: {', '.join(said)}; IGM "
            f"{', '.join(compared)} points (95 % interval)."
        )
    seeds = order.configs["pretrained"].seeds
    dots = "one run" if seeds == 1 else f"{seeds} runs"
    return (
        f"Test accuracy of the {FUSED} fusion at the round chosen on validation, mean ± standard deviation over {dots} "
        f"of each method (every run a mark, the mean a line); learning rates chosen on validation. {' '.join(parts)}"
    )
