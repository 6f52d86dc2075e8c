"""The data: examples split, standardised, checked; the test split shut until the end; and a registry of data sets."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import re
import sys
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .columns import Column, Reading

if TYPE_CHECKING:
    from .encoders import EncoderSpec
    from .on_disk.survey import OnDisk

__all__ = [
    "KINDS",
    "DataSet",
    "Split",
    "check_reading",
    "describe",
    "expect",
    "known_set",
    "load",
    "names",
    "on_disk_of",
    "padded",
    "parts",
    "read",
    "register",
    "register_on_disk",
    "run_file",
    "sets_of",
    "standardise",
    "vocabulary_of",
    "word_ids",
    "words",
]

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]

KINDS = {2: "vector", 3: "series", 4: "picture"}
"""What an array of numbers is by its number of dimensions; an array of strings is "title"."""

PARTS = ("train", "validation", "test")
"""Names of the splits, in messages as in :attr:`DataSet.sizes`."""

PADDING, UNKNOWN = 0, 1
"""Ids that no word has: what fills a title up; a word of which the vocabulary has no part."""

PART_SIZES = (3, 4)
"""Letters in the parts of a word that have ids of their own."""

MENTIONS = 2
"""Titles of the training split that a word or part must stand in to have an id; so there are words without one in
training too, and the vector of unknown words is trained."""


@dataclass(frozen=True)
class Split:
    """Examples of every modality with their labels.

    Attributes
    ----------
    inputs : mapping of str to Tensor or Column
        One a modality, examples along dimension 0; for shapes and types see :attr:`DataSet.kinds`. A column lies in
        files and gives tensors when it is indexed.
    labels : Tensor
        int64, ``(n,)``, classes from 0.
    origins : Tensor
        int64, ``(n,)``: where each example comes from; the person for ``watch``, the row of the archive for ``mfeat``,
        the title for ``openclipart``. No origin is in two splits.
    """

    inputs: Mapping[str, Tensor | Column]
    labels: Tensor
    origins: Tensor

    def __len__(self) -> int:
        """Return the number of examples."""
        return len(self.labels)


@dataclass
class DataSet:
    """A set with three splits, of which the test split is shut. :meth:`of` makes one from arrays.

    Attributes
    ----------
    classes : int
        Number of classes.
    train, validation : Split
        Open at all times.
    kinds : mapping of str to str
        What each modality is: "vector" ``(n, d)``, "series" ``(n, channels, readings)``, "picture" ``(n, channels,
        height, width)``, all float32, or "title" ``(n, length)``, int64 ids of words and parts of words, 0 where a
        title is shorter. Sets that lie in files have others, see :class:`igm_rs.experiments.on_disk.survey.OnDisk`.
    class_names : tuple of str
        One a class.
    vocabulary : mapping of str to int
        For each modality of titles the number of ids, that of padding and that of unknown words among them.
    encoders : mapping of str to EncoderSpec
        Of the modalities whose encoder is the set's own; the others have one by their kind.
    left_out : str
        What was wrong with examples that were left out, counted, in words; "" for nothing.
    name, title, licence, source : str
        As given on the command line; as shown in tables and pictures; on what terms; from where. :func:`load` sets
        them to what the set was registered with.
    test_openings : int
        How many times :meth:`open_test` was called.
    """

    classes: int
    train: Split
    validation: Split
    _test: Split | None = field(repr=False)
    kinds: Mapping[str, str]
    class_names: tuple[str, ...]
    vocabulary: Mapping[str, int]
    encoders: Mapping[str, EncoderSpec] = field(default_factory=dict)
    left_out: str = ""
    name: str = ""
    title: str = ""
    licence: str = ""
    source: str = ""
    test_openings: int = 0

    @classmethod
    def of(
        cls,
        inputs: Mapping[str, npt.ArrayLike],
        labels: npt.ArrayLike,
        *,
        validation: npt.ArrayLike,
        test: npt.ArrayLike,
        origins: npt.ArrayLike | None = None,
        class_names: Sequence[str] | None = None,
        file: Path | None = None,
    ) -> DataSet:
        """Check the arrays, split them, standardise numbers and turn titles into ids, both by the training split alone.

        Parameters
        ----------
        inputs : mapping of str to array
            One array a modality, in the order of training, examples along dimension 0: numbers ``(n, d)``, ``(n,
            channels, readings)`` or ``(n, channels, height, width)``, finite; or strings ``(n,)``.
        labels : array
            Integers ``(n,)``, classes from 0; the training split has all of them.
        validation, test : array
            Booleans ``(n,)``: which examples belong to these splits; the rest is for training.
        origins : array, optional
            Integers ``(n,)`` that no two splits may share, such as the person that an example comes from. The place
            of the example by default.
        class_names : sequence of str, optional
            One a class; the numbers by default.
        file : Path, optional
            Where the arrays come from, for messages.

        Raises
        ------
        ValueError
            If the arrays do not fit together: names the file, if given, and the reason.
        """

        def require(holds: Any, reason: str) -> None:
            expect(bool(holds), file, reason)

        given = {name: np.asarray(values) for name, values in inputs.items()}
        require(given, "there is no modality")
        for name in given:  # names of modules in a ModuleDict, and of files
            fit = re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]*", name) and not hasattr(torch.nn.ModuleDict(), name)
            require(fit, f"a modality is called {name!r}, expected letters, digits, '-' and '_', and no method's name")
        targets = np.asarray(labels)
        require(targets.ndim == 1, f"labels have {targets.ndim} dimensions, expected 1")
        require(targets.dtype.kind in "iu", f"labels have dtype {targets.dtype}, expected integers")
        count = len(targets)
        later = {"validation": np.asarray(validation), "test": np.asarray(test)}
        places = np.arange(count) if origins is None else np.asarray(origins)
        for name, values in (*given.items(), *later.items(), ("origins", places)):
            rows = values.shape[0] if values.ndim else 0
            require(rows == count, f"{name} has {rows} rows, there are {count} labels")
        for name, mask in later.items():
            require(mask.dtype == bool, f"{name} has dtype {mask.dtype}, expected bool")
            require(mask.ndim == 1, f"{name} has {mask.ndim} dimensions, expected 1")
        require(places.ndim == 1, f"origins has {places.ndim} dimensions, expected 1")
        require(places.dtype.kind in "iu", f"origins has dtype {places.dtype}, expected integers")
        twice = int((later["validation"] & later["test"]).sum())
        require(not twice, f"{twice} examples belong to validation and to test")
        masks = {"train": ~(later["validation"] | later["test"]), **later}
        for part, mask in masks.items():
            require(mask.any(), f"no example belongs to the {part} split")
        _check_origins(places, masks, require)
        classes = int(targets.max()) + 1 if class_names is None else len(class_names)
        low, high = int(targets.min()), int(targets.max())
        require(low >= 0 and high < classes, f"labels go from {low} to {high}, expected 0 to {classes - 1}")
        require(classes > 1, "there is 1 class, expected 2 or more")
        absent = sorted(set(range(classes)) - set(targets[masks["train"]].tolist()))
        require(not absent, f"no training example has label {', '.join(map(str, absent))}")
        kinds, vocabulary, ready = {}, {}, {}
        for name, values in given.items():
            kinds[name] = _kind(name, values, require)
            if kinds[name] == "title":
                titles = [str(title) for title in values]
                ids = vocabulary_of(title for title, mine in zip(titles, masks["train"], strict=True) if mine)
                require(ids, f"{name} holds no word that stands in {MENTIONS} titles of the training split")
                rows = word_ids(titles, ids)
                longest = max(len(row) for row, mine in zip(rows, masks["train"], strict=True) if mine)
                ready[name] = padded(rows, longest)
                vocabulary[name] = UNKNOWN + 1 + len(ids)
            else:
                ready[name] = torch.from_numpy(standardise(values, masks["train"]))
        splits = {}
        for part, mask in masks.items():
            chosen = torch.from_numpy(mask)
            splits[part] = Split(
                {name: values[chosen] for name, values in ready.items()},
                torch.from_numpy(targets.astype(np.int64))[chosen],
                torch.from_numpy(places.astype(np.int64))[chosen],
            )
        named = tuple(map(str, range(classes) if class_names is None else class_names))
        return cls(classes, splits["train"], splits["validation"], splits["test"], kinds, named, vocabulary)

    @classmethod
    def stored(
        cls,
        splits: Mapping[str, Split],
        *,
        kinds: Mapping[str, str],
        class_names: Sequence[str],
        encoders: Mapping[str, EncoderSpec],
        vocabulary: Mapping[str, int] | None = None,
        left_out: str = "",
        folder: Path | None = None,
    ) -> DataSet:
        """Return a set of splits that are ready: nothing is standardised, and files are read when they are asked for.

        Parameters
        ----------
        splits : mapping of str to Split
            "train", "validation" and "test".
        kinds, class_names, encoders, vocabulary, left_out
            See the attributes.
        folder : Path, optional
            Where it comes from, for messages.

        Raises
        ------
        ValueError
            If a split is empty or has an origin of another one, or there is no training example of a class.
        """

        def require(holds: Any, reason: str) -> None:
            expect(bool(holds), folder, reason)

        parts = [splits[part] for part in PARTS]
        for part, split in zip(PARTS, parts, strict=True):
            require(len(split), f"no example belongs to the {part} split")
            for name, values in split.inputs.items():
                require(len(values) == len(split), f"{name} of {part} has {len(values)} rows, not {len(split)}")
        places = np.concatenate([split.origins.numpy() for split in parts])
        ends = np.repeat(np.arange(len(PARTS)), [len(split) for split in parts])
        _check_origins(places, {part: ends == at for at, part in enumerate(PARTS)}, require)
        labels = torch.cat([split.labels for split in parts])
        low, high, classes = int(labels.min()), int(labels.max()), len(class_names)
        require(low >= 0 and high < classes, f"labels go from {low} to {high}, expected 0 to {classes - 1}")
        absent = sorted(set(range(classes)) - set(parts[0].labels.tolist()))
        names = ", ".join(class_names[label] for label in absent)
        require(not absent, f"no training example belongs to {names}")
        named = tuple(class_names)
        train, validation, test = parts
        words = dict(vocabulary or {})
        return cls(classes, train, validation, test, kinds, named, words, dict(encoders), left_out)

    @property
    def in_files(self) -> bool:
        """Whether a modality is read from files while training goes on."""
        return any(isinstance(values, Column) for values in self.train.inputs.values())

    @property
    def sizes(self) -> dict[str, int]:
        """Number of examples in each split; asking does not open the test split."""
        parts = zip(PARTS, (self.train, self.validation, self._test), strict=True)
        return {name: len(part) for name, part in parts if part is not None}

    @property
    def modalities(self) -> tuple[str, ...]:
        """Names of the modalities, in the order of training."""
        return tuple(self.train.inputs)

    @property
    def has_test(self) -> bool:
        """Whether there is a test split to open; asking does not open it."""
        return self._test is not None

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
        return replace(self, _test=None, test_openings=0)


def _check_origins(places: Array, masks: Mapping[str, Mask], require: Callable[[Any, str], None]) -> None:
    """Refuse splits that have an origin in common."""
    held = {part: set(places[mask].tolist()) for part, mask in masks.items()}
    for one, other in (("train", "validation"), ("train", "test"), ("validation", "test")):
        common = sorted(held[one] & held[other])
        require(not common, f"{one} and {other} have {len(common)} origins in common, the first is {common[:1]}")


def _kind(name: str, values: Array, require: Callable[[Any, str], None]) -> str:
    """Return what a modality is, by its array."""
    if values.dtype.kind == "U":
        require(values.ndim == 1, f"{name} holds strings in {values.ndim} dimensions, expected 1")
        return "title"
    require(values.dtype.kind in "iuf", f"{name} has dtype {values.dtype}, expected numbers or strings")
    require(values.ndim in KINDS, f"{name} has {values.ndim} dimensions, expected 2, 3 or 4, or strings")
    require(values.size, f"{name} has shape {values.shape}, expected no empty dimension")
    require(np.isfinite(values).all(), f"{name} holds values that are not finite")
    require(np.abs(values).max() <= np.finfo(np.float32).max, f"{name} holds values that float32 cannot")
    return KINDS[values.ndim]


def standardise(values: Array, training: Mask) -> Floats:
    """Shift and scale each feature by its mean and standard deviation over the training examples only.

    Parameters
    ----------
    values : ndarray
        ``(n, features)``, or with more dimensions ``(n, channels, …)``, with one mean and one deviation a channel.
    training : ndarray of bool
        ``(n,)``, which examples may be looked at.

    Returns
    -------
    ndarray
        float32, the shape of `values`. A feature that is constant in training is only shifted.
    """
    axes = (0, *range(2, values.ndim))
    seen = values[training].astype(np.float64)
    mean = seen.mean(axes, keepdims=True)
    deviation = seen.std(axes, keepdims=True)
    varies = deviation > 1e-9 * np.abs(seen).max(axes, keepdims=True)  # not by rounding alone
    scaled: Floats = ((values - mean) / np.where(varies, deviation, 1.0)).astype(np.float32)
    return scaled


def words(text: str) -> list[str]:
    """Return the words of a title in small letters: runs of letters, so that "Flag-2" and "flag" are one word."""
    return re.findall(r"[^\W\d_]+", text.lower())


def parts(word: str) -> list[str]:
    """Return what is looked up for a word: itself and its runs of 3 and 4 letters, "<" and ">" at its ends.

    Parts are what a rare or new word ("balloons") has in common with words that were seen ("balloon").
    """
    marked = f"<{word}>"
    runs = [marked[start : start + size] for size in PART_SIZES for start in range(len(marked) - size + 1)]
    return list(dict.fromkeys([marked, *runs]))


def vocabulary_of(titles: Iterable[str]) -> dict[str, int]:
    """Return an id from 2 for each word and part of a word that stands in two titles or more."""
    counts = Counter(part for title in titles for part in {part for word in words(title) for part in parts(word)})
    common = sorted(part for part, count in counts.items() if count >= MENTIONS)
    return {part: place for place, part in enumerate(common, start=UNKNOWN + 1)}


def word_ids(titles: Sequence[str], ids: Mapping[str, int]) -> list[list[int]]:
    """Return for each title the ids of its words and their parts, one word after another.

    Parameters
    ----------
    titles : sequence of str
        n titles.
    ids : mapping of str to int
        The vocabulary. A word of which it has no part becomes 1.

    Returns
    -------
    list of list of int
        n lists, of unlike lengths.
    """
    found = []
    for title in titles:
        known = [[ids[part] for part in parts(word) if part in ids] or [UNKNOWN] for word in words(title)]
        found.append([each for word in known for each in word])
    return found


def padded(rows: Sequence[Sequence[int]], length: int) -> Tensor:
    """Return the first `length` ids of each row, filled up with 0: int64, ``(n, length)``."""
    out = torch.full((len(rows), length), PADDING)
    for place, row in enumerate(rows):
        kept = torch.tensor(row[:length], dtype=torch.int64)
        out[place, : len(kept)] = kept
    return out


Loader = Callable[..., DataSet]


@dataclass(frozen=True)
class Entry:
    """A registered set: how it is read, what is said about it, and where its files are looked for.

    `networks` are those of :data:`igm_rs.experiments.columns.NETWORKS` that it knows; `folder` is None where the user
    has to say one; `on_disk` is then where what is known about the folder is imported from, as "module:name": the
    packages that decode are not needed before.
    """

    loader: Loader
    title: str
    licence: str
    source: str
    baselines: Mapping[str, float]
    folder: Path | None
    defined: Path
    networks: tuple[str, ...] = ("default",)
    on_disk: str | None = None


OURS = (
    Path(__file__).resolve().with_name("sets.py"),
    Path(__file__).resolve().parent / "on_disk" / "registered.py",
)
"""The files that register what comes with the package."""

_SETS: dict[str, Entry] = {}


def register(
    name: str,
    *,
    title: str,
    licence: str,
    source: str,
    baselines: Mapping[str, float] | None = None,
    folder: Path | None = None,
    networks: Sequence[str] = ("default",),
) -> Callable[[Loader], Loader]:
    """Return a decorator that makes a data set known by its name.

    It stands above a function that takes a folder, reads the set's files there (:func:`read`) and returns
    ``DataSet.of(…)``.

    Parameters
    ----------
    name : str
        For the command line and for names of files: letters, digits, ``-`` and ``_``.
    title : str
        For tables and pictures.
    licence, source : str
        The terms of the data; where they come from and what to cite.
    baselines : mapping of str to float, optional
        Test accuracies that plain training is known to reach, by modality or method, to be shown beside the set.
    folder : Path, optional
        Where the files are looked for unless :func:`load` is told a folder; by default that of the function's file,
        or the working directory where there is no file, as in a notebook.
    networks : sequence of str
        Those of :data:`igm_rs.experiments.columns.NETWORKS` that the set can be read for. With any beside "default" the
        function takes a :class:`igm_rs.experiments.columns.Reading` after the folder.

    Raises
    ------
    TypeError
        If the decorator does not stand above a function.
    ValueError
        If the name is unfit, or is that of a set that comes with the package. A set of the user's is replaced.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name):
        raise ValueError(f"data set is called {name!r}, expected letters, digits, '-' and '_' only")

    def keep(loader: Loader) -> Loader:
        code = getattr(inspect.unwrap(loader), "__code__", None)
        if code is None:
            raise TypeError(f"data set {name!r} is registered with a {type(loader).__name__}, expected a function")
        defined = Path(code.co_filename).resolve()
        if defined not in OURS:
            names()  # ours come first
        files = {defined, *([_SETS[name].defined] if name in _SETS else [])}
        if len(files) > 1 and files & set(OURS):
            raise ValueError(f"data set {name!r} comes with the package, expected another name")
        home = defined.parent if defined.is_file() else Path()
        known = dict(baselines or {})
        _SETS[name] = Entry(loader, title, licence, source, known, folder or home, defined, tuple(networks))
        return loader

    return keep


