"""The `korean` data set: dates, times and numbers of Python code, written out in Korean.

A tokenizer that was trained on English code has no tokens for Hangul, so every syllable falls into
three bytes: what methods for excessively tokenised languages are measured on. A line is a piece of
code and what a Korean reader says for it::

    date(2021, 6, 4)  # 이천이십일년 유월 사일
    time(15, 25)  # 오후 세 시 이십오 분
    int(4073)  # 사천칠십삼

Order, suffixes and day periods are those of Unicode's CLDR for ``ko`` (long date, ``a h시 m분``);
numbers follow its spell-out rules: Sino-Korean for dates, minutes and numbers, native for hours,
with the two irregular months 유월 and 시월. A line belongs to the held-out part when a hash of its
code says so.
"""

from __future__ import annotations

import datetime
import functools
import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass

from transformers import PreTrainedTokenizerFast

from isthmus.errors import InvalidInputError
from isthmus.workbench import pycode
from isthmus.workbench.pycode import Split
from isthmus.workbench.tokenizer import train_tokenizer

VOCABULARY = 1024
"""Tokens of the tokenizer, learnt from code alone."""

HELD_OUT_PERCENT = 10
FIRST_YEAR, LAST_YEAR = 1900, 2099
_TOKENIZER_FILES = 150
_DIGITS = "영일이삼사오육칠팔구"
_PLACES = ((1000, "천"), (100, "백"), (10, "십"))
_MONTHS = (
    "일월",
    "이월",
    "삼월",
    "사월",
    "오월",
    "유월",
    "칠월",
    "팔월",
    "구월",
    "시월",
    "십일월",
    "십이월",
)
_HOURS = ("열두", "한", "두", "세", "네", "다섯", "여섯", "일곱", "여덟", "아홉", "열", "열한")
_MORNING, _AFTERNOON = "오전", "오후"


@dataclass(frozen=True)
class Line:
    """One line of code and its reading.

    Attributes:
        prompt: The code, up to the comment sign.
        answer: The reading, with the space before it.
    """

    prompt: str
    answer: str

    @property
    def text(self) -> str:
        """Both."""
        return self.prompt + self.answer


def numeral(n: int) -> str:
    """A number from 0 to 9999 in Sino-Korean.

    Raises:
        InvalidInputError: It is out of range.

    Example:
        >>> numeral(4073), numeral(1110), numeral(0)
        ('사천칠십삼', '천백십', '영')
    """
    if not 0 <= n <= 9999:
        raise InvalidInputError(f"numerals go from 0 to 9999, got {n}")
    text, rest = "", n
    for value, name in _PLACES:
        digit, rest = divmod(rest, value)
        if digit:
            text += (_DIGITS[digit] if digit > 1 else "") + name
    return text + _DIGITS[rest] if rest or not n else text


def read_date(day: datetime.date) -> Line:
    """A date.

    Example:
        >>> read_date(datetime.date(2021, 6, 4)).text
        'date(2021, 6, 4)  # 이천이십일년 유월 사일'
    """
    said = f" {numeral(day.year)}년 {_MONTHS[day.month - 1]} {numeral(day.day)}일"
    return Line(f"date({day.year}, {day.month}, {day.day})  #", said)


def read_time(hour: int, minute: int) -> Line:
    """A time of day.

    Raises:
        InvalidInputError: There is no such time.

    Example:
        >>> read_time(15, 25).answer, read_time(0, 0).answer
        (' 오후 세 시 이십오 분', ' 오전 열두 시')
    """
    if not (0 <= hour < 24 and 0 <= minute < 60):
        raise InvalidInputError(f"there is no time {hour}:{minute:02d}")
    said = f" {_AFTERNOON if hour >= 12 else _MORNING} {_HOURS[hour % 12]} 시"
    said += f" {numeral(minute)} 분" if minute else ""
    return Line(f"time({hour}, {minute})  #", said)


def read_number(n: int) -> Line:
    """A number; see :func:`numeral`."""
    return Line(f"int({n})  #", f" {numeral(n)}")


def _draw_date(rng: random.Random) -> Line:
    first = datetime.date(FIRST_YEAR, 1, 1).toordinal()
    last = datetime.date(LAST_YEAR, 12, 31).toordinal()
    return read_date(datetime.date.fromordinal(rng.randint(first, last)))


_KINDS: tuple[Callable[[random.Random], Line], ...] = (
    _draw_date,
    lambda rng: read_time(rng.randrange(24), rng.randrange(60)),
    lambda rng: read_number(rng.randrange(10_000)),
)


def is_held_out(line: Line) -> bool:
    """Whether a line belongs to the held-out part."""
    value = hashlib.sha256(f"korean/{line.prompt}".encode()).digest()
    return int.from_bytes(value[:8], "big") % 100 < HELD_OUT_PERCENT


def lines(count: int, split: Split = "held-out", *, seed: int | str = 0) -> list[Line]:
    """Draw lines: a random kind, then a random one of that kind.

    Args:
        count: How many.
        split: ``"train"`` or ``"held-out"``.
        seed: Other seeds give other lines.

    Raises:
        InvalidInputError: No such split, or a negative count.
    """
    if split not in ("train", "held-out") or count < 0:
        raise InvalidInputError(
            f"split is {split!r} and count {count}; they must be 'train' or 'held-out', and 0 or "
            "more"
        )
    rng = random.Random(f"korean/{split}/{seed}")
    found: list[Line] = []
    while len(found) < count:
        line = rng.choice(_KINDS)(rng)
        if is_held_out(line) == (split == "held-out"):
            found.append(line)
    return found


@functools.lru_cache(maxsize=1)
def tokenizer() -> PreTrainedTokenizerFast:
    """The byte-level BPE of code: its merges know no Hangul.

    Raises:
        IsthmusError: This interpreter has no standard-library source.
    """
    return train_tokenizer(pycode.texts("train")[:_TOKENIZER_FILES], VOCABULARY)


def digest() -> str:
    """Hash of a sample of both parts and of the tokenizer's settings."""
    state = hashlib.sha256(f"{VOCABULARY}/{_TOKENIZER_FILES}".encode())
    for split in ("train", "held-out"):
        for line in lines(64, split, seed="digest"):
            state.update(f"{line.text}\n".encode())
    return state.hexdigest()
