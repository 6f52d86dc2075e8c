"""Small trees of CREMA-D and Kinetics-Sounds in the true format, for tests: a tone and a colour a class."""

from __future__ import annotations

import io
import math
import wave

import numpy as np
import soundfile
from PIL import Image

from igm_rs.experiments.on_disk import crema_d, kinetics_sounds

EMOTIONS = crema_d.LABELS
ACTIONS = kinetics_sounds.LABELS

SPEAKERS = {"train": ("1001", "1002", "1003"), "valid": ("1004",), "test": ("1005", "1006")}
"""Each says something in every emotion."""


def tone(frequency, seconds=0.4, rate=16000):
    """Return a sine of half the greatest loudness."""
    return (0.5 * np.sin(2 * math.pi * frequency * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


def write_wav(path, samples, rate=16000):
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, samples, rate, subtype="PCM_16")


def write_empty_wav(path, rate=16000):
    path.parent.mkdir(parents=True, exist_ok=True)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)


def write_picture(path, colour, side=32, seed=0):
    """Write a picture of one colour with a little noise; `path` says whether it is a JPEG or a PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(-8, 9, size=(side, side, 3))
    Image.fromarray(np.clip(np.asarray(colour) + noise, 0, 255).astype(np.uint8)).save(path)


def jpeg_bytes(side=32, **how):
    noise = np.random.default_rng(0).integers(0, 256, size=(side, side, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(noise).save(out, "JPEG", **how)
    return out.getvalue()


def colour_of(label, classes):
    """Return a colour that differs from class to class."""
    angle = 2 * math.pi * label / classes
    return [round(128 + 100 * math.cos(angle + shift)) for shift in (0.0, 2.1, 4.2)]


def pitch_of(label):
    """Return a frequency, in Hz, that differs from class to class and is below all rates' limits."""
    return 300 + 90 * label


def write_clip(sounds, pictures, name, label, classes, count=3, seconds=0.4, rate=16000):
    write_wav(sounds / f"{name}.wav", tone(pitch_of(label), seconds, rate), rate)
    for number in range(count):
        write_picture(pictures / name / f"{number + 1:05d}.jpg", colour_of(label, classes), seed=number)


def crema_clips(part):
    """Return name and label of the clips of a split, as its list has them."""
    return [(f"{speaker}_DFA_{emotion}_XX", emotion) for speaker in SPEAKERS[part] for emotion in EMOTIONS]


def write_crema(folder):
    """Write a whole CREMA-D: three splits, six emotions, 0.4 s of sound at 16 kHz and three pictures a clip."""
    for part in SPEAKERS:
        clips = crema_clips(part)
        for name, emotion in clips:
            label = EMOTIONS.index(emotion)
            write_clip(folder / "AudioWAV", folder / "Image-01-FPS", name, label, len(EMOTIONS))
        write_list(folder / "annotations" / f"{part}.csv", clips)
    return folder


def kinetics_clips(part):
    """Return the columns of a split's list: names of videos are 11 letters, times go with them."""
    each = {"train": 2, "valid": 1, "test": 1}[part]
    return [
        (action, f"{part:x<5}{number}-_{label:03d}", str(2 * number), str(2 * number + 10), part)
        for label, action in enumerate(ACTIONS)
        for number in range(each)
    ]


KINETICS_HEAD = ("label", "youtube_id", "time_start", "time_end", "split")


def kinetics_name(row):
    """Return what the files of a clip are called: as Kinetics has it."""
    return f"{row[1]}_{int(row[2]):06d}_{int(row[3]):06d}"


def write_kinetics(folder):
    """Write a whole Kinetics-Sounds: 31 classes, 0.2 s of sound at 22.05 kHz and four pictures a clip."""
    for part in ("train", "valid", "test"):
        clips = kinetics_clips(part)
        below = "test" if part == "test" else "train"
        for row in clips:
            label = ACTIONS.index(row[0])
            sounds, pictures = folder / f"{below}_wav", folder / f"{below}_img" / "Image-01-FPS"
            write_clip(sounds, pictures, kinetics_name(row), label, len(ACTIONS), count=4, seconds=0.2, rate=22050)
        write_list(folder / "annotations" / f"{part}.csv", [KINETICS_HEAD, *clips])
    return folder


def write_list(path, records, delimiter=","):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{delimiter.join(record)}\n" for record in records), encoding="utf-8")


def edit_line(path, line, change):
    """Replace a line, from 1, of a list by what `change` makes of its bytes."""
    lines = path.read_bytes().splitlines(keepends=True)
    lines[line - 1] = change(lines[line - 1])
    path.write_bytes(b"".join(lines))


def cut(path, share=0.6):
    """Leave the first part of a file."""
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
