"""Where an answer ends, token by token, also inside an accepted block.

Whether to stop depends on the prefix alone, so cutting a block leaves the law unchanged. Assisted
generation in transformers looks at the end of a block only and can run past its criterion.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from isthmus.errors import InvalidInputError


class Detokenizer:
    """Text of a growing token list, without ever taking back what was given out.

    A token may end inside a character; such text is held until the character is whole.

    Args:
        tokenizer: A tokenizer of transformers.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._tokens: list[int] = []
        self._shown = 0  # tokens whose text is out
        self._start = 0  # decode from here: spaces depend on the token before
        self.text = ""

    def _decode(self, tokens: list[int]) -> str:
        text: str = self._tokenizer.decode(tokens, skip_special_tokens=True)
        return text

    def push(self, tokens: Sequence[int], *, last: bool = False) -> str:
        """Add tokens and return the new text; with ``last``, held text is let go."""
        self._tokens += tokens
        before = self._decode(self._tokens[self._start : self._shown])
        after = self._decode(self._tokens[self._start :])
        if not last and (after.endswith("\ufffd") or len(after) < len(before)):
            return ""
        self._start, self._shown = self._shown, len(self._tokens)
        new = after[len(before) :]
        self.text += new
        return new


class Stopper:
    """Stop rules of one request.

    Args:
        max_new_tokens: Budget.
        end_tokens: Token ids that end the answer; the id itself is kept.
        stop: Strings that end the answer; the text is cut before them, tokens stay whole.
        criteria: Called with the list of all new tokens so far; true ends the answer after them,
            and a string is the reason.
        tokenizer: Needed for ``stop``.

    Attributes:
        reason: Why the answer ended, ``""`` while it has not.
        text: With ``stop``: the text up to the stop string, else None.

    Raises:
        InvalidInputError: Stop strings without a tokenizer, or an empty one.

    Example:
        >>> s = Stopper(max_new_tokens=10, end_tokens=[0])
        >>> s.cut([], [4, 0, 7]), s.reason
        (2, 'stop')
    """

    def __init__(
        self,
        *,
        max_new_tokens: int,
        end_tokens: Sequence[int] = (),
        stop: Sequence[str] = (),
        criteria: Callable[[list[int]], bool | str] | None = None,
        tokenizer: Any = None,
    ) -> None:
        if any(not s for s in stop):
            raise InvalidInputError("a stop string must not be empty")
        if stop and tokenizer is None:
            raise InvalidInputError("stop strings need a tokenizer; this model was loaded without")
        self.max_new_tokens = max_new_tokens
        self.end_tokens = frozenset(end_tokens)
        self.stop = tuple(stop)
        self.criteria = criteria
        self.reason = ""
        self.text: str | None = None
        self._detokenizer = Detokenizer(tokenizer) if stop else None

    def cut(self, so_far: list[int], new: list[int]) -> int:
        """How many of the new tokens stand after ``so_far``; sets ``reason`` at the end."""
        room = self.max_new_tokens - len(so_far)
        if self._detokenizer is None and self.criteria is None:
            if len(new) == 1 and room > 1:  # what nearly every round of plain decoding asks
                self.reason = "stop" if new[0] in self.end_tokens else self.reason
                return 1
            for i, token in enumerate(new[:room]):
                if token in self.end_tokens:
                    self.reason = "stop"
                    return i + 1
        else:
            for i, token in enumerate(new[:room]):
                if self._ends(so_far, new[: i + 1], token):
                    return i + 1
        if len(new) >= room:
            self.reason = "length"
        return min(len(new), room)

    def _ends(self, so_far: list[int], new: list[int], token: int) -> bool:
        if self._detokenizer is not None:
            known = len(self._detokenizer.text)
            fresh = self._detokenizer.push([token], last=token in self.end_tokens)
            text = self._detokenizer.text
            if fresh:
                longest = max(map(len, self.stop))
                found = [text.find(s, max(0, known - longest + 1)) for s in self.stop]
                hits = [f for f in found if f >= 0]
                if hits:
                    self.reason, self.text = "stop", text[: min(hits)]
                    return True
        if token in self.end_tokens:
            self.reason = "stop"
            return True
        over = self.criteria(so_far + new) if self.criteria is not None else False
        if over:
            self.reason = over if isinstance(over, str) else "criteria"
        return bool(over)
