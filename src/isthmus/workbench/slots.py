"""The `slots` data set: say in words what a list of slots means, by a small encoder-decoder.

A meaning has some of eight slots about a video game: five with one value, one with a list, two that
are true or false. A text says them in any order and in one of four styles, with several ways to say
each. Some training texts leave a slot out, as texts that people wrote do::

    name = crimson harbor , platforms = pc switch , family = yes
    crimson harbor is a game . it is made for kids . it can be played on pc and switch .

Values are words that stand for nothing else, so what a text says can be read off it exactly. A
meaning is held out when a hash of it says so.
"""

from __future__ import annotations

import functools
import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from isthmus.metrics.slots import slot_error_rate, slot_errors
from isthmus.workbench.pycode import Split
from isthmus.workbench.tokenizer import word_tokenizer

PAD, START, END = "<|pad|>", "<|start|>", "<|end|>"
"""Special tokens, ids 0 to 2; START begins the decoder's text, END ends both sides."""

HELD_OUT_PERCENT = 10

DROPPED = 0.15
"""Share of the training texts that leave a slot out."""

_NAMES = (
    ("crimson", "silent", "golden", "broken", "frozen", "hidden", "iron", "velvet", "wild"),
    ("harbor", "castle", "river", "empire", "signal", "garden", "dragon", "tower", "comet"),
)

VALUES: dict[str, tuple[str, ...]] = {
    "name": tuple(f"{a} {b}" for a in _NAMES[0] for b in _NAMES[1]),
    "genre": ("puzzle", "racing", "strategy", "adventure", "shooter", "platformer", "sports"),
    "developer": ("arkane", "bungie", "capcom", "dontnod", "eidos", "firaxis", "gearbox", "konami"),
    "year": tuple(str(year) for year in range(1996, 2020)),
    "rating": ("poor", "average", "good", "excellent"),
    "platforms": ("pc", "xbox", "switch", "playstation", "wii", "vita"),
    "multiplayer": ("yes", "no"),
    "family": ("yes", "no"),
}
"""What each slot may hold."""

LISTS = ("platforms",)
BOOLEANS = ("multiplayer", "family")
MOST = 3
"""Values of a list at most."""

PHRASES: dict[str, tuple[tuple[str, ...], ...]] = {
    "genre": (
        ("it is a {} game", "it belongs to the {} games"),
        ("a {} game", "of the {} kind"),
        ("do you like {} games ?", "want some {} ?"),
        ("{}",),
    ),
    "developer": (
        ("it was developed by {}", "{} made it"),
        ("made by {}", "from {}"),
        ("have you heard of {} ?", "are you a fan of {} ?"),
        ("by {}",),
    ),
    "year": (
        ("it came out in {}", "it was released in {}"),
        ("released in {}", "out since {}"),
        ("do you remember {} ?", "what did you do in {} ?"),
        ("{}",),
    ),
    "rating": (
        ("its rating is {}", "people find it {}"),
        ("rated {}", "with {} reviews"),
        ("would you call that {} ?", "is it really {} ?"),
        ("{}",),
    ),
    "platforms": (
        ("it can be played on {}", "it is available for {}"),
        ("playable on {}", "for {}"),
        ("do you own {} ?", "do you play on {} ?"),
        ("{}",),
    ),
    "multiplayer yes": (
        ("friends can join", "people play it together"),
        ("fun with friends", "played together"),
        ("do you play with friends ?", "do you like to play together ?"),
        ("friends",),
    ),
    "multiplayer no": (
        ("you play it alone", "it is a solo game"),
        ("only played alone", "a solo thing"),
        ("do you play alone ?", "do you like to go solo ?"),
        ("alone",),
    ),
    "family yes": (
        ("children can play it", "it is made for kids"),
        ("fit for children", "fine for kids"),
        ("do you have children ?", "are there kids around ?"),
        ("kids",),
    ),
    "family no": (
        ("only adults should play it", "it is for grown people"),
        ("adults only", "for grown people"),
        ("are all of you adults ?", "have you grown up ?"),
        ("adults",),
    ),
}
"""Ways to say each slot, by style: sentences, clauses, questions, notes."""

OPENINGS = ("{} is a game .", "{} :", "do you know {} ?", "{} -")
"""How the name is said, by style."""

JOINTS = (" .", " ,", "", " /")
"""What stands behind each phrase, by style."""

_SIGNS = {
    "multiplayer yes": ("friends", "together"),
    "multiplayer no": ("alone", "solo"),
    "family yes": ("children", "kids"),
    "family no": ("adults", "grown"),
}
"""Words that tell what a text says of what is true or false."""


@dataclass(frozen=True)
class Meaning:
    """What a text is to say.

    Attributes:
        slots: Names and values in the order of the source; a list has several values.
    """

    slots: tuple[tuple[str, tuple[str, ...]], ...]

    @property
    def source(self) -> str:
        """The slots as the encoder reads them."""
        return " , ".join(f"{name} = {' '.join(values)}" for name, values in self.slots)

    def places(self) -> list[tuple[str, Sequence[tuple[int, int]]]]:
        """Slots, and for each value the characters of the source where attention shows it is said.

        Of what is true or false, those of name and value together.

        Example:
            >>> Meaning((("name", ("iron comet",)), ("family", ("no",)))).places()
            [('name', [(7, 17)]), ('family', [(20, 31)])]
        """
        out: list[tuple[str, Sequence[tuple[int, int]]]] = []
        at = 0
        for name, values in self.slots:
            found, place = [], at + len(name) + 3
            for value in values:
                found.append((place, place + len(value)))
                place += len(value) + 1
            out.append((name, [(at, place - 1)] if name in BOOLEANS else found))
            at = place + 2
        return out


