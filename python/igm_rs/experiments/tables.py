"""The tables: what all runs gave, summed up and laid out as the paper's, as plain text, Markdown, CSV and JSON."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

from .evaluation import FUSIONS, MEASURES, of_fusion
from .grids import Cell, Grid
from .plans import EFFECTS, RATES, TABLES, Effect, Line
from .statistics import Difference, Summary, paired_difference, summary

__all__ = [
    "MINUS",
    "PAPER_WARNING",
    "Table",
    "condensed",
    "devices",
    "difference",
    "figure",
    "figures",
    "table",
    "values",
]

Record = Mapping[str, Any]
"""A run, as it is stored."""

Results = dict[str, Any]
"""A table's numbers in plain values, as they are stored."""

PAPER_WARNING = (
    "SELECTED ON THE TEST SET (--protocol paper): the round is the best on the test split, as in the released scripts, "
    "so every figure at the chosen round is too good."
)
"""First line of every table that such runs are in."""

SHOWN = {"mean": "mean", "entropy": "entropy", "calibrated": "calibrated", "sum": "sum"}
"""Fusions in the tables, with their headings."""

TRUSTED = ("mean", "entropy", "calibrated")
"""Those whose NLL is shown: summed logits are no probabilities to be trusted."""

JOINT_TOO = (
    "A modality alone has one prediction, and so has a joint head: it stands in all columns, in the calibrated one "
    "with a temperature of its own."
)
"""What the columns of the fusions hold where there is nothing to fuse."""

NAMES = {
    "accuracy": "accuracy",
    "by_origin": "accuracy, each origin once",
    "map": "MAP",
    "macro_f1": "macro-F1",
    "nll": "NLL",
}
"""Measures, with their headings; the last in nats, the others in percent."""

REFERENCES = {"joint-concat": "joint, concat", "joint-sum": "joint, sum", "mla": "MLA"}
"""Rows that every row of Table 1 is compared with, with their headings."""

WEIGHTS = ("chosen", "last")
"""Rounds whose weights are measured."""

KEPT = (
    *("table", "shows", "dataset", "title", "classes", "modalities", "split", "protocol", "methods", "command"),
    *("config", "versions", "revision", "words", "rows"),
)
"""What the file of a table holds."""

KEPT_OF_ROWS = ("key", "words", "modalities", "learning_rate", "tried", "of", "runs")
"""What it holds of each row."""

MISSING = "–"

MODIFIED = "igm-shared"
"""The row whose forgetting that of the other shared trunks is compared with."""


# Numbers


def condensed(record: Record, names: Sequence[str]) -> dict[str, Any]:
    """Return what a table keeps of a run: every figure to six decimals, no training curve.

    Parameters
    ----------
    record : mapping
        As stored.
    names : sequence of str
        Modalities and fusions in the order in which each measure is to list them.
    """
    kept = ("seconds_per_step", "seconds", "peak_memory", "skipped", "cosine", "kept", "effective_perturbation")
    return {
        "seed": record["seed"],
        "device": record["device"],
        "rounds": {weights: record[weights]["round"] for weights in WEIGHTS},
        "scores": {
            weights: {
                measure: [_rounded(record[weights]["scores"][measure][name]) for name in names] for measure in MEASURES
            }
            for weights in WEIGHTS
        },
        "temperatures": _rounded(record["temperatures"]),
        **{name: _rounded(record[name]) for name in (*kept, "projected_share", "parameters")},
    }


def _rounded(value: Any) -> Any:
    """Round every number in nested mappings to six decimals."""
    if isinstance(value, Mapping):
        return {name: _rounded(item) for name, item in value.items()}
    return round(value, 6) if isinstance(value, float) else value


