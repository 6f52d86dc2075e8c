"""The tables: what all runs gave, summed up and laid out as the paper's, as plain text, Markdown, CSV and JSON."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from .evaluation import FUSIONS, MEASURES, of_fusion
from .grids import Cell, Grid
from .plans import EFFECTS, TABLES, Effect, Line
from .statistics import paired_difference, summary

__all__ = ["PAPER_WARNING", "Table", "condensed", "table"]

Record = Mapping[str, Any]
"""A run, as it is stored."""

Results = dict[str, Any]
"""A table's numbers in plain values, as they are stored."""

PAPER_WARNING = (
    "SELECTED ON THE TEST SET (--protocol paper): the round is the best on the test split, as in the released scripts, "
    "so every figure here is too good."
)
"""First line of every table that such runs are in."""

SHOWN = {"mean": "mean", "entropy": "entropy", "calibrated": "calibrated"}
"""Fusions in the tables, with their headings; the files hold all."""

NAMES = {"accuracy": "accuracy", "map": "MAP", "macro_f1": "macro-F1", "nll": "NLL"}
"""Measures, with their headings; the first three in percent, the last in nats."""

REFERENCES = {"joint-concat": "joint, concat", "joint-sum": "joint, sum", "mla": "MLA"}
"""Rows that every row of Table 1 is compared with, with their headings."""

MISSING = "–"


# Numbers


def condensed(record: Record) -> dict[str, Any]:
    """Return what a table keeps of a run: every figure, six decimals, without the training curve."""
    kept = ("learning_rate", "seconds_per_step", "seconds", "peak_memory", "skipped", "cosine")
    also = ("effective_perturbation", "projected_share", "parameters")
    return {
        "seed": record["seed"],
        "rounds": {name: record[name]["round"] for name in ("chosen", "last")},
        "scores": {name: _rounded(record[name]["scores"]) for name in ("chosen", "last")},
        "temperatures": _rounded(record["temperatures"]),
        **{name: _rounded(record[name]) for name in (*kept, *also)},
    }


def _rounded(value: Any) -> Any:
    """Round every number in nested mappings and lists to six decimals."""
    if isinstance(value, float):
        return round(value, 6)
    if isinstance(value, Mapping):
        return {name: _rounded(item) for name, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list | tuple) else value


def _row(line: Line, records: Sequence[Record], tried: Mapping[float, float], by_turn: bool) -> Results:
    """Sum up the runs of one row."""
    runs = [condensed(record) for record in sorted(records, key=lambda record: record["seed"])]
    if by_turn:
        for run, record in zip(runs, sorted(records, key=lambda record: record["seed"]), strict=True):
            run["after_turn"] = [
                {"round": turn["round"], "modality": turn["modality"], "accuracy": _rounded(turn["scores"]["accuracy"])}
                for turn in record["after_turn"]
            ]
    return {
        "key": line.row.key,
        "words": list(line.words),
        "label": line.row.label,
        "modalities": list(line.row.modalities),
        "learning_rate": runs[0]["learning_rate"],
        "tuned_as": line.tuned_as.key,
        "tried": [{"learning_rate": rate, "validation_accuracy": _rounded(value)} for rate, value in tried.items()],
        "summary": {
            weights: {
                measure: {
                    name: _summary([run["scores"][weights][measure][name] for run in runs])
                    for name in runs[0]["scores"][weights][measure]
                }
                for measure in MEASURES
            }
            for weights in ("chosen", "last")
        },
        "seconds_per_step": _summary([run["seconds_per_step"] for run in runs]),
        "peak_memory": _summary([run["peak_memory"] for run in runs]),
        "runs": runs,
    }


def _summary(values: Sequence[float]) -> dict[str, Any]:
    return dict(_rounded(asdict(summary(values))))


