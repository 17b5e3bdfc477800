"""ZipAR: the next row of an image begins as soon as a few tokens of this one are there.

Paper: Y. He, F. Chen, Y. He, S. He, H. Zhou, K. Zhang, B. Zhuang, "ZipAR: Parallel Auto-regressive
    Image Generation through Spatial Locality", 2024, arXiv:2412.04062
Idea: Image tokens depend on their near neighbours above all, so row r + 1 can start once s tokens
    of row r exist, and one forward decodes the newest token of every open row.
Differs: Grids without end-of-line tokens and without guidance (the released code for LlamaGen
    without its classifier-free guidance). Draws are keyed by place, so that s as wide as a row
    gives the raster sample itself.
Lossless: no

    s = 2, W = 4, row 0 alone:     1  2  3  4
    number = pass                  5  6  7  8      passes: 2 W + (H - 2) s
                                   7  8  9 10
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch

from isthmus.claims import Claim, Gate, Row, Ruler, Scale, judge, ratio
from isthmus.decoding.grid import GridSession, PlaceDraws, in_raster_order
from isthmus.decoding.law import Law
from isthmus.decoding.target import HubTarget
from isthmus.errors import InvalidInputError
from isthmus.workbench import digits


@dataclass(frozen=True)
class Settings:
    """Settings of decoding by rows.

    Attributes:
        window: s, tokens of a row before the next one begins (16 of 24 for LlamaGen, table 1); a
            window as wide as a row, or wider, switches the idea off: raster order.
        adaptive: Let each row wait until its first token no longer depends on waiting (sec. 3.3);
            ``window`` is then the least, s_min.
        first_row_alone: Finish row 0 before row 1 begins, as the released code does.
        stand_in: Whose newest token stands in for the last token of the current row, which the
            first one of the next row follows: that of the row above the current one, or its own.
    """

    window: int = 16
    adaptive: bool = False
    first_row_alone: bool = True
    stand_in: Literal["above", "current"] = "above"


@dataclass(frozen=True)
class Painted:
    """Images, and what they took.

    Attributes:
        tokens: int64 [B, H, W].
        passes: Forwards until each image was complete, int64 [B].
    """

    tokens: torch.Tensor
    passes: torch.Tensor


def pass_count(height: int, width: int, window: int, *, first_row_alone: bool = True) -> int:
    """Forwards that a grid takes without waiting, the prompt's included.

    Example:
        >>> pass_count(8, 8, 4), pass_count(8, 8, 4, first_row_alone=False), pass_count(8, 8, 8)
        (40, 36, 64)
    """
    s = min(window, width)
    first = width if first_row_alone and height > 1 else s
    return width + (first + (height - 2) * s if height > 1 else 0)


class Zipar:
    """Decodes a grid by rows that overlap.

    Args:
        settings: See :class:`Settings`.

    Raises:
        InvalidInputError: The window is below 1, or the stand-in is unknown.
    """

    role: ClassVar[str] = "strategy"

    def __init__(self, settings: Settings | None = None) -> None:
        self.settings = settings or Settings()
        if self.settings.window < 1 or self.settings.stand_in not in ("above", "current"):
            raise InvalidInputError(
                "zipar needs a window of 1 or more and the stand-in 'above' or 'current', got "
                f"{self.settings}"
            )

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
        canvas = _Canvas(self.settings, draws, prompts, size, levels or target.vocab_size)
        session = GridSession(target, len(prompts))
        length = prompts.shape[1]
        start = torch.arange(length, device=prompts.device).expand_as(prompts)
        canvas.write(session.feed(prompts, start)[:, -1:], start[:, :1] - 1)
        while not canvas.complete:
            tokens, places = canvas.newest()
            positions = torch.where(places >= -1, places + length, -1)
            canvas.write(session.feed(tokens, positions), places)
        return Painted(canvas.tokens, canvas.passes)


IDLE = -2
"""Place of a token that is not there; the prompt's last one stands at place -1."""


