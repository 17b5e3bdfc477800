"""Bytes under tokens: what each token of a vocabulary writes, whatever kind of tokenizer it is."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from transformers.convert_slow_tokenizer import bytes_to_unicode

from isthmus.errors import InvalidInputError

SPACE = "▁"
"""What stands for a space in vocabularies of SentencePiece."""


Bytes = bytes  # inside the class, the name is a method's


class ByteVocab:
    """The bytes of every token.

    Args:
        tokenizer: A fast tokenizer of transformers: byte-level, or with ``▁`` for spaces.

    Raises:
        InvalidInputError: What its tokens write depends on where they stand, or is unknown.
    """

    def __init__(self, tokenizer: Any) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise InvalidInputError("only fast tokenizers tell the bytes of their tokens")
        parts = json.loads(backend.to_str())
        kinds = set(
            re.findall(r'"type": ?"(\w+)"', json.dumps([parts["decoder"], parts["pre_tokenizer"]]))
        )
        model = parts["model"].get("type", "")
        self._encode = backend.encode
        self._byte_level = "ByteLevel" in kinds
        spaces = SPACE in json.dumps(parts["decoder"], ensure_ascii=False)
        if not self._byte_level and not (model in ("BPE", "Unigram") and spaces):
            raise InvalidInputError(
                f"what a token of this tokenizer ({model or 'unknown'}) writes depends on where it "
                "stands; use one that is byte-level or writes spaces as ▁"
            )
        special = {*tokenizer.all_special_ids}
        special |= {t["id"] for t in parts["added_tokens"] if t["special"]}
        added = {t["id"]: t["content"].encode() for t in parts["added_tokens"]}
        letters = {letter: byte for byte, letter in bytes_to_unicode().items()}
        self._bytes: list[bytes | None] = []
        for i, token in enumerate(tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))):
            if token is None or i in special:
                self._bytes.append(None)
            elif i in added:
                self._bytes.append(added[i])
            elif self._byte_level:
                self._bytes.append(bytes(letters[c] for c in token))
            elif re.fullmatch("<0x[0-9A-F]{2}>", token):
                self._bytes.append(bytes([int(token[3:5], 16)]))
            else:
                self._bytes.append(token.replace(SPACE, " ").encode())

    def bytes(self, token: int) -> Bytes | None:
        """What a token writes; None for special ones and those beyond the tokenizer."""
        return self._bytes[token] if 0 <= token < len(self._bytes) else None

    def decode(self, tokens: Sequence[int]) -> Bytes:
        """What tokens write together."""
        return b"".join(self.bytes(token) or b"" for token in tokens)

    def encode(self, text: Bytes) -> list[int]:
        """Canonical tokens of bytes in the middle of a text.

        Bytes that are no text, or that the tokenizer changes, are covered by the longest tokens.
        """
        try:
            whole = text.decode()
        except UnicodeDecodeError:
            return self._longest(text)
        lead = "" if self._byte_level else "\n"  # or a space would be put in front
        ids: list[int] = self._encode(lead + whole, add_special_tokens=False).ids
        if lead:
            seen = b""
            while ids and not seen.endswith(b"\n"):
                seen += self.bytes(ids.pop(0)) or b"\0"
        return ids if self.decode(ids) == text else self._longest(text)

    @cached_property
    def _ids(self) -> dict[Bytes, int]:
        return {b: i for i, b in reversed(list(enumerate(self._bytes))) if b}

    def _longest(self, text: Bytes) -> list[int]:
        ids, at, most = [], 0, max(map(len, self._ids))
        while at < len(text):
            ends = range(min(len(text), at + most), at, -1)
            end = next((e for e in ends if text[at:e] in self._ids), 0)
            if not end:
                raise InvalidInputError(f"no token writes the byte {text[at]:#04x}")
            ids.append(self._ids[text[at:end]])
            at = end
        return ids