def _by_seed(row: Results, measure: str, fusion: str) -> dict[int, float]:
    """Return what stands in a fusion's column, by seed."""
    return {run["seed"]: of_fusion(run["scores"]["chosen"][measure], fusion) for run in row["runs"]}


def _differences(mine: Results, theirs: Results) -> Results:
    """Return one row minus another: measure to (fusion to difference)."""
    return {
        measure: {
            fusion: _rounded(
                asdict(paired_difference(_by_seed(mine, measure, fusion), _by_seed(theirs, measure, fusion)))
            )
            for fusion in FUSIONS
        }
        for measure in MEASURES
    }


def _effect(effect: Effect, rows: Mapping[str, Results]) -> Results:
    """Return a comparison's differences, by measure and fusion; between fusions there is one a measure."""
    mine, theirs = rows[effect.mine], rows[effect.theirs]
    if effect.fusions is None:
        found = _differences(mine, theirs)
    else:
        one, other = effect.fusions
        found = {
            measure: {
                one: _rounded(asdict(paired_difference(_by_seed(mine, measure, one), _by_seed(theirs, measure, other))))
            }
            for measure in MEASURES
        }
    fusions = None if effect.fusions is None else list(effect.fusions)
    return {**asdict(effect), "fusions": fusions, "differences": found}


def table(
    number: int,
    lines: Sequence[Line],
    records: Sequence[Record],
    *,
    about: Mapping[str, Any],
    tried: Mapping[str, Mapping[float, float]],
) -> Table:
    """Sum up the runs of a table.

    Parameters
    ----------
    number : int
        Of :data:`igm_rs.experiments.plans.TABLES`.
    lines : sequence of Line
        The plan.
    records : sequence of mapping
        The final runs of its rows, as they are stored; runs of other rows are left alone.
    about : mapping
        ``dataset``, ``title``, ``classes``, ``modalities``, ``split``, ``protocol``, ``command``, ``config``,
        ``versions``, ``revision`` and ``words``, the paragraphs that say how the comparison is made.
    tried : mapping of str to mapping
        By the key of a row: validation accuracy by learning rate, of its tuning.

    Raises
    ------
    ValueError
        If a row has no run.
    """
    rows = []
    for line in lines:
        runs = [record for record in records if record["row"] == line.row.key]
        if not runs:
            raise ValueError(f"table {number}: row {line.row.key!r} has no run")
        rows.append(_row(line, runs, tried.get(line.tuned_as.key, {}), number == 3))
    by_key = {row["key"]: row for row in rows}
    for row in rows:
        row["minus"] = {
            key: _differences(row, by_key[key]) for key in REFERENCES if key in by_key and key != row["key"]
        }
    effects = [
        _effect(effect, by_key)
        for effect in EFFECTS.get(number, ())
        if effect.mine in by_key and effect.theirs in by_key
    ]
    if number == 4:
        none = rows[-1]
        effects = [
            _effect(Effect(f"{row['words'][0]} − {none['words'][0]}", row["key"], none["key"]), by_key)
            for row in rows[:-1]
        ]
    return Table({"table": number, "shows": TABLES[number], **about, "rows": rows, "effects": effects})


# Layout


def _spread(value: Mapping[str, Any] | None, measure: str = "accuracy") -> str:
    """Return "mean ± standard deviation", in percent or, of NLL, in nats."""
    if value is None:
        return MISSING
    scale, digits = (1, 3) if measure == "nll" else (100, 1)
    mean = f"{scale * value['mean']:.{digits}f}"
    return mean if value["sd"] is None else f"{mean} ± {scale * value['sd']:.{digits}f}"


def _difference(value: Mapping[str, Any] | None, measure: str = "accuracy") -> Cell:
    """Return "difference ± half width", in points of percent or, of NLL, in nats; marked where zero is left out."""
    if value is None:
        return Cell(MISSING)
    scale, digits = (1, 3) if measure == "nll" else (100, 1)
    mean = f"{scale * value['mean']:+.{digits}f}".replace("-", "−")
    half = value["half_width"]
    if half is None:
        return Cell(mean)
    return Cell(f"{mean} ± {scale * half:.{digits}f}", marked=abs(value["mean"]) > half)


