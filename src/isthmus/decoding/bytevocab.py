"""Bytes under tokens: what each token of a vocabulary writes, whatever kind of tokenizer it is.

A token stands for bytes: through the byte letters of a byte-level BPE, through ``▁`` for a space
and ``<0x0A>`` for a byte in vocabularies of SentencePiece. Two models with different vocabularies
meet there. A sequence of tokens is *canonical* when the tokenizer itself would write its text so;
models are trained on canonical sequences only, so others say nothing about a text.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_left
from collections.abc import Callable, Sequence
from functools import cached_property
from itertools import zip_longest
from typing import Any

from transformers.convert_slow_tokenizer import bytes_to_unicode

from isthmus.errors import InvalidInputError

SPACE = "▁"
"""What stands for a space in vocabularies of SentencePiece."""

PROBES = (b"", b"a", b" ", b"\n", b".", b"0")
"""What may follow a text, one of each class that pre-tokenizers look ahead for."""

WINDOW = 16
"""Tokens before a new one that decide how it is cut."""

Bytes = bytes  # inside the class, the name is a method's


class ByteVocab:
    """The bytes of every token, and the canonical tokens of bytes.

    Args:
        tokenizer: A fast tokenizer of transformers: byte-level, or with ``▁`` for spaces.

    Attributes:
        lead: What the tokenizer writes in front of a text that begins: a space, or nothing.
        normalises: Names of what changes a text before it is cut (lower case, NFKC, ...): its
            bytes are then not those of its tokens. Empty where there is none.
        size: Tokens of the tokenizer.

    Raises:
        InvalidInputError: What its tokens write depends on where they stand (WordPiece), or is
            unknown.
    """

    def __init__(self, tokenizer: Any) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise InvalidInputError("only fast tokenizers tell the bytes of their tokens")
        parts = json.loads(backend.to_str())
        decoder = json.dumps([parts["decoder"], parts["pre_tokenizer"]], ensure_ascii=False)
        kinds = set(re.findall(r'"type": ?"(\w+)"', decoder))
        model = parts["model"].get("type", "")
        byte_level = "ByteLevel" in kinds
        spaces = SPACE in json.dumps(parts["decoder"], ensure_ascii=False)
        if not byte_level and not (model in ("BPE", "Unigram") and spaces):
            raise InvalidInputError(
                f"what a token of this tokenizer ({model or 'unknown'}) writes depends on where it "
                "stands; use one that is byte-level or writes spaces as ▁"
            )
        special = {*tokenizer.all_special_ids}
        special |= {t["id"] for t in parts["added_tokens"] if t["special"]}
        added = {t["id"]: t["content"].encode() for t in parts["added_tokens"]}
        letters = {letter: byte for byte, letter in bytes_to_unicode().items()}
        table: list[bytes | None] = []
        for i, token in enumerate(tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))):
            if token is None or i in special:
                table.append(None)
            elif i in added:
                table.append(added[i])
            elif byte_level:
                table.append(bytes(letters[c] for c in token))
            elif re.fullmatch("<0x[0-9A-F]{2}>", token):
                table.append(bytes([int(token[3:5], 16)]))
            else:
                table.append(token.replace(SPACE, " ").encode())
        self.normalises = tuple(_changes(parts["normalizer"]))
        self._backend: Any = backend
        self._cut: Callable[[bytes], list[int]] | None = None
        self._bytes = table
        self.lead = b""
        written = self.decode(backend.encode("a", add_special_tokens=False).ids)
        self.lead = written[:-1] if written.endswith(b"a") else b""

    @classmethod
    def of(
        cls, table: Sequence[Bytes | None], cut: Callable[[Bytes], list[int]] | None = None
    ) -> ByteVocab:
        """A vocabulary without a tokenizer.

        Args:
            table: What each token writes; None for special ones.
            cut: Canonical tokens of bytes; the longest token from the left, again and again
                (maximum prefix encoding), when None.

        Example:
            >>> vocab = ByteVocab.of([b"a", b"b", b"ab", None])
            >>> vocab.encode(b"aab"), vocab.is_canonical([0, 0, 1]), vocab.starting(b"a")
            ([0, 2], False, [0, 2])
        """
        vocab = object.__new__(cls)
        vocab.lead, vocab.normalises = b"", ()
        vocab._backend, vocab._bytes = None, list(table)
        vocab._cut = cut or vocab._longest
        return vocab

    @property
    def size(self) -> int:
        """Tokens of the tokenizer."""
        return len(self._bytes)

    def bytes(self, token: int) -> Bytes | None:
        """What a token writes; None for special ones and those beyond the tokenizer."""
        return self._bytes[token] if 0 <= token < len(self._bytes) else None

    def decode(self, tokens: Sequence[int]) -> Bytes:
        """What tokens write together."""
        return b"".join(self.bytes(token) or b"" for token in tokens)

    def same_bytes(self, other: ByteVocab) -> bool:
        """Whether equal ids write equal bytes in both."""
        return self.differs(other) is None

    def differs(self, other: ByteVocab) -> int | None:
        """The first token that writes other bytes in the other one, or None.

        Tokens that write nothing pad a vocabulary: it may be longer by those.
        """
        pairs = zip_longest(self._bytes, other._bytes)
        return next((i for i, (a, b) in enumerate(pairs) if a != b), None)

    def encode(self, text: Bytes) -> list[int]:
        """Canonical tokens of bytes in the middle of a text.

        Bytes that are no text, such as a character cut in two, and text that the tokenizer changes
        are covered by the longest tokens.

        Raises:
            InvalidInputError: A byte is written by no token.
        """
        return self.encode_all([text])[0]

    def encode_all(self, texts: Sequence[Bytes]) -> list[list[int]]:
        """Canonical tokens of each of many texts."""
        if self._cut is not None:
            return [self._cut(text) for text in texts]
        wholes = [_text(text) for text in texts]
        lead = "\n" if self.lead else ""  # or a space would be put in front
        cut = self._backend.encode_batch_fast(
            [lead + whole for whole in wholes], add_special_tokens=False
        )
        out = []
        for text, whole, encoding in zip(texts, wholes, cut, strict=True):
            ids: list[int] = encoding.ids
            if lead:
                seen = b""
                while ids and not seen.endswith(b"\n"):
                    seen += self.bytes(ids.pop(0)) or b"\0"
            head = whole.encode()
            if self.decode(ids) != head:
                ids = self._longest(head)
            out.append(ids + self._longest(text[len(head) :]))
        return out

    def is_canonical(self, tokens: Sequence[int]) -> bool:
        """Whether the tokenizer itself would write this text with these tokens."""
        return self.encode(self.decode(tokens)) == list(tokens)

    def may_begin(self, before: Sequence[int], tokens: Sequence[int]) -> list[bool]:
        """For each token: may a canonical text begin with ``before`` and this token?

        A canonical text can begin with tokens that are not canonical on their own, for
        pre-tokenizers look ahead; so one character of each class is tried as what follows. Text
        that ends inside a character may always be gone on with.

        Args:
            before: Tokens that may begin a canonical text, no special ones.
            tokens: Candidates for the next one.
        """
        window = list(before[-WINDOW:])
        while window and len(window) < len(before) and _broken(self.decode(window)):
            window.insert(0, before[-len(window) - 1])  # no text begins inside a character
        whole = len(window) == len(before)
        kept = window if whole else window[WINDOW // 2 :]
        head, known = self.decode(window), self.decode(kept)
        may = [False] * len(tokens)
        for probe in self.probes:
            left = [j for j, done in enumerate(may) if not done]
            if not left:
                break
            texts = [head + (self.bytes(tokens[j]) or b"") + probe for j in left]
            for j, text, ids in zip(left, texts, self.encode_all(texts), strict=True):
                own = [*kept, tokens[j]]
                at, skipped = 0, 0
                while at < len(ids) and skipped < len(head) - len(known):
                    skipped += len(self.bytes(ids[at]) or b"")
                    at += 1
                aligned = skipped == len(head) - len(known)
                may[j] = (aligned and ids[at : at + len(own)] == own) or (
                    not probe and len(_text(text).encode()) < len(text)
                )
        return may

    def starting(self, prefix: Bytes) -> list[int]:
        """Tokens whose bytes start with a prefix, in the order of their bytes."""
        words, ids = self._sorted
        low = bisect_left(words, prefix)
        if not prefix:
            return list(ids)
        high = bisect_left(words, _after(prefix), low) if _after(prefix) else len(words)
        return ids[low:high]

    @cached_property
    def probes(self) -> tuple[Bytes, ...]:
        """One beginning of each class of what may follow a text, as far as tokens write it."""
        return tuple(probe for probe in PROBES if all(self.starting(probe[:1]) for _ in probe))

    @cached_property
    def longest(self) -> int:
        """Bytes of the longest token."""
        return max((len(b) for b in self._bytes if b), default=0)

    @cached_property
    def _sorted(self) -> tuple[list[Bytes], list[int]]:
        pairs = sorted((b, i) for i, b in enumerate(self._bytes) if b)
        return [b for b, _ in pairs], [i for _, i in pairs]

    @cached_property
    def _ids(self) -> dict[Bytes, int]:
        return {b: i for i, b in reversed(list(enumerate(self._bytes))) if b}

    def _longest(self, text: Bytes) -> list[int]:
        ids, at = [], 0
        while at < len(text):
            ends = range(min(len(text), at + self.longest), at, -1)
            end = next((e for e in ends if text[at:e] in self._ids), 0)
            if not end:
                raise InvalidInputError(f"no token writes the byte {text[at]:#04x}")
            ids.append(self._ids[text[at:end]])
            at = end
        return ids


def _changes(normalizer: Any) -> list[str]:
    """Names of the normalisers that change more than where spaces stand and how accents join."""
    if normalizer is None:
        return []
    kind = normalizer["type"]
    if kind == "Sequence":
        return [name for part in normalizer["normalizers"] for name in _changes(part)]
    space = kind == "Replace" and normalizer["pattern"] == {"String": " "}
    return [] if space or kind in ("Prepend", "NFC") else [kind]


def _text(data: bytes) -> str:
    """The longest beginning of bytes that is text."""
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        return data[: error.start].decode()


def _broken(data: bytes) -> bool:
    """Whether bytes begin inside a character."""
    return bool(data) and data[0] & 0xC0 == 0x80


def _after(prefix: bytes) -> bytes:
    """The least bytes above all that start with a prefix; empty where there are none."""
    cut = prefix.rstrip(b"\xff")
    return cut[:-1] + bytes([cut[-1] + 1]) if cut else b""
