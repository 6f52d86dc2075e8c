"""The results page: stored tables and pictures with the command of each, and the findings that were written by hand."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .plans import TABLES
from .reproduction import ERRORS, FLOOR
from .tables import MINUS, Table

__all__ = ["FINDINGS", "page", "write"]

FINDINGS = "findings.md"
"""Name of the file of findings, in the folder of the results."""

FIGURES = {
    "1": "cosine between the gradients of the old and the new modality",
    "3": "sweeps of τ and ρ, with the effective perturbation",
    "4": "loss surface",
    "5a": "singular values by layer, with and without SAM",
    "5b": "pretrained encoders, frozen and trained on",
    "5c": "training time",
}
"""The paper's figures by name, in the order of the page, with what each shows."""

PICTURE = re.compile(r"figure-(?P<figure>[0-9a-z]+)-(?P<dataset>[A-Za-z0-9][A-Za-z0-9_-]*)\.png")

OPEN_PARTS = 1
"""Parts of a table that are open on the page, its effects at the chosen round are, too. The others unfold."""

OPEN_GROUPS = 2
"""Groups of columns of these parts that are open; with all of them the part is among what unfolds."""


@dataclass(frozen=True)
class _Picture:
    """A stored picture: which figure, of what data set, where it lies, and what its JSON file tells."""

    figure: str
    dataset: str
    path: Path
    told: Mapping[str, Any]


def page(folder: Path) -> str:
    """Return the results page in Markdown.

    Parameters
    ----------
    folder : Path
        Holds ``tables/table-*.json``, ``figures/figure-*.png`` with a JSON file beside each, and the findings.

    Raises
    ------
    FileNotFoundError
        If there is no findings file, or no table.
    ValueError
        If a file is not as expected.
    """
    findings = folder / FINDINGS
    if not findings.is_file():
        raise FileNotFoundError(f"file {findings} does not exist, expected the findings in words")
    tables = _tables(folder)
    if not tables:
        raise FileNotFoundError(f"folder {folder / 'tables'} has no table-*.json, expected at least one table")
    pictures = _pictures(folder)
    datasets = list(dict.fromkeys(table.results["dataset"] for table in tables))
    datasets += [name for name in dict.fromkeys(picture.dataset for picture in pictures) if name not in datasets]
    parts = [
        "# Results",
        _opening(folder),
        _contents(datasets, tables, pictures),
        findings.read_text(encoding="utf-8").strip(),
    ]
    for name in datasets:
        mine = [table for table in tables if table.results["dataset"] == name]
        title = mine[0].results["title"] if mine else name
        parts.append(f"## {title}")
        parts += [_table(table) for table in mine]
        parts += [_picture(folder, picture) for picture in pictures if picture.dataset == name]
    parts.append(_method(tables, pictures))
    return "\n\n".join(parts) + "\n"


def write(folder: Path) -> Path:
    """Write the page as ``README.md`` into the folder and return its path; raises as :func:`page`."""
    path = folder / "README.md"
    path.write_text(page(folder), encoding="utf-8")
    return path


def _opening(folder: Path) -> str:
    """What the page is made of, and how."""
    return (
        f"Made from the files in this folder by `igm-rs page --out {folder.name}`; the words before the tables are "
        f"[{FINDINGS}]({FINDINGS}). Each table and each picture stands under the command that makes it; the numbers "
        "behind it lie beside it as JSON, of tables also as CSV, every seed among them."
    )


def _tables(folder: Path) -> list[Table]:
    """Read the stored tables, those of one data set together, in the order of the package's data sets."""
    from .data import names

    known = names()
    found = [Table.read(path) for path in sorted((folder / "tables").glob("table-*.json"))]

    def place(table: Table) -> tuple[int, str, int, str]:
        dataset = table.results["dataset"]
        return (known.index(dataset) if dataset in known else len(known), dataset, table.results["table"], table.name)

    return sorted(found, key=place)


def _pictures(folder: Path) -> list[_Picture]:
    """Read what there is of each picture, in the order of the paper."""
    out = []
    for path in sorted((folder / "figures").glob("figure-*.png")):
        match = PICTURE.fullmatch(path.name)
        if match is None:
            raise ValueError(f"picture {path} is called otherwise than figure-FIGURE-DATASET.png")
        told = _numbers(path)
        out.append(_Picture(match["figure"], told["dataset"], path, told))
    order = list(FIGURES)
    return sorted(
        out, key=lambda each: (order.index(each.figure) if each.figure in order else len(order), each.dataset)
    )


