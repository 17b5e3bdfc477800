"""Multi-level training: shrink a young model, train the small one, grow it back and go on.

Paper: L. Zou, H. Zhang, Y. Deng, "A Multi-Level Framework for Accelerating Training Transformer
    Models", 2024, arXiv:2404.07999
Idea: A model that has been trained a little is coalesced to half its width and depth, the small one
    learns fast, and its de-coalesced weights, blended into the large ones, let those learn on from
    a better place.
Differs: Two levels. The hidden matrices are trained by Muon, whose steps are of one size at every
    width, so the small level keeps the learning rate (the paper: Adam, four times the rate).
    Embeddings keep their scale in growing, for the reason given in isthmus.surgery.resize. As many
    small steps as large ones, as in the paper's recipe for GPT, fill the budget of operations.

    large, a few steps ──coalesce──> small, n steps ──de-coalesce──> grown
        theta ───────────────────────── (1 - a) theta + a grown ──> large, n steps
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from isthmus.claims import Claim, Gate, Row, Ruler, Scale, judge
from isthmus.errors import InvalidInputError
from isthmus.models.hub import load_checkpoint
from isthmus.surgery import resize
from isthmus.workbench import pycode
from isthmus.workbench._training import Recipe, batches, build, evaluate, nats, pack
from isthmus.workbench.courses import made
from isthmus.workbench.tokenizer import end_id, train_tokenizer

EVERY = {"test": 60, "small": 4}
"""Only every so many documents are read: more than these short trainings get through."""


@dataclass(frozen=True)
class Settings:
    """Settings of a V-cycle.

    Attributes:
        factor: By what width and depth are divided at the small level.
        share: a, the weight of the grown model in the blend; 0 switches the idea off, because the
            large model then goes on as if the small one had never been.
        young: Steps before shrinking, as a share of the steps of ordinary training.
    """

    factor: int = 2
    share: float = 0.5
    young: float = 0.05


@dataclass(frozen=True)
class Plan:
    """Steps of the three phases.

    Attributes:
        young: Of the large model, before it is shrunk.
        small: Of the small model.
        large: Of the large model, after the blend.
    """

    young: int
    small: int
    large: int


class MultilevelTraining:
    """The V-cycle of two levels.

    Args:
        settings: See :class:`Settings`.

    Raises:
        InvalidInputError: A factor below 2, or a share outside 0 to 1.
    """

    role: ClassVar[str] = "training"

    def __init__(self, settings: Settings | None = None) -> None:
        self.settings = settings or Settings()
        given = self.settings
        if given.factor < 2 or not 0 <= given.share <= 1 or not 0 < given.young < 1:
            raise InvalidInputError(
                "multilevel-training needs a factor of 2 or more, a share from 0 to 1 and young "
                f"between 0 and 1, got {given}"
            )

    def shrink(self, model: Any) -> Any:
        """Coalesce width and depth: neighbouring blocks, channels half the width apart."""
        narrow = resize.coalesce_width(model, self.settings.factor)
        return resize.coalesce_depth(narrow, self.settings.factor)

    def blend(self, model: Any, small: Any) -> Any:
        """``(1 - a) * model + a * de-coalesced(small)``; tells the copies apart again."""
        deep = resize.decoalesce_depth(small, self.settings.factor)
        grown = resize.decoalesce_width(deep, self.settings.factor)
        return resize.interpolate(model, grown, self.settings.share)

    def plan(self, steps: int, large: float, small: float, compute: float) -> Plan:
        """Spend a budget: ``young`` steps, then as many small steps as large ones.

        Args:
            steps: Steps of ordinary training.
            large: Operations of a step of the large model.
            small: Operations of a step of the small model.
            compute: Share of the operations of ordinary training that may be spent.

        Raises:
            InvalidInputError: Nothing is left after the young steps.

        Example:
            >>> MultilevelTraining().plan(600, 10.0, 2.0, 0.9)
            Plan(young=30, small=425, large=425)
        """
        young = max(1, round(self.settings.young * steps))
        each = int((compute * steps - young) * large / (large + small))
        if each < 1:
            raise InvalidInputError(f"{compute:.0%} of {steps} steps leave nothing for a V-cycle")
        return Plan(young, each, each)

    def cycle(self, model: Any, plan: Plan, train: Callable[[Any, int, str], Any]) -> Any:
        """One V-cycle; every phase starts a new optimiser.

        Args:
            model: The large model, fresh.
            plan: Steps of the phases.
            train: Trains a model for some steps in a phase of that name and returns it.
        """
        young = train(model, plan.young, "young")
        small = train(self.shrink(young), plan.small, "small")
        return train(self.blend(young, small), plan.large, f"large-{self.settings.share:g}")


def step_flops(config: Any, tokens: int, length: int) -> float:
    """Operations of one training step of a Llama: three forwards of its matrix products.

    Args:
        config: Its config.
        tokens: Tokens of a step.
        length: Tokens of a sequence; attention is counted in full, as kernels with a mask compute
            it.
    """
    heads = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    block = config.hidden_size * (2 * heads + 2 * keys + 3 * config.intermediate_size)
    weights: int = config.num_hidden_layers * block + config.hidden_size * config.vocab_size
    attention: int = 4 * length * heads * config.num_hidden_layers
    return 3.0 * tokens * (2 * weights + attention)


@functools.lru_cache(maxsize=2)
def _texts(vocab_size: int, every: int) -> tuple[Any, list[NDArray[np.int32]], NDArray[np.int32]]:
    """A tokenizer, training documents in its tokens, and the packed held-out text."""
    texts = pycode.texts("train")[::every]
    tokenizer = train_tokenizer(texts, vocab_size)

    def encode(documents: Sequence[str]) -> list[NDArray[np.int32]]:
        found = tokenizer.backend_tokenizer.encode_batch_fast(documents, add_special_tokens=False)
        return [np.array(each.ids, dtype=np.int32) for each in found]

    return tokenizer, encode(texts), pack(encode(pycode.texts("held-out")), end_id(tokenizer))


class Phase:
    """A course that starts where another ended.

    Args:
        recipe: Steps, rates and the order of the data.
        start: The model to begin with; stays as it is.
        every: See :data:`EVERY`.
    """

    def __init__(self, recipe: Recipe, start: Any, every: int) -> None:
        self.recipe, self.start = recipe, start
        self.tokenizer, self.documents, self.held_out = _texts(recipe.vocab_size, every)
        self.end = end_id(self.tokenizer)

    def build(self) -> Any:
        """A copy of the model."""
        return resize.interpolate(self.start, self.start, 0.0)

    def batches(self, start: int) -> Iterator[Tensor]:
        """Token ids [B, T + 1]."""
        return batches(self.documents, self.recipe, self.end, start)

    def loss(self, model: nn.Module, batch: Tensor) -> Tensor:
        """Mean loss of next-token prediction."""
        return nats(model, batch)


def phase(recipe: Recipe, every: int) -> Callable[[Any, int, str], Any]:
    """How a claim trains: from any model on, for some steps, once for equal beginnings.

    Args:
        recipe: Ordinary training; its sizes give way to those of the model.
        every: See :data:`EVERY`.

    Returns:
        The function that :meth:`MultilevelTraining.cycle` takes. The learning rate falls at the
        end of a phase, but not of the young one; each kind of phase reads its data in an order of
        its own.
    """
    orders = ("scratch", "young", "small")

    def train(model: Any, steps: int, name: str) -> Any:
        config = model.config
        part = replace(
            recipe,
            name=f"multilevel-{name}",
            hidden_size=config.hidden_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            intermediate_size=config.intermediate_size,
            steps=steps,
            decay_share=0.0 if name == "young" else recipe.decay_share,
            seed=recipe.seed * 10 + (orders.index(name) if name in orders else len(orders)),
        )
        course = Phase(part, model, every)
        start = hashlib.sha256()
        for parameter in model.parameters():
            start.update(parameter.detach().numpy().tobytes())
        corpus = f"{pycode.digest()}/{every}/{start.hexdigest()}"
        folder = made(part, course, course.tokenizer, corpus=corpus, end=course.end)
        return load_checkpoint(str(folder), dtype="float32", device="cpu").model

    return train


RECIPES = {
    "small": Recipe(
        name="multilevel",
        hidden_size=128,
        num_hidden_layers=6,
        num_attention_heads=4,
        head_dim=32,
        intermediate_size=352,
        vocab_size=1024,
        batch_size=8,
        sequence_length=256,
        steps=300,
        warmup_steps=10,
        decay_share=0.4,
    ),
    "test": Recipe(
        name="multilevel",
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        head_dim=16,
        intermediate_size=48,
        vocab_size=384,
        batch_size=2,
        sequence_length=32,
        steps=20,
        warmup_steps=2,
        decay_share=0.4,
    ),
}
"""Ordinary training at each scale."""

COMPUTE = 0.9
"""Operations of the V-cycle, as a share of those of ordinary training."""


def claim(ruler: Ruler, scale: Scale = "small") -> Claim:
    """Train one decoder from scratch and by V-cycles that get nine tenths of the operations."""
    size = "test" if scale == "test" else "small"
    recipe, every = RECIPES[size], EVERY[size]
    fresh, train = build(recipe), phase(recipe, every)
    system = MultilevelTraining()
    tokens, length = recipe.batch_size * recipe.sequence_length, recipe.sequence_length
    large, small = (step_flops(m.config, tokens, length) for m in (fresh, system.shrink(fresh)))
    plan = system.plan(recipe.steps, large, small, COMPUTE)
    spent = ((plan.young + plan.large) * large + plan.small * small) / (recipe.steps * large)
    _, _, held_out = _texts(recipe.vocab_size, every)

    def loss(model: Any) -> float:
        return evaluate(model, held_out, length, 4 if size == "test" else 128)

    scratch = loss(train(fresh, recipe.steps, "scratch"))
    ours, off, whole = (
        loss(MultilevelTraining(replace(system.settings, share=share)).cycle(fresh, plan, train))
        for share in (system.settings.share, 0.0, 1.0)
    )
    gates = (
        Gate("operations, as a share of training from scratch", spent, "<=", COMPUTE),
        Gate("loss of the V-cycle minus loss from scratch", ours - scratch, "<=", 0.0),
        Gate("the same without the blend", off - scratch, ">", 0.0),
    )
    direction = (Gate("loss gained by the blend", off - ours, ">", 0.0),)
    return Claim(
        slug="multilevel-training",
        statement="A V-cycle over two levels reaches the held-out loss of training from scratch "
        "with a tenth fewer operations, the small level's included.",
        paper_figure="about 20 % fewer operations for BERT-Base and GPT-Base, 51.6 % for "
        "BERT-Large (abstract)",
        rows=(
            Row("held-out loss", "nats/token", scratch, ours, off, note="off: a = 0"),
            Row("held-out loss, only grown weights", "nats/token", scratch, whole, off, note="a=1"),
            Row("operations", "of training from scratch", 1.0, spent, spent),
        ),
        scale=scale,
        device="cpu",
        status=judge(gates, direction),
        gates=gates,
        seeds=(recipe.seed,),
        notes=(
            f"{plan.young} young, {plan.small} small and {plan.large} large steps of {tokens} "
            f"tokens against {recipe.steps} large ones; a small step costs {small / large:.2f} of "
            "a large one",
            "one seed; without the blend the small level's operations are spent and lost",
        ),
    )
