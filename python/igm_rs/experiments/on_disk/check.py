"""A folder looked through before a training starts: what is there, what is wrong, and what would be used."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from igm_rs.experiments.columns import Column, Reading
from igm_rs.experiments.data import PARTS
from igm_rs.experiments.feeding import lost_process_told

from .faults import KINDS, DataFault, Fault, Faults
from .lists import LISTS
from .media import ADVICE, PICTURES, Home
from .pictures import picture
from .survey import Example, OnDisk, Survey

__all__ = ["Report", "check"]

Columns = dict[str, Mapping[str, Column | Tensor]]
"""By split, what stands for each modality."""

SHOWN = 20
"""Faults of a kind that are told; of the others, how many there are."""

POLICIES = {
    "apart": "apart: a speaker, subject, video or picture in two splits is a fault",
    "shared": "shared: a speaker, subject, video or picture may be in two splits, and is measured on once trained on",
}
"""What :attr:`Reading.speakers` means, in words."""


@dataclass(frozen=True)
class Report:
    """What was found.

    Attributes
    ----------
    text : str
        For people; without an end of line.
    problems : int
        How many things are wrong: faults of examples, files that cannot be decoded, and what keeps a training from
        starting at all.
    """

    text: str
    problems: int


def check(on_disk: OnDisk, folder: Path, reading: Reading, loaders: int = 0) -> Report:
    """Look through a folder, decode every file of every example once, and say what a training would use.

    Parameters
    ----------
    on_disk : OnDisk
        The set.
    folder : Path
        Where its files should lie.
    reading : Reading
        For which network. All that is wrong is told, whether examples with something wrong are to be left out or not.
    loaders : int
        Processes that decode; 0: this one does. The report is the same.

    Returns
    -------
    Report
        Also of a folder that is not there, or lacks a list.
    """
    head = f"{on_disk.name} in {folder}"
    faults = Faults(skip=True)
    try:
        if not folder.is_dir():
            raise FileNotFoundError(
                f"folder {folder} does not exist, expected one of {on_disk.name}:\n{on_disk.layout}"
            )
        survey = on_disk.survey(folder, reading, faults)
    except (OSError, DataFault) as error:
        told = _told(faults.found, KINDS)
        return Report("\n\n".join([head, *told, f"A training would not start: {error}"]), len(faults.found) + 1)
    columns, used, refusal = _planned(on_disk, survey, folder, reading)
    undecodable = _undecodable(_Decoded(columns, survey, Home(on_disk.name, folder)), loaders)
    sections = [
        head,
        "\n".join(_counts(on_disk, survey)),
        *_told(faults.found, KINDS),
        *_told(undecodable, {"truncated": "files that cannot be decoded"}),
        *survey.notes,
        *used,
        _verdict(refusal, survey, undecodable),
    ]
    return Report("\n\n".join(sections), len(faults.found) + len(undecodable) + bool(refusal))


def _planned(on_disk: OnDisk, survey: Survey, folder: Path, reading: Reading) -> tuple[Columns, list[str], str]:
    """Return what would be decoded, a paragraph about what would be used, and why no training would start, or ""."""
    columns: Columns = {}
    used: list[str] = []
    try:
        for part in PARTS:
            if survey.examples[part]:
                columns[part] = on_disk.columns(survey, part, folder, reading)
        if columns:
            used = ["\n".join(_used(on_disk, survey, next(iter(columns.values())), reading))]
        for spec in on_disk.data_set(survey, folder, reading).encoders.values():
            if spec.digest:  # whether its weights fit is seen by making it
                spec.make()
    except (OSError, ValueError) as error:
        return columns, used, str(error)
    return columns, used, ""


class _Decoded(Dataset[Sequence[Fault]]):
    """Every example of every split, decoded when it is asked for: of clips every picture; what cannot be decoded."""

    def __init__(self, columns: Columns, survey: Survey, home: Home) -> None:
        self.home = home
        self._columns = columns
        self._all = [(part, *each) for part in columns for each in enumerate(survey.examples[part])]

    def __len__(self) -> int:
        return len(self._all)

    def __getitem__(self, number: int) -> list[Fault]:
        part, place, example = self._all[number]
        return [
            Fault("truncated", *example.listed, str(error).split(ADVICE, maxsplit=1)[0])
            for error in _errors(self._columns[part], place, example, self.home)
        ]


def _undecodable(decoded: _Decoded, loaders: int) -> list[Fault]:
    """Decode all; return what cannot be, in the order of the lists."""
    name = f"decoding {decoded.home.name}"
    each = DataLoader(decoded, batch_size=None, num_workers=loaders)
    with lost_process_told():
        return [fault for found in tqdm(each, desc=name, unit="clip", disable=None, leave=False) for fault in found]


def _errors(inputs: Mapping[str, Column | Tensor], place: int, example: Example, home: Home) -> Iterator[ValueError]:
    """Yield the errors at the files of an example; a file that several modalities are made of is decoded for one."""
    seen: set[Path] = set()
    for modality, column in inputs.items():
        files = example.files.get(modality, ())
        if not isinstance(column, Column) or (files and seen >= set(files)):
            continue
        seen.update(files)
        several = [path for path in files if len(files) > 1 and path.suffix.lower() in PICTURES]
        broken = [error for error in (_picture_error(path, home) for path in several) if error is not None]
        yield from broken
        try:
            column.example(place, None)
        except ValueError as error:
            if str(error) not in map(str, broken):
                yield error


def _picture_error(path: Path, home: Home) -> ValueError | None:
    try:
        picture(path, home)
    except ValueError as error:
        return error
    return None


def _counts(on_disk: OnDisk, survey: Survey) -> Iterator[str]:
    """Yield a table: what each split's list names, what can be used, and that by class."""
    usable = {part: Counter(example.label for example in survey.examples[part]) for part in PARTS}
    lines = {part: {example.listed for example in survey.examples[part]} for part in PARTS}
    for fault in survey.faults.found:
        if fault.line is not None:
            lines[_part(fault.path)].add((fault.path, fault.line))
    listed = {part: len(lines[part]) for part in PARTS}
    names = on_disk.class_names
    width = max(map(len, (*names, "listed"))) + 2
    table: list[tuple[str, tuple[object, ...]]] = [
        ("", PARTS),
        ("listed", tuple(listed.values())),
        ("usable", tuple(sum(usable[part].values()) for part in PARTS)),
        *((f"  {name}", tuple(usable[part][label] for part in PARTS)) for label, name in enumerate(names)),
    ]
    for name, values in table:
        cells = "".join(f"{value:>12}" for value in values)
        yield f"{name:<{width}}{cells}"


