"""Kinetics-Sounds: videos of actions that are heard as well as seen, a subset of Kinetics-400 with 31 classes."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from igm_rs.experiments.columns import Column, Reading

from .audio import Sound
from .clips_with_sound import clip_columns, clip_encoders, clip_files
from .faults import Faults
from .gathering import gather
from .lists import LISTS, require_lists, table
from .media import Trouble
from .survey import Example, OnDisk, Survey

__all__ = ["FRAMES", "KINETICS_SOUNDS", "LABELS", "SOUND"]

NAME = "kinetics-sounds"

LABELS = (
    *("blowing nose", "blowing out candles", "bowling", "chopping wood", "dribbling basketball", "laughing"),
    *("mowing lawn", "playing accordion", "playing bagpipes", "playing bass guitar", "playing clarinet"),
    *("playing drums", "playing guitar", "playing harmonica", "playing keyboard", "playing organ", "playing piano"),
    *("playing saxophone", "playing trombone", "playing trumpet", "playing violin", "playing xylophone"),
    *("ripping paper", "shoveling snow", "shuffling cards", "singing", "stomping grapes", "tap dancing"),
    *("tapping guitar", "tapping pen", "tickling"),
)
"""The classes of Kinetics-Sounds (Arandjelović and Zisserman, ICCV 2017) that are left in Kinetics-400, as its lists
write them; numbered by the alphabet."""

FOLDERS = {"train": ("train",), "validation": ("train", "test"), "test": ("test",)}
"""Where the clips of each split lie: ``train_wav`` and ``train_img``, or ``test_wav`` and ``test_img``. The layout has
none for the validation split alone."""

SOUND = Sound(rate=35400, seconds=10)
"""10 s at 35,400 Hz in windows of 512 samples, 353 apart, as the released scripts have it: 257 frequencies, 1,003
windows."""

FRAMES = 3
"""Pictures of a clip that are taken, as the released scripts have it ("fps"). They leave out clips of fewer than four
pictures; here a clip of fewer than three gives some of them more than once."""

ID_LENGTH = 11
"""Letters of a video's name on YouTube."""

LAYOUT = """\
annotations/train.csv, valid.csv, test.csv   with columns label and youtube_id, and maybe others
train_wav/<clip>.wav, test_wav/<clip>.wav    those of valid.csv in either
train_img/Image-01-FPS/<clip>/*.jpg          pictures of the clip, one a second; test_img alike
<clip> is a line's youtube_id, or <youtube_id>_<time_start>_<time_end> with six digits each"""


def _entries(folder: Path, part: str, path: Path, faults: Faults) -> Iterator[Example]:
    """Yield the examples of a list whose names and labels are as they should be, with where their sound should be."""
    numbers = {label: number for number, label in enumerate(LABELS)}
    for line, record in table(path, ",", ("label", "youtube_id"), faults):
        video, label = record["youtube_id"], record["label"]
        times = [record[column] for column in ("time_start", "time_end") if column in record]
        if not re.match(r"[^./\\][^/\\]*$", video) or not all(time.isdecimal() for time in times):
            said = ", ".join(map(repr, (video, *times)))
            faults.add("line", path, line, f"clip is {said}, expected a youtube_id, and whole seconds as times if any")
        elif label not in numbers:
            reason = f"label of {video} is {label!r}, expected one of the {len(LABELS)}, such as {LABELS[0]!r}"
            faults.add("label", path, line, reason)
        else:
            timed = "_".join([video, *(time.zfill(6) for time in times)])
            sounds = [
                folder / f"{below}_wav" / f"{clip}.wav"
                for below in FOLDERS[part]
                for clip in dict.fromkeys((video, timed))
            ]
            sound = next((each for each in sounds if each.exists() or _pictures(each).exists()), sounds[0])
            yield Example(sound.stem, numbers[label], video[:ID_LENGTH], {"audio": (sound,)}, (path, line))


def _pictures(sound: Path) -> Path:
    """Return where the pictures of a clip lie, by where its sound does."""
    return sound.parent.with_name(sound.parent.name.replace("_wav", "_img")) / "Image-01-FPS" / sound.stem


def _find(_: str, example: Example) -> tuple[Example, list[Trouble]]:
    [sound] = example.files["audio"]
    return clip_files(example, sound.parent, _pictures(sound).parent)


def survey(folder: Path, reading: Reading, faults: Faults) -> Survey:
    """Look through a folder; the origin of a clip is its video."""
    lists = {part: folder / "annotations" / f"{name}.csv" for part, name in LISTS.items()}
    require_lists(lists, LAYOUT)
    listed = {part: list(_entries(folder, part, path, faults)) for part, path in lists.items()}
    return gather(NAME, listed, _find, reading, faults, who="video")


def columns(survey: Survey, part: str, folder: Path, reading: Reading) -> Mapping[str, Column]:
    """Return sound and pictures of a split."""
    return clip_columns(NAME, SOUND, FRAMES, survey, part, folder, reading)


KINETICS_SOUNDS = OnDisk(
    name=NAME,
    modalities=("audio", "video"),
    kinds={"audio": "spectrogram", "video": "frames"},
    class_names=LABELS,
    layout=LAYOUT,
    survey=survey,
    columns=columns,
    encoders=clip_encoders,
)
