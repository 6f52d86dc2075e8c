"""The store: a folder for each run, found again by a hash of everything that its numbers depend on."""

from __future__ import annotations

import ast
import csv
import dataclasses
import hashlib
import io
import json
import math
import os
import platform
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import igm_rs

from .columns import Column
from .data import DataSet, Split

__all__ = [
    "RunRecord",
    "code_digest",
    "data_digest",
    "fingerprint",
    "finite",
    "read_record",
    "revision",
    "split_digest",
    "versions",
    "write_curve",
    "write_whole",
]

RunRecord = dict[str, Any]
"""A run as ``run.json`` has it: plain values, no NaN."""

PACKAGE = Path(igm_rs.__file__).resolve().parent

NOT_TRAINING = ("analysis", "integrations")
"""Folders of the package that no run depends on."""

PRESENTATION = (
    *("__init__.py", "__main__.py", "command.py", "extra.py", "figures.py", "finetuning.py", "grids.py", "later.py"),
    *("listing.py", "page.py", "plans.py", "protocol.py", "reproduction.py", "running.py", "statistics.py", "store.py"),
    "tables.py",
)
"""Files of the experiments that no run's numbers depend on."""


@cache
def code_digest() -> str:
    """Return a hash of the code that trains: the package's, without comments and docstrings, and its native part."""
    found = hashlib.sha256()
    for path in sorted(PACKAGE.rglob("*")):
        place = path.relative_to(PACKAGE)
        if place.parts[0] in NOT_TRAINING or (place.parts[0] == "experiments" and place.name in PRESENTATION):
            continue
        if path.suffix == ".py":
            found.update(place.as_posix().encode())
            found.update(_bare(path.read_text(encoding="utf-8")).encode())
        elif path.suffix == ".so":
            found.update(path.read_bytes())
    return found.hexdigest()[:16]


def _bare(source: str) -> str:
    """Return a program without comments, docstrings and layout."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            kept = [
                each
                for each in body
                if not (
                    isinstance(each, ast.Expr)
                    and isinstance(each.value, ast.Constant)
                    and isinstance(each.value.value, str)
                )
            ]
            node.body = kept or [ast.Pass()]  # type: ignore[attr-defined]
    return ast.dump(tree)


def split_digest(split: Split) -> str:
    """Return a hash of a split's tensors, and of what its columns depend on."""
    found = hashlib.sha256()
    for name, values in (*split.inputs.items(), ("labels", split.labels), ("origins", split.origins)):
        if isinstance(values, Column):
            found.update("\n".join([name, str(values.shape), *values.digest_lines()]).encode())
            continue
        found.update(f"{name} {values.dtype} {tuple(values.shape)}".encode())
        found.update(values.contiguous().numpy().tobytes())
    return found.hexdigest()[:16]


def data_digest(data: DataSet) -> str:
    """Return a hash of what a training sees of a data set; the test split stays shut."""
    parts = [data.name, str(data.classes), str(dict(data.kinds)), str(dict(data.vocabulary))]
    parts += [f"{name}: {spec.width} {spec.narrowed} {spec.digest}" for name, spec in data.encoders.items()]
    parts += [split_digest(data.train), split_digest(data.validation)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def fingerprint(values: Mapping[str, Any]) -> str:
    """Return a hash of plain values, for the name of a folder."""
    text = json.dumps(values, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


@cache
def versions() -> dict[str, str]:
    """Return the versions of what makes the numbers: packages, the processor and its instruction set."""
    others = {name: version(name) for name in ("torch", "numpy", "torchmetrics")}
    return {
        "igm-rs": igm_rs.__version__,
        "Python": platform.python_version(),
        **others,
        "processor": _processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
    }


def _processor() -> str:
    """Return the name of the processor."""
    told = Path("/proc/cpuinfo")
    if told.is_file():
        for line in told.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


@cache
def revision() -> str | None:
    """Return the git revision of the package's sources, with ``-dirty`` where they were changed; None if not in git."""

    def git(*words: str) -> str:
        told = subprocess.run(["git", "-C", str(PACKAGE), *words], capture_output=True, text=True, check=True)
        return told.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", str(PACKAGE / "__init__.py"))  # not a repository that merely holds us
        return git("describe", "--always", "--abbrev=40", "--exclude=*", "--dirty")
    except (OSError, subprocess.CalledProcessError):
        return None


def finite(value: Any) -> Any:
    """Return plain values with None for numbers that are not finite, as JSON has none."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(name): finite(item) for name, item in value.items()}
    return [finite(item) for item in value] if isinstance(value, list | tuple) else value


def write_whole(path: Path, content: bytes) -> None:
    """Write a file so that it is there wholly or not at all, whatever happens meanwhile."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        part.write_bytes(content)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def read_record(folder: Path, test: DataSet | None) -> RunRecord | None:
    """Return the record of a finished run, None if there is none.

    Parameters
    ----------
    folder : Path
        Of the run.
    test : DataSet, optional
        Of a final run the data set: a record that was measured on another test split does not count. It is opened here
        on a copy, and only if the run is finished and has opened it already.

    Raises
    ------
    ValueError
        If the file is damaged: names it.
    """
    path = folder / "run.json"
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        told = record["digests"]["test"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"run file {path} is not as expected ({error}); delete it to run again") from error
    if test is not None and told != split_digest(dataclasses.replace(test).open_test()):
        return None
    found: RunRecord = record
    return found


def write_curve(path: Path, curve: Sequence[Mapping[str, Any]]) -> None:
    """Write the training curve as CSV, one line a round."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    names = list(curve[0]["accuracy"]) if curve else []
    writer.writerow(["round", "steps", "loss", *(f"validation accuracy of {name}" for name in names)])
    for line in _lines(curve, names):
        writer.writerow(line)
    write_whole(path, file.getvalue().encode())


def _lines(curve: Sequence[Mapping[str, Any]], names: Sequence[str]) -> Iterator[list[Any]]:
    for point in curve:
        yield [point["round"], point["steps"], point["loss"], *(point["accuracy"][name] for name in names)]
