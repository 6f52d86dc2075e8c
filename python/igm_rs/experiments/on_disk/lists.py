"""The lists of a set, CSV or TSV, read strictly: each record with its line, and so is what is wrong with one."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from .faults import DataFault, Faults

__all__ = ["DELIMITERS", "LISTS", "entries", "header", "lines", "require_lists", "rows", "table"]

LISTS = {"train": "train", "validation": "valid", "test": "test"}
"""What the name of a split's list says of it."""

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
    path: Path, delimiter: str, fields: Sequence[str] | int, faults: Faults, *, quoted: bool = True, begin: int = 1
) -> Iterator[tuple[int, list[str]]]:
    r"""Read a list without a header, or one whose :func:`header` has been looked at.

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
    begin : int
        The line, from 1, of the first record.

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
    lines = _content(path).split(b"\n")
    if not any(line.strip() for line in lines):
        raise DataFault(f"{path}, line 1: the list is empty, expected {wanted} separated by {_called(delimiter)}")
    if count > 1 and not any(delimiter.encode() in line for line in lines):
        raise DataFault(
            f"{path}, line 1: no line of the list has a {_called(delimiter)}, found {_found(lines[0])}; expected "
            f"{wanted} separated by {_called(delimiter)}"
        )
    read = _Lines(path, lines, faults)
    for line, record in _records(path, read, delimiter, faults) if quoted else _plain(read, delimiter):
        if line < begin or read.was_bad(line):
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
    names = header(path, delimiter, quoted=quoted)
    unread = {"\0", "\N{REPLACEMENT CHARACTER}"}
    if any(names.count(column) != 1 for column in columns) or any(set(name) & unread for name in names):
        next(rows(path, delimiter, columns, Faults(skip=True), quoted=quoted), None)  # another delimiter is said first
        raise DataFault(
            f"{path}, line 1: the columns are {', '.join(map(repr, names))}, expected {', '.join(columns)} once each "
            f"among them, separated by {_called(delimiter)}"
        )
    for line, record in rows(path, delimiter, len(names), faults, quoted=quoted, begin=2):
        yield line, dict(zip(names, record, strict=True))


def header(path: Path, delimiter: str, *, quoted: bool = True) -> list[str]:
    """Return the fields of a list's first line, whatever they are; what is no UTF-8 in them is replaced.

    Raises
    ------
    DataFault
        If it is no line of a CSV file.
    """
    first = _content(path).split(b"\n", 1)[0].decode(errors="replace").rstrip("\r")
    try:
        return next(csv.reader([first], delimiter=delimiter), [""]) if quoted else first.split(delimiter)
    except csv.Error as error:
        raise DataFault(f"{path}, line 1: its quotes or ends of lines are not those of a CSV file ({error})") from error


def lines(path: Path, faults: Faults) -> Iterator[tuple[int, str]]:
    """Yield the lines of a list that hold something, with their numbers, from 1; raises as :func:`rows`."""
    read = _Lines(path, _content(path).splitlines(), faults)
    for text in read:
        if text.strip() and not read.was_bad(read.line):
            yield read.line, text


def entries(path: Path, columns: Sequence[str], faults: Faults) -> Iterator[tuple[int, dict[str, str]]]:
    """Read a list in JSON, ``[{"image": …, "text": …, "label": …}, …]``.

    Parameters
    ----------
    path, faults
        As of :func:`rows`.
    columns : sequence of str
        What each entry must have, strings or integers; others may be there.

    Yields
    ------
    int, dict of str to str
        The number of an entry, from 1, and its values as text.

    Raises
    ------
    DataFault
        Whatever is done about single entries: if the file is no JSON in UTF-8, or no list.
    """
    try:
        found = json.loads(_content(path).decode())
    except UnicodeDecodeError as error:
        raise DataFault(f"{path}: byte {error.start + 1} is no UTF-8; save the list as UTF-8") from error
    except (ValueError, RecursionError) as error:
        raise DataFault(f"{path}: it is no JSON that can be read ({error})") from error
    if not isinstance(found, list) or not found:
        held = "an empty list" if found == [] else f"a {type(found).__name__}"
        raise DataFault(f"{path}: it holds {held}, expected a list of entries with {', '.join(columns)}")
    for number, entry in enumerate(found, start=1):
        values = {name: entry.get(name) for name in columns} if isinstance(entry, dict) else {}
        if values and all(isinstance(value, str | int) and not isinstance(value, bool) for value in values.values()):
            texts = {name: str(value) for name, value in values.items()}
            if any("\ud800" <= letter <= "\udfff" for text in texts.values() for letter in text):
                faults.add("encoding", path, number, "it has half a letter of two, which is no UTF-8")
            else:
                yield number, texts
        else:
            faults.add("line", path, number, f"it has not each of {', '.join(columns)} as text or an integer")


def _content(path: Path) -> bytes:
    """Return what a file holds, without a byte order mark."""
    return path.read_bytes().removeprefix(b"\xef\xbb\xbf")


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
