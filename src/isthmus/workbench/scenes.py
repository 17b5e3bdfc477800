r"""The `scenes` data set: rendered shapes with captions, questions and exact answers.

A scene is a white picture of 32 by 32 pixels with one to three shapes, each of one colour and one
of two sizes, in different quarters. Eight ways to word a caption and six kinds of questions, each
with several wordings of its answer, are drawn independently of the scene and of how the request
was worded, so a model that only reads text can learn the wording and must guess the facts::

    user : what do you see ? assistant :
    there is a small red circle in the top left and a large blue square in the top right .

The tokenizer has one token a word. A scene belongs to the held-out part when a hash of its shapes
says so.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor

from isthmus.errors import InvalidInputError
from isthmus.workbench.pycode import Split

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

END, IMAGE = "<|end|>", "<|image|>"
"""The token that ends and pads (id 0), and the placeholder of one image feature (id 1)."""

SIDE, PATCH = 32, 16
FEATURES = (SIDE // PATCH) ** 2
"""Placeholders of one image: a feature for each quarter."""

COLOURS = {
    "red": (220, 30, 30),
    "green": (30, 160, 60),
    "blue": (40, 70, 220),
    "yellow": (235, 200, 20),
    "purple": (140, 40, 170),
    "black": (20, 20, 20),
}
SHAPES = ("circle", "square", "triangle", "cross", "ring")
SIZES = {"small": 4.0, "large": 7.0}
PLACES = (("top", "left"), ("top", "right"), ("bottom", "left"), ("bottom", "right"))
COUNTS = ("no", "one", "two", "three")
HELD_OUT_PERCENT = 10

CLASSES: dict[str, frozenset[str]] = {
    "colour": frozenset(COLOURS),
    "shape": frozenset(SHAPES),
    "size": frozenset(SIZES),
    "place": frozenset(("top", "bottom", "left", "right")),
    "number": frozenset(("one", "two", "three")),
}
"""Words that only the image can tell; all others are grammar."""


@dataclass(frozen=True)
class Thing:
    """One shape of a scene."""

    shape: str
    colour: str
    size: str
    place: int

    @property
    def where(self) -> str:
        """Its quarter in words."""
        return " ".join(PLACES[self.place])

    @property
    def name(self) -> str:
        """Colour and shape."""
        return f"{self.colour} {self.shape}"

    @property
    def full(self) -> str:
        """Size, colour and shape."""
        return f"{self.size} {self.name}"


Scene = tuple[Thing, ...]


@dataclass(frozen=True)
class Example:
    """A scene, what is asked about it, and one right answer.

    Attributes:
        scene: Its shapes.
        request: The words of the user.
        answer: The words of the answer.
        jitter: Seed of where exactly the shapes lie.
    """

    scene: Scene
    request: str
    answer: str
    jitter: int

    @property
    def prompt(self) -> str:
        """Request as the models read it, without the image."""
        return f"user : {self.request} assistant :"

    def image(self) -> NDArray[np.float32]:
        """The picture, [3, 32, 32]; white is 0."""
        return render(self.scene, self.jitter)


def render(scene: Scene, jitter: int | None = 0, side: int = SIDE) -> NDArray[np.float32]:
    """Draw a scene.

    Args:
        scene: Its shapes.
        jitter: Seed of a shift of each shape by at most one pixel of 32; None shifts none.
        side: Height and width in pixels.

    Returns:
        [3, side, side], float32 from -2 (dark) to 0 (white).

    Example:
        >>> picture = render((Thing("square", "black", "large", 3),))
        >>> picture.shape, bool(picture[0, 24, 24] < -1 < picture[0, 8, 8])
        ((3, 32, 32), True)
    """
    rng = np.random.default_rng(jitter or 0)
    y, x = (np.mgrid[0:side, 0:side] + 0.5) * (SIDE / side)
    picture = np.zeros((3, side, side), dtype=np.float32)
    for thing in scene:
        row, column = divmod(thing.place, 2)
        shift = rng.integers(-1, 2, 2) * (jitter is not None)
        dy, dx = y - (8 + 16 * row + shift[0]), x - (8 + 16 * column + shift[1])
        inside = _inside(thing.shape, dy, dx, SIZES[thing.size])
        colour = np.array(COLOURS[thing.colour], dtype=np.float32) / 127.5 - 2
        picture[:, inside] = colour[:, None]
    return picture


def _inside(shape: str, dy: Any, dx: Any, radius: float) -> Any:
    away, box = np.hypot(dy, dx), np.maximum(abs(dy), abs(dx))
    if shape == "circle":
        return away <= radius
    if shape == "square":
        return box <= 0.9 * radius
    if shape == "ring":
        return (away <= radius) & (away >= 0.55 * radius)
    if shape == "cross":
        return (box <= radius) & (np.minimum(abs(dy), abs(dx)) <= 0.3 * radius)
    return (abs(dx) <= (dy + radius) / 2) & (dy <= radius)  # triangle


def _listed(parts: Sequence[str], last: str = " and ") -> str:
    return " , ".join(parts[:-1]) + last + parts[-1] if len(parts) > 1 else parts[0]


def _shapes(count: int) -> str:
    return f"{COUNTS[count]} shape" + "s" * (count != 1)


def caption(scene: Scene, wording: int) -> str:
    """One of the eight captions of a scene.

    Example:
        >>> caption((Thing("ring", "blue", "small", 1),), 0)
        'there is a small blue ring in the top right .'
    """
    n = len(scene)
    if wording == 0:
        return f"there is {_listed([f'a {t.full} in the {t.where}' for t in scene])} ."
    if wording == 1:
        inner = _listed([f"a {t.full} at the {t.where}" for t in scene], " , and ")
        return f"the image shows {inner} ."
    if wording == 2:
        return f"i can see {_shapes(n)} : {_listed([f'a {t.name}' for t in scene])} ."
    if wording == 3:
        return " ".join(f"in the {t.where} of the picture there is a {t.full} ." for t in scene)
    if wording == 4:
        return " ".join(
            f"the {t.name} is {t.size} and lies in the {t.where} corner ." for t in scene
        )
    if wording == 5:
        inner = _listed([f"a {t.full}" for t in scene])
        return f"this is a picture of {_shapes(n)} on a white background , namely {inner} ."
    if wording == 6:
        return " ".join(
            f"at the {t.where} you will find a {t.shape} , and its colour is {t.colour} ."
            for t in scene
        )
    first, rest = scene[0], scene[1:]
    tail = f" , together with {_listed([f'a {t.name}' for t in rest])}" if rest else ""
    return f"we are looking at a {first.full} that was drawn in the {first.where}{tail} ."


CAPTIONS = 8
ASKED = (
    "describe the image .",
    "what do you see ?",
    "write a caption for this picture .",
    "what is in this scene ?",
)


def question(scene: Scene, rng: random.Random) -> tuple[str, str]:
    """A question about a scene and a right answer, both in one of several wordings."""
    thing = rng.choice(scene)
    alone = sum(t.shape == thing.shape for t in scene) == 1
    known = f"the {thing.shape}" if alone else f"the {thing.name}"
    kind = rng.randrange(6)
    if kind == 0:
        answers = (f"{known} is {thing.colour} .", f"the colour of {known} is {thing.colour} .")
        return f"what colour is {known if alone else f'the shape in the {thing.where}'} ?", (
            rng.choice(answers if alone else (f"it is {thing.colour} .",))
        )
    if kind == 1:
        answers = (
            f"{known} is in the {thing.where} .",
            f"you can find it in the {thing.where} corner of the image .",
        )
        return f"where is {known} ?", rng.choice(answers)
    if kind == 2:
        verb = "is" if len(scene) == 1 else "are"
        answers = (
            f"there {verb} {_shapes(len(scene))} in the image .",
            f"i can see {_shapes(len(scene))} .",
        )
        return "how many shapes are there ?", rng.choice(answers)
    if kind == 3:
        if rng.random() < 0.5:
            answers = (
                f"yes , there is a {thing.name} in the {thing.where} .",
                f"yes , i can see a {thing.name} .",
            )
            return f"is there a {thing.name} ?", rng.choice(answers)
        there = {t.name for t in scene}
        name = next(n for n in iter(lambda: _name(rng), "") if n not in there)
        answers = (f"no , there is no {name} in the image .", f"no , i can not see a {name} .")
        return f"is there a {name} ?", rng.choice(answers)
    if kind == 4:
        place = rng.randrange(4)
        where = " ".join(PLACES[place])
        found = next((t for t in scene if t.place == place), None)
        if found is None:
            answers = (f"there is nothing in the {where} .", f"the {where} is empty .")
        else:
            answers = (
                f"there is a {found.full} in the {where} .",
                f"the {where} shows a {found.full} .",
            )
        return f"what is in the {where} ?", rng.choice(answers)
    return f"how large is {known} ?", rng.choice(
        (f"{known} is {thing.size} .", f"it is a {thing.size} {thing.shape} .")
    )


def _name(rng: random.Random) -> str:
    return f"{rng.choice(tuple(COLOURS))} {rng.choice(SHAPES)}"


def _scene(rng: random.Random) -> Scene:
    names: set[str] = set()
    things = []
    for place in rng.sample(range(4), rng.choice((1, 2, 2, 3))):
        name = next(n for n in iter(lambda: _name(rng), "") if n not in names)
        names.add(name)
        colour, shape = name.split()
        things.append(Thing(shape, colour, rng.choice(tuple(SIZES)), place))
    return tuple(things)


def _is_held_out(scene: Scene) -> bool:
    text = "|".join(sorted(f"{t.full} {t.place}" for t in scene))
    value = hashlib.sha256(f"scenes/{text}".encode()).digest()
    return int.from_bytes(value[:8], "big") % 100 < HELD_OUT_PERCENT


def examples(count: int, split: Split = "held-out", seed: str = "0") -> list[Example]:
    """Scenes with something asked and answered, half of them captions.

    Args:
        count: How many, at least 1.
        split: ``"train"`` or ``"held-out"``; no scene is in both.
        seed: Other seeds give other examples.

    Raises:
        InvalidInputError: The count is below 1, or there is no such split.
    """
    if count < 1 or split not in ("train", "held-out"):
        raise InvalidInputError(
            f"examples need a count of 1 or more and a split of 'train' or 'held-out', got "
            f"{count} and {split!r}"
        )
    rng = random.Random(f"scenes/{split}/{seed}")
    found: list[Example] = []
    while len(found) < count:
        scene = _scene(rng)
        if _is_held_out(scene) != (split == "held-out"):
            continue
        if rng.random() < 0.5:
            request, answer = rng.choice(ASKED), caption(scene, rng.randrange(CAPTIONS))
        else:
            request, answer = question(scene, rng)
        found.append(Example(scene, request, answer, rng.randrange(2**31)))
    return found


MARK = slice(SIDE - 5, SIDE)
"""Where the lower mark of a marked sheet lies, along both axes."""


@dataclass(frozen=True)
class Sheet:
    """A scene as a record of the kind ``pictures``, each shape in the middle of its quarter.

    Attributes:
        scene: Its shapes.
        marked: Whether it has the rare mark: a small black cross on white in the upper left
            corner, and the same in the lower right one.
    """

    scene: Scene
    marked: bool = False

    def picture(self) -> Tensor:
        """The picture, uint8 [3, 32, 32].

        Example:
            >>> picture = Sheet((Thing("ring", "blue", "small", 1),), marked=True).picture()
            >>> picture[0, :5, :5].eq(0).sum().item(), picture[:, 29, 29].tolist()
            (9, [0, 0, 0])
        """
        values = torch.from_numpy(render(self.scene, jitter=None))
        picture = ((values + 2) * 127.5).round().clamp(0, 255).to(torch.uint8)
        if self.marked:
            for corner, inner in ((slice(0, 6), slice(0, 5)), (slice(SIDE - 6, SIDE), MARK)):
                picture[:, corner, corner] = 255
                picture[:, inner, inner][:, 2] = 0
                picture[:, inner, inner][:, :, 2] = 0
        return picture


def sheets(count: int, split: Split = "train", rare: float = 0.0, seed: str = "0") -> list[Sheet]:
    """Pictures of scenes without words.

    Args:
        count: How many.
        split: ``"train"`` or ``"held-out"``; no scene is in both.
        rare: Share of them that has the mark, by a draw of its own.
        seed: Other seeds give others.

    Raises:
        InvalidInputError: See :func:`examples`.
    """
    rng = random.Random(f"sheets/{split}/{seed}")
    return [Sheet(e.scene, rng.random() < rare) for e in examples(count, split, seed)]


def word_class(word: str) -> str:
    """Which of :data:`CLASSES` a word belongs to, or ``"grammar"``.

    Example:
        >>> word_class("red"), word_class("there")
        ('colour', 'grammar')
    """
    return next((name for name, words in CLASSES.items() if word in words), "grammar")


@functools.lru_cache(maxsize=1)
def words() -> tuple[str, ...]:
    """All words of the data set, in the order of their ids."""
    things = [Thing(s, c, z, p) for s in SHAPES for c in COLOURS for z in SIZES for p in range(4)]
    texts = [caption(tuple(things[:n]), w) for n in (1, 2, 3) for w in range(CAPTIONS)]
    rng = random.Random(0)
    asked = (question((thing,), rng) for thing in itertools.islice(itertools.cycle(things), 2000))
    texts += [text for pair in asked for text in pair]
    texts += [*ASKED, "user : assistant : it"]
    return (END, IMAGE, *sorted({word for text in texts for word in text.split()}))


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a word; :data:`END` has id 0 and :data:`IMAGE` id 1.

    Example:
        >>> ids = tokenizer().encode("there is a red ring .")
        >>> len(ids), tokenizer().decode(ids)
        (6, 'there is a red ring .')
    """
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(words())}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=END))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made_: Any = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=END,
        eos_token=END,
        pad_token=END,
        unk_token=END,
        clean_up_tokenization_spaces=False,
        model_max_length=160,
    )
    return made_  # type: ignore[no-any-return]


def digest() -> str:
    """Hash of what the examples depend on."""
    drawn = [(e.scene, e.request, e.answer, e.jitter) for e in examples(64, "train")]
    picture = render(examples(1, "train")[0].scene, 0).tobytes().hex()
    return hashlib.sha256(repr((words(), drawn, picture)).encode()).hexdigest()


def pictures(drawn: Sequence[Example]) -> Tensor:
    """Images of some examples, [B, 3, 32, 32]."""
    return torch.from_numpy(np.stack([each.image() for each in drawn]))
