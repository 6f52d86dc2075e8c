"""Twitter2015 (Yu and Jiang 2019): what a tweet with its picture feels about a target; lists and folder of TomBERT."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

from igm_rs.experiments.columns import Reading

from .faults import DataFault, Faults
from .gathering import gather, whole
from .lists import LISTS, header, require_lists, rows
from .survey import Example, OnDisk, Survey
from .text import BESIDE
from .text_image import KINDS, MODALITIES, columns, encoders, label_of, named_picture, vocabulary

__all__ = ["FEELINGS", "TARGET", "TWITTER2015", "survey"]

FEELINGS = ("negative", "neutral", "positive")
"""Classes, by label."""

TARGET = "$T$"
"""Stands for the target in a tweet."""

COLUMNS = ("index", "Label", "ImageID", "String", "String")
"""Of a list, in order; the published ones have "#1 " to "#3 " before the names. The second string is the target."""

HEADERS = (COLUMNS, tuple(name for name in COLUMNS if name != "Label"))
"""What the first line may name: that of the published test list leaves the label out, which its other lines have."""

LAYOUT = """\
annotations/{train,valid,test}_data.tsv   a header, then index, label (0, 1, 2), picture, tweet with $T$, target
twitter2015_images/<picture>"""


def survey(folder: Path, reading: Reading, faults: Faults) -> Survey:
    """Look through the lists and pictures.

    An example is a tweet with one of its targets: ``$T$`` is filled in, and the target goes beside the tweet, as in
    TomBERT. The released scripts leave the target out. A picture, with its tweet, is in one split only.

    Raises
    ------
    FileNotFoundError
        If a list is not there.
    DataFault
        At the first thing that is wrong, unless such are left out; in any case if a list is of another form.
    """
    lists = {part: folder / "annotations" / f"{name}_data.tsv" for part, name in LISTS.items()}
    require_lists(lists, LAYOUT)
    listed = {part: _examples(path, folder / "twitter2015_images", faults) for part, path in lists.items()}
    return gather("twitter2015", listed, lambda _, example: (example, whole(example)), reading, faults, who="picture")


def _examples(path: Path, pictures: Path, faults: Faults) -> list[Example]:
    """Return the examples of a list."""
    head = header(path, "\t", quoted=False)
    if tuple(re.sub(r"^#\d ", "", name.strip()) for name in head) not in HEADERS:
        next(rows(path, "\t", COLUMNS, Faults(skip=True), quoted=False), None)  # another delimiter is said first
        raise DataFault(f"{path}, line 1: the columns are {', '.join(head)}, expected {', '.join(COLUMNS)}")
    found = []
    for line, (_, label, picture, tweet, target) in rows(path, "\t", COLUMNS, faults, quoted=False, begin=2):
        feeling = label_of(label, FEELINGS, faults, path, line)
        if feeling is None or not named_picture(picture, faults, path, line):
            continue
        if TARGET not in tweet or not target.strip():
            faults.add(
                "line",
                path,
                line,
                f"its tweet is {tweet!r} and its target {target!r}, expected {TARGET} in the "
                "tweet, and a target that stands there",
            )
            continue
        found.append(
            Example(
                name=f"{picture} with target {target!r} at letter {tweet.index(TARGET) + 1}",
                label=feeling,
                origin=picture,
                files={"text": (), "image": (pictures / picture,)},
                listed=(path, line),
                text=f"{tweet.replace(TARGET, target)}{BESIDE}{target}",
            )
        )
    return found


TWITTER2015 = OnDisk(
    name="twitter2015",
    modalities=MODALITIES,
    kinds=KINDS,
    class_names=FEELINGS,
    layout=LAYOUT,
    survey=survey,
    columns=partial(columns, "twitter2015"),
    encoders=encoders,
    vocabulary=vocabulary,
)
"""The set."""
