"""Vision transformers in class space: where and how an image classifier builds up its class.

Paper: M. G. Vilas, T. Schaumloeffel, G. Roig, "Analyzing Vision Transformers for Image
    Classification in Class Embedding Space", 2023, arXiv:2310.18969
Idea: The rows of the classifier are classes as vectors of the residual stream; every hidden state,
    and every value that attention or a feed-forward writes, is read as what it says of each class.
Differs: The classifier's bias is kept, so that the last class token reads as the model's logits.
    Models that average their patches have no class token and are refused.

::

    logits = E norm(h) + b,   rank r of the class,   identifiability = 1 - r / C      (section 3)
    relevance of a patch = sum over blocks and heads of max(0, pattern * d class / d pattern)
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from isthmus.claims import Claim, Gate, Row, Ruler, Scale, judge
from isthmus.errors import InvalidInputError, UnsupportedModelError
from isthmus.lenses.class_space import (
    ROWS,
    Reading,
    agreeing,
    class_tokens,
    composed,
    gaps_by_chance,
    identifiability,
    matched,
    object_gap,
    probes,
    read_states,
    rises,
)
from isthmus.lenses.explanation import Array, Check, Explanation, identity
from isthmus.lenses.faithfulness import interval, places, random_scores
from isthmus.lenses.heads import weight_of
from isthmus.lenses.sites import TOLERANCE, eager
from isthmus.lenses.trace import Trace
from isthmus.lenses.wiring import Wiring
from isthmus.models.hub import load_classifier
from isthmus.models.picture_classifier import Eye
from isthmus.nn.masking import Mask
from isthmus.signals.image import read_image, resize
from isthmus.workbench import shape_names


@dataclass(frozen=True)
class Settings:
    """Settings.

    Attributes:
        project: Whether states are read by the classifier's rows. Off, they are read by random
            rows of the same lengths, and patches are ranked by attention alone.
        block: Block whose map of identifiability is drawn, 1 to L; 0 is the last.
    """

    project: bool = True
    block: int = 0


class VitClassSpace:
    """Reads a vision transformer's states as classes.

    Args:
        settings: See :class:`Settings`.
    """

    role: ClassVar[str] = "lens"

    def __init__(self, settings: Settings | None = None) -> None:
        self.settings = settings or Settings()

    def open(self, source: str) -> Eye:
        """A picture classifier: a folder or a hub id; by default a small one that names shapes."""
        if not source:
            model = shape_names.shape_model()
            return Eye(model, tuple(model.names), model.side)
        from transformers import AutoImageProcessor

        model = load_classifier(source, "image").model
        reads: Any = AutoImageProcessor.from_pretrained(source)
        size = reads.size.get("height") or reads.size.get("shortest_edge")
        names = tuple(str(name) for _, name in sorted(model.config.id2label.items()))
        return Eye(model, names, int(size), tuple(reads.image_mean), tuple(reads.image_std))

    def know(self, model: Any, pixels: Tensor) -> Wiring:
        """How a model is put together, tried on one picture.

        Raises:
            UnsupportedModelError: No class token is read, or it is put together otherwise.
        """
        wiring = Wiring(model, {"pixel_values": pixels[:1]})
        kinds = [(s.kind, s.what if s.kind == "pool" else "") for s in wiring.steps]
        if sorted(kinds) != [("linear", ""), ("norm", ""), ("pool", "first")]:
            raise UnsupportedModelError(
                f"{type(model).__name__} does not read a class token by a norm and one linear "
                f"map, but by {', '.join(s.what for s in wiring.steps)}"
            )
        return wiring

    def classes(self, wiring: Wiring) -> tuple[nn.Module, Tensor, Tensor]:
        """The final norm, the classes' rows [C, D] and their biases [C]."""
        modules = dict(wiring.model.named_modules())
        norm = next(modules[s.what] for s in wiring.steps if s.kind == "norm")
        head = next(modules[s.what] for s in wiring.steps if s.kind == "linear")
        weight, bias = weight_of(head), getattr(head, "bias", None)
        assert weight is not None
        rows = weight.detach().T
        return norm, rows, torch.zeros(len(rows)) if bias is None else bias.detach()

    def read(self, model: Any, pixels: Tensor, wiring: Wiring | None = None) -> Reading:
        """Project every state of pictures [B, 3, H, W].

        Raises:
            UnsupportedModelError: The model is put together otherwise.
        """
        wiring = wiring or self.know(model, pixels)
        found = [self._read(wiring, part) for part in torch.split(pixels, ROWS)]
        names = ("logits", "attention", "forward", "keys")
        join = {k: torch.cat([getattr(f, k) for f in found], 1) for k in names}
        return Reading(
            **join,
            own=torch.cat([f.own for f in found]),
            error=max(f.error for f in found),
            sums=[max(each) for each in zip(*(f.sums for f in found), strict=True)],
        )

    def _read(self, wiring: Wiring, pixels: Tensor) -> Reading:
        norm, rows, bias = self.classes(wiring)
        if self.settings.project:
            return read_states(wiring, pixels, norm, rows, bias)
        by = torch.randn(rows.shape, generator=torch.Generator().manual_seed(0))
        by = by / by.norm(dim=1, keepdim=True) * rows.norm(dim=1, keepdim=True)
        return read_states(wiring, pixels, norm, rows, bias, by)

    def relevance(
        self,
        model: Any,
        pixels: Tensor,
        target: Tensor,
        wiring: Wiring | None = None,
        rows: Tensor | None = None,
    ) -> Tensor:
        """How much each patch brings the class token toward a class [B, N].

        Args:
            model: The classifier.
            pixels: [B, 3, H, W].
            target: Classes [B].
            wiring: What :meth:`know` said.
            rows: Other rows than the classifier's, one set a block [L, C, D] (of probes).

        Raises:
            UnsupportedModelError: The gradient does not reach a pattern.
        """
        wiring = wiring or self.know(model, pixels)
        parts = torch.split(torch.arange(len(pixels)), ROWS)
        return torch.cat([self._relevance(wiring, pixels[p], target[p], rows) for p in parts])

    def _relevance(
        self, wiring: Wiring, pixels: Tensor, target: Tensor, rows: Tensor | None
    ) -> Tensor:
        wanted = {f"post.{i}": wiring.sites[f"resid_post.{i}"] for i in range(len(wiring.layers))}
        wanted |= {f"pattern.{i}": e.heads.pattern for i, e in enumerate(wiring.layers)}
        norm, own, _ = self.classes(wiring)
        total = torch.zeros(())
        with (
            eager(wiring.model),
            torch.enable_grad(),
            Trace(wiring.model, wanted, grad=True) as seen,
        ):
            wiring.model(pixel_values=pixels.requires_grad_(False))
            for i, layer in enumerate(wiring.layers):
                pattern = seen[f"pattern.{i}"]
                if not self.settings.project:
                    total = total + pattern.detach()[:, :, 0].sum(1)
                    continue
                state = norm(seen[f"post.{i}"][:, 0])
                chosen = (own if rows is None else rows[i])[target]
                (slope,) = torch.autograd.grad(
                    (state * chosen).sum(), pattern, retain_graph=True, allow_unused=True
                )
                if slope is None:
                    raise UnsupportedModelError(
                        f"no gradient reaches {layer.heads.pattern}; the model does not use the "
                        "pattern that it shows"
                    )
                total = total + (slope * pattern).detach()[:, :, 0].clamp(min=0).sum(1)
        return total[:, 1:]

    def explain(self, subject: Eye, given: str) -> Explanation:
        """Where and when a picture's class shows.

        Args:
            subject: What :meth:`open` gave.
            given: A picture file; for the small classifier also the number of a held-out shape.

        Raises:
            InvalidInputError: No such picture.
            MismatchError: States do not add up, or do not read as the model's logits.
        """
        started = time.perf_counter()
        picture = _picture(given, subject)
        pixels = subject.pixels(picture[None])
        wiring = self.know(subject.model, pixels)
        found = self.read(subject.model, pixels, wiring)
        target = found.own.argmax(-1)
        relevance = self.relevance(subject.model, pixels, target, wiring)[0]
        side = math.isqrt(len(relevance))
        if side * side != len(relevance):
            raise UnsupportedModelError(
                f"{len(relevance)} patches besides the class token are no square; models with more "
                "tokens of their own are not read"
            )
        known = identifiability(found.logits, target)[:, 0]  # [L + 1, T]
        count = len(wiring.layers)
        block = self.settings.block or count
        if not 1 <= block <= count:
            raise InvalidInputError(f"block {block} is none of 1 to {count}")
        grid = tuple(str(i + 1) for i in range(side))
        depth = ("embeddings", *(f"block {i + 1}" for i in range(count)))
        name = subject.names[int(target)]
        best = found.logits[:, 0, 0].softmax(-1)  # [L + 1, C]
        top, rising = best.argmax(-1).tolist(), rises(found.logits, target)
        rows = [
            {
                "after": depth[i],
                "class token reads as": subject.names[top[i]],
                f"{name} there": float(known[i, 0]),
                f"{name} in patches, mean": float(known[i, 1:].mean()),
                "patches that rise": float(rising[i - 1, 0]) if i else None,
            }
            for i in range(count + 1)
        ]
        patches = known[block, 1:].view(side, side)
        return Explanation(
            method="vit-class-space",
            model=identity(subject.model),
            inputs=[
                f"picture: {given}",
                f"class: {name}, probability {float(found.own.softmax(-1)[0, target]):.3g}",
            ],
            target=f"where {name!r} is in the picture, and from which block on",
            arrays={
                f"relevance of patches for {name}": Array(
                    relevance.view(side, side).double().numpy(), ("row", "column"), (grid, grid)
                ),
                f"identifiability of {name} after block {block}": Array(
                    patches.double().numpy(), ("row", "column"), (grid, grid)
                ),
                "probability that the class token reads as": Array(
                    best.double().numpy(), ("after", "class"), (depth, subject.names)
                ),
            },
            tables={"blocks": rows},
            checks=[
                Check("parts of blocks less their sums", max(found.sums), TOLERANCE[torch.float32]),
                Check("last class token less the model's logits", found.error, 1e-5),
            ],
            params=asdict(self.settings),
            seconds=time.perf_counter() - started,
            picture=picture.permute(1, 2, 0).contiguous().numpy(),
        ).require()


