"""Code matrices of a known law, as a residual quantizer might give them, and models of them.

Frame follows frame. A code hangs on the level below in its own frame, and on its own level and the
one above in the frame before::

    log p(c[k, t]) = A[k, c[k-1, t]] + B[k, c[k, t-1]] + C[k, c[k+1, t-1]] + a constant

The tables are drawn once from a seed. The law is made up: it has what the orders of a code matrix
differ in, dependence within a frame and, through C, from higher to lower levels of the next. Its
cost of a matrix is known, so no model can honestly be below it on average; and so is what a matrix
costs at least in an order that shows a code only some of the others (:func:`least_nats`).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from isthmus.models.code_patterns import Pattern
from isthmus.models.pattern_lm import PatternLM
from isthmus.roles import Loss
from isthmus.training.loop import Plan, Trainer
from isthmus.training.seeds import batch_generator


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

    def given(self, k: int) -> Tensor:
        """Probabilities [V + 1, V + 1, V + 1, V] of level k: below, own, above, itself."""
        below, own, above = self.below[k], self.own[k], self.above[k]
        logits = below[:, None, None] + own[:, None] + above
        p: Tensor = logits.double().softmax(-1)
        return p

    def _law(self, k: int, below: Tensor, last: Tensor) -> Tensor:
        """Logits [B, V] of level k; ``last`` is the frame before and a level without codes."""
        logits: Tensor = (
            self.below[k, below] + self.own[k, last[:, k]] + self.above[k, last[:, k + 1]]
        )
        return logits


class _Frames:
    """Sums over the codes of frames that are not seen, frame by frame.

    A message [B, Q, ...] has an axis for each level of a frame, of size V where its code is summed
    over and 1 where it is seen; Q is 1 before the frame that is asked about and V after it.

    Args:
        law: The law.
        codes: Matrices, int64 [B, K, T].
        seen: Which of their codes are seen, bool [K, T].
    """

    def __init__(self, law: LevelLaw, codes: Tensor, seen: Tensor) -> None:
        self.law, self.codes, self.seen = law, codes, seen
        self.tables = [law.given(k) for k in range(law.levels)]

    def values(self, k: int, t: int) -> Tensor:
        """What a code may be, int64 [B or 1, V or 1]."""
        if t < 0 or not 0 <= k < self.law.levels:
            return torch.full((1, 1), self.law.size)
        return self.codes[:, k, t, None] if self.seen[k, t] else torch.arange(self.law.size)[None]

    def onward(self, message: Tensor, t: int) -> Tensor:
        """The message of frame t from that of frame t - 1."""
        for k in range(self.law.levels):
            asked = (
                self.values(k - 1, t),
                self.values(k, t - 1),
                self.values(k + 1, t - 1),
                self.values(k, t),
            )
            spread = [
                v.view(len(v), *(-1 if i == j else 1 for j in range(4)))
                for i, v in enumerate(asked)
            ]
            p = self.tables[k][tuple(spread)]  # [B or 1, below, own, above, code]
            shape = list(message.shape)
            below, own, above = (v.shape[1] for v in asked[:3])
            tail = math.prod(shape[4 + k :])
            parts = message.reshape(len(message), -1, below, own, above, tail)
            found = torch.einsum(
                "blpacr,bpacn->blpncr", parts, p.expand(len(message), *p.shape[1:])
            )
            shape[2 + k] = asked[3].shape[1]
            message = found.reshape(shape)
        return message

    def posterior(self, k: int, t: int) -> Tensor:
        """Probabilities of an unseen code (k, t), given all that is seen, float64 [B, V]."""
        whole, some = self.seen.all(0), self.seen.any(0)
        known = whole[:t].nonzero().flatten().tolist()
        later = whole[t + 1 :].nonzero().flatten().tolist()
        told = some[t:].nonzero().flatten().tolist()
        # frames on the far sides of one that is seen whole say nothing
        first = known[-1] + 1 if known else 0
        last = t + 1 + later[0] if later else t + (told[-1] if told else 0)
        one = [1] * self.law.levels
        message = torch.ones(len(self.codes), 1, *one, dtype=torch.float64)
        for at in range(first, last + 1):
            message = self.onward(message, at)
            if at == t:  # from here on it is kept apart what the code was
                apart = torch.eye(self.law.size, dtype=torch.float64)
                shape = [1, self.law.size, *one]
                shape[2 + k] = self.law.size
                message = message.transpose(1, 2 + k) * apart.view(shape)
            message = message / message.flatten(1).sum(1).view(-1, 1, *one)
        return message.flatten(2).sum(2)


def least_nats(law: LevelLaw, codes: Tensor, pattern: Pattern) -> Tensor:
    """What codes of the law cost at least in an order: given what it shows, by exact sums.

    Summed over a matrix and in the mean over matrices, no model of this order can be below it.

    Args:
        law: The law.
        codes: Matrices, int64 [B, K, T].
        pattern: The order.

    Returns:
        float64 [B, K, T].

    Example:
        >>> from isthmus.models.code_patterns import flat
        >>> law = LevelLaw(2, 3)
        >>> codes = law.draw(2, 4, seed=1)
        >>> bool(torch.allclose(least_nats(law, codes, flat(2, 4)).float(), law.nats(codes)))
        True
    """
    costs = torch.zeros(codes.shape, dtype=torch.float64)
    shown = pattern.visible().view(law.levels, pattern.times, law.levels, pattern.times)
    for k in range(law.levels):
        for t in range(pattern.times):
            p = _Frames(law, codes, shown[k, t]).posterior(k, t)
            costs[:, k, t] = -p.gather(1, codes[:, k, t, None])[:, 0].log()
    return costs


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
        generator = batch_generator(self.seed, part)
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
