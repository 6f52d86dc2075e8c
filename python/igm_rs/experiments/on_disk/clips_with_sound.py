"""What CREMA-D and Kinetics-Sounds have in common: clips of a sound file and a folder of pictures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from igm_rs.experiments.columns import Column, Reading
from igm_rs.experiments.encoders import EncoderSpec, audio_resnet18, frames_resnet18

from .audio import Sound, SpectrogramColumn
from .gathering import whole
from .media import Home, Trouble, clip_pictures
from .pictures import SMALL_SIDE, FramesColumn, Look
from .survey import Example, Survey

__all__ = ["clip_columns", "clip_encoders", "clip_files"]


def clip_files(example: Example, sounds: Path, pictures: Path) -> tuple[Example, list[Trouble]]:
    """Return a clip with its files, the sound and the pictures, and what is wrong with them."""
    shown = clip_pictures(pictures / example.name)
    found = replace(example, files={"audio": (sounds / f"{example.name}.wav",), "video": shown})
    troubles = whole(found)
    if not (pictures / example.name).is_dir():
        troubles.append(("missing", f"folder {pictures / example.name} does not exist"))
    elif not shown:
        troubles.append(("empty", f"folder {pictures / example.name} has no picture"))
    return found, troubles


def clip_columns(
    name: str, sound: Sound, frames: int, survey: Survey, part: str, folder: Path, reading: Reading
) -> Mapping[str, Column]:
    """Return sound and pictures of a split's clips."""
    home, examples = Home(name, folder), survey.examples[part]
    look = Look(SMALL_SIDE) if reading.small else Look()
    heard = sound.small() if reading.small else sound
    return {
        "audio": SpectrogramColumn(tuple(example.files["audio"][0] for example in examples), home, heard),
        "video": FramesColumn(tuple(example.files["video"] for example in examples), frames, home, look),
    }


def clip_encoders(reading: Reading, _: Survey) -> Mapping[str, EncoderSpec]:
    """Return a ResNet18 for each modality."""
    return {
        "audio": audio_resnet18(reading.small, reading.weights.get("audio")),
        "video": frames_resnet18(reading.small, reading.weights.get("video")),
    }
