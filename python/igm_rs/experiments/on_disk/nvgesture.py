"""NVGesture (Molchanov et al. 2016): 25 gestures of a driver's hand, in colour, as optical flow, and by depth."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path

from igm_rs.experiments.columns import Column, Reading
from igm_rs.experiments.encoders import EncoderSpec, i3d

from .clips import CHANNELS, FULL, SMALL, Clip, ClipColumn, Shown, frames_said
from .faults import DataFault, Faults, place
from .gathering import gather
from .lists import LISTS, lines, require_lists
from .media import Home, Trouble, file_trouble
from .survey import Example, OnDisk, Survey

__all__ = ["GESTURES", "NVGESTURE", "SENSORS", "SHOWN", "Gesture", "survey"]

GESTURES = tuple(f"class_{number:02d}" for number in range(1, 26))
"""Classes, as their folders are called."""

SHOWN: Mapping[str, Shown] = {"rgb": "colour", "flow": "flow", "depth": "depth"}
"""The modalities, in the order of training, and what each shows."""

SENSORS = {"rgb": "color", "flow": "color", "depth": "depth"}
"""The sensor that each is made of, as the lists call it."""

LAYOUT = """\
nvgesture_{train,valid,test}_correct_v2.lst   path:./Video_data/class_XX/subjectN_rM depth:FILE:FIRST:END
                                              color:FILE:FIRST:END … label:1 to 25, a line each
Video_data/class_XX/subjectN_rM/FILE.avi      one of colours, one of depth"""

FORM = {
    "path": (r"(?:\./)?Video_data/([^/:]+/subject(\d+)_[^/:]+)/?", "path:./Video_data/class_XX/subjectN_rM"),
    "depth": (r"([^/:]+):(\d{1,9}):(\d{1,9})", "depth:FILE:FIRST:END"),
    "color": (r"([^/:]+):(\d{1,9}):(\d{1,9})", "color:FILE:FIRST:END"),
    "label": (r"(\S+)", "label:N"),
}
"""What a line holds by its key, other sensors besides: how the rest is read, and how the whole is written."""

WANTED = f"{', '.join(written for _, written in FORM.values())} with spaces between"


@dataclass(frozen=True)
class Gesture(Example):
    """An example with the frames of its files that are used.

    Attributes
    ----------
    windows : mapping of str to tuple of int
        By modality, the first frame, from 0, and the first one behind.
    """

    windows: Mapping[str, tuple[int, int]] = field(default_factory=dict)


def survey(folder: Path, reading: Reading, faults: Faults) -> Survey:
    """Look through the lists and videos. A subject is in one split only, as in the authors' own.

    Raises
    ------
    FileNotFoundError
        If a list is not there. The published set has none for validation.
    DataFault
        At the first thing that is wrong, unless such are left out; in any case if a list is of another form.
    """
    paths = {part: folder / f"nvgesture_{name}_correct_v2.lst" for part, name in LISTS.items()}
    require_lists(paths, LAYOUT)
    listed = {part: list(_examples(path, folder / "Video_data", faults)) for part, path in paths.items()}
    found = gather("nvgesture", listed, _found, reading, faults, who="subject")
    return replace(found, notes=_notes(found))


def columns(survey: Survey, part: str, folder: Path, reading: Reading) -> Mapping[str, Column]:
    """Return the clips of a split by modality; the flow is computed whenever a clip is decoded."""
    for package in ("av", "cv2"):
        import_module(package)  # told here if it is missing, not when a process of its own decodes
    home, form = Home("nvgesture", folder), SMALL if reading.small else FULL
    gestures = [example for example in survey.examples[part] if isinstance(example, Gesture)]
    return {
        modality: ClipColumn(
            home, [Clip(each.files[modality][0], *each.windows[modality]) for each in gestures], shown, form
        )
        for modality, shown in SHOWN.items()
    }


def encoders(reading: Reading, survey: Survey) -> Mapping[str, EncoderSpec]:
    """Return an I3D for each modality; what the survey has found does not matter."""
    return {
        modality: i3d(reading.small, reading.weights.get(modality), CHANNELS[shown])
        for modality, shown in SHOWN.items()
    }


def _examples(path: Path, videos: Path, faults: Faults) -> Iterator[Gesture]:
    """Yield the examples of a list."""
    held = list(lines(path, faults))
    if not any(len(text.split()) > 1 for _, text in held):
        found = repr(held[0][1].strip()[:40]) if held else "nothing"
        raise DataFault(f"{path}, line 1: no line of the list has a space, found {found}; expected {WANTED}")
    for line, text in held:
        given = dict(part.partition(":")[::2] for part in text.split())
        read = {key: re.fullmatch(pattern, given.get(key, "")) for key, (pattern, _) in FORM.items()}
        wrong = [FORM[key][1] for key, match in read.items() if match is None]
        groups = {key: match.groups() for key, match in read.items() if match is not None}
        if wrong:
            faults.add("line", path, line, f"it has no {' and no '.join(wrong)}, expected {WANTED}")
            continue
        windows = {name: (int(groups[sensor][1]), int(groups[sensor][2])) for name, sensor in SENSORS.items()}
        turned = [SENSORS[name] for name, (first, end) in windows.items() if first >= end]
        if turned:
            faults.add("line", path, line, f"the window of {turned[0]} ends before it begins, expected FIRST < END")
            continue
        number = groups["label"][0]
        if number not in map(str, range(1, len(GESTURES) + 1)):
            faults.add("label", path, line, f"label is {number!r}, expected 1 to {len(GESTURES)}")
            continue
        name, subject = groups["path"]
        files = {each: (videos / name / f"{groups[sensor][0]}.avi",) for each, sensor in SENSORS.items()}
        yield Gesture(name, int(number) - 1, f"subject{subject}", files, (path, line), windows=windows)


def _found(_: str, example: Example) -> tuple[Example, list[Trouble]]:
    """Return an example and what is wrong with its two files."""
    assert isinstance(example, Gesture)
    troubles = []
    for modality in ("rgb", "depth"):
        (path,) = example.files[modality]
        first, _end = example.windows[modality]
        trouble = file_trouble(path)
        if trouble is None and first >= (count := frames_said(path)) > 0:
            trouble = "empty", f"file {path}: it has {count} frames, the window begins behind them, at {first}"
        if trouble is not None:
            troubles.append(trouble)
    return example, troubles


def _notes(survey: Survey) -> tuple[str, ...]:
    """Return how many windows are longer than their files, which stops nothing: there the last frame stands still."""
    short = []
    for example in (each for part in survey.examples.values() for each in part):
        assert isinstance(example, Gesture)
        for modality in ("rgb", "depth"):
            count = frames_said(example.files[modality][0])
            if 0 < count < example.windows[modality][1]:
                short.append(f"{place(*example.listed)}: {example.files[modality][0]} has {count} frames")
    return (f"{len(short)} windows end behind their files, the first in {short[0]}",) if short else ()


NVGESTURE = OnDisk(
    name="nvgesture",
    modalities=tuple(SHOWN),
    kinds=dict.fromkeys(SHOWN, "clip"),
    class_names=GESTURES,
    layout=LAYOUT,
    survey=survey,
    columns=columns,
    encoders=encoders,
)
"""The set."""
