"""The layout of tables: cells with their marks, columns in groups, as plain text and as Markdown."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

__all__ = ["Cell", "Grid", "markdown"]

NOTE = 120
"""Characters of a line of a note in a terminal, at the most."""


@dataclass(frozen=True)
class Cell:
    """A cell of a table.

    Attributes
    ----------
    text : str
        What it says.
    rank : int
        1 for the best of a column, 2 for the second, 0 for all others.
    worse : bool
        Whether it is worse than the best single modality (†).
    marked : bool
        Whether it stands out: a difference whose interval leaves out zero, or a figure that must be that of IGM.
    """

    text: str
    rank: int = 0
    worse: bool = False
    marked: bool = False

    @property
    def plain(self) -> str:
        """The text and its marks: ¹ best, ² second, † worse than the best single modality, * stands out."""
        return self.text + ("", "¹", "²")[self.rank] + "†" * self.worse + "*" * self.marked

    @property
    def markdown(self) -> str:
        """The text in bold for the best and for what stands out, underlined for the second, and †."""
        text = self.text.replace("|", "\\|")
        if self.rank == 1 or self.marked:
            text = f"**{text}**"
        elif self.rank == 2:
            text = f"<ins>{text}</ins>"
        return text + "†" * self.worse


@dataclass
class Grid:
    """One part of a table: columns in groups, rows of cells, a title and what its marks mean.

    Attributes
    ----------
    title, note : str
        Above; below.
    words : list of str
        Headings of the columns of words, at the left.
    groups : list of (str, list of str)
        Headings of the columns of numbers, in groups with a heading of their own.
    rows : list of list of Cell
        As many cells as there are columns.
    """

    title: str
    words: list[str]
    groups: list[tuple[str, list[str]]]
    rows: list[list[Cell]] = field(default_factory=list)
    note: str = ""

    @property
    def _headings(self) -> list[str]:
        """One heading a column, for tables with one line of headings."""
        return self.words + [f"{group}: {name}" if group else name for group, names in self.groups for name in names]

    def opening(self, groups: int) -> Grid:
        """Return the part with its first groups of columns only."""
        kept = self.groups[:groups]
        columns = len(self.words) + sum(len(names) for _, names in kept)
        return Grid(self.title, self.words, kept, [row[:columns] for row in self.rows], self.note)

    def markdown(self) -> str:
        """Return the part in Markdown, words to the left and numbers to the right."""
        lines = markdown(self._headings, [[cell.markdown for cell in row] for row in self.rows], len(self.words))
        return "\n\n".join(part for part in (f"**{self.title}**", lines, self.note) if part)

    def plain(self, width: int | None = None) -> str:
        """Return the part for a terminal: columns padded with spaces.

        Parameters
        ----------
        width : int, optional
            Of the terminal. Groups of columns that do not fit go below, with the words repeated.
        """
        blocks, at = [], len(self.words)
        chosen: list[tuple[str, range]] = []
        for name, names in self.groups:
            group = (name, range(at, at + len(names)))
            at += len(names)
            if chosen and width is not None and len(self._block([*chosen, group])[1]) > width:
                blocks.append(self._block(chosen))
                chosen = []
            chosen.append(group)
        blocks.append(self._block(chosen))
        body = "\n\n".join("\n".join(line.rstrip() for line in block) for block in blocks)
        note = "\n".join(textwrap.wrap(self.note, min(width or NOTE, NOTE)))
        return "\n\n".join(part for part in (self.title, body, note) if part)

    def _block(self, groups: Sequence[tuple[str, range]]) -> list[str]:
        """Return lines of the words and some groups: headings of groups, headings, a rule, the rows; all as wide."""
        heads = self.words + [name for _, names in self.groups for name in names]
        columns = [[head, *(row[at].plain for row in self.rows)] for at, head in enumerate(heads)]
        left = [_padded(column, str.ljust) for column in columns[: len(self.words)]]
        blocks = [["", *map("  ".join, zip(*left, strict=True))]]
        for name, places in groups:
            lines = list(map("  ".join, zip(*(_padded(columns[at], str.rjust) for at in places), strict=True)))
            blocks.append([name, *lines])
        padded = [_padded(block, str.ljust) if at == 0 else _titled(block) for at, block in enumerate(blocks)]
        lines = ["  ".join(parts) for parts in zip(*padded, strict=True)]
        above = 0 if any(name for name, _ in groups) else 1
        return [*lines[above:2], "─" * len(lines[0]), *lines[2:]]


def markdown(heads: Sequence[str], body: Sequence[Sequence[str]], words: int = 2) -> str:
    """Return a table in Markdown, its first columns, those of words, to the left and the numbers to the right.

    Parameters
    ----------
    heads : sequence of str
        Headings.
    body : sequence of sequence of str
        As many cells a row as there are headings.
    words : int
        Columns of words.
    """
    rule = [":--" if index < words else "--:" for index in range(len(heads))]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (heads, rule, *body))


def _padded(texts: Sequence[str], pad: Callable[[str, int], str]) -> list[str]:
    width = max(map(len, texts))
    return [pad(text, width) for text in texts]


def _titled(block: Sequence[str]) -> list[str]:
    """Put a group's heading in the middle above its columns, with a rule to both sides."""
    width = max(map(len, block))
    head = f" {block[0]} ".center(width, "─") if block[0] else " " * width
    return [head, *(line.rjust(width) for line in block[1:])]
