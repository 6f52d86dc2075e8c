"""The lists of a set, CSV or TSV, read strictly: each record with its line, and so is what is wrong with one."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from .faults import DataFault, Faults

__all__ = ["DELIMITERS", "require_lists", "rows", "table"]

DELIMITERS = {",": "comma", "\t": "tab", ";": "semicolon", "|": "bar", " ": "space"}
"""What may separate the fields of a list, with its name in messages."""


def require_lists(lists: Mapping[str, Path], layout: str) -> None:
    """Refuse a folder in which a list is missing.

    Parameters
    ----------
    lists : mapping of str to Path
        The list of each split: "train", "validation", "test".
    layout : str
        The files that are expected, for the message.

    Raises
    ------
    FileNotFoundError
        Names the lists that are missing, and the layout.
    """
    missing = {part: path for part, path in lists.items() if not path.is_file()}
    if not missing:
        return
    names = ", ".join(map(str, missing.values()))
    does = "list {} does not exist" if len(missing) == 1 else "lists {} do not exist"
    hint = ""
    if set(missing) == {"validation"}:
        hint = (
            f"; settings are chosen on the validation split: move some lines of {lists['train']} into it, and all that "
            "a speaker says in one split"
        )
    raise FileNotFoundError(f"{does.format(names)}{hint}; expected\n{layout}")


def rows(
    path: Path, delimiter: str, fields: Sequence[str] | int, faults: Faults, *, quoted: bool = True
) -> Iterator[tuple[int, list[str]]]:
    r"""Read a list without a header, or with one that is a record like any other.

    Parameters
    ----------
    path : Path
        A file of UTF-8, with or without a byte order mark.
    delimiter : str
        One of :data:`DELIMITERS`.
    fields : sequence of str, or int
        What the fields of a record are called, or only how many there are; each record has as many.
    faults : Faults
        Takes lines that are of another form, "line", or no UTF-8, "encoding".
    quoted : bool
        Whether a field in double quotes may hold delimiters and ends of lines, as in CSV; otherwise a quote is a letter
        like any other and each line is a record.

    Yields
    ------
    int, list of str
        The line, from 1, that a record begins on, and its fields as they stand. Lines that hold nothing are passed
        over.

    Raises
    ------
    DataFault
        Whatever is done about single lines: if the list is empty, no line has the delimiter, or a quote is opened and
        never closed.
    """
    count = fields if isinstance(fields, int) else len(fields)
    wanted = f"{count} fields" if isinstance(fields, int) else f"{count} fields, {', '.join(fields)},"
    lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    if not any(line.strip() for line in lines):
        raise DataFault(f"{path}, line 1: the list is empty, expected {wanted} separated by {_called(delimiter)}")
    if count > 1 and not any(delimiter.encode() in line for line in lines):
        raise DataFault(
            f"{path}, line 1: no line of the list has a {_called(delimiter)}, found {_found(lines[0])}; expected "
            f"{wanted} separated by {_called(delimiter)}"
        )
    read = _Lines(path, lines, faults)
    for line, record in _records(path, read, delimiter, faults) if quoted else _plain(read, delimiter):
        if read.was_bad(line):
            continue
        if len(record) == count:
            yield line, record
        elif any(field.strip() for field in record):
            faults.add("line", path, line, f"it has {len(record)} fields, expected {wanted} by {_called(delimiter)}")


def table(
    path: Path, delimiter: str, columns: Sequence[str], faults: Faults, *, quoted: bool = True
) -> Iterator[tuple[int, dict[str, str]]]:
    """Read a list whose first line names its columns.

    Parameters
    ----------
    path, delimiter, faults, quoted
        As of :func:`rows`.
    columns : sequence of str
        The columns that must be there, in any order; others may be there.

    Yields
    ------
    int, dict of str to str
        The line of a record, and its fields by the names of all columns.

    Raises
    ------
    DataFault
        As :func:`rows`; and if a column is missing, or there twice.
    """
    head = path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n", 1)[0].decode(errors="replace").rstrip("\r")
    names = next(csv.reader([head], delimiter=delimiter)) if quoted else head.split(delimiter)
    if any(names.count(column) != 1 for column in columns) or set(head) & {"\0", "\N{REPLACEMENT CHARACTER}"}:
        next(rows(path, delimiter, columns, Faults(skip=True), quoted=quoted), None)  # another delimiter is said first
        raise DataFault(
            f"{path}, line 1: the columns are {', '.join(map(repr, names))}, expected {', '.join(columns)} once each "
            f"among them, separated by {_called(delimiter)}"
        )
    read = rows(path, delimiter, len(names), faults, quoted=quoted)
    next(read)
    for line, record in read:
        yield line, dict(zip(names, record, strict=True))


class _Lines:
    """The lines of a list, decoded one after another; remembers the last and which were no UTF-8."""

    def __init__(self, path: Path, lines: Sequence[bytes], faults: Faults) -> None:
        self._path, self._lines, self._faults = path, lines, faults
        self.line, self._bad = 0, 0

    def __iter__(self) -> Iterator[str]:
        for number, raw in enumerate(self._lines, start=1):
            self.line = number
            try:
                text = raw.decode()
                reason = "it holds a zero byte, expected text in UTF-8" if "\0" in text else ""
            except UnicodeDecodeError as error:
                text = raw.decode(errors="replace")
                reason = f"byte {error.start + 1} is {raw[error.start]:#04x}, which is no UTF-8; save the list as UTF-8"
            if reason:
                self._bad = number
                self._faults.add("encoding", self._path, number, reason)
            yield text.replace("\0", " ") + "\n"  # its quotes count

    def was_bad(self, begin: int) -> bool:
        """Return whether a line from `begin` to the last was no text."""
        return self._bad >= begin


def _plain(lines: _Lines, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    for text in lines:
        yield lines.line, text.rstrip("\r\n").split(delimiter)


def _records(path: Path, lines: _Lines, delimiter: str, faults: Faults) -> Iterator[tuple[int, list[str]]]:
    """Yield the records of a list with quotes, each with the line it begins on."""
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    while True:
        begin = lines.line + 1
        try:
            record = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            if "end of data" in str(error) or "field larger" in str(error):
                raise DataFault(f"{path}, line {begin}: a quote is opened and never closed") from error
            faults.add("line", path, begin, f"its quotes are not those of a CSV file ({error})")
            continue
        yield begin, record


def _called(delimiter: str) -> str:
    return DELIMITERS[delimiter]


def _found(line: bytes) -> str:
    """Return what the fields of a line may be separated by, in words."""
    found = [name for mark, name in DELIMITERS.items() if mark.encode() in line]
    return f"a {found[0]}" if found else "no separator"
