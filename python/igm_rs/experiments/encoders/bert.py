"""BERT of transformers as an encoder of text: the last hidden state of the first token."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from .spec import EncoderSpec
from .weights import digest, load_folder, model_type

if TYPE_CHECKING:
    from transformers import BertConfig

__all__ = ["SMALL_WIDTH", "WIDTH", "TextBert", "text_bert"]

WIDTH, SMALL_WIDTH = 768, 32
"""Features of BERT-base, and of the small one."""

_LEFT_OUT = ("pooler.", "bert.pooler.", "cls.", "embeddings.position_ids", "bert.embeddings.position_ids")
"""What files of pretraining have beside the encoder."""


class TextBert(nn.Module):
    """A BERT without pooling layer: ids ``(n, length)``, int64, 0 is padding, to ``(n, d)``.

    The features are those of the first token, [CLS], as released. Dropout is that of its configuration.
    """

    def __init__(self, bert: nn.Module) -> None:
        super().__init__()
        self.bert = bert

    def forward(self, ids: Tensor) -> Tensor:
        """Return the features ``(n, d)``."""
        features: Tensor = self.bert(input_ids=ids, attention_mask=ids != 0).last_hidden_state[:, 0]
        return features


def text_bert(small: bool, weights: Path | None, vocabulary_size: int) -> EncoderSpec:
    """Return a BERT for ids ``(n, length)``, 0 is padding, to ``(n, 768)``.

    Parameters
    ----------
    small : bool
        Whether random weights are those of a network of two layers, ``(n, 32)``, rather than of BERT-base. A folder
        has a size of its own.
    weights : Path, optional
        A folder with a BERT, as ``save_pretrained`` writes it; what it has beside the encoder (pooling layer, heads of
        pretraining) is left out. By default random weights.
    vocabulary_size : int
        Number of ids; a folder's BERT may know more.

    Raises
    ------
    FileNotFoundError, NotADirectoryError
        If `weights` is no folder with a model. Weights that do not fit are a ValueError when the encoder is made.
    ValueError
        If the folder holds another kind of model, or knows fewer ids.
    """
    if weights is None:
        return EncoderSpec(partial(_random, small, vocabulary_size), SMALL_WIDTH if small else WIDTH)
    told = digest(weights, folder=True)
    config = _config(weights)
    if config.vocab_size < vocabulary_size:
        raise ValueError(
            f"weights {weights} know {config.vocab_size} ids, expected vocabulary_size {vocabulary_size} or more: use "
            "the tokenizer that belongs to them"
        )
    return EncoderSpec(partial(_read, weights), config.hidden_size, digest=told)


def _config(folder: Path) -> BertConfig:
    from transformers import BertConfig

    model_type(folder, "bert")
    return BertConfig.from_pretrained(folder, local_files_only=True)


def _random(small: bool, vocabulary_size: int) -> TextBert:
    from transformers import BertConfig, BertModel

    size: dict[str, Any] = {
        "hidden_size": SMALL_WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
    }
    config = BertConfig(vocab_size=vocabulary_size, **(size if small else {}))
    return TextBert(BertModel(config, add_pooling_layer=False).train())


def _read(folder: Path) -> TextBert:
    from transformers import BertModel

    return TextBert(load_folder(BertModel, folder, left_out=_LEFT_OUT, add_pooling_layer=False))
