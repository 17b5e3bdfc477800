"""Tokenizers of our own: subwords learnt from texts, and plain bytes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from isthmus.errors import InvalidInputError

END_ID, FIRST_BYTE = 1, 2
"""Ids of a text's end and of byte 0 in a tokenizer of bytes."""

PAD, END = "<pad>", "</s>"
"""Special tokens, ids 0 and 1: padding, which begins a decoder's text, and the end of a text."""


def sentinel(number: int) -> str:
    """Name of T5's sentinel of that number, counted from 0."""
    return f"<extra_id_{number}>"


def learn_tokenizer(
    texts: Iterable[str], vocab_size: int, *, sentinels: int = 0, split_digits: bool = True
) -> PreTrainedTokenizerFast:
    """Learn a byte-level BPE whose texts end with :data:`END`.

    Args:
        texts: What it is learnt from; every text of any script survives a round trip.
        vocab_size: Tokens at most: 256 bytes, the special ones and sentinels included.
        sentinels: Sentinels, which have the last ids, the first one the very last, as in T5.
        split_digits: Every digit is a token of its own.

    Raises:
        InvalidInputError: ``vocab_size`` has no room for the bytes.

    Example:
        >>> tokenizer = learn_tokenizer(["a stitch in time"] * 3, 300, sentinels=2)
        >>> ids = tokenizer("a stitch in <extra_id_0> 42").input_ids
        >>> tokenizer.decode(ids), len(tokenizer) - tokenizer.convert_tokens_to_ids("<extra_id_0>")
        ('a stitch in <extra_id_0> 42</s>', 1)
    """
    room = vocab_size - sentinels
    if room < 258:
        raise InvalidInputError(
            f"vocab_size must be at least {258 + sentinels}: 256 bytes, 2 special tokens and "
            f"{sentinels} sentinels; got {vocab_size}"
        )
    backend = Tokenizer(models.BPE())
    pieces: list[Any] = [pre_tokenizers.ByteLevel(add_prefix_space=False)]
    if split_digits:
        pieces.insert(0, pre_tokenizers.Digits(individual_digits=True))
    backend.pre_tokenizer = pre_tokenizers.Sequence(pieces)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=room,
        min_frequency=2,
        special_tokens=[PAD, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    names = [sentinel(n) for n in reversed(range(sentinels))]
    backend.add_special_tokens(names)
    backend.post_processor = processors.TemplateProcessing(
        single=f"$A {END}", special_tokens=[(END, backend.token_to_id(END))]
    )
    made: Any = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=names[::-1],
        clean_up_tokenization_spaces=False,
    )
    return made  # type: ignore[no-any-return]


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer whose tokens are the bytes of UTF-8; nothing is put at the end of a text.

    Byte b has the id ``b + FIRST_BYTE``, after :data:`PAD` and :data:`END`.

    Example:
        >>> tokenizer = byte_tokenizer()
        >>> ids = tokenizer("né").input_ids
        >>> bytes(i - FIRST_BYTE for i in ids).decode(), tokenizer.decode(ids)
        ('né', 'né')
    """
    letters = bytes_to_unicode()
    names = [PAD, END, *(letters[byte] for byte in range(256))]
    backend = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    made: Any = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=END,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,
    )
    return made  # type: ignore[no-any-return]


def stream(texts: Sequence[str]) -> torch.Tensor:
    """Bytes of texts, each with its end, int16 [N].

    Raises:
        InvalidInputError: A text holds half a character (a lone surrogate).

    Example:
        >>> (stream(["ab", "c"]) - FIRST_BYTE).tolist() == [97, 98, -1, 99, -1]
        True
    """
    parts = []
    for text in texts:
        try:
            known = np.frombuffer(text.encode(), np.uint8)
        except UnicodeEncodeError as error:
            raise InvalidInputError(
                f"a text cannot be written in UTF-8 ({error.reason}): "
                f"{text[max(0, error.start - 10) : error.start + 10]!a}; mend it or leave it out"
            ) from error
        parts += [known.astype(np.int16) + FIRST_BYTE, np.array([END_ID], np.int16)]
    return torch.from_numpy(np.concatenate(parts))


def learn_byte_pairs(
    files: Iterable[bytes], vocab_size: int, *, apart: str = ""
) -> PreTrainedTokenizerFast:
    r"""Byte-pair encoding of bytes that are no text; see :func:`as_text`.

    Args:
        files: What it is learnt from.
        vocab_size: Tokens, the 256 bytes and the end (id 0) included.
        apart: A pattern of letters of :func:`as_text`; what matches is never joined with what
            stands around it.

    Raises:
        InvalidInputError: Fewer tokens than bytes.

    Example:
        >>> tokenizer = learn_byte_pairs([b"\xff\x00\xff\x00"] * 3, 258)
        >>> len(tokenizer.encode(as_text(b"\xff\x00\xff\x01"))), len(tokenizer)
        (3, 258)
    """
    if vocab_size < 257:
        raise InvalidInputError(f"a vocabulary holds 256 bytes and an end, not {vocab_size} tokens")
    backend = Tokenizer(models.BPE())
    if apart:
        backend.pre_tokenizer = pre_tokenizers.Split(Regex(apart), behavior="isolated")
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=[chr(_FIRST + b) for b in range(256)],
        max_token_length=8,
        show_progress=False,
    )
    backend.train_from_iterator((as_text(f) for f in files), trainer)
    backend.decoder = decoders.Fuse()
    special = dict.fromkeys(("bos_token", "eos_token", "pad_token"), END)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, clean_up_tokenization_spaces=False, **special
    )


_FIRST = 0x100


def as_text(data: bytes) -> str:
    r"""A letter for each byte, from U+0100 on: no spaces or controls, which tokenizers change.

    Example:
        >>> as_text(b"\x00\x41"), as_bytes(as_text(b"\x00\x41"))
        ('ĀŁ', b'\x00A')
    """
    return "".join(chr(_FIRST + b) for b in data)


def as_bytes(text: str) -> bytes:
    """The bytes of :func:`as_text`; other letters are left out."""
    return bytes(ord(c) - _FIRST for c in text if _FIRST <= ord(c) < _FIRST + 256)
