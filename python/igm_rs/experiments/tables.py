"""The tables: what all runs gave, summed up, as plain text, Markdown, CSV and JSON."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np

from .data import DataSet
from .evaluation import FUSIONS, MEASURES
from .methods import Row, Settings
from .running import Choice, Outcome

__all__ = ["Line", "dataset_results", "half_width", "markdown", "plain", "remarks", "table", "write"]

SHOWN = {"mean": "mean", "sum": "logit sum", "calibrated": "calibrated"}
"""Fusions in the tables, with their headings; the files hold all of :data:`igm_rs.experiments.evaluation.FUSIONS`."""

PERCENT = {"accuracy": "accuracy", "macro_f1": "macro-F1"}
"""Measures in the tables, with their names; in percent."""

WORDS = 2
"""Columns of a table that hold words, at its left; the others hold numbers."""

Results = dict[str, Any]

Line = tuple[Row, Settings, Choice, Sequence[Outcome]]
"""A row of a table with its settings and its final runs."""


def half_width(values: Sequence[float]) -> float | None:
    """Return half the width of the 95 % interval of the mean, by Student's t; None for fewer than two values.

    Notes
    -----
    With t = √ν tan φ, Student's density in φ is proportional to cos^(ν−1) φ on (−π/2, π/2).
    """
    degrees = len(values) - 1
    if degrees < 1:
        return None
    angle = np.linspace(0.0, math.pi / 2, 200_001)
    mass = np.cumsum(np.cos(angle) ** (degrees - 1))
    quantile = math.sqrt(degrees) * math.tan(float(np.interp(0.95, mass / mass[-1], angle)))
    return quantile * stdev(values) / math.sqrt(len(values))


def dataset_results(data: DataSet, lines: Sequence[Line]) -> Results:
    """Sum up all final runs on one data set, in plain values.

    Parameters
    ----------
    data : DataSet
        The set.
    lines : sequence of (Row, Settings, Choice, sequence of Outcome)
        For each row of the table its settings and its runs, the same seeds in the same order for all.
    """
    joint = next((runs for row, _, _, runs in lines if row.key == "joint"), None)
    return {
        "name": data.name,
        "title": data.title,
        "classes": data.classes,
        "modalities": list(data.modalities),
        "split": data.sizes,
        "rows": [_row_results(row, settings, choice, runs, joint) for row, settings, choice, runs in lines],
    }


def _row_results(
    row: Row, settings: Settings, choice: Choice, runs: Sequence[Outcome], joint: Sequence[Outcome] | None
) -> Results:
    """Sum up the runs of one row."""
    names = list(runs[0].scores["accuracy"])
    times = [run.seconds_per_step for run in runs]
    return {
        "key": row.key,
        "label": row.label,
        "modalities": list(row.modalities),
        "method": {name: value for name, value in asdict(row.method).items() if name not in ("key", "label")},
        "settings": {"learning_rate": choice.learning_rate, **asdict(settings)},
        "rounds": len(settings.turn_lengths),
        "kept_round": choice.keep,
        "tried": [{"learning_rate": rate, "validation_accuracy": value} for rate, value in choice.tried.items()],
        "summary": {
            measure: {name: _mean_and_sd([run.scores[measure][name] for run in runs]) for name in names}
            for measure in MEASURES
        },
        "seconds_per_step": _mean_and_sd(times),
        "difference_to_joint": {} if joint is None else _differences(runs, joint),
        "runs": [asdict(run) for run in runs],
    }


def _mean_and_sd(values: Sequence[float]) -> dict[str, float | None]:
    return {"mean": fmean(values), "sd": stdev(values) if len(values) > 1 else None}


def _differences(runs: Sequence[Outcome], joint: Sequence[Outcome]) -> dict[str, dict[str, float | None]]:
    """Accuracy minus that of joint training with the same fusion, seed by seed."""
    out = {}
    for fusion in FUSIONS:
        if fusion in runs[0].scores["accuracy"]:
            pairs = zip(runs, joint, strict=True)
            values = [mine.scores["accuracy"][fusion] - theirs.scores["accuracy"][fusion] for mine, theirs in pairs]
            out[fusion] = {"mean": fmean(values), "half_width_95": half_width(values)}
    return out


def table(results: Results) -> tuple[list[str], list[list[str]]]:
    """Return headings and cells of a data set's table: two lines a method, accuracy and macro-F1, in percent."""
    modalities = results["modalities"]
    heads = ["method", "%", *modalities, *SHOWN.values(), "vs joint", "ms/step", "lr", "round"]
    body = []
    for row in results["rows"]:
        difference = row["difference_to_joint"].get("calibrated") if row["key"] != "joint" else None
        for measure, name in PERCENT.items():
            summary = row["summary"][measure]
            first = measure == "accuracy"
            body.append(
                [
                    row["label"] if first else "",
                    name,
                    *(_spread(summary.get(column)) for column in (*modalities, *SHOWN)),
                    _signed(difference) if first else "",
                    f"{1000 * row['seconds_per_step']['mean']:.2f}" if first else "",
                    f"{row['settings']['learning_rate']:g}" if first else "",
                    f"{row['kept_round']}/{row['rounds']}" if first else "",
                ]
            )
    return heads, body


