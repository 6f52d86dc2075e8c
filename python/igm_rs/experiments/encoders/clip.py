"""CLIP's two encoders of transformers, each with its projection into the common space."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .spec import EncoderSpec
from .weights import digest, load_folder, model_type

__all__ = ["ClipImage", "ClipText", "clip_image", "clip_text"]

_SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
}

_OF_TEXT, _OF_IMAGE = ("text_model.", "text_projection."), ("vision_model.", "visual_projection.")
_OF_BOTH = ("logit_scale", "text_model.embeddings.position_ids", "vision_model.embeddings.position_ids")


class ClipText(nn.Module):
    """CLIP's text encoder and its projection: ids ``(n, length)``, int64, to ``(n, d)``, not normalised.

    The features are those of the text's end token. No token sees a later one: what follows the end token is padding,
    whatever its id, 0 or CLIP's own, and no mask is needed.
    """

    def __init__(self, clip: nn.Module) -> None:
        super().__init__()
        self.clip = clip

    def forward(self, ids: Tensor) -> Tensor:
        """Return the features ``(n, d)``."""
        features: Tensor = self.clip(input_ids=ids).text_embeds
        return features


class ClipImage(nn.Module):
    """CLIP's image encoder and its projection: ``(n, 3, size, size)``, CLIP's own size, to ``(n, d)``, not normalised.

    Pictures are expected with CLIP's own mean and deviation of each channel taken out.
    """

    def __init__(self, clip: nn.Module) -> None:
        super().__init__()
        self.clip = clip

    def forward(self, pictures: Tensor) -> Tensor:
        """Return the features ``(n, d)``."""
        features: Tensor = self.clip(pixel_values=pictures).image_embeds
        return features


def clip_text(weights: Path | None, small: bool = False) -> EncoderSpec:
    """Return CLIP's text encoder: ids ``(n, length)``, beginning and end token included, to ``(n, d)``.

    Parameters
    ----------
    weights : Path, optional
        A folder with a whole CLIP model, as ``save_pretrained`` writes it; its other half is left out. By default
        random weights.
    small : bool
        Whether random weights are those of a network of two layers, 64 ids and d = 32, rather than of CLIP ViT-B/32,
        49408 ids and d = 512. A folder has a size of its own.

    Raises
    ------
    FileNotFoundError, NotADirectoryError
        If `weights` is no folder with a model. Weights that do not fit are a ValueError when the encoder is made.
    ValueError
        If the folder holds another kind of model.
    """
    return _spec(partial(_text, weights, small), weights, small)


def clip_image(weights: Path | None, small: bool = False) -> EncoderSpec:
    """Return CLIP's image encoder: pictures ``(n, 3, 224, 224)`` to ``(n, d)``; small ones 32 × 32.

    Parameters and errors as in :func:`clip_text`; a folder's pictures have the size of its configuration.
    """
    return _spec(partial(_image, weights, small), weights, small)


def _spec(make: Any, weights: Path | None, small: bool) -> EncoderSpec:
    told = digest(weights, folder=True)
    return EncoderSpec(make, _config(weights, small).projection_dim, digest=told)


def _config(weights: Path | None, small: bool) -> Any:
    """The configuration of both halves, which agree on the width of the common space."""
    from transformers import CLIPConfig

    config: Any = CLIPConfig()
    if weights is not None:
        model_type(weights, "clip")
        config = CLIPConfig.from_pretrained(weights, local_files_only=True)
    elif small:
        text = _SMALL | {"vocab_size": 64, "bos_token_id": 62, "eos_token_id": 63}
        config = CLIPConfig(text_config=text, vision_config=_SMALL | {"image_size": 32, "patch_size": 8})
        config.projection_dim = 32
    for half in (config.text_config, config.vision_config):  # of a whole model's file only the outer one counts
        half.projection_dim = config.projection_dim
    return config


def _text(weights: Path | None, small: bool) -> ClipText:
    from transformers import CLIPTextModelWithProjection

    config = _config(weights, small).text_config
    if weights is None:
        return ClipText(CLIPTextModelWithProjection(config).train())
    return ClipText(load_folder(CLIPTextModelWithProjection, weights, left_out=_OF_IMAGE + _OF_BOTH, config=config))


def _image(weights: Path | None, small: bool) -> ClipImage:
    from transformers import CLIPVisionModelWithProjection

    config = _config(weights, small).vision_config
    if weights is None:
        return ClipImage(CLIPVisionModelWithProjection(config).train())
    return ClipImage(load_folder(CLIPVisionModelWithProjection, weights, left_out=_OF_TEXT + _OF_BOTH, config=config))
