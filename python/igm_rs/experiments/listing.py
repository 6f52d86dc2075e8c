"""The list of what there is: data sets with their sizes and baselines, methods, tables and figures."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .data import describe, known_set, names
from .methods import METHODS
from .page import FIGURES
from .plans import ONE_SIDED, RELEASED, TABLES

__all__ = ["listing"]


def listing(folder: Path | None = None) -> str:
    """Return all data sets, methods, tables and figures, as text for the terminal.

    Parameters
    ----------
    folder : Path, optional
        Where the data sets' files lie, as for :func:`igm_rs.experiments.data.load`. Of a set that cannot be read from
        there the reason is told in its place.
    """
    parts = ["Data sets (--data)", *(_data_set(name, folder) for name in names())]
    methods = {key: method.label.format("a modality") for key, method in METHODS.items()}
    methods[ONE_SIDED] += ", with --sources; the rows of table 3"
    methods[RELEASED] += ", with --released; the rows of table 5"
    parts.append(_block("Methods (--method)", methods))
    parts.append(_block("Tables (igm-rs table NUMBER)", {str(number): shows for number, shows in TABLES.items()}))
    parts.append(_block("Figures (igm-rs figure NAME)", FIGURES))
    return "\n\n".join(parts)


def _block(title: str, lines: Mapping[str, str]) -> str:
    """A title and lines of a name and what it is."""
    width = max(map(len, lines))
    return "\n".join([title, *(f"  {name.ljust(width)}  {text}" for name, text in lines.items())])


def _data_set(name: str, folder: Path | None) -> str:
    """What there is to know about a data set."""
    if known_set(name).folder is None:  # listed as what it is; igm-rs data check looks into its folder
        return _in_a_folder(name)
    try:
        told = describe(name, folder)
    except (OSError, ValueError, TypeError) as error:
        return f"  {name}: cannot be read: {error}"
    sizes = ", ".join(f"{count} {split}" for split, count in told["sizes"].items())
    balance = ", ".join(f"{label} {count}" for label, count in told["balance"].items())
    lines = {
        "title": told["title"],
        "examples": sizes,
        "classes": f"{told['classes']}; in training {balance}",
        "modalities": "; ".join(map(_modality, told["modalities"], told["modalities"].values())),
        "baselines": ", ".join(_baselines(told)),
        "licence": told["licence"],
        "source": told["source"],
    }
    return _block(f"  {name}", {f"  {word}": text for word, text in lines.items()})


def _in_a_folder(name: str) -> str:
    """What there is to know about a data set that the user has in a folder."""
    entry = known_set(name)
    lines = {
        "title": entry.title,
        "examples": "in a folder of yours: --data-root FOLDER; igm-rs data check looks into it",
        "networks": ", ".join(entry.networks),
        "licence": entry.licence,
        "source": entry.source,
    }
    return _block(f"  {name}", {f"  {word}": text for word, text in lines.items()})


def _modality(name: str, told: Mapping[str, Any]) -> str:
    """A modality's name, kind and shape."""
    if "vocabulary" in told:
        return f"{name} ({told['kind']} of up to {told['shape'][0]} words, {told['vocabulary']} word ids)"
    return f"{name} ({told['kind']} of {' × '.join(map(str, told['shape']))})"


def _baselines(told: Mapping[str, Any]) -> list[str]:
    """What can be reached with little: the most frequent class, then what the set was registered with."""
    most = f"always the most frequent class {told['majority']:.1%} (of training)"
    return [most, *(f"{name} {value:.1%}" for name, value in told["baselines"].items())]
