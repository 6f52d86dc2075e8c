"""What is wrong with a data set on disk: said at once with file and line, or left out and counted."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

__all__ = ["KINDS", "DataFault", "Fault", "Faults", "place"]

KINDS = {
    "missing": "missing files",
    "truncated": "files that are cut off or damaged",
    "empty": "empty clips",
    "label": "labels out of range",
    "duplicate": "examples that are listed twice",
    "speaker": "examples of speakers who are in another split",
    "line": "lines of another form",
    "encoding": "lines that are no UTF-8",
}
"""What can be wrong with an example, with its name in a count."""


class DataFault(ValueError):  # noqa: N818  # a fault of the data, not of the program
    """Something in a data set is not as expected; the message names file, line and reason."""


def place(path: Path, line: int) -> str:
    """Return where something stands in a list, in words: a line, or an entry of a list in JSON."""
    return f"{path}, {'entry' if path.suffix == '.json' else 'line'} {line}"


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong.

    Attributes
    ----------
    kind : str
        Of :data:`KINDS`.
    path : Path
        The file.
    line : int, optional
        Its line, from 1, where it is a list.
    reason : str
        What is wrong, and what was expected.
    """

    kind: str
    path: Path
    line: int | None
    reason: str

    def __str__(self) -> str:
        """Say it, for a message or a report."""
        return f"{self.path if self.line is None else place(self.path, self.line)}: {self.reason}"


@dataclass
class Faults:
    """Takes what is wrong: raises it, or notes it so that the example is left out.

    Attributes
    ----------
    skip : bool
        Whether it is noted.
    found : list of Fault
        What was noted.
    """

    skip: bool
    found: list[Fault] = field(default_factory=list)

    def add(self, kind: str, path: Path, line: int | None, reason: str) -> None:
        """Take one fault of an example.

        Raises
        ------
        DataFault
            Unless faults are left out.
        """
        assert kind in KINDS, kind
        fault = Fault(kind, path, line, reason)
        if not self.skip:
            hint = "" if kind == "speaker" else "; --skip-broken leaves such examples out and counts them"
            raise DataFault(f"{fault}{hint}")
        self.found.append(fault)

    @property
    def counts(self) -> dict[str, int]:
        """How many of each kind."""
        return dict(Counter(fault.kind for fault in self.found))

    def said(self) -> str:
        """Return the counts in words, "" without any."""
        return ", ".join(f"{count} {KINDS[kind]}" for kind, count in self.counts.items())
