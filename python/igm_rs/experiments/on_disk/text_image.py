"""What Twitter2015 and Sarcasm have in common: a text and a picture an example, BERT and ResNet50, or CLIP's two."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from igm_rs.experiments.columns import Column, Reading
from igm_rs.experiments.encoders import EncoderSpec, clip_image, clip_text, image_resnet50, text_bert

from .faults import Faults
from .media import PICTURES, Home
from .pictures import CLIP, SIDE, SMALL_SIDE, Look, PictureColumn
from .survey import Survey
from .text import text_length, token_ids, tokenizer_of

__all__ = ["CROPS", "KINDS", "MODALITIES", "columns", "encoders", "label_of", "named_picture", "vocabulary"]

MODALITIES = ("text", "image")
"""In the order of training."""

KINDS = {"text": "tokens", "image": "picture file"}
"""What each is."""

CROPS = (0.5, 1.0)
"""Share of a picture that a crop takes in training, as in the released scripts. These distort pictures besides, by two
of RandAugment's changes: left out here, as the paper does not speak of it."""

WITH_CLIP = ("pretrained", "frozen")
"""Networks that are CLIP's."""


def columns(name: str, survey: Survey, part: str, folder: Path, reading: Reading) -> Mapping[str, Column | Tensor]:
    """Return the texts of a split as ids, and its pictures to be decoded.

    Texts are taken as they stand. The released scripts drop all but letters from Twitter2015's and marks of punctuation
    from Sarcasm's, before BERT's tokenizer cuts them up.
    """
    look = _look(reading)
    texts = [example.text for example in survey.examples[part]]
    paths = tuple(path for example in survey.examples[part] for path in example.files["image"])
    return {
        "text": token_ids(texts, _tokenizer(survey, reading), text_length(reading)),
        "image": PictureColumn(paths, Home(name, folder), look),
    }


def encoders(reading: Reading, survey: Survey) -> Mapping[str, EncoderSpec]:
    """Return BERT and ResNet50, or CLIP's two encoders with the weights of their folders.

    Raises
    ------
    ValueError
        If CLIP's weights are not given.
    """
    if reading.network in WITH_CLIP:
        folders = _clip_folders(reading)
        return {"text": clip_text(folders["text"]), "image": clip_image(folders["image"])}
    words = len(_tokenizer(survey, reading))
    text = text_bert(reading.small, reading.weights.get("text"), words)
    image = image_resnet50(reading.small, reading.weights.get("image"), narrowed=text.width)
    return {"text": text, "image": image}


def vocabulary(survey: Survey, reading: Reading) -> Mapping[str, int]:
    """Return the number of ids that texts may have."""
    return {"text": len(_tokenizer(survey, reading))}


def label_of(field: str, names: tuple[str, ...], faults: Faults, path: Path, line: int) -> int | None:
    """Return the class that a list's field says; None for a fault that is left out."""
    labels = [str(label) for label in range(len(names))]
    if field.strip() in labels:
        return labels.index(field.strip())
    known = ", ".join(f"{place} ({name})" for place, name in enumerate(names))
    faults.add("label", path, line, f"label is {field!r}, expected {known}")
    return None


def named_picture(name: str, faults: Faults, path: Path, line: int) -> bool:
    """Return whether a list's field is the name of a picture; if not, that is a fault."""
    if name.lower().endswith(PICTURES) and "/" not in name:
        return True
    faults.add(
        "line", path, line, f"its picture is {name!r}, expected a file's name that ends in {', '.join(PICTURES)}"
    )
    return False


def _tokenizer(survey: Survey, reading: Reading) -> Any:
    return tokenizer_of([example.text for example in survey.examples["train"]], reading)


def _look(reading: Reading) -> Look:
    """Return how pictures become numbers: at the size that the encoder takes, and with CLIP's numbers, as released."""
    side = SMALL_SIDE if reading.small else SIDE
    if reading.network in WITH_CLIP:
        from transformers import CLIPConfig

        folder = _clip_folders(reading)["image"]
        clip_image(folder)  # refuses another model's
        config: Any = CLIPConfig.from_pretrained(folder, local_files_only=True)
        side = config.vision_config.image_size
    return Look(side, CROPS, cubic=True, normal=CLIP)


def _clip_folders(reading: Reading) -> Mapping[str, Path]:
    """Return the folders of CLIP's weights by modality."""
    missing = [name for name in MODALITIES if name not in reading.weights]
    if missing:
        raise ValueError(
            f"network is {reading.network!r} without weights of {' and '.join(missing)}, expected --weights text=DIR "
            "image=DIR, folders of a CLIP model with its tokenizer; both may be the same"
        )
    return reading.weights