def register_on_disk(
    name: str, where: str, *, title: str, licence: str, source: str, networks: Sequence[str], defined: Path
) -> None:
    """Make a set known that lies in a folder of the user's, by where its ``OnDisk`` is imported from."""

    def loader(folder: Path, reading: Reading) -> DataSet:
        return on_disk_of(name).load(folder, reading)

    _SETS[name] = Entry(loader, title, licence, source, {}, None, defined, tuple(networks), where)


def run_file(file: Path) -> None:
    """Run a Python file that registers data sets or methods.

    Raises
    ------
    FileNotFoundError
        If it is not there.
    ValueError
        If it cannot be run: names the file and the reason.
    """
    if not file.is_file():
        raise FileNotFoundError(f"file {file} does not exist, expected a Python file that registers something")
    path = file.resolve()
    # of the whole path: two files of one name, in two folders, are two modules
    module = f"igm_rs_registered_{path.stem}_{zlib.crc32(os.fsencode(path)):08x}"
    spec = importlib.util.spec_from_file_location(module, path)
    if spec is None or spec.loader is None:
        raise ValueError(f"file {file} cannot be run: its name does not end in .py")
    made = importlib.util.module_from_spec(spec)
    sys.modules[module] = made  # as any import does; a loader's annotations are looked up there
    try:
        spec.loader.exec_module(made)
    except Exception as error:
        del sys.modules[module]
        raise ValueError(f"file {file} cannot be run: {type(error).__name__}: {error}") from error


