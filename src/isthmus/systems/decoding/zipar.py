"""ZipAR: the next row of an image begins as soon as a few tokens of this one are there.

Paper: Y. He, F. Chen, Y. He, S. He, H. Zhou, K. Zhang, B. Zhuang, "ZipAR: Parallel Auto-regressive
    Image Generation through Spatial Locality", 2024, arXiv:2412.04062
Idea: Image tokens depend on their near neighbours above all, so row r + 1 can start once s tokens
    of row r exist, and one forward decodes the newest token of every open row.
Differs: Grids without end-of-line tokens and without guidance (the released code for LlamaGen
    without its classifier-free guidance). Draws are keyed by place, so that s as wide as a row
    gives the raster sample itself.
Lossless: no

Passes of the first three rows with W = 4 and s = 2; in all there are 2 W + (H - 2) s::

    1  2  3  4
    5  6  7  8
    7  8  9 10
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from isthmus.claims import Claim, Gate, Row, Ruler, Scale, judge, ratio
from isthmus.decoding.grid import Painted, PlaceDraws, in_raster_order
from isthmus.decoding.law import Law
from isthmus.decoding.rows import Rows, paint_rows
from isthmus.decoding.target import HubTarget
from isthmus.workbench import digit_models, digits


@dataclass(frozen=True)
class Settings(Rows):
    """Settings of decoding by rows, which :class:`isthmus.decoding.rows.Rows` explains.

    Attributes:
        window: s (16 of 24 for LlamaGen, table 1); as wide as a row, or wider, it switches the
            idea off: raster order.
        adaptive: Section 3.3; ``window`` is then s_min.
        first_row_alone: As the released code does.
        stand_in: As the released code does.
    """

    window: int = 16


class Zipar:
    """Decodes a grid by rows that overlap.

    Args:
        settings: See :class:`Settings`.
    """

    role: ClassVar[str] = "strategy"

    def __init__(self, settings: Settings | None = None) -> None:
        self.settings = settings or Settings()

    def paint(
        self,
        target: HubTarget,
        prompts: torch.Tensor,
        size: tuple[int, int],
        *,
        seed: int,
        law: Law | None = None,
        levels: int | None = None,
    ) -> Painted:
        """Decode images.

        Args:
            target: A decoder that was trained on prompts and then tokens in raster order.
            prompts: int64 [B, P].
            size: Height H and width W in tokens.
            seed: Key of all draws.
            law: Temperature and truncations; plain sampling when None.
            levels: Only tokens below this number are image tokens; all of them when None.

        Returns:
            The images.
        """
        draws = PlaceDraws(seed, len(prompts), law)
        return paint_rows(self.settings, target, prompts, size, draws, levels or target.vocab_size)


SIZE = (digits.SIDE, digits.SIDE)


def claim(ruler: Ruler, scale: Scale = "small") -> Claim:
    """Handwritten digits, 8 by 8 pixels: passes, and what a judge makes of them."""
    small = scale != "test"
    recipe = digit_models.RECIPE if small else replace(digit_models.RECIPE, steps=20)
    target, judged = digit_models.raster_target(recipe), digits.Judge()
    wanted = torch.arange(1000 if small else 20) % digits.CLASSES
    prompts = digits.prompts(wanted)

    def paint(window: int, few: int = len(wanted), **other: Any) -> Painted:
        system = Zipar(Settings(window, **other))
        return system.paint(target, prompts[:few], SIZE, seed=0, levels=digits.LEVELS)

    def raster(few: int = len(wanted)) -> torch.Tensor:
        draws = PlaceDraws(0, few)
        return in_raster_order(target, prompts[:few], SIZE, draws, digits.LEVELS)

    plain, ours, off = raster(), paint(4), paint(digits.SIDE)
    variants = {
        "s = 6": paint(6),
        "s = 2": paint(2),
        "s = 1": paint(1),
        "s = 4, row 1 early": paint(4, first_row_alone=False),
        "s = 4, the current row's stand-in": paint(4, stand_in="current"),
        "s_min = 2, adaptive": paint(2, adaptive=True),
    }

    def quality(made: torch.Tensor) -> tuple[float, float]:
        return 100 * judged.accuracy(made, wanted), judged.distance(made)

    (right, far), (our_right, our_far) = quality(plain), quality(ours.tokens)
    off_right, off_far = quality(off.tokens)
    bad_right, bad_far = quality(variants["s = 2"].tokens)
    real_right = 100 * judged.accuracy(*digits.pictures("held-out"))
    passes = int(ours.passes.max())
    few = 16 if small else 2
    clock = ruler.compare(
        {"raster": lambda: raster(few), "ours": lambda: paint(4, few)}, repeats=3 if small else 1
    )
    faster = ratio(clock["raster"], clock["ours"])
    share = passes / plain[0].numel()
    gates = (
        Gate("passes, as a share of raster order", share, "<=", 40 / 64),
        Gate("accuracy lost at s = 4, points", right - our_right, "<=", 5),
        Gate("accuracy lost at s = 2, points", right - bad_right, ">=", 10),
        Gate("idea off: tokens unlike raster order", float((off.tokens != plain).sum()), "==", 0),
    )
    direction = (
        gates[0],
        Gate("accuracy lost at s = 4, points", right - our_right, "<=", 10),
        Gate("accuracy of s = 2 below that of s = 4, points", our_right - bad_right, ">", 0),
    )
    return Claim(
        slug="zipar",
        statement="A row of a digit may begin after four of the eight tokens above it: 40 passes "
        "instead of 64, and a judge sees the digit as often, within 5 points; after two it is too "
        "early.",
        paper_figure="up to 91 % fewer forwards on Emu3-Gen without retraining (abstract)",
        rows=(
            Row("passes, s = 4", "forwards", plain[0].numel(), passes, int(off.passes.max())),
            Row(
                "digits that the judge sees, s = 4",
                "%",
                right,
                our_right,
                off_right,
                ceiling=real_right,
                control=bad_right,
                note="ceiling: real digits; control: s = 2",
            ),
            Row(
                "Fréchet distance, s = 4",
                "",
                far,
                our_far,
                off_far,
                control=bad_far,
                note="in the judge's hidden layer; control: s = 2",
            ),
            *(
                Row(
                    f"digits that the judge sees, {name}",
                    "%",
                    right,
                    quality(made.tokens)[0],
                    off_right,
                    note=f"{float(made.passes.double().mean()):.1f} passes, Fréchet "
                    f"{quality(made.tokens)[1]:.1f}",
                )
                for name, made in variants.items()
            ),
            Row("speed-up, 16 images", "x", 1.0, faster.median, None, note=f"{faster}, no gate"),
        ),
        scale=scale,
        device="cpu",
        status=judge(gates, direction),
        gates=gates,
        seeds=(0,),
        notes=(
            f"{len(wanted)} images, draws shared by all rows; the model loses "
            f"{digit_models.pixel_loss(target.model):.2f} nats per held-out pixel.",
        ),
    )
