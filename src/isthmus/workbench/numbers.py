"""The `numbers` data set: numbers from 0 to 9999 in words of four languages, and their digits.

>>> spell(4321, "de"), spell(4321, "en")
('viertausenddreihunderteinundzwanzig', 'four thousand three hundred twenty-one')
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable

from isthmus.errors import InvalidInputError, UnknownNameError
from isthmus.training.data import Data, Pair

LAST = 9_999
HELD_OUT_PERCENT = 10


def _words(text: str) -> list[str]:
    return text.split()


_EN = _words(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
    "sixteen seventeen eighteen nineteen"
)
_EN_TENS = _words("twenty thirty forty fifty sixty seventy eighty ninety")
_DE = _words(
    "null eins zwei drei vier fünf sechs sieben acht neun zehn elf zwölf dreizehn vierzehn "
    "fünfzehn sechzehn siebzehn achtzehn neunzehn"
)
_DE_TENS = _words("zwanzig dreißig vierzig fünfzig sechzig siebzig achtzig neunzig")
_NL = _words(
    "nul een twee drie vier vijf zes zeven acht negen tien elf twaalf dertien veertien vijftien "
    "zestien zeventien achttien negentien"
)
_NL_TENS = _words("twintig dertig veertig vijftig zestig zeventig tachtig negentig")
_SV = _words(
    "noll ett två tre fyra fem sex sju åtta nio tio elva tolv tretton fjorton femton sexton "
    "sjutton arton nitton"
)
_SV_TENS = _words("tjugo trettio fyrtio femtio sextio sjuttio åttio nittio")


def _english(n: int) -> str:
    if n < 20:
        return _EN[n]
    if n < 100:
        return _EN_TENS[n // 10 - 2] + (f"-{_EN[n % 10]}" if n % 10 else "")
    size, word = (1000, "thousand") if n >= 1000 else (100, "hundred")
    rest = f" {_english(n % size)}" if n % size else ""
    return f"{_english(n // size)} {word}{rest}"


def _german(n: int) -> str:
    if n < 20:
        return _DE[n]
    if n < 100:
        one = {0: "", 1: "einund"}.get(n % 10, f"{_DE[n % 10]}und")
        return one + _DE_TENS[n // 10 - 2]
    size, word = (1000, "tausend") if n >= 1000 else (100, "hundert")
    head = "ein" if n // size == 1 else _german(n // size)
    return f"{head}{word}{_german(n % size) if n % size else ''}"


def _dutch(n: int) -> str:
    if n < 20:
        return _NL[n]
    if n < 100:
        one = _NL[n % 10]
        joint = "" if not n % 10 else f"{one}ën" if one[-1] == "e" else f"{one}en"
        return joint + _NL_TENS[n // 10 - 2]
    size, word, space = (1000, "duizend", " ") if n >= 1000 else (100, "honderd", "")
    head = "" if n // size == 1 else _dutch(n // size)
    return f"{head}{word}{space + _dutch(n % size) if n % size else ''}"


def _swedish(n: int) -> str:
    if n < 20:
        return _SV[n]
    if n < 100:
        return _SV_TENS[n // 10 - 2] + (_SV[n % 10] if n % 10 else "")
    size, word = (1000, "tusen") if n >= 1000 else (100, "hundra")
    head = f"{_swedish(n // size)}{word}".replace("ttt", "tt")
    return f"{head}{_swedish(n % size) if n % size else ''}"


LANGUAGES: dict[str, Callable[[int], str]] = {
    "en": _english,
    "de": _german,
    "nl": _dutch,
    "sv": _swedish,
}
"""The languages by their ISO 639 code."""


def spell(number: int, language: str) -> str:
    """A number in words.

    Raises:
        UnknownNameError: No such language.
        InvalidInputError: Not within 0 and 9999.
    """
    if language not in LANGUAGES:
        raise UnknownNameError("language", language, LANGUAGES)
    if not 0 <= number <= LAST:
        raise InvalidInputError(f"numbers from 0 to {LAST} are spelt, not {number}")
    return LANGUAGES[language](number)


def is_held_out(number: int) -> bool:
    """Whether a number is kept from training, in every language."""
    value = hashlib.sha256(f"numbers/{number}".encode()).digest()
    return int.from_bytes(value[:8], "big") % 100 < HELD_OUT_PERCENT


def pairs(count: int, *, held_out: bool = False, seed: int | str = 0) -> list[Pair]:
    """Draw numbers in words, with their digits; every language and every length alike.

    Args:
        count: How many.
        held_out: Of the held-out numbers.
        seed: Other seeds give other pairs.
    """
    rng = random.Random(f"numbers/{held_out}/{seed}")
    codes, found = list(LANGUAGES), list[Pair]()
    while len(found) < count:
        number = rng.randrange(10 ** rng.randint(1, 4))
        if is_held_out(number) == held_out:
            found.append(Pair(spell(number, rng.choice(codes)), str(number)))
    return found


def data() -> Data[Pair]:
    """Pairs to learn from and held-out ones."""
    return Data(pairs(20_000), pairs(500, held_out=True))
