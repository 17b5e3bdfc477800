"""The byte-level BPE tokenizer that all `pycode` models share, and one of whole words."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, cast

from tokenizers import (
    Regex,
    Tokenizer,
    decoders,
    models,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from isthmus.errors import InvalidInputError

END = "<|endoftext|>"

# Line ends and indentation stand alone: a prompt that ends after a colon, after a newline or after
# the indentation is then cut where training text is cut too, and continues naturally. Inside a line
# a word takes one space along.
_PIECES = (
    r"\n+"
    r"|(?<![^\n])[^\S\n]+"
    r"| ?[\p{L}_]+"
    r"| ?\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}_]+"
    r"|[^\S\n]+(?=[^\S\n])"
    r"|[^\S\n]+"
)


def word_tokenizer(words: Sequence[str]) -> PreTrainedTokenizerFast:
    """One token a word, in the order given; words stand between spaces.

    Args:
        words: The words; the first one begins, ends and pads, and stands for what is unknown.

    Example:
        >>> word_tokenizer(["<end>", "a", "b"]).encode("b a x")
        [2, 1, 0]
    """
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token=words[0]))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = dict.fromkeys(("bos_token", "eos_token", "pad_token", "unk_token"), words[0])
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def train_tokenizer(documents: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Learn a byte-level BPE; every text of any script survives a round trip.

    Args:
        documents: Training texts.
        vocab_size: Number of tokens, the 256 bytes and the end-of-text token included.

    Returns:
        A tokenizer whose one special token ``<|endoftext|>`` (id 0) begins, ends and pads.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        max_token_length=24,
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END,
        eos_token=END,
        pad_token=END,
        clean_up_tokenization_spaces=False,
        model_max_length=1024,
    )


CLS, MASK = "<|cls|>", "<|mask|>"


def masking_tokenizer(documents: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """As :func:`train_tokenizer`, with a token before every text and one for what is hidden.

    Args:
        documents: Training texts.
        vocab_size: Number of tokens, these two included.
    """
    tokenizer = train_tokenizer(documents, vocab_size - 2)
    tokenizer.add_special_tokens({"cls_token": CLS, "mask_token": MASK})
    first = tokenizer.convert_tokens_to_ids(CLS)
    backend: Any = tokenizer.backend_tokenizer
    backend.post_processor = processors.TemplateProcessing(
        single=f"{CLS} $A", special_tokens=[(CLS, first)]
    )
    return tokenizer


def load_tokenizer(directory: Path) -> PreTrainedTokenizerFast:
    """Load a tokenizer that was saved beside a model.

    Args:
        directory: Folder with ``tokenizer.json`` and ``tokenizer_config.json``.

    Returns:
        The tokenizer.
    """
    loaded: Any = PreTrainedTokenizerFast.from_pretrained(str(directory))
    # How it was loaded would otherwise be saved along, and the copy would differ from the original.
    for key in ("is_local", "local_files_only"):
        loaded.init_kwargs.pop(key, None)
    return cast(PreTrainedTokenizerFast, loaded)


def end_id(tokenizer: PreTrainedTokenizerFast) -> int:
    """Id of the end-of-text token.

    Args:
        tokenizer: A tokenizer with an end-of-text token.

    Returns:
        The id.

    Raises:
        InvalidInputError: The tokenizer has none.
    """
    end = cast("int | None", tokenizer.eos_token_id)
    if end is None:
        raise InvalidInputError(
            "the tokenizer has no end-of-text token to put between texts; set its eos_token"
        )
    return int(end)
