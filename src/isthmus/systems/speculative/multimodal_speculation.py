"""Multimodal speculation: a drafter that never sees the image drafts for a target that does.

Paper: Gagrani, Goel, Jeon, Park, Lee, Lott. On Speculative Decoding for Multimodal Large Language
    Models. 2024. arXiv:2404.08856
Idea: Most words of an answer about an image are decided by the words before them, so a small
    language model without image encoder, image tokens or adapter is a good enough drafter.
Differs: The drafters are trained from scratch on texts of the target's training set, not tuned on
    its answers; an image encoder learns to name what it sees while the target is trained, in place
    of pre-training. The target's prompt holds one placeholder for each image feature, as the
    processors of transformers write it. Models whose positions form an image grid are not covered.
Lossless: yes

    target   <image> x 4, user  : what do you see ? assistant : there is a ...   position i + 4
    drafter                user : what do you see ? assistant : there is a ...   position i
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from isthmus.claims import Claim, Gate, Row, Ruler, Scale, judge
from isthmus.decoding.drafters import ModelDrafter
from isthmus.decoding.generation import Generation
from isthmus.decoding.law import chain_logits
from isthmus.decoding.model import Model
from isthmus.decoding.policy import Fixed
from isthmus.decoding.target import HubTarget
from isthmus.decoding.tree import TokenTree
from isthmus.errors import InvalidInputError
from isthmus.models.hub import load_checkpoint
from isthmus.roles import Context, Shape, Step, Target
from isthmus.workbench import scene_models, scenes
from isthmus.workbench.courses import card
from isthmus.workbench.scene_models import word_hits


@dataclass(frozen=True)
class Settings:
    """Settings of multimodal speculation.

    Attributes:
        num_draft_tokens: Draft tokens a round, gamma.
        text_only: The mechanism: leave image placeholders out of what the draft model reads. Off,
            it reads the target's prompt as it is, and the images too if it can.
        image_token: Id of the placeholder; None takes the one in the target's config.
    """

    num_draft_tokens: int = 3
    text_only: bool = True
    image_token: int | None = None


class MultimodalSpeculation(ModelDrafter):
    """A language model that drafts for an image-text target.

    Args:
        model: The draft model as a target, sharing the target's vocabulary.
        settings: See :class:`Settings`.

    Raises:
        InvalidInputError: A negative number of draft tokens.
    """

    role: ClassVar[str] = "drafter"
    name = "multimodal-speculation"

    def __init__(self, model: Target, settings: Settings | None = None) -> None:
        self.settings = settings or Settings()
        if self.settings.num_draft_tokens < 0:
            raise InvalidInputError(
                f"num_draft_tokens must be 0 or more, got {self.settings.num_draft_tokens}"
            )
        super().__init__(model)
        self._image: int | None = None

    @property
    def default_shape(self) -> Shape:
        """A chain of gamma tokens."""
        return Shape(self.settings.num_draft_tokens, self.settings.num_draft_tokens, 1)

    def begin(self, context: Context, target: Target, **inputs: Any) -> None:
        """Prefill the draft model with the words of the prompts.

        Raises:
            InvalidInputError: A prompt ends in an image placeholder.
        """
        self._image = None
        if self.settings.text_only:
            config = getattr(getattr(target, "model", None), "config", None)
            own = self.settings.image_token
            self._image = getattr(config, "image_token_id", None) if own is None else own
            inputs = {}
        if self._image is not None and bool((context.roots() == self._image).any()):
            raise InvalidInputError("a prompt ends in an image; put the request after it")
        super().begin(self._words(context), target, **inputs)

    def propose(self, context: Context, shape: Shape) -> TokenTree:
        """Draft a chain from the words alone."""
        return super().propose(self._words(context), shape)

    def observe(self, step: Step) -> None:
        """Forget drafted tokens that were not accepted, counted in the drafter's positions."""
        super().observe(replace(step, context=self._words(step.context)))

    def _words(self, context: Context) -> Context:
        return context if self._image is None else without_images(context, self._image)


def position_map(ids: torch.Tensor, image: int) -> torch.Tensor:
    """Target position of each drafter position, int64 [B, T]; those of images come last.

    Args:
        ids: Tokens as the target counts them, int64 [B, T].
        image: The placeholder.

    Example:
        >>> position_map(torch.tensor([[1, 1, 7, 8], [5, 1, 1, 6]]), 1).tolist()
        [[2, 3, 0, 1], [0, 3, 1, 2]]
    """
    return (ids == image).to(torch.uint8).sort(dim=1, stable=True).indices


