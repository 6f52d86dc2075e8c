"""What a folder holds: the examples of each split with their files, found without decoding anything."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch

from igm_rs.experiments.columns import Column, Reading
from igm_rs.experiments.data import PARTS, DataSet, Split
from igm_rs.experiments.encoders import EncoderSpec
from igm_rs.experiments.networks import frozen

from .faults import DataFault, Faults

__all__ = ["Example", "OnDisk", "Survey"]


@dataclass(frozen=True)
class Example:
    """One example of a list.

    Attributes
    ----------
    name : str
        As the list calls it.
    label : int
        Class, from 0.
    origin : str
        Where it comes from: the speaker, the subject, the video, the picture. Examples of one origin are no
        independent evidence. None is in two splits, unless :attr:`igm_rs.experiments.columns.Reading.speakers` is
        "shared": then each split's is an origin of its own.
    files : mapping of str to tuple of Path
        By modality, in order; empty for text.
    listed : tuple of Path and int
        The list and the line, from 1.
    text : str
        Of sets with text; else "".
    """

    name: str
    label: int
    origin: str
    files: Mapping[str, tuple[Path, ...]]
    listed: tuple[Path, int]
    text: str = ""


@dataclass(frozen=True)
class Survey:
    """The examples of each split that can be used, and what was wrong with others.

    Attributes
    ----------
    examples : mapping of str to sequence of Example
        By split: "train", "validation", "test".
    faults : Faults
        What was left out.
    notes : sequence of str
        What else is worth a look, in words; it stops nothing.
    """

    examples: Mapping[str, Sequence[Example]]
    faults: Faults
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class OnDisk:
    """One of the paper's sets: how its folder is looked through, and what stands for each modality.

    Attributes
    ----------
    name : str
        As on the command line.
    modalities : tuple of str
        In the order of training.
    kinds : mapping of str to str
        What each modality is: "spectrogram", "frames", "tokens", "picture file", "clip".
    class_names : tuple of str
        One a class.
    layout : str
        The files that are expected below the folder, a line each, for messages.
    survey : callable
        ``survey(folder, reading, faults)``: looks through the folder, with every check that needs no decoding.
    columns : callable
        ``columns(survey, part, folder, reading)``: for each modality a column, or a tensor ``(n, …)``, of one split.
    encoders : callable
        ``encoders(reading, survey)``: for each modality its encoder.
    vocabulary : callable
        ``vocabulary(survey, reading)``: for each modality of text the number of ids; none by default.
    """

    name: str
    modalities: tuple[str, ...]
    kinds: Mapping[str, str]
    class_names: tuple[str, ...]
    layout: str
    survey: Callable[[Path, Reading, Faults], Survey]
    columns: Callable[[Survey, str, Path, Reading], Mapping[str, Column | torch.Tensor]]
    encoders: Callable[[Reading, Survey], Mapping[str, EncoderSpec]]
    vocabulary: Callable[[Survey, Reading], Mapping[str, int]] = field(default=lambda _, __: {})

    def load(self, folder: Path, reading: Reading) -> DataSet:
        """Return the data set in `folder`.

        Raises
        ------
        FileNotFoundError
            If the folder, or one of its lists, is not there.
        DataFault
            At the first thing that is wrong with an example, unless such are left out; if none is left in a split, or
            no training example in a class.
        """
        if not folder.is_dir():
            raise FileNotFoundError(f"folder {folder} does not exist, expected one of {self.name}:\n{self.layout}")
        survey = self.survey(folder, reading, Faults(reading.skip_broken))
        return self.data_set(survey, folder, reading)

    def data_set(self, survey: Survey, folder: Path, reading: Reading) -> DataSet:
        """Return what a survey has found as a data set; raises as :meth:`load`."""
        for part in PARTS:
            if not survey.examples[part]:
                way_out = "; --speakers shared takes the lists as they are" * ("speaker" in survey.faults.counts)
                raise DataFault(
                    f"folder {folder} has no example for the {part} split ({survey.faults.said() or 'none'}){way_out}"
                )
        shared = self._shared(survey)
        named = {part: [_origin(part, example, shared) for example in survey.examples[part]] for part in PARTS}
        origins = {name: place for place, name in enumerate(sorted(set().union(*named.values())))}
        splits = {}
        for part in PARTS:
            examples = survey.examples[part]
            splits[part] = Split(
                self.columns(survey, part, folder, reading),
                torch.tensor([example.label for example in examples]),
                torch.tensor([origins[name] for name in named[part]]),
            )
        encoders = dict(self.encoders(reading, survey))
        if reading.network == "frozen":
            encoders = {name: replace(spec, make=partial(frozen, spec.make)) for name, spec in encoders.items()}
        return DataSet.stored(
            splits,
            kinds=self.kinds,
            class_names=self.class_names,
            encoders=encoders,
            vocabulary=self.vocabulary(survey, reading),
            left_out=survey.faults.said(),
            folder=folder,
        )

    @staticmethod
    def _shared(survey: Survey) -> frozenset[str]:
        """Return the origins that several splits have, where that is allowed: there each split's is another."""
        held = [{example.origin for example in survey.examples[part]} for part in PARTS]
        one, two, three = held
        return frozenset((one & two) | (one & three) | (two & three))


def _origin(part: str, example: Example, shared: frozenset[str]) -> str:
    return f"{part}: {example.origin}" if example.origin in shared else example.origin
