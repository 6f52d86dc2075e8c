"""Texts as ids: the tokenizer of a pretrained encoder's folder, or word pieces of the training split's own texts."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from igm_rs.experiments.columns import Reading

__all__ = [
    "BESIDE",
    "LENGTH",
    "PIECES",
    "SMALL_LENGTH",
    "SMALL_PIECES",
    "SPECIAL",
    "text_length",
    "token_ids",
    "tokenizer_of",
]

LENGTH, SMALL_LENGTH = 50, 16
"""Ids of a text; longer texts are cut. The released scripts cut at 50 words, before these become ids."""

PIECES, SMALL_PIECES = 30522, 1000
"""The most word pieces of a vocabulary of the training texts; at full size as many as BERT-base has."""

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
"""Pieces that stand for no text, ids from 0."""

MENTIONS = 2
"""Times that two pieces must stand side by side in the training texts to become one."""

BESIDE = "\t"
"""Between a text and a second one that goes with it, such as the target that an opinion is about."""


def text_length(reading: Reading) -> int:
    """Return the ids of a text."""
    return SMALL_LENGTH if reading.small else LENGTH


def tokenizer_of(training: Sequence[str], reading: Reading) -> Any:
    """Return what turns texts into ids.

    Parameters
    ----------
    training : sequence of str
        Texts of the training split; word pieces are made of these, and no other, unless the text encoder's weights come
        from a folder.
    reading : Reading
        ``weights["text"]`` is the folder of a pretrained text encoder with its tokenizer, BERT's or CLIP's.

    Returns
    -------
    transformers tokenizer
        Its ``len()`` is the size of the vocabulary.

    Raises
    ------
    FileNotFoundError
        If the folder is not there.
    ValueError
        If it holds no tokenizer that can be read, or one whose padding has another id than 0 and that is not CLIP's.
    """
    folder = reading.weights.get("text")
    if folder is None:
        return _made(tuple(training), SMALL_PIECES if reading.small else PIECES)
    return _read(Path(folder))


def token_ids(texts: Sequence[str], tokenizer: Any, length: int) -> Tensor:
    """Return the ids of texts.

    A text in two parts becomes ``[CLS] text [SEP] second [SEP]``, and the longer part is cut first. A tokenizer that
    has no separator, CLIP's, is given one text, the second part before the first.

    Parameters
    ----------
    texts : sequence of str
        n texts, each in one part, or all in two with :data:`BESIDE` between.
    tokenizer : transformers tokenizer
        See :func:`tokenizer_of`.
    length : int
        Ids of a text.

    Returns
    -------
    Tensor
        int64, ``(n, length)``, 0 after the end of a text.
    """
    parts = [text.split(BESIDE) for text in texts]
    if tokenizer.sep_token is None:
        given = [[": ".join(reversed(part)) for part in parts]]
    else:
        given = [list(each) for each in zip(*parts, strict=True)]
    with _one_by_one():
        made = tokenizer(*given, truncation=True, max_length=length, padding="max_length")
    return torch.tensor(made["input_ids"]) * torch.tensor(made["attention_mask"])


def _read(folder: Path) -> Any:
    """Return the tokenizer in a folder."""
    from transformers import AutoTokenizer

    wanted = "expected a pretrained text encoder's folder with tokenizer.json, or vocab.txt and config.json"
    if not folder.is_dir():
        raise FileNotFoundError(f"weights of text are {str(folder)!r}, which is no folder, {wanted}")
    try:
        found = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"folder {folder} has no tokenizer that can be read, {wanted} ({reason})") from error
    if found.sep_token is not None and found.pad_token_id != 0:
        raise ValueError(
            f"the tokenizer in {folder} pads with id {found.pad_token_id}, expected 0, as BERT's does, or CLIP's"
        )
    return found


@lru_cache(maxsize=4)
def _made(texts: tuple[str, ...], size: int) -> Any:
    """Return a tokenizer of the word pieces of some texts, the same in every process.

    The library numbers pieces within words as a hash table has them, and settles ties by these numbers; so they are
    numbered for it.
    """
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    normalizer, splitter = normalizers.BertNormalizer(lowercase=True), pre_tokenizers.BertPreTokenizer()

    def with_pieces(model: Any) -> Any:
        tokenizer = Tokenizer(model)
        tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, splitter
        return tokenizer

    words = [text.replace(BESIDE, " ") for text in texts]
    letters = {letter for text in words for letter in normalizer.normalize_str(text) if not letter.isspace()}
    numbered = [*SPECIAL, *sorted(f"##{letter}" for letter in letters)]
    trainer = trainers.WordPieceTrainer(
        vocab_size=size, min_frequency=MENTIONS, show_progress=False, special_tokens=numbered
    )
    learner = with_pieces(models.WordPiece(unk_token="[UNK]"))
    with _one_by_one():
        learner.train_from_iterator(words, trainer)
    made = with_pieces(models.WordPiece(vocab=learner.get_vocab(), unk_token="[UNK]"))
    made.post_processor = processors.BertProcessing(
        ("[SEP]", SPECIAL.index("[SEP]")), ("[CLS]", SPECIAL.index("[CLS]"))
    )
    named = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), SPECIAL, strict=True))
    wrapped: Any = PreTrainedTokenizerFast
    return wrapped(tokenizer_object=made, **named)


@contextmanager
def _one_by_one() -> Iterator[None]:
    """Let the tokenizer use one thread, here: processes that are forked after it used several are warned about."""
    name = "TOKENIZERS_PARALLELISM"
    before = os.environ.get(name)
    os.environ[name] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