@dataclass(frozen=True)
class Example:
    """A meaning and a text that says it."""

    meaning: Meaning
    target: str

    @property
    def source(self) -> str:
        """What the encoder reads."""
        return self.meaning.source


def say(
    meaning: Meaning, rng: random.Random, *, style: int | None = None, without: str = ""
) -> str:
    """A text that says a meaning.

    Args:
        meaning: What to say.
        rng: Source of draws.
        style: One of four; drawn when None.
        without: A slot other than the name that is left out.
    """
    style = rng.randrange(len(JOINTS)) if style is None else style
    name, *rest = sorted(meaning.slots, key=lambda slot: slot[0] != "name")
    rng.shuffle(rest)
    words = [OPENINGS[style].format(*name[1])]
    for slot, values in rest:
        key = f"{slot} {values[0]}" if slot in BOOLEANS else slot
        phrase = rng.choice(PHRASES[key][style]).format(" and ".join(values))
        if slot != without:
            words.append(phrase + JOINTS[style])
    return " ".join(words)


def said(text: str) -> dict[str, list[str]]:
    """What a text says, by slot.

    Example:
        >>> said("iron comet is a game . you play it alone . it is available for pc and wii .")
        {'name': ['iron comet'], 'platforms': ['pc', 'wii'], 'multiplayer': ['no']}
    """
    padded = f" {' '.join(text.split())} "
    found: dict[str, list[str]] = {}
    for slot, values in VALUES.items():
        for value in values:
            signs = _SIGNS[f"{slot} {value}"] if slot in BOOLEANS else (value,)
            if any(f" {sign} " in padded for sign in signs):
                found.setdefault(slot, []).append(value)
    return found


def wanted(meaning: Meaning) -> dict[str, list[str]]:
    """What a text has to say, by slot."""
    return {name: list(values) for name, values in meaning.slots}


def errors(one: Meaning, text: str) -> int:
    """Slot errors of a text that should say a meaning."""
    return slot_errors(wanted(one), said(text))


def error_rate(meanings: Sequence[Meaning], texts: Sequence[str]) -> float:
    """Slot error rate of texts that should say some meanings."""
    pairs = zip(meanings, texts, strict=True)
    return slot_error_rate((wanted(one), said(text)) for one, text in pairs)


def meaning(rng: random.Random) -> Meaning:
    """Draw a name and three to seven other slots."""
    names = ["name", *rng.sample([name for name in VALUES if name != "name"], rng.randint(3, 7))]
    slots = []
    for name in names:
        count = rng.randint(1, MOST) if name in LISTS else 1
        slots.append((name, tuple(rng.sample(VALUES[name], count))))
    return Meaning(tuple(slots))


def is_held_out(one: Meaning) -> bool:
    """Whether a meaning belongs to the held-out part, in whatever order it stands."""
    value = hashlib.sha256(repr(sorted(one.slots)).encode()).digest()
    return int.from_bytes(value[:8], "big") % 100 < HELD_OUT_PERCENT


def examples(count: int, split: Split = "held-out", *, seed: int | str = 0) -> list[Example]:
    """Meanings with a text each; those of the training part may leave a slot out.

    Args:
        count: How many.
        split: ``"train"`` or ``"held-out"``.
        seed: Other seeds give other examples.
    """
    rng = random.Random(f"slots/{split}/{seed}")
    drawn: list[Example] = []
    while len(drawn) < count:
        one = meaning(rng)
        if is_held_out(one) == (split == "held-out"):
            drop = split == "train" and rng.random() < DROPPED
            without = rng.choice(one.slots[1:])[0] if drop else ""
            drawn.append(Example(one, say(one, rng, without=without)))
    return drawn


def references(one: Meaning, seed: int = 0) -> list[str]:
    """A text in every style."""
    rng = random.Random(f"slots/references/{seed}")
    return [say(one, rng, style=style) for style in range(len(JOINTS))]


@functools.lru_cache(maxsize=1)
def tokenizer() -> PreTrainedTokenizerFast:
    """One token a word; both sides end with :data:`END`.

    Example:
        >>> tokenizer().decode(tokenizer().encode("family = no"))
        'family = no <|end|>'
    """
    texts = [*OPENINGS, *JOINTS, *VALUES, "= , and"]
    texts += [phrase for ways in PHRASES.values() for style in ways for phrase in style]
    texts += [value for values in VALUES.values() for value in values]
    words = dict.fromkeys(word for text in texts for word in text.split() if word != "{}")
    made: Any = word_tokenizer((PAD, START, END, *words))
    made.bos_token, made.eos_token = START, END
    made.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {END}", special_tokens=[(END, made.eos_token_id)]
    )
    return made  # type: ignore[no-any-return]


def digest() -> str:
    """Hash of the tokenizer and of a sample of both parts: what a model's data depends on."""
    state = hashlib.sha256(repr(sorted(tokenizer().get_vocab().items())).encode())
    for split in ("train", "held-out"):
        for example in examples(64, split, seed="digest"):
            state.update(f"{example.source}\t{example.target}\n".encode())
    return state.hexdigest()
