"""ARPG: an image decoder that is told where, and so decodes any places at once, in any order.

Paper: H. Li, J. Yang, G. Li, H. Wang, "Autoregressive Image Generation with Randomized Parallel
    Decoding", 2025, arXiv:2503.10568
Idea: Where and what are kept apart: content tokens build a causal memory of keys and values, and
    queries that know nothing but a place read it, so that a group of places is predicted in one
    pass and every pass is cached.
Differs: No dropout of activations, since random orders keep so small a model from learning by
    heart, and no tokenizer of images: pixels are tokens.
Lossless: no

    class ──> memory ──> places of group 1 ──> their tokens ──> memory ──> places of group 2 ..
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch

from isthmus.claims import Claim, Gate, Row, Ruler, Scale, judge, ratio
from isthmus.decoding.cache import LayerShape, SlotCache
from isthmus.decoding.grid import Painted, PlaceDraws, in_raster_order
from isthmus.decoding.law import Law
from isthmus.decoding.rows import Rows, paint_rows
from isthmus.errors import InvalidInputError
from isthmus.models.guided_decoder import GuidedDecoder
from isthmus.workbench import digit_models, digits


@dataclass(frozen=True)
class Settings:
    """Settings of decoding by groups.

    Attributes:
        steps: S, groups and so passes; 0 switches the idea off: one place in each pass.
        schedule: How groups grow: ``"arccos"``, or ``"cosine"`` as in the released code.
        guidance: g, how far the class pulls (4.5 for the L model, table 1); 1 is no guidance, and
            half the work.
        rising: Let guidance rise with the share of places that are done; else it is constant.
    """

    steps: int = 64
    schedule: Literal["arccos", "cosine"] = "arccos"
    guidance: float = 4.5
    rising: bool = True


def group_sizes(places: int, steps: int, schedule: str = "arccos") -> list[int]:
    """Places of each group: at least one, and all of them together.

    Args:
        places: n.
        steps: S, at most n.
        schedule: See :class:`Settings`.

    Example:
        >>> group_sizes(64, 4), group_sizes(64, 4, "cosine")
        ([11, 11, 13, 29], [5, 14, 21, 24])
    """
    sizes: list[int] = []
    for step in range(steps):
        share = (step + 1) / steps
        if schedule == "arccos":
            left = math.floor(places * math.acos(share) / (math.pi / 2))
        else:
            left = math.floor(places * math.cos(share * math.pi / 2))
        done = sum(sizes)
        later = steps - step - 1  # one place at least for each of these
        sizes.append(min(max(1, places - done - left), places - done - later))
    sizes[-1] += places - sum(sizes)
    return sizes


class Arpg:
    """Decodes the places of a grid in groups, in a random order.

    Args:
        settings: See :class:`Settings`.

    Raises:
        InvalidInputError: A setting is out of range.
    """

    role: ClassVar[str] = "strategy"

    def __init__(self, settings: Settings | None = None) -> None:
        self.settings = given = settings or Settings()
        if given.steps < 0 or given.guidance < 0 or given.schedule not in ("arccos", "cosine"):
            raise InvalidInputError(
                "arpg needs steps and guidance of 0 or more and the schedule 'arccos' or 'cosine', "
                f"got {given}"
            )

    @torch.no_grad()
    def paint(
        self,
        model: GuidedDecoder,
        classes: torch.Tensor,
        places: int,
        *,
        seed: int,
        law: Law | None = None,
        known: torch.Tensor | None = None,
    ) -> Painted:
        """Decode images.

        Args:
            model: A decoder that was trained on random orders.
            classes: int64 [B].
            places: Places n of the grid.
            seed: Key of the order and of all draws.
            law: Temperature and truncations; plain sampling when None.
            known: Tokens that stand already, int64 [B, n], -1 where there is none; the same
                places in every image. They are read first (inpainting, sec. 3.4).

        Returns:
            The images, tokens in raster order [B, n].

        Raises:
            InvalidInputError: Known places differ among the images.
        """
        draws = PlaceDraws(seed, len(classes), law)
        tokens = classes.new_full((len(classes), places), -1) if known is None else known.clone()
        given = (tokens >= 0).all(0)
        if not torch.equal(given, (tokens >= 0).any(0)):
            raise InvalidInputError("all images of a batch must know the same places")
        order = torch.randperm(places, generator=torch.Generator().manual_seed(seed))
        order = order.to(classes.device)
        held, free = order[given[order]], order[~given[order]]
        work = _Work(model, classes, guided=self.settings.guidance != 1)
        done = len(held)
        memory = work.remember(tokens[:, held], held)
        steps = min(self.settings.steps or len(free), len(free))
        groups = group_sizes(len(free), steps, self.settings.schedule) if steps else []
        for group in torch.split(free, groups):
            done += len(group)
            pull = self.settings.guidance
            if self.settings.rising:  # g_t of the released code, this group counted as done
                pull = 1 + (pull - 1) * done / places
            asked = group.expand(len(classes), -1)
            tokens[:, group] = draws.pick(work.ask(asked, memory, pull), asked)
            if done < places:
                memory = work.remember(tokens[:, group], group)
        return Painted(tokens, classes.new_full((len(classes),), len(groups)))


class _Work:
    """A guided decoder and its caches; with guidance, a second half of the batch has no class."""

    def __init__(self, model: GuidedDecoder, classes: torch.Tensor, *, guided: bool) -> None:
        self.model, self.guided = model, guided
        if guided:
            classes = torch.cat([classes, torch.full_like(classes, model.classes)])
        self._classes: torch.Tensor | None = model.class_token(classes)[:, None]
        sizes = model.sizes
        shape = LayerShape(sizes.num_attention_heads, sizes.head_dim, sizes.head_dim)
        dtype = model.query.dtype
        layout = [shape] * model.num_stores
        self._slots = SlotCache(layout, len(classes), dtype, classes.device)

    def remember(
        self, tokens: torch.Tensor, places: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Feed tokens [B, N] of places [N]; they see one another, and what was fed before."""
        if self.guided:
            tokens = torch.cat([tokens, tokens])
        if self._classes is not None:  # the class comes first, alone
            first, self._classes = self._classes, None
            memory = self._feed(first, first.new_full((1,), -1))
            if not len(places):
                return memory
        return self._feed(tokens, places)

    def _feed(
        self, tokens: torch.Tensor, places: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        slots, count = self._slots, tokens.shape[1]
        slots.reserve(count)
        stores: list[Any] = list(slots.hub.layers)
        open_mask = torch.zeros(1, 1, count, slots.used + count, dtype=self.model.query.dtype)
        mask = open_mask.to(tokens.device)
        memory = self.model.remember(tokens, places.expand_as(tokens), stores, mask)
        slots.used += count
        return memory

    def ask(
        self, places: torch.Tensor, memory: tuple[torch.Tensor, torch.Tensor], pull: float
    ) -> torch.Tensor:
        """Logits [B, N, V] at places [B, N], ``u + g (c - u)`` with guidance."""
        if not self.guided:
            return self.model.ask(places, memory)
        with_class, without = self.model.ask(torch.cat([places, places]), memory).chunk(2)
        return without + pull * (with_class - without)


SIZE = (digits.SIDE, digits.SIDE)
PLACES = digits.SIDE * digits.SIDE


def claim(ruler: Ruler, scale: Scale = "small") -> Claim:
    """Handwritten digits, 8 by 8 pixels: what a judge makes of them after few passes."""
    small = scale != "test"
    lessons = digit_models.RECIPE.steps if small else 20
    model = digit_models.guided(replace(digit_models.GUIDED, steps=lessons))
    target = digit_models.raster_target(replace(digit_models.RECIPE, steps=lessons))
    judged = digits.Judge()
    wanted = torch.arange(1000 if small else 20) % digits.CLASSES
    prompts = digits.prompts(wanted)

    def paint(steps: int, few: int = len(wanted), **other: Any) -> Painted:
        part = Arpg(Settings(steps, **other))
        return part.paint(model, wanted[:few], PLACES, seed=0)

    def raster(few: int = len(wanted)) -> torch.Tensor:
        return in_raster_order(target, prompts[:few], SIZE, PlaceDraws(0, few), digits.LEVELS)

    def quality(made: torch.Tensor) -> tuple[float, float]:
        grids = made.view(-1, *SIZE)
        return 100 * judged.accuracy(grids, wanted), judged.distance(grids)

    by_rows = paint_rows(Rows(1), target, prompts, SIZE, PlaceDraws(0, len(wanted)), digits.LEVELS)
    right, far = quality(raster())
    rows_right, rows_far = quality(by_rows.tokens)
    ours, off = paint(16), paint(0)  # off: one place in each pass
    found = {16: quality(ours.tokens)} | {n: quality(paint(n).tokens) for n in (8, 4, 2)}
    one, one_far = quality(off.tokens)
    share = int(ours.passes.max()) / int(off.passes.max())
    variants = {
        f"{n or PLACES} passes, no guidance": quality(paint(n, guidance=1.0).tokens)
        for n in (0, 16, 8)
    }
    variants["8 passes, cosine groups"] = quality(paint(8, schedule="cosine").tokens)
    alone = variants[f"{PLACES} passes, no guidance"][0]
    cosine = variants["8 passes, cosine groups"][0]
    few = 16 if small else 2
    clock = ruler.compare(
        {"raster": lambda: raster(few), "ours": lambda: paint(16, few)},
        repeats=3 if small else 1,
    )
    faster = ratio(clock["raster"], clock["ours"])
    gates = (
        Gate("accuracy lost at 16 passes, points", one - found[16][0], "<=", 4),
        Gate("accuracy lost at 8 passes, points", one - found[8][0], "<=", 4),
        Gate("accuracy lost at 2 passes, points", one - found[2][0], ">=", 10),
        Gate("Fréchet, share of rows in flight's", found[16][1] / rows_far, "<", 1),
        Gate("passes, as a share of those with the idea off", share, "<=", 0.25),
    )
    direction = (
        Gate("accuracy lost at 16 passes, points", one - found[16][0], "<=", 8),
        Gate("accuracy lost at 2 passes, points", one - found[2][0], ">", 0),
    )
    return Claim(
        slug="arpg",
        statement="A decoder that is told where paints a digit of 64 pixels in 8 to 16 passes as "
        "well as in 64, within 4 points of what a judge sees, and better than rows in flight do "
        "in 22.",
        paper_figure="FID 2.44 at 64 steps for 256 tokens, over 20 times the throughput (L, "
        "table 1)",
        rows=(
            *(
                Row(
                    f"digits that the judge sees, {steps} passes",
                    "%",
                    right,
                    value,
                    one,
                    control=rows_right,
                    note=f"Fréchet {distance:.1f}; baseline: raster order, 64 passes; off: one "
                    f"place a pass; control: rows in flight, {int(by_rows.passes.max())} passes",
                )
                for steps, (value, distance) in found.items()
            ),
            Row(
                "Fréchet distance, 16 passes",
                "",
                far,
                found[16][1],
                one_far,
                control=rows_far,
                note="in the judge's hidden layer; columns as above",
            ),
            *(
                Row(
                    f"digits that the judge sees, {name}",
                    "%",
                    right,
                    value,
                    one,
                    note=f"Fréchet {distance:.1f}",
                )
                for name, (value, distance) in variants.items()
            ),
            Row("speed-up, 16 images", "x", 1.0, faster.median, None, note=f"{faster}, no gate"),
        ),
        scale=scale,
        device="cpu",
        status=judge(gates, direction),
        gates=gates,
        seeds=(0,),
        reason=""
        if gates[1].passed
        else f"8 passes lose {one - found[8][0]:.1f} points; groups by the cosine, whose first and "
        f"last are smaller, lose {one - cosine:.1f}",
        notes=(
            f"{len(wanted)} images; both decoders have 0.2M parameters and as many lessons; one "
            f"place a pass without guidance is {right - alone:.1f} points behind raster order.",
            "guidance rises to the published 4.5 and doubles the work of a pass; raster order and "
            "rows in flight have none.",
            "Without guidance, which was measured first, 16 passes lose 6.7 points and 8 lose "
            "17.4.",
        ),
    )