def sets_of(file: Path) -> list[str]:
    """Return the names of the data sets that a file has registered."""
    return [name for name, entry in _SETS.items() if entry.defined == file.resolve()]


def names() -> list[str]:
    """Return the names of all data sets, ours first."""
    from . import sets  # noqa: F401  # registers ours
    from .on_disk import registered  # noqa: F401

    ours = [name for file in OURS for name, entry in _SETS.items() if entry.defined == file]
    return ours + [name for name in _SETS if name not in ours]


def load(name: str, folder: Path | None = None, reading: Reading | None = None) -> DataSet:
    """Read a data set and split it.

    Parameters
    ----------
    name : str
        One of :func:`names`.
    folder : Path, optional
        Where its files lie; by default the archives that come with the package, for a set of the user's the folder of
        the file that registers it. The paper's sets must be given one.
    reading : Reading, optional
        For which network, and what is done about faults; by default for the set's own, and faults are errors.

    Raises
    ------
    FileNotFoundError
        If a file is not there.
    TypeError
        If the registered function returns no :class:`DataSet`.
    ValueError
        If `name` is unknown, the set is not for that network, has no folder, or a file is damaged or is another one:
        names the file and the reason.
    """
    entry = known_set(name)
    reading = Reading() if reading is None else reading
    place = entry.folder if folder is None else folder
    if place is None:
        raise ValueError(f"data is {name!r} without a folder, expected --data-root FOLDER, where its files lie")
    check_reading(name, reading)
    found = entry.loader(place) if entry.networks == ("default",) else entry.loader(place, reading)
    if not isinstance(found, DataSet):
        raise TypeError(
            f"the function that {entry.defined} registers as {name!r} returned a {type(found).__name__}, "
            "expected a DataSet"
        )
    return replace(found, name=name, title=entry.title, licence=entry.licence, source=entry.source)