def _row(line: Line, records: Sequence[Record], tried: Mapping[float, float], by_turn: bool) -> Results:
    """Return what a table keeps of a row."""
    records = sorted(records, key=lambda record: record["seed"])
    names = list(records[0]["chosen"]["scores"]["accuracy"])
    row: Results = {
        "key": line.row.key,
        "words": list(line.words),
        "modalities": list(line.row.modalities),
        "learning_rate": records[0]["learning_rate"],
        "tuned_as": line.tuned_as.key,
        "tried": [{"learning_rate": rate, "validation_accuracy": _rounded(value)} for rate, value in tried.items()],
        "of": names,
        "runs": [condensed(record, names) for record in records],
    }
    if by_turn:
        turns = records[0]["after_turn"]
        row["turns"] = [{"round": turn["round"], "modality": turn["modality"]} for turn in turns]
        row["of_turns"] = list(turns[0]["scores"]["accuracy"])
        for run, record in zip(row["runs"], records, strict=True):
            run["after_turn"] = [
                [_rounded(turn["scores"]["accuracy"][name]) for name in row["of_turns"]]
                for turn in record["after_turn"]
            ]
    elif line.row.of.schedule == "once":
        first = line.row.modalities[0]
        for run, record in zip(row["runs"], records, strict=True):
            of_first = [turn["scores"]["accuracy"][first] for turn in record["after_turn"]]
            run["first_modality"] = {"after_its_own": _rounded(of_first[1]), "after_all": _rounded(of_first[-1])}
    return row


def values(row: Results, weights: str, measure: str, name: str) -> dict[int, float] | None:
    """Return what stands in a column of a table, by seed; None where the row has no such figure.

    Parameters
    ----------
    row : dict
        Of a table's ``rows``.
    weights : {"chosen", "last"}
        Which round.
    measure : str
        Of :data:`igm_rs.experiments.evaluation.MEASURES`.
    name : str
        A modality; or a fusion, which of a joint head is its own prediction and of a single modality its own.
    """
    places = {known: place for place, known in enumerate(row["of"])}
    place = of_fusion(places, name) if name in FUSIONS else places.get(name)
    return None if place is None else {run["seed"]: run["scores"][weights][measure][place] for run in row["runs"]}


def figure(row: Results, weights: str, measure: str, name: str) -> Summary | None:
    """Return mean and deviation of :func:`values`."""
    found = values(row, weights, measure, name)
    return None if found is None else summary(list(found.values()))


def figures(row: Results) -> dict[tuple[str, str, str], Summary]:
    """Return every figure of a row by weights, measure, and modality or fusion, under their own names."""
    return {
        (weights, measure, name): summary([run["scores"][weights][measure][place] for run in row["runs"]])
        for weights in WEIGHTS
        for measure in MEASURES
        for place, name in enumerate(row["of"])
    }


def difference(
    mine: Results, theirs: Results, measure: str, fusions: tuple[str, str], weights: str = "chosen"
) -> Difference:
    """Return one row's fusion minus another row's, at the chosen or at the last round, seed by seed."""
    one, other = (values(row, weights, measure, name) for row, name in zip((mine, theirs), fusions, strict=True))
    if one is None or other is None:
        raise ValueError(f"fusions are {', '.join(fusions)}, expected two of {', '.join(FUSIONS)}")
    return paired_difference(one, other)


