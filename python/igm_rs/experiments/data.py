"""The data: recorded sets read from their archives, split, standardised, and the test split kept shut until the end."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

__all__ = ["DATASETS", "DataSet", "Split", "load", "standardise", "windows"]

Array = npt.NDArray[np.generic]
Floats = npt.NDArray[np.float32]

WINDOW, STRIDE = 200, 100
"""Readings in a window of ``watch`` (4 s at 50 Hz), and from one window's start to the next."""

VALIDATION_PEOPLE, TEST_PEOPLE = (7,), (8, 9, 10)
"""People of ``watch`` that the training never sees."""

CLASS_SHARES = (120, 40, 40)
"""Of the 200 examples of each digit of ``mfeat``: for training, validation, test."""

MFEAT_SEED = 0
"""Of the permutation that splits ``mfeat``; the split is the same for every seed of the training."""


@dataclass(frozen=True)
class Split:
    """Examples of every modality with their labels.

    Attributes
    ----------
    inputs : mapping of str to Tensor
        float32, one tensor a modality, examples along dimension 0.
    labels : Tensor
        int64, ``(n,)``, classes from 0.
    origins : Tensor
        int64, ``(n,)``: where each example comes from; the person for ``watch``, the row of the archive for ``mfeat``.
        No origin is in two splits.
    """

    inputs: Mapping[str, Tensor]
    labels: Tensor
    origins: Tensor

    def __len__(self) -> int:
        """Return the number of examples."""
        return len(self.labels)


@dataclass
class DataSet:
    """A set with three splits, of which the test split is shut.

    Attributes
    ----------
    name, title : str
        As given on the command line; as shown in tables and pictures.
    classes : int
        Number of classes.
    train, validation : Split
        Open at all times.
    test_openings : int
        How many times :meth:`open_test` was called.
    """

    name: str
    title: str
    classes: int
    train: Split
    validation: Split
    _test: Split | None = field(repr=False)
    test_openings: int = 0

    @property
    def sizes(self) -> dict[str, int]:
        """Number of examples in each split; asking does not open the test split."""
        parts = {"train": self.train, "validation": self.validation, "test": self._test}
        return {name: len(part) for name, part in parts.items() if part is not None}

    @property
    def modalities(self) -> tuple[str, ...]:
        """Names of the modalities, in the order of training."""
        return tuple(self.train.inputs)

    def open_test(self) -> Split:
        """Return the test split, and count that it was looked at.

        Raises
        ------
        RuntimeError
            On what :meth:`without_test` returned.
        """
        if self._test is None:
            raise RuntimeError(f"the test split of {self.name} is shut while settings are chosen")
        self.test_openings += 1
        return self._test

    def without_test(self) -> DataSet:
        """Return the same set with no test split in it, for choosing settings."""
        return DataSet(self.name, self.title, self.classes, self.train, self.validation, None)


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


def standardise(values: Floats, training: npt.NDArray[np.bool_]) -> Floats:
    """Shift and scale each feature by its mean and standard deviation over the training examples only.

    Parameters
    ----------
    values : ndarray
        ``(n, features)``, or ``(n, channels, readings)`` with one mean and one deviation a channel.
    training : ndarray of bool
        ``(n,)``, which examples may be looked at.

    Returns
    -------
    ndarray
        float32, the shape of `values`. A feature that is constant in training is only shifted.
    """
    axes = (0, 2) if values.ndim == 3 else (0,)
    seen = values[training].astype(np.float64)
    mean = seen.mean(axes, keepdims=True)
    deviation = seen.std(axes, keepdims=True)
    scaled: Floats = ((values - mean) / np.where(deviation > 0, deviation, 1.0)).astype(np.float32)
    return scaled


def load(name: str, folder: Path) -> DataSet:
    """Read a data set and split it.

    Parameters
    ----------
    name : str
        A key of :data:`DATASETS`.
    folder : Path
        Where its archive ``<name>.npz`` lies.

    Raises
    ------
    FileNotFoundError
        If the archive is not there.
    ValueError
        If `name` is unknown, or the archive is damaged or is another one: names the file, the reason and what to do.
    """
    if name not in DATASETS:
        raise ValueError(f"data set is {name!r}, expected one of {', '.join(DATASETS)}")
    return DATASETS[name](folder)