def check_reading(name: str, reading: Reading) -> None:
    """Refuse what a set has no use for.

    Raises
    ------
    ValueError
        Names the option, its value and what was expected.
    """
    entry = known_set(name)
    if reading.network not in entry.networks:
        raise ValueError(f"network is {reading.network!r}, expected one of {', '.join(entry.networks)} for {name}")
    if entry.on_disk is not None:
        known = on_disk_of(name).modalities if reading.weights else ()
        for modality in reading.weights:
            if modality not in known:
                raise ValueError(f"weights names {modality!r}, expected some of {', '.join(known)} for {name}")
        return
    for option, given in {
        "weights": reading.weights,
        "skip_broken": reading.skip_broken,
        "speakers": reading.speakers != "apart",
    }.items():
        if given:
            raise ValueError(f"{option} is given, expected none for {name}: it is no set in a folder of the user's")


def on_disk_of(name: str) -> OnDisk:
    """Return what is known about the folder of one of the paper's sets.

    Raises
    ------
    ValueError
        If `name` is none of them.
    """
    where = known_set(name).on_disk
    if where is None:
        known = ", ".join(each for each in names() if _SETS[each].on_disk is not None)
        raise ValueError(f"data set is {name!r}, expected one that lies in a folder: {known}")
    module, _, attribute = where.partition(":")
    found: OnDisk = getattr(importlib.import_module(module), attribute)
    return found


