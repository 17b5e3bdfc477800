"""Phrases: candidates of unlike length that the target scores as one tree, and the one to keep.

A phrase stands or falls whole. Phrases of unlike length have no common measure: the probability of
a longer one is a product of more factors. Three rules are known here:

* ``part`` compares phrases at the token where they part, where each has one token to show: it
  follows what the target itself says as long as the tree has it, and keeps the longest phrase that
  was passed whole;
* ``product`` takes the largest probability, which favours short phrases;
* ``mean`` takes the largest geometric mean a token, which favours long ones with a sure end.

The first phrase is the fallback, one token that the target says at the root. The last two rules
take it where no other phrase has a geometric mean of ``floor`` or more.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, get_args

import torch

from isthmus.decoding.tree import TokenTree
from isthmus.roles import Context

Rule = Literal["part", "product", "mean"]
"""How phrases are compared."""

RULES: tuple[Rule, ...] = get_args(Rule)


def said_after(logits: torch.Tensor, tree: TokenTree, context: Context) -> list[int]:
    """What the target says after each node: its likeliest token, or one drawn from its law.

    Args:
        logits: Of the tree, one row, [1, N, V].
        tree: The tree.
        context: Its law and source of draws.

    Returns:
        N tokens.
    """
    probs = context.law.probs(logits, tree, context)[0]  # [N, V]
    if context.law.greedy:
        said = probs.argmax(-1)
    else:
        said = torch.multinomial(probs, 1, generator=context.generator)[:, 0]
    tokens: list[int] = said.tolist()
    return tokens


def step_scores(logits: torch.Tensor, tree: TokenTree, context: Context) -> torch.Tensor:
    """Log-probability of each node's token under the target, 0 at the root; [N].

    Args:
        logits: Of the tree, one row, [1, N, V].
        tree: The tree.
        context: Its law.
    """
    logp = torch.log_softmax(context.law.logits(logits, tree, context)[0], -1)
    above = tree.topology.parent[0, 1:]
    return torch.nn.functional.pad(logp[above, tree.tokens[0, 1:]], (1, 0))


class Phrases:
    """Phrases as one tree, and which of them is kept.

    Args:
        tree: Their common tree, one row.
        paths: Their tokens, the fallback first.
        steps: Log-probability of each node's token after those above it, [N].

    Example:
        >>> paths = [[1], [1, 2], [1, 3, 4, 5]]
        >>> tree = TokenTree.from_paths(0, paths)
        >>> tree.tokens.tolist()
        [[0, 1, 2, 3, 4, 5]]
        >>> phrases = Phrases(tree, paths, torch.tensor([1.0, 0.9, 0.6, 0.4, 0.9, 1.0]).log())
        >>> said = [1, 2, 9, 4, 5, 9]
        >>> [[phrases.tokens[n] for n in phrases.choose(r, said)] for r in RULES]
        [[1, 2], [1, 2], [1, 3, 4, 5]]
    """

    def __init__(
        self, tree: TokenTree, paths: Sequence[Sequence[int]], steps: torch.Tensor
    ) -> None:
        self.tokens: list[int] = tree.tokens[0].tolist()
        self.steps = steps
        self.below: dict[int, dict[int, int]] = {}
        for node, parent in enumerate(tree.topology.parents_list):
            if node:
                self.below.setdefault(parent, {})[self.tokens[node]] = node
        self.paths = {path[-1]: path for path in map(self._walk, paths)}
        # log p(u), the product of its tokens' probabilities, at the end of each phrase
        self.log_p = torch.where(tree.topology.ancestors[0], steps, 0.0).sum(-1)[list(self.paths)]

    def _walk(self, path: Sequence[int]) -> list[int]:
        nodes, node = [], 0
        for token in path:
            node = self.below[node][token]
            nodes.append(node)
        return nodes

    def choose(
        self,
        rule: Rule,
        said: Sequence[int],
        *,
        floor: float = 0.5,
        generator: torch.Generator | None = None,
    ) -> list[int]:
        """Nodes of the phrase that is kept, without the root.

        Args:
            rule: How they are compared.
            said: What the target says after each node; at the root the fallback.
            floor: Least geometric mean of a phrase's probabilities, for ``product`` and ``mean``.
            generator: Draws where these two compare; None takes the best.
        """
        paths = list(self.paths.values())
        if rule != "part":
            lengths = torch.tensor([len(p) for p in paths], device=self.log_p.device)
            mean = self.log_p / lengths
            score = mean if rule == "mean" else self.log_p
            score = score.masked_fill(mean < math.log(floor), -torch.inf)[1:]
            if not bool((score > -torch.inf).any()):
                return paths[0]
            return paths[1 + _pick(score, generator)]
        kept, node = paths[0], 0
        while (below := self.below.get(node, {}).get(said[node])) is not None:
            node = below
            kept = self.paths.get(node, kept)
        return kept


def _pick(scores: torch.Tensor, generator: torch.Generator | None) -> int:
    """The best of scores [N], or one drawn from their softmax."""
    if generator is None:
        return int(scores.argmax())
    return int(torch.multinomial(torch.softmax(scores, -1), 1, generator=generator))