def table(
    number: int,
    lines: Sequence[Line],
    records: Sequence[Record],
    *,
    about: Mapping[str, Any],
    tried: Mapping[str, Mapping[float, float]],
) -> Table:
    """Put the runs of a table together.

    Parameters
    ----------
    number : int
        Of :data:`igm_rs.experiments.plans.TABLES`.
    lines : sequence of Line
        The plan.
    records : sequence of mapping
        The final runs of its rows, as they are stored; runs of other rows are left alone.
    about : mapping
        ``dataset``, ``title``, ``classes``, ``modalities``, ``split``, ``protocol``, ``methods`` (keys, where only
        some were wanted, or None), ``command``, ``config``, ``versions``, ``revision`` and ``words``, the paragraphs
        that say how the comparison is made.
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
    if number == 4:
        rows.sort(key=lambda row: -(_told(row, "projected_share") or 0.0))
    return Table({"table": number, "shows": TABLES[number], **about, "rows": rows})


def _told(row: Results, name: str) -> float | None:
    """Return the mean over seeds of what a run tells of itself, where it does; of time and memory the median."""
    found = [run[name] for run in row["runs"] if run[name] is not None]
    middle = median if name in ("seconds_per_step", "peak_memory") else fmean
    return middle(found) if found else None


# Layout


def _shown(measure: str) -> tuple[str, ...]:
    """Which fusions a measure is shown of."""
    return TRUSTED if measure == "nll" else tuple(SHOWN)


def _scale(measure: str) -> tuple[int, int]:
    """Factor and decimals of a measure in the tables: percent, or nats."""
    return (1, 3) if measure == "nll" else (100, 1)


def _spread(value: Summary | None, measure: str = "accuracy") -> str:
    """Return "mean ± standard deviation", in percent or, of NLL, in nats."""
    if value is None:
        return MISSING
    scale, digits = _scale(measure)
    mean = f"{scale * value.mean:.{digits}f}".replace("-", "−")
    return mean if value.sd is None else f"{mean} ± {scale * value.sd:.{digits}f}"


def _signed(value: Difference, measure: str = "accuracy") -> Cell:
    """Return "difference ± half width", in points of percent or, of NLL, in nats; marked where zero is left out."""
    scale, digits = _scale(measure)
    mean = f"{scale * value.mean:+.{digits}f}".replace("-", "−")
    if value.half_width is None:
        return Cell(mean)
    return Cell(f"{mean} ± {scale * value.half_width:.{digits}f}", marked=value.clear)


def _ranked(rows: Sequence[Results], weights: str, measure: str, name: str) -> list[Cell]:
    """Return a column: best and second by what is printed, † where worse than the best single modality."""
    figures = [figure(row, weights, measure, name) for row in rows]
    better = -1 if measure == "nll" else 1
    keys = [None if found is None else better * round(found.mean, 3) for found in figures]
    order = sorted({key for key in keys if key is not None}, reverse=True)
    alone = [key for row, key in zip(rows, keys, strict=True) if len(row["modalities"]) == 1 and key is not None]
    cells = []
    for row, found, key in zip(rows, figures, keys, strict=True):
        rank = 1 + order.index(key) if key is not None and len(rows) > 1 else 0
        worse = name in FUSIONS and len(row["modalities"]) > 1 and bool(alone) and key is not None and key < max(alone)
        cells.append(Cell(_spread(found, measure), rank if rank < 3 else 0, worse))
    return cells


def _grouped(results: Results) -> tuple[str, ...]:
    """Return ``("by_origin",)`` where that is another figure than the accuracy, by half a point or more in some row."""
    largest = 0.0
    for row in results["rows"]:
        scores = [run["scores"]["last"] for run in row["runs"]]
        for place in range(len(row["of"])):
            differences = [each["accuracy"][place] - each["by_origin"][place] for each in scores]
            largest = max(largest, abs(fmean(differences)))
    return ("by_origin",) if largest >= 0.005 else ()


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
    rows = {row["key"]: row for row in results["rows"]}
    keys = [key for key in REFERENCES if key in rows]
    columns, groups = [], []
    pairs = [("accuracy", "mean"), ("accuracy", "sum"), ("accuracy", "calibrated")]
    pairs += [(measure, "calibrated") for measure in (*_grouped(results), "nll")]
    for measure, fusion in pairs:
        groups.append((f"{NAMES[measure]}, {fusion}", [f"− {REFERENCES[key]}" for key in keys]))
        columns += [
            [
                Cell(MISSING)
                if row is rows[key]
                else _signed(difference(row, rows[key], measure, (fusion,) * 2), measure)
                for row in rows.values()
            ]
            for key in keys
        ]
    title = "Paired differences, seed by seed, ± 95 % interval"
    return Grid(title, words, groups, _columns_to_rows([row["words"] for row in rows.values()], columns), CLEAR)


def _effects(table: Table, weights: str) -> Grid:
    """Return the part with the comparisons that the plan names, at the chosen or at the last round."""
    rows = {row["key"]: row for row in table.results["rows"]}
    measures = ("accuracy", *_grouped(table.results), "nll")
    body = []
    for effect in table.effects:
        rates = [f"{rows[key]['learning_rate']:g}" for key in (effect.mine, effect.theirs)]
        cells = [Cell(effect.label), Cell(", ".join(dict.fromkeys(rates)))]
        for measure in measures:
            for fusion in _shown(measure):
                fusions = effect.fusions or (fusion, fusion)
                shown = fusions[0] == fusion
                found = difference(rows[effect.mine], rows[effect.theirs], measure, fusions, weights)
                cells.append(_signed(found, measure) if shown else Cell(MISSING))
        body.append(cells)
    headings = {measure: [SHOWN[name] for name in _shown(measure)] for measure in measures}
    groups = [("", ["lr"]), *((NAMES[measure], heads) for measure, heads in headings.items())]
    title = f"What is worth how much at the {weights} round: paired differences, ± 95 % interval"
    note = f"{CLEAR} Learning rate: {RATES[table.results['table']]}."
    return Grid(title, [MINUS], groups, body, note)


def _forgetting(results: Results) -> Grid | None:
    """Return the part with what the first modality of a shared trunk has lost in the end; None where there is none."""
    rows = [row for row in results["rows"] if "first_modality" in row["runs"][0]]
    if not rows:
        return None
    body, lost = [], {}
    for row in rows:
        told = {run["seed"]: run["first_modality"] for run in row["runs"]}
        lost[row["key"]] = {seed: each["after_its_own"] - each["after_all"] for seed, each in told.items()}
        then, now = ([each[name] for each in told.values()] for name in ("after_its_own", "after_all"))
        spreads = [Cell(_spread(summary(values))) for values in (then, now, list(lost[row["key"]].values()))]
        body.append([*map(Cell, row["words"]), *spreads])
    for cells, (key, mine) in zip(body, lost.items(), strict=True):
        theirs = lost.get(MODIFIED)
        compared = None if theirs is None or key == MODIFIED else paired_difference(mine, theirs)
        cells.append(Cell(MISSING) if compared is None else _signed(compared, "accuracy"))
    first = results["modalities"][0]
    heads = ["after its own training", "after all", "forgotten", "more than with the flat modification, ± 95 %"]
    note = (
        "Last round; on validation, where it is looked at without choosing anything, ± standard deviation. No SAM. "
        f"{CLEAR}"
    )
    return Grid(f"Forgetting of {first}, trained first through a trunk that all share", ["method"],
                [(f"accuracy of {first}", heads)], body, note)  # fmt: skip


def _cost(results: Results, words: list[str]) -> Grid:
    """Return the part with what each row was run with, what it cost, and what the optimizer told of itself."""
    computed_on = devices(results["rows"])
    shown = computed_on != {"cpu"}
    body = []
    for row in results["rows"]:
        runs = row["runs"]
        cells = [
            *[", ".join(sorted(devices([row])))] * shown,
            f"{row['learning_rate']:g}",
            f"{fmean(run['rounds']['chosen'] for run in runs):.1f} of {runs[0]['rounds']['last']}",
            _written(row, "seconds_per_step", "{:.2f}", 1000),
            _written(row, "peak_memory", "{:.0f}", 2**-20),
            str(sum(run["skipped"] for run in runs)),
            _written(row, "cosine", "{:.4f}"),
            _written(row, "kept", "{:.1%}"),
            _written(row, "projected_share", "{:.1%}"),
            _written(row, "effective_perturbation", "{:.1%}"),
        ]
        body.append([*map(Cell, row["words"]), *map(Cell, cells)])
    groups = [
        ("", [*["device"] * shown, "lr", "round", "ms/step", "MiB", "skipped"]),
        ("told by the optimizer", ["cosine", "norm kept", "modified", "ρ realised"]),
    ]
    note = (
        f"lr, round: the learning rate ({RATES[results['table']]}), and the round chosen (mean over seeds). ms/step, "
        f"MiB: median over the seeds of time, and of the peak of memory{GPU_MEMORY if shown else ''} above what the "
        f"process held before the run{APART if len(computed_on) > 1 else ''}. "
        "cosine, norm kept: of a projected layer's gradient before and after its T; 1 and 100 % mean that nothing "
        "happens. modified: share of the parameters whose gradient a T acts on. ρ realised: ‖perturbation that arrived "
        "in the weights‖/ρ."
    )
    return Grid("Settings and cost", words, groups, body, note)


GPU_MEMORY = " (with a GPU, of its own memory)"
APART = "; of rows on different devices neither compares"


def devices(rows: Sequence[Results]) -> set[str]:
    """Return on what the runs of rows were computed; tables stored before this was kept were made on the CPU."""
    return {run.get("device", "cpu") for row in rows for run in row["runs"]}


def _written(row: Results, name: str, pattern: str, factor: float = 1) -> str:
    """Return the mean of what the runs tell of themselves, in a unit."""
    found = _told(row, name)
    return MISSING if found is None else pattern.format(factor * found)


MINUS = "one minus the other"
"""Heading of the comparisons' names."""