def _contents(datasets: Sequence[str], tables: Sequence[Table], pictures: Sequence[_Picture]) -> str:
    """What is on the page: a line a data set, a link each."""
    lines = []
    for name in datasets:
        mine = [table for table in tables if table.results["dataset"] == name]
        links = [f"[Table {table.results['table']}{_kind(table)}](#{table.name})" for table in mine]
        links += [f"[Figure {each.figure}](#{each.path.stem})" for each in pictures if each.dataset == name]
        lines.append(f"- {name}: {', '.join(links)}")
    return "\n".join(lines)


def _kind(table: Table) -> str:
    """What sets a table apart from the one that its command makes without further options."""
    results = table.results
    words = ["selected on the test set"] * (results["protocol"] == "paper")
    words += ["some methods"] * (results["methods"] is not None)
    return f" ({', '.join(words)})" if words else ""


def _table(table: Table) -> str:
    """One table: its command, its first part and its effects open, the rest to unfold."""
    results = table.results
    *warning, _, seeds = table.heading
    number, dataset = results["table"], results["dataset"]
    base = f"tables/{table.name}"
    parts = [
        f'<a id="{table.name}"></a>\n\n### Table {number} on {dataset}{_kind(table)}: {TABLES[number]}',
        *(f"**{line}**" for line in warning),
        f"```\n{results['command']}\n```",
        f"{seeds} Numbers: [JSON]({base}.json), [CSV]({base}.csv).",
    ]
    folded: list[str] = []
    for place, grid in enumerate(table.grids):
        if place < OPEN_PARTS:
            parts.append(grid.opening(OPEN_GROUPS).markdown())
        if place >= OPEN_PARTS or len(grid.groups) > OPEN_GROUPS:
            effects = grid.words == [MINUS] and "last round" not in grid.title
            (parts if effects else folded).append(grid.markdown())
    inside = "\n\n".join(folded)
    return "\n\n".join([*parts, f"<details><summary>More of this table</summary>\n\n{inside}\n\n</details>"])


def _picture(folder: Path, picture: _Picture) -> str:
    """One picture with its command and what is said below it, from the JSON file beside it."""
    figure, dataset, path, told = picture.figure, picture.dataset, picture.path, picture.told
    chosen = " (selected on the test set)" if path.stem.endswith("-paper") else ""
    place = path.relative_to(folder).as_posix()
    files = [file for ending in (".json", ".csv") if (file := path.with_suffix(ending)).is_file()]
    links = ", ".join(f"[{file.suffix[1:].upper()}]({file.relative_to(folder).as_posix()})" for file in files)
    return "\n\n".join(
        [
            f'<a id="{path.stem}"></a>\n\n### Figure {figure} on {dataset}{chosen}',
            f"```\n{told['command']}\n```",
            f"![Figure {figure} on {dataset}]({place})",
            f"{told['caption']} Numbers: {links}.",
        ]
    )


def _numbers(picture: Path) -> dict[str, Any]:
    """Read what lies beside a picture."""
    numbers = picture.with_suffix(".json")
    try:
        told: Any = json.loads(numbers.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"picture {picture} has no numbers that can be read beside it: {error}") from error
    kinds: dict[str, type | tuple[type, ...]] = {"command": str, "caption": str, "dataset": str, "versions": dict}
    for name, kind in {**kinds, "revision": (str, type(None))}.items():
        if not isinstance(told, dict) or name not in told or not isinstance(told[name], kind):
            raise ValueError(f"file {numbers} is not as expected: it has no {name}")
    return dict(told)


def _method(tables: Sequence[Table], pictures: Sequence[_Picture]) -> str:
    """How the comparisons are made, and with what; said once for all tables that say the same."""
    parts = ["## How the comparisons are made"]
    told: dict[str, list[str]] = {}
    for table in tables:
        told.setdefault("\n\n".join(table.results["words"]), []).append(table.name)
    for words, names in told.items():
        parts += ["**All tables**" if len(told) == 1 else f"**{', '.join(names)}**", words]
    made: dict[str, list[str]] = {}
    sources: list[tuple[str, Mapping[str, Any]]] = [(table.name, table.results) for table in tables]
    sources += [(picture.path.stem, picture.told) for picture in pictures]
    for name, results in sources:
        versions = ", ".join(f"{package} {version}" for package, version in results["versions"].items())
        revision = f" at revision {results['revision']}" if results["revision"] else ""
        made.setdefault(f"with {versions}{revision}", []).append(name)
    parts += [f"{', '.join(names)}: made {how}." for how, names in made.items()]
    parts.append(
        "`igm-rs table 1 --data watch --compare results/tables/table-1-watch.json` makes a table afresh and says "
        "whether it is the stored one: to the last digit with the same torch on the same kind of processor; else "
        f"within {100 * FLOOR:g} points or {ERRORS:g} standard errors, as training enlarges the last digit of a sum."
    )
    return "\n\n".join(parts)
