"""Files looked at without decoding: whether a WAV, JPEG, PNG or AVI file is whole, by its header and its end."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

from .faults import DataFault

__all__ = ["ADVICE", "PICTURES", "Home", "Trouble", "clip_pictures", "file_trouble"]

Trouble = tuple[str, str]
"""What is wrong with a file: its kind, one of :data:`igm_rs.experiments.on_disk.faults.KINDS`, and the reason."""

PICTURES = (".jpg", ".jpeg", ".png")
"""How the names of pictures end, in small letters."""

UNKNOWN_SIZE = 0xFFFFFFFF
"""Written as a size by programs that do not know it yet: the chunk ends with the file."""

ADVICE = "; igm-rs data check"
"""What is said after the reason in an error about one file."""

TAIL = 4096
"""Bytes at the end of a JPEG file in which its end is looked for first."""

END = 4096
"""Bytes at each end of a file by which its content is told from another of the same size."""


@dataclass(frozen=True)
class Home:
    """The folder that a set lies in.

    Attributes
    ----------
    name : str
        The set, as on the command line.
    folder : Path
        Where its files lie.
    """

    name: str
    folder: Path

    def line(self, path: Path) -> str:
        """Return a file's path below the folder, its size in bytes and a hash of both its ends: for a digest."""
        found = path.stat()
        ends = _ends(path, found.st_size, found.st_mtime_ns)
        return f"{path.relative_to(self.folder).as_posix()} {found.st_size} {ends}"

    def lines(self, paths: Iterable[Path]) -> Iterator[str]:
        """Yield :meth:`line` of each file."""
        return map(self.line, paths)

    def undecodable(self, path: Path, reason: object) -> DataFault:
        """Return the error for a file that cannot be decoded."""
        said = " ".join(str(reason).split()) or type(reason).__name__
        return DataFault(
            f"{path}: it cannot be decoded ({said}){ADVICE} {self.name} {self.folder} finds all such files"
        )


@lru_cache(maxsize=1_000_000)
def _ends(path: Path, size: int, _: int) -> str:
    """Return a hash of a file's first and last bytes; read again only if the file has changed since."""
    with path.open("rb") as file:
        first = file.read(END)
        file.seek(max(len(first), size - END))
        return hashlib.blake2b(first + file.read(END), digest_size=6).hexdigest()


def clip_pictures(folder: Path) -> tuple[Path, ...]:
    """Return the pictures of a clip's folder in order: numbers in their names count as numbers.

    What is hidden, such as "._1.jpg" of macOS, is none. Empty if the folder is not there, or holds none.
    """
    if not folder.is_dir():
        return ()
    found = [path for path in folder.iterdir() if path.suffix.lower() in PICTURES and not path.name.startswith(".")]
    return tuple(sorted(found, key=_in_order))


