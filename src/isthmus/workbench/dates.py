"""The `dates` data set: a date as people write it in many languages, and its ISO form.

The task of a small encoder-decoder: read ``"Donnerstag, 4. März 2021"`` and write
``"2021-03-04"``. Every part of the output is decided by the source, so a drafter that looks at the
source can write many tokens at once. Written by hand for fifteen languages; only ways of writing
that leave no doubt are used (no ``3/4/2021``), so each source has one right answer.

A date belongs to the held-out part when a hash of its ISO form says so: no way of writing it is
then seen in training.
"""

from __future__ import annotations

import datetime
import functools
import hashlib
import random
import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors

from isthmus.errors import InvalidInputError, UnknownNameError
from isthmus.training.data import Aligned
from isthmus.workbench.pycode import Split

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PAD, START, END, UNKNOWN = "<|pad|>", "<|start|>", "<|end|>", "<|unknown|>"
"""Special tokens, ids 0 to 3; START begins the decoder's text, END ends both sides."""

HELD_OUT_PERCENT = 10
FIRST_YEAR, LAST_YEAR = 1900, 2099


@dataclass(frozen=True)
class Language:
    """How one language writes dates.

    Attributes:
        months: Names of the twelve months as they stand in a date.
        forms: Ways of writing; ``{d}`` is the day, ``{dd}`` the day in two digits, ``{m}`` and
            ``{mm}`` the month in digits, ``{month}`` its name, ``{y}`` the year, ``{w}`` the day of
            the week.
        weekdays: Names of the seven days from Monday; empty where no form uses them.
    """

    months: tuple[str, ...]
    forms: tuple[str, ...]
    weekdays: tuple[str, ...] = ()


def _language(months: str, *forms: str, weekdays: str = "") -> Language:
    return Language(tuple(months.split()), forms, tuple(weekdays.split()))


LANGUAGES: dict[str, Language] = {
    "en": _language(
        "January February March April May June July August September October November December",
        "{month} {d}, {y}",
        "{d} {month} {y}",
        "{w}, {d} {month} {y}",
        "{y} {month} {d}",
        weekdays="Monday Tuesday Wednesday Thursday Friday Saturday Sunday",
    ),
    "de": _language(
        "Januar Februar März April Mai Juni Juli August September Oktober November Dezember",
        "{d}. {month} {y}",
        "{dd}.{mm}.{y}",
        "{w}, {d}. {month} {y}",
        weekdays="Montag Dienstag Mittwoch Donnerstag Freitag Samstag Sonntag",
    ),
    "fr": _language(
        "janvier février mars avril mai juin juillet août septembre octobre novembre décembre",
        "{d} {month} {y}",
        "le {d} {month} {y}",
        "{w} {d} {month} {y}",
        weekdays="lundi mardi mercredi jeudi vendredi samedi dimanche",
    ),
    "es": _language(
        "enero febrero marzo abril mayo junio julio agosto septiembre octubre noviembre diciembre",
        "{d} de {month} de {y}",
        "el {d} de {month} de {y}",
    ),
    "it": _language(
        "gennaio febbraio marzo aprile maggio giugno luglio agosto settembre ottobre novembre "
        "dicembre",
        "{d} {month} {y}",
        "il {d} {month} {y}",
    ),
    "pt": _language(
        "janeiro fevereiro março abril maio junho julho agosto setembro outubro novembro dezembro",
        "{d} de {month} de {y}",
    ),
    "nl": _language(
        "januari februari maart april mei juni juli augustus september oktober november december",
        "{d} {month} {y}",
        "{w} {d} {month} {y}",
        weekdays="maandag dinsdag woensdag donderdag vrijdag zaterdag zondag",
    ),
    "sv": _language(
        "januari februari mars april maj juni juli augusti september oktober november december",
        "den {d} {month} {y}",
        "{d} {month} {y}",
    ),
    "fi": _language(
        "tammikuuta helmikuuta maaliskuuta huhtikuuta toukokuuta kesäkuuta heinäkuuta elokuuta "
        "syyskuuta lokakuuta marraskuuta joulukuuta",
        "{d}. {month} {y}",
        "{d}.{m}.{y}",
    ),
    "pl": _language(
        "stycznia lutego marca kwietnia maja czerwca lipca sierpnia września października "
        "listopada grudnia",
        "{d} {month} {y}",
        "{d} {month} {y} r.",
    ),
    "cs": _language(
        "ledna února března dubna května června července srpna září října listopadu prosince",
        "{d}. {month} {y}",
        "{d}. {m}. {y}",
    ),
    "tr": _language(
        "Ocak Şubat Mart Nisan Mayıs Haziran Temmuz Ağustos Eylül Ekim Kasım Aralık",
        "{d} {month} {y}",
    ),
    "hu": _language(
        "január február március április május június július augusztus szeptember október november "
        "december",
        "{y}. {month} {d}.",
        "{y}. {mm}. {dd}.",
    ),
    "ru": _language(
        "января февраля марта апреля мая июня июля августа сентября октября ноября декабря",
        "{d} {month} {y} г.",
        "{d} {month} {y} года",
    ),
    "ja": _language(
        "1月 2月 3月 4月 5月 6月 7月 8月 9月 10月 11月 12月",
        "{y}年{month}{d}日",
        "{y}/{mm}/{dd}",
    ),
}
"""The languages by their ISO 639 code."""


@dataclass(frozen=True)
class Example:
    """One date, written.

    Attributes:
        source: As people write it.
        target: ISO 8601, ``2021-03-04``.
        language: Code of the language.
    """

    source: str
    target: str
    language: str