def _part(path: Path) -> str:
    """Return the split whose list a file is, by its name."""
    return next(part for part, word in LISTS.items() if word in path.name)


def _used(on_disk: OnDisk, survey: Survey, inputs: Mapping[str, Column | Tensor], reading: Reading) -> Iterator[str]:
    """Yield what a training would use: for each modality its input and encoder, then the policies."""
    yield f"A training for the network {reading.network!r} would use"
    vocabulary = on_disk.vocabulary(survey, reading)
    for modality, spec in on_disk.encoders(reading, survey).items():
        shape = " × ".join(map(str, inputs[modality].shape[1:]))
        ids = f" of {vocabulary[modality]} ids" if modality in vocabulary else ""
        weights = f"weights {spec.digest}" if spec.digest else "random weights"
        yield f"  {modality}: {on_disk.kinds[modality]} {shape}{ids}; encoder with {spec.width} features, {weights}"
    yield f"  speakers {POLICIES[reading.speakers]}"


def _verdict(refusal: str, survey: Survey, undecodable: Sequence[Fault]) -> str:
    """Return whether a training would start."""
    faulty = {(fault.path, fault.line) for fault in survey.faults.found}
    if refusal:
        return f"A training would not start: {refusal}"
    if undecodable:
        return (
            f"A training would stop at the first of {len(undecodable)} files that cannot be decoded: take their lines "
            "out of the lists."
        )
    if faulty:
        return f"A training would not start, but with --skip-broken: without {len(faulty)} examples."
    return "A training would start."


def _told(faults: Sequence[Fault], kinds: Mapping[str, str]) -> list[str]:
    """Return a paragraph for each kind of fault there is."""
    told = []
    for kind, name in kinds.items():
        mine = [fault for fault in faults if fault.kind == kind]
        lines = [f"{len(mine)} {name}", *(f"  {fault}" for fault in mine[:SHOWN])]
        if len(mine) > SHOWN:
            lines.append(f"  and {len(mine) - SHOWN} more")
        if mine:
            told.append("\n".join(lines))
    return told