def _spread(value: Mapping[str, float | None] | None) -> str:
    """Return "mean ± sd" in percent."""
    if value is None or value["mean"] is None:
        return "–"
    mean = f"{100 * value['mean']:.1f}"
    return mean if value["sd"] is None else f"{mean} ± {100 * value['sd']:.1f}"


def _signed(value: Mapping[str, float | None] | None) -> str:
    """Return "difference ± half width" in percentage points."""
    if value is None or value["mean"] is None:
        return "–"
    mean = f"{100 * value['mean']:+.1f}"
    return mean if value["half_width_95"] is None else f"{mean} ± {100 * value['half_width_95']:.1f}"


def plain(heads: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """Return a table for the terminal: columns padded with spaces, a rule under the headings."""
    widths = [max(map(len, column)) for column in zip(heads, *body, strict=True)]

    def line(cells: Sequence[str]) -> str:
        words = [cell.ljust(width) for cell, width in zip(cells[:WORDS], widths[:WORDS], strict=True)]
        numbers = [cell.rjust(width) for cell, width in zip(cells[WORDS:], widths[WORDS:], strict=True)]
        return "  ".join([*words, *numbers]).rstrip()

    return "\n".join([line(heads), "  ".join("─" * width for width in widths), *map(line, body)])


def markdown(heads: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown, words to the left and numbers to the right."""
    rule = [":--" if index < WORDS else "--:" for index in range(len(heads))]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (heads, rule, *body))


def remarks(results: Results) -> list[str]:
    """Return what the optimizer itself reported about projection, SAM and skipped steps."""
    out = []
    for row in results["rows"]:
        runs = row["runs"]
        parts = []
        cosines = [run["cosine"] for run in runs if run["cosine"] is not None]
        if cosines:
            scope = row["settings"].get("scope")
            of = "a head's" if scope is None else "a projected layer's"
            parts.append(f"cosine of {of} gradient before and after projection {fmean(cosines):.4f}")
            shares = [run["projected_share"] for run in runs if run.get("projected_share") is not None]
            if scope is not None and shares:
                parts.append(f"{fmean(shares):.1%} of the parameters projected (--scope {scope:g})")
        realised = [run["effective_perturbation"] for run in runs if run["effective_perturbation"] is not None]
        if realised:
            parts.append(f"realised perturbation {fmean(realised):.1%} of ρ")
        skipped = sum(run["skipped"] for run in runs)
        if skipped:
            parts.append(f"{skipped} steps skipped")
        if parts:
            out.append(f"{row['label']}: {', '.join(parts)}.")
    return out


def write(folder: Path, results: Results) -> list[Path]:
    """Write ``results.json``, ``runs.csv``, ``summary.csv`` and ``tables.md`` and return their paths.

    Parameters
    ----------
    folder : Path
        Exists.
    results : dict
        ``protocol``, ``options``, ``versions``, ``seconds`` and ``datasets``, each of these from
        :func:`dataset_results`.
    """
    paths = [folder / name for name in ("results.json", "runs.csv", "summary.csv", "tables.md")]
    paths[0].write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    _write_csv(paths[1], ["dataset", "method", "seed", "measure", "of", "value"], _run_lines(results))
    _write_csv(paths[2], ["dataset", "method", "measure", "of", "mean", "sd", "seeds"], _summary_lines(results))
    paths[3].write_text(_document(results), encoding="utf-8")
    return paths


def _run_lines(results: Results) -> Iterator[list[Any]]:
    """One line for each run and figure."""
    for data in results["datasets"]:
        for row in data["rows"]:
            for run in row["runs"]:
                start = [data["name"], row["key"], run["seed"]]
                for measure, values in run["scores"].items():
                    for name, value in values.items():
                        yield [*start, measure, name, f"{value:.6f}"]
                yield [*start, "seconds_per_step", "training", f"{run['seconds_per_step']:.6f}"]
                for name, value in run["temperatures"].items():
                    yield [*start, "temperature", name, f"{value:.6f}"]


def _summary_lines(results: Results) -> Iterator[list[Any]]:
    """One line for each row of a table and figure."""
    for data in results["datasets"]:
        for row in data["rows"]:
            seeds = len(row["runs"])
            columns = [(measure, name, value) for measure, of in row["summary"].items() for name, value in of.items()]
            columns.append(("seconds_per_step", "training", row["seconds_per_step"]))
            for measure, name, value in columns:
                spread = "" if value["sd"] is None else f"{value['sd']:.6f}"
                yield [data["name"], row["key"], measure, name, f"{value['mean']:.6f}", spread, seeds]


def _write_csv(path: Path, heads: Sequence[str], lines: Iterator[list[Any]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(heads)
        writer.writerows(lines)


def _document(results: Results) -> str:
    """All tables and the protocol as one Markdown page."""
    parts = ["# Results of the demonstration", *results["protocol"]]
    for data in results["datasets"]:
        split = data["split"]
        parts += [
            f"## {data['title']}",
            f"{split['train']} examples to train on, {split['validation']} to validate, {split['test']} to test.",
            markdown(*table(data)),
            "\n".join(f"- {remark}" for remark in remarks(data)),
        ]
    versions = ", ".join(f"{name} {value}" for name, value in results["versions"].items())
    parts.append(f"Made with {versions}.")
    return "\n\n".join(part for part in parts if part) + "\n"