def write(date: datetime.date, language: str, form: int = 0) -> str:
    """Write a date as a language does.

    Args:
        date: The date.
        language: A code in :data:`LANGUAGES`.
        form: Which of the language's forms.

    Raises:
        UnknownNameError: No such language.
        InvalidInputError: The language has fewer forms.

    Example:
        >>> write(datetime.date(2021, 3, 4), "de", 2)
        'Donnerstag, 4. März 2021'
    """
    if language not in LANGUAGES:
        raise UnknownNameError("language", language, LANGUAGES)
    told = LANGUAGES[language]
    if not 0 <= form < len(told.forms):
        raise InvalidInputError(f"{language!r} has {len(told.forms)} forms, not a form {form}")
    return told.forms[form].format(**_written(date, language))


def _written(date: datetime.date, language: str) -> dict[str, str]:
    told = LANGUAGES[language]
    return {
        "d": str(date.day),
        "dd": f"{date.day:02d}",
        "m": str(date.month),
        "mm": f"{date.month:02d}",
        "y": f"{date.year:04d}",
        "month": told.months[date.month - 1],
        "w": told.weekdays[date.weekday()] if told.weekdays else "",
    }


def fields(example: Example) -> list[tuple[range, range]]:
    """Where year, month and day stand: characters of the source, and of the ISO form.

    Raises:
        InvalidInputError: The language does not write the date so.

    Example:
        >>> fields(Example("4. März 2021", "2021-03-04", "de"))
        [(range(8, 12), range(0, 4)), (range(3, 7), range(5, 7)), (range(0, 1), range(8, 10))]
    """
    date = datetime.date.fromisoformat(example.target)
    for number, form in enumerate(LANGUAGES[example.language].forms):
        if write(date, example.language, number) != example.source:
            continue
        found: dict[str, range] = {}
        place = 0
        for text, name, _, _ in string.Formatter().parse(form):
            place += len(text)
            if name is not None:
                size = len(_written(date, example.language)[name])
                found[name[0]] = range(place, place + size)
                place += size
        return [(found["y"], range(4)), (found["m"], range(5, 7)), (found["d"], range(8, 10))]
    raise InvalidInputError(f"{example.source!r} is no date as {example.language!r} writes it")


def aligned(example: Example) -> Aligned:
    """The pair, and that year, month and day come from year, month and day.

    Raises:
        InvalidInputError: The language does not write the date so.
    """
    return Aligned(example.source, example.target, fields(example))


def is_held_out(date: datetime.date) -> bool:
    """Whether a date belongs to the held-out part."""
    value = hashlib.sha256(f"dates/{date.isoformat()}".encode()).digest()
    return int.from_bytes(value[:8], "big") % 100 < HELD_OUT_PERCENT


@functools.lru_cache(maxsize=2)
def _dates(split: Split) -> tuple[datetime.date, ...]:
    if split not in ("train", "held-out"):
        raise InvalidInputError(f"split is {split!r}; it must be 'train' or 'held-out'")
    first = datetime.date(FIRST_YEAR, 1, 1)
    days = (datetime.date(LAST_YEAR, 12, 31) - first).days + 1
    every = (first + datetime.timedelta(days=n) for n in range(days))
    return tuple(date for date in every if is_held_out(date) == (split == "held-out"))


def examples(
    count: int,
    split: Split = "held-out",
    *,
    seed: int | str = 0,
    languages: Sequence[str] | None = None,
) -> list[Example]:
    """Draw written dates: a random date, language and form.

    Args:
        count: How many.
        split: ``"train"`` or ``"held-out"``.
        seed: Other seeds give other examples.
        languages: Codes to draw from; None takes all.

    Raises:
        UnknownNameError: No such language.
        InvalidInputError: No such split.
    """
    rng = random.Random(f"dates/{split}/{seed}")
    codes = list(LANGUAGES if languages is None else languages)
    pool = _dates(split)
    drawn = []
    for _ in range(count):
        date, code = rng.choice(pool), rng.choice(codes)
        if code not in LANGUAGES:
            raise UnknownNameError("language", code, LANGUAGES)
        source = write(date, code, rng.randrange(len(LANGUAGES[code].forms)))
        drawn.append(Example(source, date.isoformat(), code))
    return drawn


def check(example: Example, text: str) -> bool:
    """Whether a text is the right answer."""
    return text.strip() == example.target


@functools.lru_cache(maxsize=1)
def tokenizer() -> PreTrainedTokenizerFast:
    """One token a character; the source ends with :data:`END`.

    Example:
        >>> ids = tokenizer().encode("4 März 2021")
        >>> len(ids), tokenizer().decode(ids, skip_special_tokens=True)
        (12, '4 März 2021')
    """
    from transformers import PreTrainedTokenizerFast

    written = "".join(
        "".join((*told.months, *told.weekdays, *told.forms)) for told in LANGUAGES.values()
    )
    characters = sorted(set(written + "0123456789-") - set("{}"))
    vocabulary = {token: i for i, token in enumerate((PAD, START, END, UNKNOWN, *characters))}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    backend.decoder = decoders.Fuse()
    backend.post_processor = processors.TemplateProcessing(
        single=f"$A {END}", special_tokens=[(END, vocabulary[END])]
    )
    made: Any = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=START,
        eos_token=END,
        pad_token=PAD,
        unk_token=UNKNOWN,
        clean_up_tokenization_spaces=False,
        model_max_length=64,
    )
    return made  # type: ignore[no-any-return]


def digest() -> str:
    """Hash of the tokenizer and of a sample of both parts: what a model's data depends on."""
    state = hashlib.sha256(tokenizer().backend_tokenizer.to_str().encode())
    for split in ("train", "held-out"):
        for example in examples(64, split, seed="digest"):
            state.update(f"{example.source}\t{example.target}\n".encode())
    return state.hexdigest()
