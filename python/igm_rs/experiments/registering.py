"""What is the user's own: Python files that register data sets or methods, run once a process."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from pathlib import Path

from .data import run_file, sets_of
from .methods import METHODS

__all__ = ["register_files"]


def register_files(files: Iterable[Path]) -> None:
    """Run files that register data sets or methods, each once in this process.

    Raises
    ------
    FileNotFoundError
        If one is not there.
    ValueError
        If one cannot be run, or registers nothing: names the file and the reason.
    """
    for file in files:
        _registered(file.resolve())


@cache
def _registered(file: Path) -> None:
    before = set(METHODS)
    run_file(file)
    if not sets_of(file) and set(METHODS) == before:
        raise ValueError(
            f"file {file} registers nothing, expected a function under @register(…) or a class under @method"
        )