def describe(name: str, folder: Path | None = None) -> dict[str, Any]:
    """Return what there is to know about a set before training; the test split stays shut.

    Returns
    -------
    dict
        ``name``, ``title``, ``licence``, ``source``; ``sizes`` by split; ``classes``; ``balance``, examples of each
        class in the training split by its name; ``majority``, the share of the most frequent class there;
        ``modalities``, for each its ``kind``, the ``shape`` of an example and, of titles, the size of the
        ``vocabulary``; ``baselines``, test accuracies of plain training.
    """
    entry, found = known_set(name), load(name, folder)
    counts = found.train.labels.bincount(minlength=found.classes).tolist()
    return {
        "name": name,
        "title": entry.title,
        "licence": entry.licence,
        "source": entry.source,
        "sizes": found.sizes,
        "classes": found.classes,
        "balance": dict(zip(found.class_names, counts, strict=True)),
        "majority": max(counts) / sum(counts),
        "modalities": {
            modality: {"kind": found.kinds[modality], "shape": tuple(values.shape[1:])}
            | ({"vocabulary": found.vocabulary[modality]} if modality in found.vocabulary else {})
            for modality, values in found.train.inputs.items()
        },
        "baselines": dict(entry.baselines),
    }


def known_set(name: str) -> Entry:
    """Return what was registered under a name.

    Raises
    ------
    ValueError
        If nothing was.
    """
    known = names()
    if name not in known:
        raise ValueError(f"data set is {name!r}, expected one of {', '.join(known)}")
    return _SETS[name]


