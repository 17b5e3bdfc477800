"""What a draft chain would come to at every place of a text, counted once.

Under greedy decoding it depends on the place alone how many tokens of a chain stand there. So one
pass over the target's answers, one token at a time with a full chain drafted at each, tells what
every way of choosing draft lengths would have done.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from isthmus.decoding.acceptance import Lossless
from isthmus.decoding.engine import Request, decode
from isthmus.decoding.feature_drafter import FeatureDrafter
from isthmus.decoding.law import Law
from isthmus.decoding.policy import Fixed
from isthmus.decoding.stopping import Stopper
from isthmus.decoding.tree import TokenTree
from isthmus.roles import Context, Drafter, Shape, Verdict


@dataclass(frozen=True)
class Survey:
    """What a chain of K would come to at each place of P greedy texts of T tokens.

    Attributes:
        inputs: ``[f_t; E x_{t+1}]`` there, [P, T, 2D].
        accepted: Draft tokens that stand, y, int64 [P, T].
        chance: Probability that the drafter gives its chain of 1..K tokens, [P, T, K].
    """

    inputs: torch.Tensor
    accepted: torch.Tensor
    chance: torch.Tensor

    def count(self, lengths: torch.Tensor) -> tuple[int, int, int]:
        """Tokens, rounds and drafted tokens when ``lengths`` [P, T] are drafted at each place.

        A round at place i that drafts k tokens goes on at place ``i + min(y, k) + 1``; whether a
        token stands depends on the place alone, so this is what decoding would do.
        """
        texts, width = self.accepted.shape
        row = torch.arange(texts)
        place = torch.zeros_like(row)
        tokens = rounds = drafted = 0
        while bool((place < width).any()):
            live = place < width
            at = place.clamp(max=width - 1)
            step = torch.minimum(self.accepted[row, at], lengths[row, at]) + 1
            rounds += int(live.sum())
            drafted += int(lengths[row, at][live].sum())
            tokens += int(step[live].sum())
            place = torch.where(live, place + step, place)
        return tokens, rounds, drafted


class _OneByOne:
    """Writes down what stands, then keeps only the target's next token: every place is seen."""

    lossless = True

    def __init__(self) -> None:
        self.accepted: list[torch.Tensor] = []

    def accept(self, tree: TokenTree, logits: torch.Tensor, context: Context) -> Verdict:
        verdict = Lossless().accept(tree, logits, context)
        self.accepted.append((verdict.path >= 0).sum(1) - 1)
        return Verdict(verdict.path[:, :1], logits[:, 0].argmax(-1))


class _Surveyor(Fixed):
    """Drafts the longest chain and writes down what is known before it."""

    def __init__(self, drafter: FeatureDrafter, longest: int) -> None:
        super().__init__(drafter, Shape(longest, longest, 1))
        self.source = drafter
        self.inputs: list[torch.Tensor] = []
        self.sure: list[list[torch.Tensor]] = []

    def decide(self, context: Context, limit: Shape) -> tuple[Drafter | None, Shape]:
        self.inputs.append(self.source.known(context))
        self.sure.append([self.source.law_of_first().amax(-1)])
        self.source.stop_rule = self._note
        return super().decide(context, limit)

    def _note(self, logits: torch.Tensor) -> bool:
        self.sure[-1].append(torch.softmax(logits, -1).amax(-1))
        return False


@torch.no_grad()
def survey(
    drafter: FeatureDrafter, prompts: torch.Tensor, new_tokens: int, longest: int = 8
) -> Survey:
    """Draft a chain at every place of the target's greedy answers.

    Args:
        drafter: Trained.
        prompts: int64 [P, T], decoded as one batch.
        new_tokens: Places in each answer.
        longest: Length K of the chains.
    """
    budget = new_tokens + longest + 1  # the last chains must not be cut short
    requests = [Request(p.long(), Stopper(max_new_tokens=budget)) for p in prompts]
    rule, policy = _OneByOne(), _Surveyor(drafter, longest)
    rounds = decode(
        drafter.target,
        requests,
        policy=policy,
        acceptance=rule,
        law=Law(),
        generator=torch.Generator(drafter.target.device).manual_seed(0),
    )
    for _ in range(new_tokens):
        next(rounds)
    rounds.close()
    drafter.stop_rule = None
    chance = torch.stack([torch.stack(s, -1).cumprod(-1) for s in policy.sure], 1)
    inputs, accepted = torch.stack(policy.inputs, 1), torch.stack(rule.accepted, 1)
    return Survey(inputs.cpu(), accepted.cpu(), chance.cpu())
