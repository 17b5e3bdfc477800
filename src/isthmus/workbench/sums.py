r"""The `sums` data set: chains of sums, worked column by column, with a checkable answer.

A problem adds two to four numbers. Its worked solution takes the first two, adds them one column a
line, writes down what is left to add, and goes on until the answer stands alone::

    27 + 58 + 46 =                      the prompt
    ones: 7 plus 8 is 15                one column a line; the carry is added last
    tens: 2 plus 5 plus 1 is 8
    85 + 46 =                           what is left
    ones: 5 plus 6 is 11
    tens: 8 plus 4 plus 1 is 13
    answer: 131

Every line is a step that :func:`check_step` judges on its own, so the place of a mistake is known
exactly. A prompt that ends in ``= freely`` asks for *free wording*: synonyms and any order of the
addends of a line, so that two right solutions may share no line. The tokenizer has one token for
each digit, word and sign, its spaces included: any text of this data set survives a round trip.

A problem belongs to the held-out part when a hash of its addends says so.
"""

from __future__ import annotations

import functools
import hashlib
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from isthmus.errors import InvalidInputError
from isthmus.workbench.pycode import Split

END = "<|end|>"
"""The special token that begins, ends and pads; id 0."""

ANSWER = "answer: "
"""What the line with the answer begins with; one token."""

COLUMNS = ("ones", "tens", "hundreds", "thousands")
PLUS = (" plus ", " and ", " with ")
"""Ways to say "plus"; the first is the plain one."""
IS = (" is ", " makes ", " gives ")
"""Ways to say "is"; the first is the plain one."""

HELD_OUT_PERCENT = 10
_PIECES = (" + ", " =", " freely", "\n", ANSWER, *(f"{c}: " for c in COLUMNS), *PLUS, *IS)
_COLUMN = re.compile(
    rf"({'|'.join(COLUMNS)}): (\d(?:(?:{'|'.join(PLUS)})\d)*)(?:{'|'.join(IS)})(\d+)"
)
_REST = re.compile(r"(\d+(?: \+ \d+)*) =( freely)?")
_ANSWER = re.compile(rf"{ANSWER}(\d+)")
_DIGITS = re.compile(r"\d")

Meaning = tuple[str, tuple[int, ...], int]
"""What a line says whatever its wording: its kind, its addends sorted (or what is left, in order),
and its result."""


@dataclass(frozen=True)
class Problem:
    r"""A chain of numbers to add.

    Attributes:
        addends: The numbers, at least two, each below 1000.
        free: Whether the prompt asks for free wording.

    Example:
        >>> problem = Problem((27, 58))
        >>> problem.prompt, problem.answer
        ('27 + 58 =\n', 85)
        >>> print(problem.solution())
        ones: 7 plus 8 is 15
        tens: 2 plus 5 plus 1 is 8
        answer: 85
    """

    addends: tuple[int, ...]
    free: bool = False

    def __post_init__(self) -> None:
        if len(self.addends) < 2 or not all(0 <= n < 1000 for n in self.addends):
            raise InvalidInputError(
                f"a problem adds two or more numbers from 0 to 999, not {self.addends}"
            )

    @property
    def prompt(self) -> str:
        """The question, one line."""
        return _rest(self.addends) + (" freely\n" if self.free else "\n")

    @property
    def answer(self) -> int:
        """The sum."""
        return sum(self.addends)

    def meanings(self) -> list[Meaning]:
        """What each line of a right solution says, in order."""
        return list(_meanings(self.addends))

    def solution(self, rng: random.Random | None = None) -> str:
        """A right solution, without a line end at its end.

        Args:
            rng: Chooses the wording where it is free; without it, or where it is not, the
                plain wording.
        """
        chooser = rng if self.free else None
        return "\n".join(_say(meaning, chooser) for meaning in self._in_order())

    def text(self, rng: random.Random | None = None) -> str:
        """Prompt and solution, as a model is trained on them."""
        return self.prompt + self.solution(rng)

    def _in_order(self) -> Iterator[Meaning]:
        """The lines with the addends of a column as they are written: the carry last."""
        return _meanings(self.addends, ordered=False)


def _rest(numbers: Sequence[int]) -> str:
    return " + ".join(map(str, numbers)) + " ="


def _meanings(addends: Sequence[int], *, ordered: bool = True) -> Iterator[Meaning]:
    total, left = addends[0], list(addends[1:])
    while left:
        a, b = str(total)[::-1], str(left.pop(0))[::-1]
        carry, width = 0, max(len(a), len(b))
        for column in range(width):
            parts = [int(n[column]) for n in (a, b) if column < len(n)]
            parts += [1] if carry else []
            result = sum(parts)
            said = tuple(sorted(parts)) if ordered else tuple(parts)
            yield COLUMNS[column], said, result
            carry = result // 10
        total = int(a[::-1]) + int(b[::-1])
        if left:
            yield "rest", (total, *left), 0
    yield "answer", (), total


def _say(meaning: Meaning, rng: random.Random | None) -> str:
    kind, numbers, result = meaning
    if kind == "rest":
        return _rest(numbers)
    if kind == "answer":
        return f"{ANSWER}{result}"
    said = list(numbers)
    if rng is None:
        return f"{kind}: {PLUS[0].join(map(str, said))}{IS[0]}{result}"
    rng.shuffle(said)
    return f"{kind}: {rng.choice(PLUS).join(map(str, said))}{rng.choice(IS)}{result}"