class _Canvas:
    """Images in the making: which rows are open, and what each of them feeds next."""

    def __init__(
        self,
        settings: Settings,
        draws: PlaceDraws,
        prompts: torch.Tensor,
        size: tuple[int, int],
        levels: int,
    ) -> None:
        self.settings, self.draws, self.levels = settings, draws, levels
        (self.height, self.width), batch = size, len(prompts)
        self.tokens = prompts.new_full((batch, *size), -1)
        self.fed = prompts.new_zeros(batch, self.height)  # tokens of each row that are cached
        self.passes = prompts.new_zeros(batch)
        # first tokens that wait, and the laws that they were drawn from
        self.waiting = prompts.new_full((batch, self.height), -1)
        self.laws = torch.zeros(batch, self.height, levels, dtype=torch.float64)
        window = torch.full((self.height,), min(settings.window, self.width))
        if settings.first_row_alone:
            window[1:2] = self.width
        self.window = window.to(prompts.device)

    @property
    def counts(self) -> torch.Tensor:
        """Tokens of each row, int64 [B, H]."""
        return (self.tokens >= 0).sum(2)

    @property
    def complete(self) -> bool:
        """Whether nothing is missing."""
        return bool((self.tokens >= 0).all())

    def newest(self) -> tuple[torch.Tensor, torch.Tensor]:
        """What the next pass feeds: tokens and their places, int64 [B, N].

        The newest token of every open row; of a row that is finished, its last one, once; and a
        stand-in in front of every row that is about to begin.
        """
        counts = self.counts
        rows = torch.arange(self.height, device=counts.device)
        column = (counts - 1).clamp(min=0)[..., None]
        last = self.tokens.gather(2, column)[..., 0]  # [B, H]
        unfinished = ~(self.tokens >= 0).flatten(1).all(1, keepdim=True)
        places = torch.where((self.fed < counts) & unfinished, rows * self.width + self.fed, IDLE)
        above = counts.roll(1, 1)
        opens = (counts == 0) & (above >= self.window) & (above < self.width) & (rows > 0)
        # the row above the one that the new row follows; row 1 follows row 0, which has none
        back = 2 if self.settings.stand_in == "above" else 1
        stand_in = last.gather(1, (rows - back).clamp(min=0).expand_as(last))
        before = torch.where(opens, rows * self.width - 1, IDLE)
        tokens, places = torch.cat([last, stand_in], 1), torch.cat([places, before], 1)
        used = (places != IDLE).any(0)
        return tokens[:, used], places[:, used]

    def write(self, logits: torch.Tensor, places: torch.Tensor) -> None:
        """Draw what follows the tokens at some places [B, N] from their logits [B, N, V]."""
        self.passes += ~(self.tokens >= 0).flatten(1).all(1)
        real = self._real(places)
        image, _ = torch.nonzero(real & (places >= 0), as_tuple=True)
        fed = places[real & (places >= 0)]
        self.fed[image, fed // self.width] = fed % self.width + 1
        following = (places + 1).clamp(0, self.height * self.width - 1)
        logits = logits[..., : self.levels]
        drawn = self.draws.pick(logits, following)
        free = (places != IDLE) & (places + 1 < self.height * self.width) & ~self._real(following)
        if self.settings.adaptive:
            first = free & (following % self.width == 0) & (following > 0)
            drawn, settled = self._wait(logits, following // self.width, drawn, real, first)
            free &= settled
        image, node = torch.nonzero(free, as_tuple=True)
        self.tokens.view(len(places), -1)[image, following[image, node]] = drawn[image, node]

    def _real(self, places: torch.Tensor) -> torch.Tensor:
        """Whether the token at each place [B, N] has been decided; the prompt's last one has."""
        flat = self.tokens.flatten(1)
        return (flat.gather(1, places.clamp(min=0)) >= 0) & (places >= 0) | (places == -1)

    def _wait(
        self,
        logits: torch.Tensor,
        rows: torch.Tensor,
        drawn: torch.Tensor,
        real: torch.Tensor,
        first: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Judge the first tokens of rows by the law of one pass later (sec. 3.3).

        Args:
            logits: [B, N, V].
            rows: Row of the token that follows, int64 [B, N].
            drawn: What was drawn from the logits, int64 [B, N].
            real: Whether it follows a token that has been decided, bool [B, N].
            first: Whether it is the first one of a row other than row 0, bool [B, N].

        Returns:
            Tokens int64 [B, N] and whether they stand.
        """
        law = self.draws.logprobs(logits).exp()
        waiting, old = self.waiting.gather(1, rows), _rows_of(self.laws, rows)
        asked = waiting >= 0
        # one key for every row and every number of tokens above it, beyond those of the places
        above = self.counts.gather(1, (rows - 1).clamp(min=0))
        keys = self.height * self.width * (1 + above) + rows
        odds = _rows_at(law, waiting) / _rows_at(old, waiting)
        accepted = asked & (self.draws.uniform(keys) < odds)  # min(1, p_(k+1) / p_k)
        rest = (law - old).clamp(min=0).log()  # the positive part of p_(k+1) - p_k
        again = torch.where(asked, self.draws.of(rest, keys + self.height * self.width**2), drawn)
        token = torch.where(accepted, waiting, again)
        image, node = torch.nonzero(first, as_tuple=True)
        self.waiting[image, rows[image, node]] = token[image, node]
        self.laws[image, rows[image, node]] = law[image, node]
        return torch.where(first, token, drawn), ~first | accepted | real


def _rows_of(table: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """``table[b, rows[b, n]]``, [B, N, X] of [B, H, X]."""
    return table.gather(1, rows[..., None].expand(-1, -1, table.shape[2]))


def _rows_at(table: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """``table[b, n, tokens[b, n]]``, [B, N] of [B, N, X]; of token 0 where there is none."""
    return table.gather(2, tokens.clamp(min=0)[..., None])[..., 0]


SIZE = (digits.SIDE, digits.SIDE)


def claim(ruler: Ruler, scale: Scale = "small") -> Claim:
    """Handwritten digits, 8 by 8 pixels: passes, and what a judge makes of them."""
    small = scale != "test"
    recipe = digits.RECIPE if small else replace(digits.RECIPE, steps=20)
    target, judged = digits.raster_target(recipe), digits.Judge()
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
            f"{digits.pixel_loss(target.model):.2f} nats per held-out pixel.",
        ),
    )