def _figure(row: Results, weights: str, measure: str, name: str) -> Results | None:
    """Return mean and deviation in a column of a fusion or a modality; None where the row has none."""
    values = row["summary"][weights][measure]
    found: Results | None = of_fusion(values, name) if name in FUSIONS else values.get(name)
    return found


def _ranked(rows: Sequence[Results], weights: str, measure: str, name: str) -> list[Cell]:
    """Return a column: best and second by what is printed, † where worse than the best single modality."""
    figures = [_figure(row, weights, measure, name) for row in rows]
    better = -1 if measure == "nll" else 1
    digits = 3
    keys = [None if figure is None else better * round(figure["mean"], digits) for figure in figures]
    order = sorted({key for key in keys if key is not None}, reverse=True)
    alone = [key for row, key in zip(rows, keys, strict=True) if len(row["modalities"]) == 1 and key is not None]
    cells = []
    for row, figure, key in zip(rows, figures, keys, strict=True):
        rank = 1 + order.index(key) if key is not None and len(rows) > 1 else 0
        worse = name in FUSIONS and len(row["modalities"]) > 1 and bool(alone) and key is not None and key < max(alone)
        cells.append(Cell(_spread(figure, measure), rank if rank < 3 else 0, worse))
    return cells


def _columns_to_rows(words: Sequence[Sequence[str]], columns: Sequence[Sequence[Cell]]) -> list[list[Cell]]:
    return [
        [*map(Cell, named), *cells] for named, cells in zip(words, zip(*columns, strict=True), strict=True)
    ]  # fmt: skip


def _measured(
    results: Results, title: str, words: list[str], weights: str, measures: Sequence[str], branches: Sequence[str] = ()
) -> Grid:
    """Return a part with a group of columns for each measure: the modalities' branches, and the fusions."""
    rows = results["rows"]
    names = (*branches, *SHOWN)
    heads = [*branches, *SHOWN.values()]
    columns = [_ranked(rows, weights, measure, name) for measure in measures for name in names]
    groups = [(NAMES[measure], list(heads)) for measure in measures]
    return Grid(title, words, groups, _columns_to_rows([row["words"] for row in rows], columns))


def _compared(results: Results, words: list[str]) -> Grid:
    """Return the part with each row's paired differences to joint training and to MLA."""
    rows = results["rows"]
    keys = [key for key in REFERENCES if any(key in row["minus"] for row in rows)]
    columns, groups = [], []
    for measure, fusion in (("accuracy", "mean"), ("accuracy", "calibrated"), ("nll", "calibrated")):
        groups.append((f"{NAMES[measure]}, {fusion}", [f"− {REFERENCES[key]}" for key in keys]))
        columns += [
            [_difference(row["minus"].get(key, {}).get(measure, {}).get(fusion), measure) for row in rows]
            for key in keys
        ]
    title = "Paired differences, seed by seed, ± 95 % interval"
    return Grid(title, words, groups, _columns_to_rows([row["words"] for row in rows], columns))


def _effects(results: Results) -> Grid:
    """Return the part with the comparisons that the plan names."""
    body = []
    for effect in results["effects"]:
        found = effect["differences"]
        cells = [Cell(effect["label"])]
        for measure in ("accuracy", "nll"):
            cells += [_difference(found[measure].get(fusion), measure) for fusion in SHOWN]
        body.append(cells)
    groups = [(NAMES[measure], list(SHOWN.values())) for measure in ("accuracy", "nll")]
    return Grid("What is worth how much: paired differences, ± 95 % interval", ["one minus the other"], groups, body)


