"""The page `benchmarks/README.md`, from the JSON of the runs alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Results = dict[str, Any]

RESULTS = {"cpu": "results.json", "cuda": "results-cuda.json"}
NETWORKS = {"cpu": "networks.json", "cuda": "networks-cuda.json"}
"""Files of the runs, by device; the paper's networks have runs of their own."""

_SECTIONS = {
    "T": "T, Eqs. (3)-(4)",
    "Ȳ": "Covariance, Eq. (2)",
    "Steps": "The optimizer's side of a step, Eqs. (6)-(9)",
}


_INTRODUCTION = (
    "`make bench` measures everything but the paper's networks in one run, `make bench-cuda` the same on a GPU. In "
    "each row all sides run in one process, in turn in blocks (at least one run), in changing order; given are "
    "medians over the runs with the interquartile range in brackets. “≥ 4×” asks for that many times the peer's "
    "speed, “≤ 0.4×” for at most that share of its time; rows marked “told” are asked for nothing. “In factors” is "
    "how a T made from fewer rows than d is kept and applied: T = scale · (I − Rᵀ M R), never a d × d matrix."
)


_OF_NETWORKS = (
    "`make bench-networks` measures these, on a GPU with `--device cuda`: encoder and head with random "
    "weights, a synthetic batch as large as the paper's, the paper's base optimizer alone and with IGM around it "
    "(ρ = 0.05; features are gathered, and the T's of a turn of the modality before act on the head). "
    "Each side runs in a process of its own. Given are the median time of a step with the interquartile range in "
    "brackets, of steps longer than 20 s that of the first, and the most memory that weights, gradients, the "
    "optimizer's state and everything of a step hold at once: resident on the CPU, allocated on a GPU. IGM runs "
    "forward and backward twice: about 2× is its price."
)


def write(folder: Path) -> None:
    """Write the page of the runs that a folder holds."""
    (folder / "README.md").write_text(page_of(folder), encoding="utf-8")


def page_of(folder: Path) -> str:
    """Return the page of the runs that a folder holds."""

    def read(name: str) -> Results | None:
        file = folder / name
        return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None

    cpu, cuda = (read(name) for name in RESULTS.values())
    return page(cpu, cuda, [run for name in NETWORKS.values() if (run := read(name)) is not None])


def page(cpu: Results | None, cuda: Results | None, networks: Sequence[Results] = ()) -> str:
    """Return the page of a run on the CPU and one on a GPU, either may be absent, and of runs of the networks."""
    parts = ["# Benchmarks", _INTRODUCTION]
    parts += ["## CPU", *_run(cpu, "results.json", "plots")] if cpu else []
    parts.append("## CUDA")
    parts += _run(cuda, "results-cuda.json", "plots/cuda-") if cuda else ["No figures: none have been measured yet."]
    if networks:
        parts += ["## The paper's networks, a step at full size", _OF_NETWORKS]
        parts += [part for run in networks for part in (_where(run), network_table(run["networks"]))]
    return "\n\n".join(parts) + "\n"


def table(rows: list[dict[str, Any]]) -> str:
    """Return comparisons as a Markdown table, a line for each ratio."""
    lines = [
        "| what | ours | ms (IQR) | peer | ms (IQR) | ratio | asked for | |",
        "|---|---|---:|---|---:|---:|---:|---|",
    ]
    lines += [
        f"| {row['name']} | {ratio['ours']} | {_time(row['sides'][ratio['ours']])} | {ratio['peer']} | "
        f"{_time(row['sides'][ratio['peer']])} | {ratio['ratio']:.2f}× | {_asked(ratio, '×')}"
        for row in rows
        for ratio in row["ratios"]
    ]
    return "\n".join(lines)


def figure_table(figures: list[dict[str, Any]]) -> str:
    """Return the figures that are no times of two sides as a Markdown table."""
    lines = ["| what | value | asked for | |", "|---|---:|---:|---|"]
    lines += [
        f"| {figure['name']} | {figure['value']:.3g} {figure['unit']} | {_asked(figure, '')}" for figure in figures
    ]
    return "\n".join(lines)


def network_table(networks: list[dict[str, Any]]) -> str:
    """Return the steps of the paper's networks as a Markdown table."""
    columns = ["data set", "modality", "encoder", "parameters", "batch", "base", "plain, ms (IQR)", "IGM, ms (IQR)"]
    columns += ["ratio", "plain, MB", "IGM, MB", "ratio"]
    lines = [f"| {' | '.join(columns)} |", "|---|---|---|---:|---|---|---:|---:|---:|---:|---:|---:|"]
    for row in networks:
        plain, igm = row["sides"]["plain"], row["sides"]["IGM"]
        more = "–" if row["memory"] is None else f"{row['memory']:.2f}×"
        lines.append(
            f"| {row['data']} | {row['modality']} | {row['encoder']} | {row['parameters'] / 1e6:.1f} M "
            f"| {' × '.join(map(str, row['inputs']))} | {row['base']} | {_time(plain)} | {_time(igm)} "
            f"| {row['time']:.2f}× | {plain['bytes'] / 1e6:.0f} | {igm['bytes'] / 1e6:.0f} | {more} |"
        )
    return "\n".join(lines)