def _picture(given: str, subject: Eye) -> Tensor:
    """uint8 [3, side, side]."""
    if given.isdigit() and not Path(given).exists():
        return shape_names.shapes(int(given) + 1).pictures[-1]
    if not Path(given).exists():
        raise InvalidInputError(f"{given!r} is no picture file and no number of a held-out shape")
    return resize(read_image(given), (subject.side, subject.side))


def _left(model: Any, pixels: Tensor, names: Tensor, scores: Tensor, share: float) -> Tensor:
    """Whether pictures are named right without a share of their patches, highest first [B]."""
    count = scores.shape[1]
    rank = places(scores, torch.ones_like(scores, dtype=torch.bool))
    mask = Mask(rank.argsort(1).flip(1), count - math.ceil(share * count))
    with torch.no_grad():
        told: Tensor = model(pixels, mask).logits.argmax(-1)
    return (told == names).double()


def claim(ruler: Ruler, scale: Scale = "small") -> Claim:
    """Read a small classifier of shapes, whose masks say where the shape is."""
    del ruler  # nothing is timed
    small = scale != "test"
    model = shape_names.shape_model(shape_names.RECIPE if small else shape_names.tiny())
    lens, off = VitClassSpace(), VitClassSpace(Settings(project=False))
    data = shape_names.shapes(300 if small else 8)
    pixels = shape_names.pixels(data.pictures)
    wiring = lens.know(model, pixels)
    found, blind = lens.read(model, pixels, wiring), off.read(model, pixels, wiring)
    known, guessed = (identifiability(f.logits, data.names) for f in (found, blind))
    gap, gap_off = (object_gap(v, data.object) for v in (known, guessed))
    block = int(gap.argmax())
    shuffled = gaps_by_chance(known, data.object, 300 if small else 20)
    p = (1 + sum(s >= float(gap.max()) for s in shuffled)) / (1 + len(shuffled))
    token = float(identifiability(found.own[:, None], data.names).mean())
    same = abs(float(known[-1, :, 0].mean()) - token)
    norm, rows, _ = lens.classes(wiring)
    learn = shape_names.shapes(600 if small else 8, "train")
    found_rows = probes(
        class_tokens(wiring, norm, shape_names.pixels(learn.pictures)), learn.names, len(rows)
    )
    maps = {
        "ours": lens.relevance(model, pixels, data.names, wiring),
        "off": off.relevance(model, pixels, data.names, wiring),
        "probes": lens.relevance(model, pixels, data.names, wiring, found_rows),
    }
    whole = (found.own.argmax(-1) == data.names).double()
    left = {n: _left(model, pixels, data.names, s, 0.3) for n, s in maps.items()}
    chance = [
        _left(model, pixels, data.names, random_scores(maps["ours"], seed), 0.3)
        for seed in range(5)
    ]
    left["random"] = torch.stack(chance).mean(0)
    cost = {n: 100 * float((whole - v).mean()) for n, v in left.items()}
    more, low, high = interval(100 * (left["random"] - left["ours"]))
    gates = (
        Gate("parts of blocks less what they hand on", max(found.sums), "<=", 1e-4),
        Gate("last class token's mean identifiability less the logits'", same, "==", 0.0),
        Gate("identifiability, object less context, best block", float(gap.max()), ">=", 0.05),
        Gate("its p by 300 shuffles of the patches", p, "<", 0.01),
        Gate("points lost without the relevant 30 %, less random", more, ">=", 10.0),
        Gate("the gap by random rows instead of the classifier's", float(gap_off.max()), "<", 0.05),
    )
    nearest, drawn = matched(wiring, rows), matched(wiring, rows, seed=1)

    def told(values: Sequence[float] | Tensor) -> str:
        return ", ".join(f"{float(v):.2f}" for v in values)

    return Claim(
        slug="vit-class-space",
        statement="Read by the classifier's rows, image tokens become specific of the class, more "
        "so on the object, and patches found in that space are those that the class rests on.",
        paper_figure="image tokens are class-identifiable, object above context, and relevance in "
        "class space beats linear probes (figures 2 and 5, read)",
        rows=(
            Row(
                "identifiability, object less context",
                "of ranks",
                None,
                float(gap.max()),
                float(gap_off.max()),
                control=float(np.quantile(shuffled, 0.99)),
                note=f"after block {block}; control: 99th percentile of shuffled patches",
            ),
            Row(
                "accuracy lost without 30 % of the patches",
                "points",
                cost["random"],
                cost["ours"],
                cost["off"],
                control=cost["probes"],
                note=f"baseline: random patches; ours less random {more:.1f} [{low:.1f}, "
                f"{high:.1f}]; off: attention alone; control: gradients of linear probes",
            ),
            Row(
                "largest cosine of a class with a written value",
                "",
                float(drawn.mean()),
                float(nearest.mean()),
                None,
                note="baseline: values drawn at random",
            ),
        ),
        scale=scale,
        device="cpu",
        status=judge(gates, gates[:4]),
        reason=""
        if gates[2].passed
        else "the ground around a shape is empty, and its patches come to hold the class more than "
        "those of the shape; attention alone finds patches that cost more",
        gates=gates,
        seeds=(0,),
        notes=(
            f"the classifier is right on {float(whole.mean()):.3f} of {len(whole)} held-out shapes",
            f"object less context by block: {told(gap)}; by random rows: {told(gap_off)}",
            f"class token's identifiability: {told(known[:, :, 0].mean(1))}; patches': "
            f"{told(known[:, :, 1:].mean((1, 2)))}",
            f"patches that rise by block: {told(rises(found.logits, data.names).mean(1))}",
            "top class of patches that is attention's, the feed-forward's, as before, or new: "
            + "; ".join("/".join(f"{v:.2f}" for v in each) for each in composed(found)),
            "patches whose 5 most active keys meet the 5 values nearest to the class: "
            + told(agreeing(wiring, rows, found.keys, data.names)),
        ),
    )
