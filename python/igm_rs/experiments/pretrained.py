"""The shipped clip art for encoders that come pretrained inside packages: to be trained on, or left as they are."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from .columns import Reading
from .data import DataSet, Split
from .encoders import EncoderSpec
from .encoders.packaged import packaged_image, packaged_pixels, packaged_text, packaged_tokenizer
from .on_disk.threads import one_thread
from .sets import ClipArt, clip_art

__all__ = ["SIZE", "TITLE_LENGTH", "openclipart"]

SIZE = 80
"""Pixels of a side that pictures of 32 are made for their encoder.

Accuracy of a linear probe on the frozen features, from the training split to the validation split (790 pictures, so
± 0.02), and milliseconds a picture on one thread: 32: 0.36, 1; 64: 0.43, 3; 80: 0.51, 5; 96: 0.51, 6; 112: 0.50, 11;
128: 0.47, 14; 224, what the encoder was trained on: 0.47, 60.
"""

TITLE_LENGTH = 32
"""Ids of a title, padding among them; the longest of the archive has 25."""

PORTION = 128
"""Examples whose features are computed between two looks at the progress bar."""

_COMPUTED: dict[str, dict[str, Tensor]] = {}
"""Features of encoders left as they are, by what they depend on."""


def openclipart(folder: Path, reading: Reading) -> DataSet:
    """Return the set ``openclipart``, in the splits that it always has, for pretrained encoders.

    Parameters
    ----------
    folder : Path
        Where the archive lies.
    reading : Reading
        Of network "pretrained": "image" is a picture ``(n, 3, 32, 32)``, standardised as the encoder expects, "title"
        ids ``(n, 32)``, and the encoders are trained on. Of network "frozen": both are vectors, what the encoders make
        of them, ``(n, 1280)`` and ``(n, 384)``, computed once in a process, by one thread and with a progress bar.
        They are taken as they are: standardised, a head made no more of them on validation (pictures 0.53 as they
        are, 0.50 standardised; titles 0.72 to 0.76 either way), and three features of titles differ by rounding alone,
        which a division by their deviation would make as large as the others.

    Raises
    ------
    FileNotFoundError
        If the archive is not there.
    ModuleNotFoundError
        If a package is missing.
    ValueError
        If the archive is not as expected, or the network is another one.
    """
    if reading.network not in ("pretrained", "frozen"):
        raise ValueError(f"network is {reading.network!r}, expected 'pretrained' or 'frozen'")
    art = clip_art(folder)
    encoders = {"image": packaged_image(SIZE), "title": packaged_text()}
    tokenizer = packaged_tokenizer(TITLE_LENGTH)
    # one after another: several at once would start threads, which processes forked later warn of
    ids = torch.tensor([tokenizer.encode(str(title)).ids for title in art.titles])
    inputs = {"image": packaged_pixels(art.images), "title": ids}
    kinds, vocabulary = {"image": "picture", "title": "title"}, {"title": tokenizer.get_vocab_size()}
    if reading.network == "frozen":
        inputs, vocabulary = _features(inputs, encoders), {}
        kinds = dict.fromkeys(inputs, "vector")
        encoders = {
            name: EncoderSpec(nn.Identity, spec.width, spec.narrowed, spec.digest) for name, spec in encoders.items()
        }
    return DataSet.stored(
        _splits(inputs, art),
        kinds=kinds,
        class_names=art.class_names,
        encoders=encoders,
        vocabulary=vocabulary,
        folder=folder,
    )


def _splits(inputs: Mapping[str, Tensor], art: ClipArt) -> dict[str, Split]:
    masks = {"train": ~(art.validation | art.test), "validation": art.validation, "test": art.test}
    labels, origins = (torch.from_numpy(values).long() for values in (art.labels, art.origins))
    splits = {}
    for part, mask in masks.items():
        mine = torch.from_numpy(mask)
        splits[part] = Split({name: values[mine] for name, values in inputs.items()}, labels[mine], origins[mine])
    return splits


def _features(inputs: Mapping[str, Tensor], encoders: Mapping[str, EncoderSpec]) -> dict[str, Tensor]:
    """Return what the encoders make of the inputs, in evaluation mode."""
    told = hashlib.sha256()
    for name, values in inputs.items():
        told.update(f"{name} {encoders[name].digest} {tuple(values.shape)}".encode())
        told.update(values.numpy().tobytes())
    key = told.hexdigest()
    if key not in _COMPUTED:
        with torch.random.fork_rng(devices=[]), torch.no_grad(), one_thread():
            _COMPUTED[key] = {name: _encoded(name, encoders[name], values) for name, values in inputs.items()}
    return _COMPUTED[key]


def _encoded(name: str, spec: EncoderSpec, values: Tensor) -> Tensor:
    encoder = spec.make().eval()
    distinct, places = torch.unique(values, dim=0, return_inverse=True)  # a third of the titles are there already
    portions = distinct.split(PORTION)
    bar = tqdm(portions, desc=f"features of openclipart: {name}", unit="portion", disable=None, leave=False)
    return torch.cat([encoder(portion) for portion in bar])[places]