RANKS = "Bold (¹): best of the column; underlined (²): second best"
CLEAR = "Bold (*): the interval leaves out zero."


def _first(results: Results) -> list[Grid]:
    words = ["method"]
    shown = ("accuracy", *_grouped(results), "map", "macro_f1")
    main = _measured(results, "Chosen round, test", words, "chosen", shown)
    main.note = f"{RANKS}. †: worse than the best single modality. {JOINT_TOO}"
    last = _measured(results, "Last round, test", words, "last", shown)
    last.note = main.note
    names = results["modalities"]
    branches = Grid(
        "Each modality's branch, and how far probabilities can be trusted; chosen round, test",
        words,
        [("accuracy of the branch", list(names)), ("NLL", [SHOWN[name] for name in TRUSTED])],
        _columns_to_rows(
            [row["words"] for row in results["rows"]],
            [_ranked(results["rows"], "chosen", "accuracy", name) for name in names]
            + [_ranked(results["rows"], "chosen", "nll", name) for name in TRUSTED],
        ),
        f"{RANKS}. The branch of a joint head is given zeros for the other modalities' features.",
    )
    forgetting = _forgetting(results)
    out = [main, last, branches, *([] if forgetting is None else [forgetting])]
    return [*out, _compared(results, words)] if any(row["key"] in REFERENCES for row in results["rows"]) else out