def _in_order(path: Path) -> tuple[list[str | int], str]:
    """Return what a picture is sorted by: letters and numbers of its name in turn."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", path.name)], path.name


def file_trouble(path: Path) -> Trouble | None:
    """Return what is wrong with a file as far as can be seen without decoding it; None for nothing.

    Parameters
    ----------
    path : Path
        A WAV, JPEG, PNG or AVI file; which of them its name says. A JPEG or PNG may be the other one, as a picture's
        name is often wrong.

    Returns
    -------
    tuple of str and str, or None
        "missing"; "truncated" for a file that ends early, or is none of its kind; "empty" for one without a sample or
        a frame; and the reason, with the file's path.
    """
    if not path.is_file():
        return "missing", f"file {path} does not exist"
    look = _LOOKS[path.suffix.lower()]
    with path.open("rb") as file:
        size = path.stat().st_size
        found = ("truncated", "it has no byte") if size == 0 else look(file, size)
    return found and (found[0], f"file {path}: {found[1]}")


def _wav(file: BinaryIO, size: int) -> Trouble | None:
    """Compare the sizes that a WAV file says with its own."""
    head = file.read(12)
    if head[:4] != b"RIFF" or head[8:12] != b"WAVE":
        return "truncated", f"it begins with {_shown(head)}, expected a WAV file's RIFF header"
    for name, begin, length in _chunks(file, 12, size):
        end = size if length == UNKNOWN_SIZE else begin + length
        if end > size:
            return "truncated", f"chunk {name} has {length} bytes, the file holds {size - begin} of them"
        if name == "data":
            return None if end > begin else ("empty", "it has no sample")
    return "truncated", "it has no chunk of samples"


def _avi(file: BinaryIO, size: int) -> Trouble | None:
    """Compare the sizes that an AVI file says with its own, and look for a frame."""
    begin, frames = 0, False
    while begin < size:
        file.seek(begin)
        head = file.read(12)
        kind = (b"AVI ", b"AVIX")[begin > 0]
        if len(head) < 12 or head[:4] != b"RIFF" or head[8:12] != kind:
            if begin:  # whatever a program has put behind the video
                break
            return "truncated", f"it begins with {_shown(head)}, expected an AVI file's RIFF header"
        length = int.from_bytes(head[4:8], "little")
        end = size if length == UNKNOWN_SIZE else begin + 8 + length
        if length < 4 or end > size:
            return "truncated", f"its header says {length} bytes, the file holds {size - begin - 8} of them"
        frames = frames or _has_frame(file, begin + 12, end)
        begin = end + end % 2
    return None if frames else ("empty", "it has no frame")


def _has_frame(file: BinaryIO, begin: int, end: int) -> bool:
    """Return whether a list of AVI chunks holds one of video that is not empty."""
    for name, start, length in _chunks(file, begin, end):
        if name == "LIST":
            file.seek(start)
            if file.read(4) in (b"movi", b"rec ") and _has_frame(file, start + 4, min(start + length, end)):
                return True
        elif name[2:] in ("dc", "db") and length:
            return True
    return False


def _chunks(file: BinaryIO, begin: int, end: int) -> Iterator[tuple[str, int, int]]:
    """Yield name, first byte and length of each chunk of a RIFF file."""
    while begin + 8 <= end:
        file.seek(begin)
        head = file.read(8)
        if len(head) < 8:
            return
        length = int.from_bytes(head[4:], "little")
        yield head[:4].decode("latin-1"), begin + 8, length
        begin += 8 + length + length % 2


def _picture(file: BinaryIO, size: int) -> Trouble | None:
    """Look for the end of a JPEG or PNG file."""
    head = file.read(8)
    if head.startswith(b"\xff\xd8"):
        return _jpeg(file, size)
    if head != b"\x89PNG\r\n\x1a\n":
        return "truncated", f"it begins with {_shown(head)}, expected a JPEG or PNG file's header"
    begin = 8
    while begin + 12 <= size:
        file.seek(begin)
        length, name = int.from_bytes(file.read(4), "big"), file.read(4)
        begin += 12 + length
        if name == b"IEND" and begin <= size:
            return None
    return "truncated", "its end is missing: it has no IEND chunk"


def _jpeg(file: BinaryIO, size: int) -> Trouble | None:
    """Go along the segments to the picture itself, and look for an end after it: one before is a thumbnail's."""
    begin = 2
    while True:
        file.seek(begin)
        head = file.read(4)
        if len(head) < 4 or head[0] != 0xFF:
            return "truncated", f"its header ends at byte {begin} of {size}, before the picture"
        if head[1] == 0xFF:  # a byte that fills up
            begin += 1
            continue
        begin += 2 + int.from_bytes(head[2:], "big")
        if head[1] == 0xDA:
            break
    for start in (max(begin, size - TAIL), begin):
        file.seek(start)
        if b"\xff\xd9" in file.read():
            return None
    return "truncated", "its end is missing: it has no end-of-image marker"


_LOOKS: dict[str, Callable[[BinaryIO, int], Trouble | None]] = {
    ".wav": _wav,
    ".avi": _avi,
    **dict.fromkeys(PICTURES, _picture),
}


def _shown(head: bytes) -> str:
    return repr(head[:8])[1:]