def without_images(context: Context, image: int) -> Context:
    """The context as a model that reads text only sees it, in positions of its own.

    Args:
        context: The target's.
        image: The placeholder, which stands in prompts only.
    """
    ids = context.ids
    known = torch.arange(ids.shape[1]) < torch.tensor(context.lengths)[:, None]
    images: list[int] = ((ids == image) & known).sum(1).tolist()
    noise = context.noise
    if noise is not None:
        # shared noise belongs to the target's positions
        shift, given = dict(zip(context.requests, images, strict=True)), noise

        def noise(request: int, place: int, size: int) -> torch.Tensor:
            return given(request, place + shift[request], size)

    return replace(
        context,
        ids=ids.gather(1, position_map(ids, image)),
        lengths=[n - k for n, k in zip(context.lengths, images, strict=True)],
        prompt_lengths=[n - k for n, k in zip(context.prompt_lengths, images, strict=True)],
        noise=noise,
    )


class Unigram:
    """A control: every draft token is drawn from one law, whatever stands before it.

    Args:
        counts: How often each token occurs, [V].
    """

    name = "unigram"

    def __init__(self, counts: torch.Tensor) -> None:
        self.logits = torch.log(counts.double() / counts.sum())

    def begin(self, context: Context, target: Target, **inputs: Any) -> None:
        """Nothing to read."""

    def propose(self, context: Context, shape: Shape) -> TokenTree:
        """A chain of likeliest tokens, or of drawn ones."""
        drafted = torch.zeros(context.batch, 0, dtype=torch.int64)
        laws = []
        rows = self.logits.expand(context.batch, -1)
        for _ in range(min(shape.nodes, shape.depth)):
            law = torch.softmax(chain_logits(rows, context, drafted), -1)
            laws.append(law)
            token = law.argmax(-1, keepdim=True)
            if not context.law.greedy:
                token = torch.multinomial(law, 1, generator=context.generator)
            drafted = torch.cat([drafted, token], 1)
        if not laws:
            return TokenTree.root(context.roots())
        q = None if context.law.greedy else torch.stack(laws, 1)
        return TokenTree.chain(context.roots(), drafted, q=q)

    def observe(self, step: Step) -> None:
        """Nothing to learn."""

    def select(self, rows: Sequence[int]) -> None:
        """Nothing to keep."""


def memory_bound_speedup(tau: float, gamma: int, cost: float) -> float:
    """Speed-up where a forward costs the parameters it reads: tau / (c gamma + 1).

    Example:
        >>> memory_bound_speedup(2.5, 5, 0.05)
        2.0
    """
    return tau / (cost * gamma + 1.0)


GAMMAS = (3, 5)
TEMPERATURES = (0.0, 1.0)