def meaning(line: str) -> Meaning | None:
    """What a line says, or None where it is no line of a solution.

    Example:
        >>> meaning("tens: 5 with 1 with 2 makes 8") == meaning("tens: 2 plus 5 plus 1 is 8")
        True
        >>> meaning("tens: and so on") is None
        True
    """
    if found := _COLUMN.fullmatch(line):
        numbers = tuple(sorted(int(d) for d in _DIGITS.findall(found[2])))
        return found[1], numbers, int(found[3])
    if found := _REST.fullmatch(line):
        return "rest", tuple(int(n) for n in found[1].split(" + ")), 0
    if found := _ANSWER.fullmatch(line):
        return "answer", (), int(found[1])
    return None


def lines(solution: str) -> list[str]:
    """The steps of a solution (without its prompt), one string a line."""
    return [line for line in solution.replace(END, "").split("\n") if line]


def check_step(problem: Problem, index: int, line: str) -> bool:
    """Whether a line is right as the line of that index of a solution, however it is worded.

    Args:
        problem: The problem.
        index: Lines of the solution that come before it.
        line: The line, without its line end.

    Example:
        >>> check_step(Problem((27, 58)), 0, "ones: 8 and 7 makes 15")
        True
        >>> check_step(Problem((27, 58)), 0, "ones: 7 plus 8 is 14")
        False
    """
    wanted = problem.meanings()
    return 0 <= index < len(wanted) and meaning(line) == wanted[index]


def check_steps(problem: Problem, solution: str) -> list[bool]:
    """:func:`check_step` for every line of a solution."""
    wanted = problem.meanings()
    return [
        index < len(wanted) and meaning(line) == wanted[index]
        for index, line in enumerate(lines(solution))
    ]


def given_answer(solution: str) -> int | None:
    """The first answer that a solution gives, or None."""
    for line in lines(solution):
        if found := _ANSWER.fullmatch(line):
            return int(found[1])
    return None


def check_answer(problem: Problem, solution: str) -> bool:
    """Whether a solution gives the right answer, however it came by it.

    Example:
        >>> check_answer(Problem((27, 58)), "answer: 85")
        True
        >>> check_answer(Problem((27, 58)), "ones: 7 plus 8 is 15")
        False
    """
    return given_answer(solution) == problem.answer


def corrupt(line: str, rng: random.Random) -> str:
    """The same line with one digit changed: a plausible mistake.

    Args:
        line: A line of a solution.
        rng: Chooses the digit and its new value.

    Raises:
        InvalidInputError: The line holds no digit.
    """
    places = [found.start() for found in _DIGITS.finditer(line)]
    if not places:
        raise InvalidInputError(f"the line {line!r} holds no digit to change")
    at = rng.choice(places)
    other = rng.choice([d for d in "0123456789" if d != line[at]])
    return line[:at] + other + line[at + 1 :]


def is_held_out(addends: Sequence[int]) -> bool:
    """Whether a problem belongs to the held-out part."""
    name = "sums/" + "+".join(map(str, addends))
    value = hashlib.sha256(name.encode()).digest()
    return int.from_bytes(value[:8], "big") % 100 < HELD_OUT_PERCENT


def problems(
    count: int,
    split: Split = "held-out",
    *,
    seed: int | str = 0,
    addends: tuple[int, int] = (2, 4),
    below: int = 100,
    free: bool | None = False,
) -> list[Problem]:
    """Draw problems.

    Args:
        count: How many.
        split: ``"train"`` or ``"held-out"``.
        seed: Other seeds give other problems.
        addends: Fewest and most numbers of a problem.
        below: Numbers are from 10 to this, exclusive; at most 1000.
        free: Whether they ask for free wording; None lets a coin decide.

    Raises:
        InvalidInputError: A number is out of range.
    """
    low, high = addends
    if count < 0 or not 2 <= low <= high or not 11 <= below <= 1000:
        raise InvalidInputError(
            "problems needs count >= 0, 2 <= fewest <= most addends and 11 <= below <= 1000, not "
            f"{count}, {addends} and {below}"
        )
    if split not in ("train", "held-out"):
        raise InvalidInputError(f"split is {split!r}; it must be 'train' or 'held-out'")
    rng = random.Random(f"sums/{split}/{seed}")
    found: list[Problem] = []
    while len(found) < count:
        numbers = tuple(rng.randrange(10, below) for _ in range(rng.randint(low, high)))
        coin = rng.random() < 0.5
        if is_held_out(numbers) == (split == "held-out"):
            found.append(Problem(numbers, coin if free is None else free))
    return found


@functools.lru_cache(maxsize=1)
def tokenizer() -> PreTrainedTokenizerFast:
    r"""One token for each digit, word and sign; the token :data:`END` has id 0.

    Example:
        >>> ids = tokenizer().encode("27 + 58 =\n")
        >>> len(ids), tokenizer().decode(ids)
        (7, '27 + 58 =\n')
    """
    words = [END, *"0123456789", *_PIECES]
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token=END))
    pattern = "|".join(re.escape(piece) for piece in (*"0123456789", *_PIECES))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    backend.decoder = decoders.Fuse()
    made: Any = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=END,
        eos_token=END,
        pad_token=END,
        unk_token=END,
        clean_up_tokenization_spaces=False,
        model_max_length=512,
    )
    return made  # type: ignore[no-any-return]


def digest() -> str:
    """Hash of the tokenizer and of a sample of both parts: what a model's data depends on."""
    state = hashlib.sha256(tokenizer().backend_tokenizer.to_str().encode())
    for split in ("train", "held-out"):
        rng = random.Random(0)
        for problem in problems(32, split, seed="digest", free=None):
            state.update(problem.text(rng).encode())
    return state.hexdigest()
