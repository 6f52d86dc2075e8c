"""Listed examples sorted out: what is listed twice, whose files are not whole, and who is in more than one split."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from tqdm import tqdm

from igm_rs.experiments.columns import Reading

from .faults import Faults, place
from .media import Trouble, file_trouble
from .survey import Example, Survey

__all__ = ["ORDER", "gather", "whole"]

ORDER = ("test", "validation", "train")
"""Whose examples keep their places where two splits have the same: the later ones are left out."""


def gather(
    name: str,
    listed: Mapping[str, Sequence[Example]],
    find: Callable[[str, Example], tuple[Example, Iterable[Trouble]]],
    reading: Reading,
    faults: Faults,
    *,
    who: str,
    paper: str = "",
) -> Survey:
    """Look through the examples that the lists name.

    Parameters
    ----------
    name : str
        The set, for the progress bar.
    listed : mapping of str to sequence of Example
        By split, in the order of its list.
    find : callable
        ``find(part, example)``: the example with its files, and what is wrong with them.
    reading : Reading
        Its `speakers` says whether an origin in two splits is a fault.
    faults : Faults
        Takes what is wrong.
    who : str
        What an origin is: "speaker", "video", "subject".
    paper : str
        What the paper's own lists have to do with origins in two splits, for the message.

    Returns
    -------
    Survey
        The examples that are left. Of examples that are listed twice, and of origins that are in two splits, those of
        the test split are kept before those of the validation split and of the training split.
    """
    places: dict[str, str] = {}
    homes: dict[str, tuple[str, Example]] = {}
    kept: dict[str, list[Example]] = {part: [] for part in ORDER}
    total = sum(map(len, listed.values()))
    with tqdm(total=total, desc=f"looking through {name}", unit="clip", disable=None, leave=False) as bar:
        for part in ORDER:
            for example in listed[part]:
                bar.update()
                if example.name in places:
                    where = places[example.name]
                    faults.add("duplicate", *example.listed, f"{example.name} is listed twice, first in {where}")
                    continue
                places[example.name] = place(*example.listed)
                found, troubles = find(part, example)
                sound = True
                for kind, reason in troubles:
                    faults.add(kind, *example.listed, reason)
                    sound = False
                home, first = homes.get(example.origin, (part, example))
                if sound and home != part and reading.speakers == "apart":
                    where = place(*first.listed)
                    faults.add("speaker", *example.listed, _shared(who, example.origin, home, where, paper))
                elif sound:
                    homes.setdefault(example.origin, (part, found))
                    kept[part].append(found)
    return Survey(kept, faults)


def whole(example: Example) -> list[Trouble]:
    """Return what is wrong with the files of an example."""
    looks = (file_trouble(path) for files in example.files.values() for path in files)
    return [trouble for trouble in looks if trouble is not None]


def _shared(who: str, origin: str, home: str, where: str, paper: str) -> str:
    return (
        f"{who} {origin} is in the {home} split too, {where}{paper and f'; {paper}'}; --speakers shared takes the "
        f"lists as they are, and measures on {who}s that were trained on"
    )