def _run(results: Results, file: str, plots: str) -> list[str]:
    parts = [_facts(results, file)]
    for section, title in _SECTIONS.items():
        rows = [row for row in results["rows"] if row["section"] == section]
        parts += [f"### {title}", table(rows), "\n".join(_note(row, results) for row in rows)]
    parts += ["### Memory, calls, import", figure_table(results["figures"])]
    parts.append("\n".join(f"- **{figure['name']}**: {figure['note']}." for figure in results["figures"]))
    if results["left_out"]:
        parts.append("\n".join(f"- left out, **{key}**: {reason}." for key, reason in results["left_out"].items()))
    parts.append("### How it grows")
    folder = plots if plots.endswith("-") else f"{plots}/"
    parts += [
        f"![{curve['title']}, time against {curve['quantity']}]({folder}{curve['key']}.png)\n\n{curve['title']}, time "
        f"against {curve['quantity']}; at least {curve['runs']} run{'s' if curve['runs'] > 1 else ''} a point."
        for curve in results["growth"]
    ]
    return parts


def _where(results: Results) -> str:
    """What a run of the networks depends on."""
    return (
        f"Measured {results['date']} at revision {results['revision']} on {results['device']}, {results['threads']} "
        f"threads, load {results['load']:.1f} at the start; Python {results['python']}, torch {results['torch']}, "
        f"igm-rs {results['igm_rs']}, transformers {results['transformers']}; {results['minutes']:.0f} minutes in "
        f"all.{_quick(results)}"
    )


def _facts(results: Results, file: str) -> str:
    return (
        f"Measured {results['date']} at revision {results['revision']} on {results['device']}, {results['threads']} "
        f"threads, load {results['load']:.1f} at the start; Python {results['python']}, torch {results['torch']}, "
        f"igm-rs {results['igm_rs']}, pytorch_optimizer {results['pytorch_optimizer']}, transformers "
        f"{results['transformers']}; blocks of {results['block_s']:g} s; {results['minutes']:.0f} minutes in all. A "
        f"copy of 256 MB moves {results['copy_gb_per_s']:.1f} GB/s here (read and written), a matrix product does "
        f"{results['float32_gflops']:.0f} GFLOP/s in float32 and {results['float64_gflops']:.0f} in float64; floors "
        "are the bytes and operations at these speeds. What partly stays in the caches moves faster: the copies among "
        f"the peers are of their row's own sizes. All numbers: `{file}`.{_quick(results)}"
    )


def _quick(results: Results) -> str:
    return " **A smoke run on tiny sizes: its figures mean nothing.**" if results["quick"] else ""


def _note(row: dict[str, Any], results: Results) -> str:
    runs = ", ".join(f"{side['runs']} of {label}" for label, side in row["sides"].items())
    errors = ""
    if row["errors"]:
        told = ", ".join(f"{label} {error:.1e}" for label, error in row["errors"].items())
        errors = f" Greatest difference from float64: {told}."
    return f"- **{row['name']}**: {row['note']}.{_floor(row['needs'], results)}{errors} Runs: {runs}."


def _floor(needs: dict[str, float], results: Results) -> str:
    """What ours needs, and how long the machine takes for it at its own speed."""
    told = ""
    if "bytes" in needs:
        ms = needs["bytes"] / results["copy_gb_per_s"] / 1e6
        told += f" Floor: {needs['bytes'] / 1e6:.0f} MB moved, {_digits(ms)} ms at the speed of a copy."
    if "flops" in needs:
        double, single = (needs["flops"] / results[f"{dtype}_gflops"] / 1e6 for dtype in ("float64", "float32"))
        told += (
            f" Floor: {needs['flops'] / 1e9:.3g} GFLOP, {_digits(double)} ms at the speed of a float64 product, "
            f"{_digits(single)} ms of a float32 one."
        )
    return told


def _time(side: dict[str, float]) -> str:
    return f"{_digits(side['ms'])} ({_digits(side['iqr_ms'], 2)})"


def _digits(ms: float, few: int = 3) -> str:
    return f"{ms:.0f}" if round(ms) >= 100 else f"{ms:.{few}g}"


def _asked(judged: dict[str, Any], unit: str) -> str:
    if judged["limit"] is None:
        return "told | |"
    return f"{judged['sign']} {judged['limit']:g}{unit} | {'reached' if judged['reached'] else 'missed'} |"