def _second(results: Results) -> list[Grid]:
    words = ["SAM", "GM"]
    grid = _measured(
        results, "Chosen round, test", words, "chosen", ("accuracy", *_grouped(results)), results["modalities"]
    )
    grid.groups[0] = ("accuracy: each branch, and the fusions", grid.groups[0][1])
    grid.note = f"{RANKS}. GM: modification of the gradients by the other modality's T."
    return [grid]


def _third(results: Results) -> list[Grid]:
    rows, names = results["rows"], results["modalities"]
    turns = [(turn["round"], turn["modality"]) for turn in rows[0]["turns"]]
    last = turns[-1][0]
    wanted = sorted({number for number in (1, 2, last // 2, last) if number >= 1})
    shown = [at for at, (number, _) in enumerate(turns) if number == 0 or number in wanted]
    igm = rows[-1]
    columns = []
    for at in shown:
        found = [_after_turn(row, at, "mean") for row in rows]
        columns.append(
            [
                Cell(_spread(summary(mine)), marked=row is not igm and mine == found[-1])
                for row, mine in zip(rows, found, strict=True)
            ]
        )
    groups = [("", ["initial"])] if turns[0][0] == 0 else []
    groups += [(f"round {number}", list(names)) for number in wanted]
    title = "Validation accuracy of the mean fusion after each turn"
    note = (
        "Bold (*): the same as IGM in every seed, to the last digit, as it must be until the modification is first "
        f"left out; nothing is chosen here. Rounds 1, 2, the middle and the last of {last}; the files hold all."
    )
    by_turn = Grid(title, ["method"], groups, _columns_to_rows([row["words"] for row in rows], columns), note)
    test = _measured(results, "Chosen round, test", ["method"], "chosen", ("accuracy", "map"), names)
    test.note = f"{RANKS}."
    return [by_turn, test]


def _after_turn(row: Results, turn: int, name: str) -> list[float]:
    """Return the validation accuracy after a turn, a value a seed."""
    place = row["of_turns"].index(name)
    return [run["after_turn"][turn][place] for run in row["runs"]]


def _fourth(results: Results) -> list[Grid]:
    words = ["scope"]
    shown = ("accuracy", *_grouped(results), "map", "macro_f1")
    grid = _measured(results, "Chosen round, test", words, "chosen", shown)
    shares = [Cell(_written(row, "projected_share", "{:.1%}")) for row in results["rows"]]
    scores = [[run["scores"] for run in row["runs"]] for row in results["rows"]]
    for at, (row, share) in enumerate(zip(grid.rows, shares, strict=True)):
        same = [other for other in range(at + 1, len(scores)) if scores[other] == scores[at]]
        row.insert(1, Cell(f"{share.text} = {grid.rows[same[-1]][0].text}") if same else share)
    grid.groups.insert(0, ("", ["modified"]))
    grid.note = (
        f"{RANKS}. scope: wanted share of each modality's parameters, layers taken from the output backwards until it "
        "is reached; modified: the share whose gradient a T acts on, which takes a layer as wide in the other "
        "modality. “= …”: the same layers as in that row, so the same figures."
    )
    return [grid]


def _fifth(results: Results) -> list[Grid]:
    shown = ("accuracy", *_grouped(results), "map", "macro_f1")
    grid = _measured(results, "Chosen round, test", ["deviation"], "chosen", shown, results["modalities"])
    grid.note = (
        f"{RANKS}. Each row is IGM with what it names done as the released scripts do it, `igm_rs.Released`; all at "
        f"the learning rate of IGM. It falls as in every table, but where StepLR is begun anew: {_step_lr(results)}. "
        "What is given as ids, such as words, is not mixed."
    )
    return [grid]


def _step_lr(results: Results) -> str:
    """Return what a StepLR that is begun anew in each turn does there, stepped before each pass as the scripts do."""
    config = results["config"]
    batches = max(1, results["split"]["train"] // config["batch_size"])
    passes = math.ceil(min(config["turn_steps"], config["steps"]) / batches)
    after = config["rate_passes"]
    if passes < after:
        return f"there it is constant, as it falls before pass {after} and a turn has {passes}"
    return f"there it falls to a tenth before pass {after} of a turn, and again every {after} passes"


PARTS = {1: _first, 2: _second, 3: _third, 4: _fourth, 5: _fifth}
WORDS = {1: ["method"], 2: ["SAM", "GM"], 3: ["method"], 4: ["scope"], 5: ["deviation"]}


@dataclass(frozen=True)
class Table:
    """A table of the paper, on one data set.

    Attributes
    ----------
    results : dict
        Its numbers in plain values: what :func:`table` was told, and ``rows`` with every run condensed.
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
        _require(path, results, KEPT)
        for row in results["rows"]:
            _require(path, row, KEPT_OF_ROWS)
        return cls(results)

    @property
    def name(self) -> str:
        """Name of its files: ``table-1-watch``; ``-paper`` selected on the test set, ``-part`` of some methods only."""
        results = self.results
        more = ["paper"] * (results["protocol"] == "paper") + ["part"] * (results["methods"] is not None)
        return "-".join(["table", str(results["table"]), results["dataset"], *more])

    @property
    def heading(self) -> list[str]:
        """What stands above it: the warning of ``--protocol paper`` first, then title, seeds and split."""
        results = self.results
        split = results["split"]
        seeds = {len(row["runs"]) for row in results["rows"]}
        counts = " to ".join(map(str, sorted({min(seeds), max(seeds)})))
        return [
            *([PAPER_WARNING] if results["protocol"] == "paper" else []),
            f"Table {results['table']}: {results['shows']}. {results['title']}",
            (
                f"Mean ± standard deviation over {counts} seed{'s' * (max(seeds) > 1)}, in percent. {split['train']} "
                f"examples to train on, {split['validation']} to validate, {split['test']} to test; "
                f"{results['classes']} classes."
            ),
        ]

    @property
    def effects(self) -> list[Effect]:
        """Its comparisons; of Table 4 each scope is compared with none, of Table 5 each deviation with IGM."""
        rows = self.results["rows"]
        if self.results["table"] == 5:
            first, *others = rows
            return [Effect(f"{row['words'][0]} − {first['words'][0]}", row["key"], first["key"]) for row in others]
        if self.results["table"] == 4:
            none = rows[-1]
            return [Effect(f"{row['words'][0]} − {none['words'][0]}", row["key"], none["key"]) for row in rows[:-1]]
        keys = {row["key"] for row in rows}
        return [effect for effect in EFFECTS.get(self.results["table"], ()) if {effect.mine, effect.theirs} <= keys]

    @property
    def grids(self) -> list[Grid]:
        """Its parts, the paper's own first."""
        number = self.results["table"]
        parts = PARTS[number](self.results)
        if self.effects:
            parts += [_effects(self, weights) for weights in (WEIGHTS if number == 1 else WEIGHTS[:1])]
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
                *("dataset", "protocol", "row", "weights", "measure", "of", "minus"),
                *("mean", "sd", "half_width_95", "seeds"),
            ]
        )
        start = [self.results["dataset"], self.results["protocol"]]
        for line in self._lines():
            numbers = ["" if value is None else f"{value:.6g}" for value in line[-4:-1]]
            writer.writerow([*start, *line[:-4], *numbers, line[-1]])
        return file.getvalue()

    def _lines(self) -> Iterator[list[Any]]:
        """The lines of the CSV file after their first two columns."""
        rows = {row["key"]: row for row in self.results["rows"]}
        for key, row in rows.items():
            for (weights, measure, name), found in figures(row).items():
                yield [key, weights, measure, name, "", found.mean, found.sd, None, found.seeds]
            for at, turn in enumerate(row.get("turns", ())):
                weights = f"round {turn['round']} after {turn['modality'] or 'nothing'}, validation"
                for name in row["of_turns"]:
                    found = summary(_after_turn(row, at, name))
                    yield [key, weights, "accuracy", name, "", found.mean, found.sd, None, found.seeds]
            for name in ("after_its_own", "after_all") if "first_modality" in row["runs"][0] else ():
                found = summary([run["first_modality"][name] for run in row["runs"]])
                weights = f"{name.replace('_', ' ')}, validation"
                yield [key, weights, "accuracy", row["modalities"][0], "", found.mean, found.sd, None, found.seeds]
            for measure in ("seconds_per_step", "peak_memory"):
                found = summary([run[measure] for run in row["runs"]])
                yield [key, "", measure, "", "", found.mean, found.sd, None, found.seeds]
        pairs = [
            ("chosen", mine, theirs, (fusion, fusion))
            for mine in rows
            for theirs in (REFERENCES if self.results["table"] == 1 else ())
            if theirs in rows and mine != theirs
            for fusion in SHOWN
        ]
        for effect in self.effects:
            choice = [(fusion, fusion) for fusion in SHOWN] if effect.fusions is None else [effect.fusions]
            shown = WEIGHTS if self.results["table"] == 1 else WEIGHTS[:1]
            pairs += [(weights, effect.mine, effect.theirs, fusions) for weights in shown for fusions in choice]
        for weights, mine, theirs, fusions in dict.fromkeys(pairs):
            for measure in MEASURES:
                minus = difference(rows[mine], rows[theirs], measure, fusions, weights)
                other = theirs if fusions[0] == fusions[1] else f"{theirs}: {fusions[1]}"
                yield [mine, weights, measure, fusions[0], other, minus.mean, None, minus.half_width, minus.seeds]

    def json(self) -> str:
        """Return all its numbers; one line a row."""
        parts = []
        for name, value in self.results.items():
            if name in ("rows", "words") and value:
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


def _require(path: Path, held: Any, names: Sequence[str]) -> None:
    """Refuse a file's mapping that lacks something."""
    missing = [name for name in names if not isinstance(held, dict) or name not in held]
    if missing:
        raise ValueError(f"table file {path} is not as expected: it has no {', '.join(missing)}")
