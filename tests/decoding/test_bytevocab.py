"""Bytes under tokens, for every kind of tokenizer, and what is canonical, against enumeration."""

import json
from itertools import product

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from isthmus.decoding.bytevocab import ByteVocab
from isthmus.errors import InvalidInputError

TEXT = ["aab ab  aba b", "abab   aab b", "def f(x):\n    return ü ", "a b  ab ba"] * 4


def fast(made: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<s>", pad_token="<s>")


def byte_level(size: int = 290, prefix: bool = False) -> PreTrainedTokenizerFast:
    """As GPT-2: its pre-tokenizer looks ahead at what follows spaces."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=["<s>"], initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(TEXT, trainer)
    return fast(made)


def sentencepiece() -> PreTrainedTokenizerFast:
    """As Llama 2: a space in front of everything, and bytes for what is unknown."""
    pieces = [f"<0x{i:02X}>" for i in range(256)]
    learnt = Tokenizer(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=["<s>", *pieces], show_progress=False
    )
    learnt.train_from_iterator(["\n" + t.replace(" ", "▁") for t in TEXT], trainer)
    parts = json.loads(learnt.to_str())["model"]
    merges = [tuple(pair) for pair in parts["merges"]]
    made = Tokenizer(models.BPE(parts["vocab"], merges, byte_fallback=True, fuse_unk=True))
    made.add_special_tokens(["<s>"])
    made.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return fast(made)


def unigram() -> PreTrainedTokenizerFast:
    """As T5, without its normaliser."""
    made = Tokenizer(models.Unigram())
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    made.decoder = decoders.Metaspace(prepend_scheme="always")
    trainer = trainers.UnigramTrainer(vocab_size=60, special_tokens=["<s>"], show_progress=False)
    made.train_from_iterator(TEXT, trainer)
    return fast(made)


@pytest.mark.parametrize("make", [byte_level, sentencepiece, unigram])
def test_tokens_write_their_text(make: object) -> None:
    tokenizer = make()  # type: ignore[operator]
    vocab = ByteVocab(tokenizer)
    assert vocab.lead == (b"" if make is byte_level else b" ")
    for text in ("aab ab b", "ab aba", "return"):
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert vocab.decode(ids) == vocab.lead + text.encode()
        assert vocab.is_canonical(vocab.encode(text.encode()))
    assert vocab.bytes(tokenizer.eos_token_id) is None
    assert vocab.bytes(10**6) is None
    assert not vocab.normalises


@pytest.mark.parametrize("make", [byte_level, sentencepiece])
def test_any_bytes_can_be_written(make: object) -> None:
    vocab = ByteVocab(make())  # type: ignore[operator]
    for text in ("ü€".encode()[:3], b"\xffab\x00", b"ab \xc3", b""):
        assert vocab.decode(vocab.encode(text)) == text


def test_prefix_space_of_byte_level_tokenizers() -> None:
    vocab = ByteVocab(byte_level(prefix=True))
    assert vocab.lead == b" "
    assert vocab.decode(vocab.encode(b"ab")) == b"ab"


def test_tokens_are_found_by_what_they_start_with() -> None:
    vocab = ByteVocab.of([b"b", b"ab", b"a", None, b"\xff", b"\xff\xff", b"abc"])
    assert vocab.starting(b"a") == [2, 1, 6]
    assert vocab.starting(b"ab") == [1, 6]
    assert vocab.starting(b"\xff") == [4, 5]
    assert vocab.starting(b"x") == []
    assert sorted(vocab.starting(b"")) == [0, 1, 2, 4, 5, 6]


def test_what_may_begin_a_canonical_text_equals_enumeration() -> None:
    """All texts of up to 7 letters over a, b and space, cut by a tokenizer that looks ahead."""
    vocab = ByteVocab(byte_level(275))
    # each text goes on with one more letter than is looked at, for that decides the last cut
    texts = ["".join(letters) for n in range(8) for letters in product("ab ", repeat=n)]
    begun = set()
    for ids in vocab.encode_all([t.encode() for t in texts]):
        begun |= {tuple(ids[:k]) for k in range(len(ids) + 1)}
    words = [i for i in vocab.starting(b"") if set(vocab.bytes(i) or b"") <= set(b"ab ")]
    assert len(words) > 8
    asked = 0
    for before in [b for b in begun if len(vocab.decode(b)) <= 4]:
        fit = [w for w in words if len(vocab.decode([*before, w])) <= 5]
        found = vocab.may_begin(before, fit)
        assert found == [(*before, w) in begun for w in fit]
        asked += len(fit)
    assert asked > 500
    spaces = vocab.encode(b"   ")
    assert vocab.may_begin(vocab.encode(b"a"), spaces[:1]) == [True]


def test_a_long_past_changes_nothing() -> None:
    vocab = ByteVocab(byte_level(275))
    past = vocab.encode(b"ab ba aab " * 20 + b"a")
    words = vocab.starting(b"")
    near = vocab.may_begin(vocab.encode(b"ab ba aab a"), words)
    assert vocab.may_begin(past, words) == near


def test_wordpiece_is_refused_and_normalising_is_told() -> None:
    pieces = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1, "##a": 2}, unk_token="[UNK]"))
    pieces.decoder = decoders.WordPiece()
    with pytest.raises(InvalidInputError, match="WordPiece"):
        ByteVocab(PreTrainedTokenizerFast(tokenizer_object=pieces, unk_token="[UNK]"))
    lower = byte_level()
    lower.backend_tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Lowercase()]
    )
    assert ByteVocab(lower).normalises == ("Lowercase",)
    with pytest.raises(InvalidInputError, match="fast"):
        ByteVocab(object())


def test_vocabularies_are_compared_by_bytes() -> None:
    one, other = ByteVocab.of([b"a", b"b"]), ByteVocab.of([b"b", b"a"])
    assert one.same_bytes(ByteVocab.of([b"a", b"b"]))
    assert not one.same_bytes(other)
    with pytest.raises(InvalidInputError, match="0x63"):
        one.encode(b"abc")
