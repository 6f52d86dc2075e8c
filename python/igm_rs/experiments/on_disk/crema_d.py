"""CREMA-D: speech and face of actors who say a sentence in one of six emotions."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from igm_rs.experiments.columns import Column, Reading

from .audio import Sound
from .clips_with_sound import clip_columns, clip_encoders, clip_files
from .faults import Faults
from .gathering import gather
from .lists import LISTS, require_lists, rows
from .media import Trouble
from .survey import Example, OnDisk, Survey

__all__ = ["CREMA_D", "FRAMES", "LABELS", "SOUND"]

NAME = "crema-d"

LABELS = ("NEU", "HAP", "SAD", "FEA", "DIS", "ANG")
"""As the lists have them: neutral, happy, sad, fear, disgust, anger; numbered as in OGM-GE (CVPR 2022)."""

SOUND = Sound(rate=22050, seconds=3)
"""3 s at 22,050 Hz in windows of 512 samples, 353 apart, as OGM-GE has it: 257 frequencies, 188 windows."""

FRAMES = 1
"""Pictures of a clip that are taken, as OGM-GE and the released scripts have it ("fps")."""

LAYOUT = """\
annotations/train.csv, valid.csv, test.csv   lines such as 1001_DFA_ANG_XX,ANG without a header
AudioWAV/<clip>.wav
Image-01-FPS/<clip>/*.jpg                    pictures of the clip, one a second"""

PAPER = "the paper's own split is such"


def _entries(path: Path, faults: Faults) -> Iterator[Example]:
    """Yield the examples of a list whose names and labels are as they should be."""
    for line, (clip, label) in rows(path, ",", ("clip", "label"), faults):
        speaker = re.match(r"(\d{4})_\w+$", clip, re.ASCII)
        if speaker is None:
            faults.add("line", path, line, f"clip is {clip!r}, expected a name such as 1001_DFA_ANG_XX")
        elif label not in LABELS:
            faults.add("label", path, line, f"label of {clip} is {label!r}, expected one of {', '.join(LABELS)}")
        else:
            yield Example(clip, LABELS.index(label), speaker[1], {}, (path, line))


def survey(folder: Path, reading: Reading, faults: Faults) -> Survey:
    """Look through a folder; the origin of a clip is its speaker."""
    lists = {part: folder / "annotations" / f"{name}.csv" for part, name in LISTS.items()}
    require_lists(lists, LAYOUT)

    def find(_: str, example: Example) -> tuple[Example, list[Trouble]]:
        return clip_files(example, folder / "AudioWAV", folder / "Image-01-FPS")

    listed = {part: list(_entries(path, faults)) for part, path in lists.items()}
    return gather(NAME, listed, find, reading, faults, who="speaker", paper=PAPER)


def columns(survey: Survey, part: str, folder: Path, reading: Reading) -> Mapping[str, Column]:
    """Return sound and pictures of a split."""
    return clip_columns(NAME, SOUND, FRAMES, survey, part, folder, reading)


CREMA_D = OnDisk(
    name=NAME,
    modalities=("audio", "video"),
    kinds={"audio": "spectrogram", "video": "frames"},
    class_names=LABELS,
    layout=LAYOUT,
    survey=survey,
    columns=columns,
    encoders=clip_encoders,
)
