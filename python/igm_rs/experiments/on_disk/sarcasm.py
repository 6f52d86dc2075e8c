"""Sarcasm (Cai et al. 2019): tweets with a picture, sarcastic or not."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from igm_rs.experiments.columns import Reading

from .faults import Faults
from .gathering import gather, whole
from .lists import LISTS, entries, require_lists, table
from .survey import Example, OnDisk, Survey
from .text_image import KINDS, MODALITIES, columns, encoders, label_of, named_picture, vocabulary

__all__ = ["MEANINGS", "SARCASM", "survey"]

MEANINGS = ("not sarcastic", "sarcastic")
"""Classes, by label."""

COLUMNS = ("image", "text", "label")
"""Of a list, in any order, others beside them: what the released loader looks up."""

LAYOUT = """\
annotations/{train,valid,test}_data.csv   a header with image, text and label (0, 1)
           {train,valid,test}_data.json   the same as a list of entries, in place of a CSV file that is not there
images/<image>"""


def survey(folder: Path, reading: Reading, faults: Faults) -> Survey:
    """Look through the lists and pictures; folders before a picture's name in a list are left out, as released.

    Raises
    ------
    FileNotFoundError
        If a list is not there.
    DataFault
        At the first thing that is wrong, unless such are left out; in any case if a list is of another form.
    """
    lists = {part: _list(folder / "annotations", name) for part, name in LISTS.items()}
    require_lists(lists, LAYOUT)
    listed = {part: _examples(path, folder / "images", faults) for part, path in lists.items()}
    return gather("sarcasm", listed, lambda _, example: (example, whole(example)), reading, faults, who="picture")


def _list(folder: Path, name: str) -> Path:
    """Return a split's list: CSV as the authors document it, or JSON as their scripts read it."""
    table, listed = (folder / f"{name}_data.{ending}" for ending in ("csv", "json"))
    return listed if listed.is_file() and not table.is_file() else table


def _examples(path: Path, pictures: Path, faults: Faults) -> list[Example]:
    """Return the examples of a list."""
    found = []
    records = entries(path, COLUMNS, faults) if path.suffix == ".json" else table(path, ",", COLUMNS, faults)
    for line, record in records:
        picture = record["image"].rpartition("/")[2]
        label = label_of(record["label"], MEANINGS, faults, path, line)
        if label is None or not named_picture(picture, faults, path, line):
            continue
        text = " ".join(record["text"].split())
        if not text:
            faults.add("line", path, line, "its text is empty, expected a tweet")
            continue
        found.append(Example(picture, label, picture, {"text": (), "image": (pictures / picture,)}, (path, line), text))
    return found


SARCASM = OnDisk(
    name="sarcasm",
    modalities=MODALITIES,
    kinds=KINDS,
    class_names=MEANINGS,
    layout=LAYOUT,
    survey=survey,
    columns=partial(columns, "sarcasm"),
    encoders=encoders,
    vocabulary=vocabulary,
)
"""The set."""
