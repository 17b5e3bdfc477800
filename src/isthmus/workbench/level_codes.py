"""Code matrices of a known law, as a residual quantizer might give them, and models of them.

Frame follows frame. A code hangs on the level below in its own frame, and on its own level and the
one above in the frame before::

    log p(c[k, t]) = A[k, c[k-1, t]] + B[k, c[k, t-1]] + C[k, c[k+1, t-1]] + a constant

The tables are drawn once from a seed. The law is made up: it has what the orders of a code matrix
differ in, dependence within a frame and, through C, from higher to lower levels of the next. Its
cost of a matrix is known, so no model can honestly be below it on average.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from isthmus.models.code_patterns import Pattern
from isthmus.models.pattern_lm import PatternLM
from isthmus.roles import Loss
from isthmus.training.loop import Plan, Trainer


class LevelLaw:
    """The law.

    Args:
        levels: K.
        size: V, codes of a level.
        strength: Standard deviation of the tables; with 0 all codes are uniform.
        seed: Of the tables.

    Example:
        >>> law = LevelLaw(2, 4, strength=0.0)
        >>> law.nats(law.draw(3, 5, seed=1))[0, 0, 0].exp().item()
        4.0
    """

    def __init__(self, levels: int, size: int, strength: float = 1.5, seed: int = 0) -> None:
        self.levels, self.size = levels, size
        generator = torch.Generator().manual_seed(seed)
        tables = torch.randn(3, levels, size + 1, size, generator=generator) * strength
        tables[:, :, size] = 0  # where there is no code to hang on
        self.below, self.own, self.above = tables

    def draw(self, clips: int, times: int, *, seed: int) -> Tensor:
        """Matrices, int64 [B, K, T]."""
        generator = torch.Generator().manual_seed(seed)
        none = torch.full((clips, 1), self.size)
        last = none.expand(-1, self.levels)
        frames = []
        for _ in range(times):
            frame = none[:, 0][None]
            for k in range(self.levels):
                p = self._law(k, frame[-1], torch.cat([last, none], 1)).softmax(-1)
                drawn = torch.multinomial(p, 1, generator=generator)[:, 0]
                frame = torch.cat([frame, drawn[None]])
            last = frame[1:].T
            frames.append(last)
        return torch.stack(frames, 2)

    def nats(self, codes: Tensor) -> Tensor:
        """What each code of matrices [B, K, T] costs under the law, of the same shape."""
        below = F.pad(codes[:, :-1], (0, 0, 1, 0), value=self.size)
        before = F.pad(codes[:, :, :-1], (1, 0), value=self.size)
        above = F.pad(before[:, 1:], (0, 0, 0, 1), value=self.size)
        level = torch.arange(self.levels)[:, None]
        logits = self.below[level, below] + self.own[level, before] + self.above[level, above]
        costs = F.cross_entropy(logits.flatten(0, 2), codes.flatten(), reduction="none")
        return costs.view(codes.shape)

    def _law(self, k: int, below: Tensor, last: Tensor) -> Tensor:
        """Logits [B, V] of level k; ``last`` is the frame before and a level without codes."""
        logits: Tensor = (
            self.below[k, below] + self.own[k, last[:, k]] + self.above[k, last[:, k + 1]]
        )
        return logits


class PatternLearner:
    """Plays :class:`isthmus.roles.Learner`: a model of code matrices in one order.

    Args:
        module: The model.
        pattern: The order.
        train: Matrices, int64 [N, K, T].
        batch_size: Matrices of a batch.
        seed: Of their order.
    """

    lower_is_better = True

    def __init__(
        self, module: PatternLM, pattern: Pattern, train: Tensor, batch_size: int, seed: int
    ) -> None:
        self.module: Any = module
        self.pattern, self.train, self.batch_size, self.seed = pattern, train, batch_size, seed
        self.identity = {"batch_size": batch_size, "seed": seed, "matrices": len(train)}

    def batch(self, part: int) -> Tensor:
        """Matrices drawn with replacement, the same for every pattern."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + part)
        return self.train[torch.randint(len(self.train), (self.batch_size,), generator=generator)]

    def loss(self, batch: Tensor) -> Loss:
        """Nats of all codes."""
        logits = self.module(batch, self.pattern)
        total = F.cross_entropy(logits.flatten(0, 2), batch.flatten(), reduction="sum")
        return Loss(total, batch.numel())

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Nothing is chosen by it: nats of the first matrices that were trained on."""
        some = self.train[:8]
        return {"nats": float(self.loss(some).total) / some.numel()}


def taught(
    pattern: Pattern,
    train: Tensor,
    size: int,
    *,
    steps: int,
    width: int = 64,
    layers: int = 2,
    heads: int = 4,
    batch_size: int = 8,
    seed: int = 0,
) -> PatternLM:
    """A model that learnt matrices [N, K, T] in the order of a pattern."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = PatternLM(pattern.levels, size, width, layers, heads)
    learner = PatternLearner(model, pattern, train, batch_size, seed)
    plan = Plan(
        steps,
        learning_rate=4e-3,
        warmup_steps=min(50, steps // 4),
        weight_decay=0.01,
        validate_every=steps,
        seed=seed,
    )
    Trainer(learner, plan).run()
    return model.eval()


@torch.no_grad()
def bits(model: PatternLM, pattern: Pattern, codes: Tensor, batch_size: int = 32) -> Tensor:
    """Bits of each matrix by the chain rule over the pattern, float32 [N]."""
    costs = [model.nats(part, pattern).sum((1, 2)) for part in torch.split(codes, batch_size)]
    return torch.cat(costs) / torch.log(torch.tensor(2.0))