def _cost(results: Results, words: list[str]) -> Grid:
    """Return the part with what each row was run with, what it cost, and what the optimizer told of itself."""
    body = []
    for row in results["rows"]:
        runs = row["runs"]
        rounds = [run["rounds"]["chosen"] for run in runs]
        last = runs[0]["rounds"]["last"]
        cells = [
            f"{row['learning_rate']:g}",
            f"{fmean(rounds):.1f} of {last}",
            f"{1000 * row['seconds_per_step']['mean']:.2f}",
            f"{row['peak_memory']['mean'] / 2**20:.0f}",
            _told(runs, "cosine", "{:.4f}"),
            _told(runs, "projected_share", "{:.1%}"),
            _told(runs, "effective_perturbation", "{:.1%}"),
            str(sum(run["skipped"] for run in runs)),
        ]
        body.append([*map(Cell, row["words"]), *map(Cell, cells)])
    heads = ["lr", "round", "ms/step", "peak MiB", "cosine", "modified", "ρ realised", "skipped"]
    note = (
        "lr, round: the learning rate, and the round chosen (mean over seeds). cosine: of a projected layer's gradient "
        "before and after its T; 1 means that nothing happens. modified: share of the parameters whose gradient a T "
        "acts on. ρ realised: ‖perturbation that arrived in the weights‖/ρ."
    )
    return Grid("Settings and cost", words, [("", heads)], body, note)


def _told(runs: Sequence[Results], name: str, pattern: str) -> str:
    """Return the mean of what the optimizer told, where it did."""
    values = [run[name] for run in runs if run[name] is not None]
    return pattern.format(fmean(values)) if values else MISSING


RANKS = "Bold (¹): best of the column; underlined (²): second best"
CLEAR = "Bold (*): the interval leaves out zero."


def _first(results: Results) -> list[Grid]:
    words = ["method"]
    main = _measured(results, "Chosen round, test", words, "chosen", ("accuracy", "map", "macro_f1"))
    main.note = (
        f"{RANKS}. †: worse than the best single modality. A modality alone has one prediction, and so has a joint "
        "head: it stands in all columns."
    )
    last = _measured(results, "Last round, test", words, "last", ("accuracy", "map", "macro_f1"))
    last.note = main.note
    names = results["modalities"]
    branches = Grid(
        "Each modality's branch, and how far probabilities can be trusted; chosen round, test",
        words,
        [("accuracy of the branch", list(names)), ("NLL", list(SHOWN.values()))],
        _columns_to_rows(
            [row["words"] for row in results["rows"]],
            [_ranked(results["rows"], "chosen", "accuracy", name) for name in names]
            + [_ranked(results["rows"], "chosen", "nll", name) for name in SHOWN],
        ),
        f"{RANKS}.",
    )
    if not any(row["minus"] for row in results["rows"]):
        return [main, last, branches]
    compared = _compared(results, words)
    compared.note = CLEAR
    return [main, last, branches, compared]


def _second(results: Results) -> list[Grid]:
    words = ["SAM", "GM"]
    grid = _measured(results, "Chosen round, test", words, "chosen", ("accuracy",), results["modalities"])
    grid.groups[0] = ("accuracy: each branch, and the fusions", grid.groups[0][1])
    grid.note = f"{RANKS}. GM: modification of the gradients by the other modality's T."
    return [grid]