def _load_watch(folder: Path) -> DataSet:
    """Accelerometer and gyroscope of a wrist watch; the people of each split are others."""
    path = folder / "watch.npz"
    arrays = _read(path, {"X": 2, "n": 1, "y": 1, "subject": 1})
    lengths = arrays["n"].astype(np.int64)
    _expect(arrays["X"].shape[1] == 6, path, f"X has {arrays['X'].shape[1]} columns, expected 6")
    readings = len(arrays["X"])
    _expect(int(lengths.sum()) == readings, path, f"n adds up to {lengths.sum()}, X has {readings} rows")
    counts = [len(arrays[name]) for name in ("n", "y", "subject")]
    _expect(len(set(counts)) == 1, path, f"n, y and subject have {counts} entries, expected one for each series")
    _expect(bool((lengths >= WINDOW).any()), path, f"no series has {WINDOW} readings")
    cut, series = windows(arrays["X"].astype(np.float32), lengths)
    person = arrays["subject"].astype(np.int64)[series]
    validation, test = np.isin(person, VALIDATION_PEOPLE), np.isin(person, TEST_PEOPLE)
    training = ~(validation | test)
    views = {"accelerometer": cut[:, :3], "gyroscope": cut[:, 3:]}
    labels = arrays["y"].astype(np.int64)[series]
    masks = (training, validation, test)
    return _assemble("watch", "watch: exercises of unseen people", path, views, labels, person, masks)


def _load_mfeat(folder: Path) -> DataSet:
    """Handwritten digits in three descriptions; the same share of every digit in each split."""
    path = folder / "mfeat.npz"
    views = ("fou", "zer", "mor")
    arrays = _read(path, {"y": 1, **dict.fromkeys(views, 2)})
    labels = arrays["y"].astype(np.int64)
    for view in views:
        _expect(len(arrays[view]) == len(labels), path, f"{view} has {len(arrays[view])} rows, y has {len(labels)}")
    counts = np.bincount(labels)
    enough = bool((counts == sum(CLASS_SHARES)).all())
    _expect(enough, path, f"classes have {counts.tolist()} examples, expected {sum(CLASS_SHARES)} each")
    part = np.empty(len(labels), dtype=np.int64)
    draw = np.random.default_rng(MFEAT_SEED)
    for digit in range(len(counts)):
        part[draw.permutation(np.flatnonzero(labels == digit))] = np.repeat(np.arange(3), CLASS_SHARES)
    given = {view: arrays[view].astype(np.float32) for view in views}
    masks = (part == 0, part == 1, part == 2)
    return _assemble("mfeat", "mfeat: handwritten digits", path, given, labels, np.arange(len(labels)), masks)


DATASETS: dict[str, Callable[[Path], DataSet]] = {"watch": _load_watch, "mfeat": _load_mfeat}
"""Every data set by name, with the function that reads it from a folder."""


def _assemble(
    name: str,
    title: str,
    path: Path,
    views: Mapping[str, Floats],
    labels: npt.NDArray[np.int64],
    origins: npt.NDArray[np.int64],
    masks: tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_], npt.NDArray[np.bool_]],
) -> DataSet:
    """Standardise with the training split and build the three splits."""
    for view, values in views.items():
        _expect(bool(np.isfinite(values).all()), path, f"{view} holds values that are not finite")
    for part, mask in zip(("training", "validation", "test"), masks, strict=True):
        _expect(bool(mask.any()), path, f"no example belongs to the {part} split")
    scaled = {view: standardise(values, masks[0]) for view, values in views.items()}
    train, validation, test = (
        Split(
            {view: torch.from_numpy(values[mask]) for view, values in scaled.items()},
            torch.from_numpy(labels[mask]),
            torch.from_numpy(origins[mask]),
        )
        for mask in masks
    )
    return DataSet(name, title, int(labels.max()) + 1, train, validation, test)


def _read(path: Path, dimensions: Mapping[str, int]) -> dict[str, Array]:
    """Read the named arrays of an archive and check their number of dimensions."""
    if not path.is_file():
        raise FileNotFoundError(
            f"data file {path} does not exist: give the folder that holds {path.name} with --data "
            "(the repository ships it in data/)"
        )
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            missing = [name for name in dimensions if name not in archive]
            arrays = {name: archive[name] for name in dimensions if name in archive}
    except (OSError, ValueError, EOFError, TypeError, AttributeError, zipfile.BadZipFile) as error:
        raise _foreign(path, f"it is no NumPy archive that can be read ({error})") from error
    _expect(not missing, path, f"it has no array {', '.join(missing)}")
    for name, wanted in dimensions.items():
        _expect(arrays[name].ndim == wanted, path, f"{name} has {arrays[name].ndim} dimensions, expected {wanted}")
        _expect(arrays[name].dtype.kind in "iuf", path, f"{name} has dtype {arrays[name].dtype}, expected numbers")
    return arrays


def _expect(holds: bool, path: Path, reason: str) -> None:
    """Refuse the archive, with the reason, unless the condition holds."""
    if not holds:
        raise _foreign(path, reason)


def _foreign(path: Path, reason: str) -> ValueError:
    """Return the error for an archive that is not the one that ships with the repository."""
    return ValueError(f"data file {path} is not the expected one: {reason}; take the copy in the repository's data/")