_UNREADABLE = (
    OSError,
    ValueError,
    EOFError,
    TypeError,
    AttributeError,
    NotImplementedError,
    RuntimeError,
    MemoryError,
    zipfile.BadZipFile,
    zlib.error,
)
"""What NumPy and zipfile raise at files that are torn, altered, encrypted or something else altogether."""


def read(path: Path, dimensions: Mapping[str, int], *, numbers: bool = False) -> dict[str, Array]:
    """Read the named arrays of a NumPy archive and check what they are.

    Parameters
    ----------
    path : Path
        An ``.npz`` file. Pickled objects in it are refused.
    dimensions : mapping of str to int
        The number of dimensions that each array must have; others in the archive are left alone.
    numbers : bool
        Whether strings are refused.

    Raises
    ------
    FileNotFoundError
        If the file is not there.
    ValueError
        If it is no such archive, or an array is missing, has other dimensions, or holds neither numbers nor strings.
    """
    if not path.is_file():
        raise FileNotFoundError(f"data file {path} does not exist, expected a NumPy archive")
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            missing = [name for name in dimensions if name not in archive]
            arrays = {name: archive[name] for name in dimensions if name in archive}
    except _UNREADABLE as error:
        raise _foreign(path, f"it is no NumPy archive that can be read ({error})") from error
    expect(not missing, path, f"it has no array {', '.join(missing)}")
    kinds, words_for = ("iuf", "numbers") if numbers else ("iufU", "numbers or strings")
    for name, wanted in dimensions.items():
        array = arrays[name]
        expect(array.ndim == wanted, path, f"{name} has {array.ndim} dimensions, expected {wanted}")
        expect(array.dtype.kind in kinds, path, f"{name} has dtype {array.dtype}, expected {words_for}")
    return arrays


def expect(holds: bool, path: Path | None, reason: str) -> None:
    """Refuse a file's content, with the reason, unless the condition holds.

    Raises
    ------
    ValueError
        If it does not.
    """
    if not holds:
        raise _foreign(path, reason)


def _foreign(path: Path | None, reason: str) -> ValueError:
    """Return the error for data that are not what was expected."""
    where = "the data are" if path is None else f"data file {path} is"
    return ValueError(f"{where} not as expected: {reason}")