def _third(results: Results) -> list[Grid]:
    rows, names = results["rows"], results["modalities"]
    turns = [(turn["round"], turn["modality"]) for turn in rows[0]["runs"][0]["after_turn"]]
    last = turns[-1][0]
    wanted = sorted({number for number in (1, 2, last // 2, last) if number >= 1})
    shown = [at for at, (number, _) in enumerate(turns) if number == 0 or number in wanted]
    igm = rows[-1]
    columns = []
    for at in shown:
        values = [[run["after_turn"][at]["accuracy"]["mean"] for run in row["runs"]] for row in rows]
        columns.append(
            [
                Cell(_spread(_summary(mine)), marked=row is not igm and mine == values[-1])
                for row, mine in zip(rows, values, strict=True)
            ]
        )
    groups = [("", ["initial"])] if turns[0][0] == 0 else []
    groups += [(f"round {number}", list(names)) for number in wanted]
    title = "Validation accuracy of the mean fusion after each turn"
    note = (
        "Bold (*): the same as IGM in every seed, to the last digit, as it must be until the modification is first "
        f"left out. Rounds 1, 2, the middle and the last of {last}; the files hold all."
    )
    by_turn = Grid(title, ["method"], groups, _columns_to_rows([row["words"] for row in rows], columns), note)
    test = _measured(results, "Chosen round, test", ["method"], "chosen", ("accuracy", "map"), names)
    test.note = f"{RANKS}."
    return [by_turn, test]


def _fourth(results: Results) -> list[Grid]:
    words = ["scope"]
    grid = _measured(results, "Chosen round, test", words, "chosen", ("accuracy", "map", "macro_f1"))
    shares = [Cell(_told(row["runs"], "projected_share", "{:.1%}")) for row in results["rows"]]
    for row, share in zip(grid.rows, shares, strict=True):
        row.insert(1, share)
    grid.groups.insert(0, ("", ["modified"]))
    grid.note = (
        f"{RANKS}. scope: wanted share of each modality's parameters, layers taken from the output backwards until it "
        "is reached; modified: the share whose gradient a T acts on."
    )
    return [grid]


PARTS = {1: _first, 2: _second, 3: _third, 4: _fourth}
WORDS = {1: ["method"], 2: ["SAM", "GM"], 3: ["method"], 4: ["scope"]}


@dataclass(frozen=True)
class Table:
    """A table of the paper, on one data set.

    Attributes
    ----------
    results : dict
        Its numbers in plain values: what :func:`table` was told, ``rows`` with every run condensed, ``effects``.
    """

    results: Results

    @classmethod
    def read(cls, path: Path) -> Table:
        """Return a table from its JSON file.

        Raises
        ------
        FileNotFoundError
            If there is none.
        ValueError
            If the file is no table's.
        """
        if not path.is_file():
            raise FileNotFoundError(f"table file {path} does not exist")
        try:
            results = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"table file {path} is not as expected: it is no JSON ({error})") from error
        missing = [
            name for name in ("table", "dataset", "rows") if not isinstance(results, dict) or name not in results
        ]
        if missing:
            raise ValueError(f"table file {path} is not as expected: it has no {', '.join(missing)}")
        return cls(results)

    @property
    def name(self) -> str:
        """Name of its files, such as ``"table-1-watch"``."""
        return f"table-{self.results['table']}-{self.results['dataset']}"

    @property
    def heading(self) -> list[str]:
        """What stands above it: the warning of ``--protocol paper`` first, then title, seeds and split."""
        results = self.results
        split = results["split"]
        seeds = {len(row["runs"]) for row in results["rows"]}
        counts = " to ".join(map(str, sorted({min(seeds), max(seeds)})))
        return [
            *([PAPER_WARNING] if results["protocol"] == "paper" else []),
            f"Table {results['table']}, {results['title']}: {results['shows']}",
            (
                f"Mean ± standard deviation over {counts} seed{'s' * (max(seeds) > 1)}, in percent. {split['train']} "
                f"examples to train on, {split['validation']} to validate, {split['test']} to test; "
                f"{results['classes']} classes."
            ),
        ]

    @property
    def grids(self) -> list[Grid]:
        """Its parts, the paper's own first."""
        number = self.results["table"]
        parts = PARTS[number](self.results)
        if self.results["effects"]:
            effects = _effects(self.results)
            effects.note = CLEAR
            parts.append(effects)
        return [*parts, _cost(self.results, WORDS[number])]

    def plain(self, width: int | None = None) -> str:
        """Return the table for a terminal of `width` characters; None: however wide."""
        return "\n\n".join(["\n".join(self.heading), *(grid.plain(width) for grid in self.grids)])

    def markdown(self, level: int = 1) -> str:
        """Return the table in Markdown, under a heading of a level; the warning of ``--protocol paper`` goes first."""
        *warning, title, seeds = self.heading
        parts = [*(f"**{line}**" for line in warning), f"{'#' * level} {title}", seeds]
        parts += [f"Made by `{self.results['command']}`.", *(grid.markdown() for grid in self.grids)]
        if level == 1:
            parts += self.results["words"]
            versions = ", ".join(f"{name} {value}" for name, value in self.results["versions"].items())
            parts.append(f"Made with {versions}.")
        return "\n\n".join(parts) + "\n"

    def csv(self) -> str:
        """Return every figure, one a line: means and deviations, differences, and Table 3's turns."""
        file = io.StringIO()
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(
            [
                *("table", "dataset", "protocol", "row", "label", "weights", "measure", "of", "minus"),
                *("mean", "sd", "half_width_95", "seeds"),
            ]
        )
        start = [self.results["table"], self.results["dataset"], self.results["protocol"]]
        for line in self._lines():
            writer.writerow([*start, *("" if value is None else value for value in line)])
        return file.getvalue()

    def _lines(self) -> Iterator[list[Any]]:
        """The lines of the CSV file after their first three columns."""
        for row in self.results["rows"]:
            first = [row["key"], " ".join(row["words"])]
            for weights, measures in row["summary"].items():
                for measure, values in measures.items():
                    for name, value in values.items():
                        yield [*first, weights, measure, name, "", value["mean"], value["sd"], "", value["seeds"]]
            for turn in range(len(row["runs"][0].get("after_turn", ()))):
                told = [run["after_turn"][turn] for run in row["runs"]]
                weights = f"round {told[0]['round']} after {told[0]['modality']}, validation"
                for name in told[0]["accuracy"]:
                    value = _summary([run["accuracy"][name] for run in told])
                    yield [*first, weights, "accuracy", name, "", value["mean"], value["sd"], "", value["seeds"]]
            for measure in ("seconds_per_step", "peak_memory"):
                value = row[measure]
                yield [*first, "", measure, "training", "", value["mean"], value["sd"], "", value["seeds"]]
            for other, measures in row["minus"].items():
                yield from _difference_lines(first, other, measures)
        for effect in self.results["effects"]:
            one = [effect["mine"], effect["label"]]
            yield from _difference_lines(one, effect["theirs"], effect["differences"])

    def json(self) -> str:
        """Return all its numbers; one line a row."""
        parts = []
        for name, value in self.results.items():
            if name in ("rows", "effects", "words") and value:
                text = "[\n  " + ",\n  ".join(json.dumps(item, ensure_ascii=False) for item in value) + "\n ]"
            else:
                text = json.dumps(value, ensure_ascii=False)
            parts.append(f" {json.dumps(name)}: {text}")
        return "{\n" + ",\n".join(parts) + "\n}\n"

    def write(self, folder: Path) -> list[Path]:
        """Write the table as ``.md``, ``.csv`` and ``.json`` into a folder, which is made, and return the paths."""
        folder.mkdir(parents=True, exist_ok=True)
        paths = []
        for ending, text in (("md", self.markdown()), ("csv", self.csv()), ("json", self.json())):
            paths.append(folder / f"{self.name}.{ending}")
            paths[-1].write_text(text, encoding="utf-8")
        return paths


def _difference_lines(first: list[Any], other: str, measures: Results) -> Iterator[list[Any]]:
    """The CSV lines of differences."""
    for measure, values in measures.items():
        for fusion, value in values.items():
            yield [
                *first, "chosen", measure, fusion, other, value["mean"], "", value["half_width"], value["seeds"],
            ]  # fmt: skip