def claim(ruler: Ruler, scale: Scale = "small") -> Claim:
    """Measure drafters that see nothing, a little, or only word counts of rendered scenes.

    Args:
        ruler: Not used: tokens of a forward decide.
        scale: ``"small"`` is 96 held-out scenes, ``"test"`` 4 with networks hardly trained.
    """
    small = scale != "test"
    count, batch = (96, 32) if small else (4, 4)
    hubs, courses, nats = {}, {}, {}
    for name in scene_models.NETWORKS:
        recipe = scene_models.NETWORKS[name]
        recipe = recipe if small else replace(recipe, name=f"{name}-test", steps=2)
        courses[name] = scene_models.SceneCourse(recipe)
        folder = scene_models.network(recipe)
        nats[name] = card(folder)["curve"][-1]
        hubs[name] = load_checkpoint(str(folder), dtype="float32", device="cpu").model
    model = Model(hubs["scenes-target"], scenes.tokenizer(), fast=False)
    target, course = model.target, courses["scenes-target"]
    text, adapter = HubTarget(hubs["scenes-text"]), HubTarget(hubs["scenes-adapter"])
    asked = scenes.examples(count)
    counts = torch.ones(target.vocab_size)
    for example in scenes.examples(2000, "train"):
        ids = torch.tensor([*course.encode(example.answer), course.end])
        counts.index_add_(0, ids, torch.ones(len(ids)))

    def run(drafter: Any, temperature: float, gamma: int) -> list[Generation]:
        policy: Any = Fixed() if drafter is None else Fixed(drafter, Shape(gamma, gamma, 1))
        found: list[Generation] = []
        for first in range(0, count, batch):
            part = asked[first : first + batch]
            found += model.generate(
                [torch.tensor(course.prompt(e)) for e in part],
                inputs={"pixel_values": scenes.pictures(part)},
                drafter=policy,
                max_new_tokens=56,
                temperature=temperature,
                seed=first,
            )
        return found

    def tau(found: Sequence[Generation]) -> float:
        forwards = sum(r.stats.target_forwards for r in found)
        return sum(len(r.tokens) for r in found) / forwards

    arms: Mapping[str, Any] = {
        "text": MultimodalSpeculation(text),
        "adapter": MultimodalSpeculation(adapter, Settings(text_only=False)),
        "off": MultimodalSpeculation(text, Settings(text_only=False)),
        "unigram": Unigram(counts),
    }
    plain = run(None, 0.0, 1)
    runs = {
        (name, temperature, gamma): run(drafter, temperature, gamma)
        for name, drafter in arms.items()
        for temperature in TEMPERATURES
        for gamma in (GAMMAS if name in ("text", "adapter") else GAMMAS[:1])
    }
    lengths = {key: tau(found) for key, found in runs.items()}
    same = sum(
        [r.tokens for r in runs[name, 0.0, 3]] == [r.tokens for r in plain]
        for name in ("text", "adapter", "unigram")
    )
    answers = [r.tokens for r in plain]
    truth = [[*course.encode(e.answer), course.end] for e in asked]
    hits = {
        "text": word_hits(text, courses["scenes-text"], asked, answers),
        "adapter": word_hits(adapter, courses["scenes-adapter"], asked, answers),
        "target": word_hits(target, course, asked, truth),
        "guess": word_hits(text, courses["scenes-text"], asked, truth),
    }
    gains = [lengths["adapter", t, 3] / lengths["text", t, 3] for t in TEMPERATURES]
    gain = max(gains)
    below = [hits["text"]["grammar"] - hits["text"][name] for name in scenes.CLASSES]
    sizes = {n: sum(p.numel() for p in h.parameters()) for n, h in hubs.items()}

    def bound(arm: str, t: float, gamma: int) -> float:
        cost = sizes[f"scenes-{arm}"] / sizes["scenes-target"]
        return memory_bound_speedup(lengths[arm, t, gamma], gamma, cost)

    law = (counts / counts.sum()).double()
    entropy = -float((law * law.log()).sum())
    gates = (
        Gate("drafters with the plain output, greedy", same, "==", 3),
        *(
            Gate(f"acceptance length of text only, T = {t:g}", lengths["text", t, 3], ">=", 1.6)
            for t in TEMPERATURES
        ),
        *(
            Gate(
                f"adapter: acceptance of {name} words, gain",
                hits["adapter"][name] - hits["text"][name],
                ">",
                0.0,
            )
            for name in ("colour", "place")
        ),
        Gate("adapter: acceptance length over text only, the larger one", gain, "<=", 1.25),
        Gate("grammar words minus the likeliest class of visual words", min(below), ">", 0.0),
        *(
            Gate(
                f"acceptance length minus that with placeholders, T = {t:g}",
                lengths["text", t, 3] - lengths["off", t, 3],
                ">",
                0.0,
            )
            for t in TEMPERATURES
        ),
        Gate(
            "acceptance length over that of word counts",
            lengths["text", 0.0, 3] / lengths["unigram", 0.0, 3],
            ">",
            1.0,
        ),
    )
    return Claim(
        slug="multimodal-speculation",
        statement="A drafter that reads only the words reaches 1.6 tokens a forward on a target "
        "that describes images; an image adapter helps with colours and places but by 25 % at "
        "most, because most words are grammar and those it drafts well.",
        paper_figure="2.37x memory-bound speed-up with a text-only 115M drafter for LLaVA-7B; an "
        "image adapter adds little, and only on captions (abstract)",
        rows=(
            *(
                Row(
                    f"acceptance length, T = {t:g}, gamma {g}",
                    "tokens/forward",
                    1.0,
                    lengths["text", t, g],
                    lengths.get(("off", t, g)),
                    control=lengths.get(("unigram", t, g)),
                    note=f"with adapter {lengths['adapter', t, g]:.3f}; memory-bound speed-up "
                    f"{bound('text', t, g):.2f}x, with adapter {bound('adapter', t, g):.2f}x; "
                    "off: the drafter is fed the placeholders; control: word counts",
                )
                for t in TEMPERATURES
                for g in GAMMAS
            ),
            *(
                Row(
                    f"acceptance rate of {name} words, greedy",
                    "",
                    hits["adapter"][name],
                    hits["text"][name],
                    None,
                    note="baseline: with adapter; on the true answers the target is right at "
                    f"{hits['target'][name]:.2f} and text alone at {hits['guess'][name]:.2f}",
                )
                for name in ("grammar", *scenes.CLASSES)
            ),
        ),
        scale=scale,
        device="cpu",
        status=judge(gates, (*gates[:3], gates[-1])),
        reason=""
        if gates[5].passed
        else "answers about shapes are short and full of facts, so an adapter is worth more than "
        f"on photographs: {100 * gains[0] - 100:.0f} % greedily, {100 * gains[1] - 100:.0f} % at "
        "T = 1",
        notes=(
            f"Parameters: {', '.join(f'{n} {s:,}' for n, s in sizes.items())}.",
            f"{scenes.CAPTIONS} wordings of captions and six kinds of questions; the words of the "
            f"answers have an entropy of {entropy:.2f} nats of {math.log(target.vocab_size):.2f}, "
            f"and of {nats['scenes-text']:.2f} for the drafter, which knows the words before them.",
            "Acceptance rates are taken on the target's greedy answers.",
        ),
        gates=gates,
        seeds=(0,),
    )
