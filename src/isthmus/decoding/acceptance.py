"""Acceptance rules: which draft tokens stand, and which token the target adds at the end.

All rules here but :class:`Typical` keep the law of plain decoding exactly (``lossless``). The proof
of the sampled one, :class:`Rejection`, in one line: with x ~ q, ``min(p, q) + (1 - sum min(p, q)) r
= p`` for ``r = norm((p - q)+)``; for several candidates the same step is applied backwards from the
last one.

Numerics: ratio tests are products, never divisions, and strict (``u q(x) < p(x)`` with u in
[0, 1), so an impossible token never passes at u = 0); residuals are normalised in float64; a
residual that sums to nothing means p and q agree, and then the draw is from p.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from isthmus.decoding.tree import TokenTree
from isthmus.errors import InvalidInputError
from isthmus.roles import Context, Verdict

NOTHING = 1e-14
"""A residual with less mass than this is rounding, not probability."""


def _check_finite(logits: torch.Tensor) -> None:
    # one pass: NaN and +inf survive a sum, -inf (a banned token) must not alarm
    top = logits.amax(-1)
    if not bool(torch.isfinite(top).all()):
        raise InvalidInputError(
            "the target's logits are not finite (NaN or infinity); the checkpoint is damaged or "
            "the dtype too narrow, try --dtype float32"
        )


def likeliest(logits: torch.Tensor) -> torch.Tensor:
    """The first of the largest logits [..., V], int64 [...]; a NaN counts as largest.

    Example:
        >>> likeliest(torch.tensor([[1.0, 3.0, 3.0], [0.0, float("nan"), 9.0]])).tolist()
        [1, 1]
    """
    if logits.device.type == "cpu" and logits.dtype in (torch.float32, torch.float64):
        # the same answer as torch's, whose search takes ten times as long here
        return torch.from_numpy(logits.detach().numpy().argmax(-1, keepdims=True))[..., 0]
    return logits.argmax(-1)


def match_path(tree: TokenTree, choice: torch.Tensor) -> Verdict:
    """Follow the child that carries the target's choice at each node, as deep as it goes.

    Args:
        tree: Token trees.
        choice: The target's token at each node, int64 [B, N].

    Returns:
        The accepted path and the choice at its end.
    """
    topology = tree.topology
    if tree.batch == 1:
        return _match_one(tree, choice)
    if tree.nodes == 1:  # nothing was drafted
        return Verdict(torch.zeros_like(choice), choice[:, 0])
    parent = topology.parent.clamp(min=0).expand_as(tree.tokens)
    agree = tree.tokens == choice.gather(1, parent)
    agree[:, 0] = True
    if tree.valid is not None:
        agree &= tree.valid
    if topology.is_chain:
        count = agree.long().cumprod(1).sum(1)
        steps = torch.arange(int(count.max()), device=choice.device)
        path = torch.where(steps < count[:, None], steps, -1)
        return Verdict(path, choice.gather(1, count[:, None] - 1)[:, 0])
    stands = ~(topology.ancestors & ~agree[:, None, :]).any(-1)
    depth = topology.depth.expand_as(stands)
    # siblings carry unlike tokens, so at most one node a level stands
    last = torch.where(stands, depth, -1).argmax(1)
    levels = int(depth.gather(1, last[:, None]).max()) + 1
    path = torch.full((tree.batch, levels + 1), -1, device=choice.device)
    slot = torch.where(stands, depth, levels)
    path.scatter_(1, slot, torch.arange(tree.nodes, device=choice.device).expand_as(slot))
    return Verdict(path[:, :levels], choice.gather(1, last[:, None])[:, 0])


def _match_one(tree: TokenTree, choice: torch.Tensor) -> Verdict:
    """:func:`match_path` for one row: a short walk costs less than a dozen tensor operations."""
    tokens, wanted = tree.tokens[0].tolist(), choice[0].tolist()
    parents = tree.topology.parents_list
    valid = [True] * tree.nodes if tree.valid is None else tree.valid[0].tolist()
    path = [0]
    for node in range(1, tree.nodes):  # children come after their parents
        parent = parents[node]
        if parent == path[-1] and valid[node] and tokens[node] == wanted[parent]:
            path.append(node)
    device = choice.device
    return Verdict(
        torch.tensor([path], device=device), torch.tensor([wanted[path[-1]]], device=device)
    )


class Greedy:
    """The child that equals the target's argmax stands, else the argmax is emitted.

    Example:
        >>> tree = TokenTree.from_paths(9, [[1, 2], [3]])
        >>> logits = torch.zeros(1, 4, 10)
        >>> logits[0, 0, 1] = logits[0, 1, 5] = 1.0
        >>> match_path(tree, logits.argmax(-1))
        Verdict(path=tensor([[0, 1]]), token=tensor([5]))
    """

    lossless = True
    reads_choice = True

    def accept(self, tree: TokenTree, logits: torch.Tensor, context: Context) -> Verdict:
        """See :class:`isthmus.roles.Acceptance`."""
        processed = context.law.logits(logits, tree, context)
        choice = likeliest(processed)
        top = processed.gather(-1, choice[..., None])
        if not math.isfinite(float(top.sum())):
            _check_finite(processed)
        return match_path(tree, choice)


class Match:
    """Draw the target's token at every node; a child that carries it stands.

    Lossless for any tree that was chosen before the draw and has unlike siblings, and the best
    possible acceptance for a fixed set of children: p(children).

    Raises:
        InvalidInputError: From ``accept``, for siblings drawn with replacement. Equal siblings get
            a draw each, and the deeper one would be preferred because of its value.
    """

    lossless = True

    def accept(self, tree: TokenTree, logits: torch.Tensor, context: Context) -> Verdict:
        """See :class:`isthmus.roles.Acceptance`."""
        if tree.draw == "iid" and not tree.is_chain:
            raise InvalidInputError("siblings drawn with replacement need Rejection, not Match")
        _check_finite(logits)
        probs = context.law.probs(logits, tree, context)
        flat = probs.reshape(-1, probs.shape[-1])
        draw = torch.multinomial(flat, 1, generator=context.generator).view(tree.tokens.shape)
        return match_path(tree, draw)


class Rejection:
    """Recursive rejection among drawn siblings, with or without replacement.

    Chain rejection (Leviathan et al. 2022, 2211.17192, alg. 1) when every node has one child;
    several candidates with replacement as in SpecInfer (2305.09781), without as in RSD
    (2402.14160). ``tree.q`` must be the law that the first child was really drawn from.

    Args:
        renormalise: Off, q is not renormalised after a rejection of a draw without replacement:
            the classic mistake, kept for the test that must catch it.

    Attributes:
        residual: Law that the last tree's final token was drawn from, float64 [B, V].
    """

    lossless = True

    def __init__(self, *, renormalise: bool = True) -> None:
        self.renormalise = renormalise
        self.residual: torch.Tensor | None = None

    def accept(self, tree: TokenTree, logits: torch.Tensor, context: Context) -> Verdict:
        """See :class:`isthmus.roles.Acceptance`."""
        _check_finite(logits)
        law = context.law.probs(logits, tree, context).double()
        return self.verify(tree, law, context.generator)

    def verify(self, tree: TokenTree, law: torch.Tensor, generator: torch.Generator) -> Verdict:
        """Run the rule on probabilities [B, N, V] in float64."""
        b = law.shape[0]
        if tree.nodes == 1 or tree.q is None:
            token = torch.multinomial(law[:, 0], 1, generator=generator)[:, 0]
            return Verdict(torch.zeros(b, 1, dtype=torch.int64, device=law.device), token)
        if tree.draw == "point":
            raise InvalidInputError("a chosen tree (draw='point') needs Match, not Rejection")
        q_all, alive = tree.q.double(), tree.alive
        children = tree.topology.children.expand(b, -1, -1)
        k_max = children.shape[2]
        node = torch.zeros(b, dtype=torch.int64, device=law.device)
        done = torch.zeros(b, dtype=torch.bool, device=law.device)
        p = law[:, 0].clone()
        path = [node]
        for _ in range(tree.topology.max_depth):
            kids = _at(children, node)  # [B, K]
            q = _at(q_all, node).clone()  # [B, V]
            chosen = torch.full_like(node, -1)
            u = torch.rand(b, k_max, generator=generator, dtype=torch.float64, device=law.device)
            for k in range(k_max):
                kid = kids[:, k].clamp(min=0)
                open_ = (
                    ~done & (chosen < 0) & (kids[:, k] >= 0) & alive.gather(1, kid[:, None])[:, 0]
                )
                if not bool(open_.any()):
                    continue
                x = tree.tokens.gather(1, kid[:, None])  # [B, 1]
                qx, px = q.gather(1, x)[:, 0], p.gather(1, x)[:, 0]
                open_ &= qx > 0  # support exhausted: the draw carries no information
                ok = open_ & (u[:, k] * qx < px)
                chosen = torch.where(ok, kid, chosen)
                lost = open_ & ~ok
                if bool(lost.any()):
                    rest = (p - q).clamp(min=0)
                    mass = rest.sum(-1, keepdim=True)
                    agree = mass < NOTHING  # p and q are the same law
                    rest = torch.where(agree, p, rest / mass.clamp(min=NOTHING))
                    p = torch.where(lost[:, None], rest, p)
                    if tree.draw == "without":
                        left = q.scatter(1, x, 0.0)
                        if self.renormalise:
                            left = left / left.sum(-1, keepdim=True).clamp(min=NOTHING)
                        q = torch.where(lost[:, None], left, q)
            done |= chosen < 0
            path.append(torch.where(done, -1, chosen))
            node = torch.where(done, node, chosen)
            p = torch.where(done[:, None], p, _at(law, node))
            if bool(done.all()):
                break
        self.residual = p
        steps = torch.stack(path, 1)
        width = int((steps >= 0).sum(1).max())
        return Verdict(steps[:, :width], torch.multinomial(p, 1, generator=generator)[:, 0])


class KSequential(Rejection):
    """k-sequential selection among siblings drawn with replacement (SpecTr, 2310.15141, alg. 3).

    Child x stands when ``u < p(x) / (gamma q(x))``, each child against the same p; the scale gamma
    in [1, k] is the smallest that leaves a residual without negative mass.
    """

    def verify(self, tree: TokenTree, law: torch.Tensor, generator: torch.Generator) -> Verdict:
        """Run the rule on probabilities [B, N, V] in float64."""
        if tree.nodes > 1 and tree.draw != "iid":
            raise InvalidInputError("k-sequential selection needs siblings drawn with replacement")
        b, alive = law.shape[0], tree.alive
        if tree.nodes == 1 or tree.q is None:
            return super().verify(tree, law, generator)
        children = tree.topology.children.expand(b, -1, -1)
        k_max = children.shape[2]
        node = torch.zeros(b, dtype=torch.int64, device=law.device)
        done = torch.zeros(b, dtype=torch.bool, device=law.device)
        p = law[:, 0]
        path = [node]
        for _ in range(tree.topology.max_depth):
            kids = _at(children, node)  # [B, K]
            open_ = (kids >= 0) & alive.gather(1, kids.clamp(min=0)) & ~done[:, None]
            q = _at(tree.q, node).double()  # [B, V]
            gamma, share, rest = k_sequential(p, q, open_.sum(1))
            x = tree.tokens.gather(1, kids.clamp(min=0))
            u = torch.rand(b, k_max, generator=generator, dtype=torch.float64, device=law.device)
            stands = open_ & (u * gamma[:, None] * q.gather(1, x) < p.gather(1, x))
            first = stands.to(torch.uint8).argmax(1, keepdim=True)
            found = stands.any(1)
            tried = open_.any(1) & (share > 0)
            p = torch.where((tried & ~found)[:, None], rest, p)
            done |= ~found
            path.append(torch.where(found, kids.gather(1, first)[:, 0], -1))
            node = torch.where(found, path[-1], node)
            p = torch.where(found[:, None], _at(law, node), p)
            if bool(done.all()):
                break
        steps = torch.stack(path, 1)
        width = int((steps >= 0).sum(1).max())
        return Verdict(steps[:, :width], torch.multinomial(p, 1, generator=generator)[:, 0])


def k_sequential(
    p: torch.Tensor, q: torch.Tensor, k: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Scale, acceptance of one candidate and residual of k-sequential selection.

    With ``beta = sum min(q, p / gamma)`` one of k candidates stands with ``1 - (1 - beta)^k``;
    gamma solves ``1 - (1 - beta)^k = gamma beta`` by bisection, from the valid side.

    Args:
        p: Target laws float64 [B, V].
        q: Draft laws float64 [B, V].
        k: Candidates of each row, int64 [B].

    Returns:
        gamma [B], beta [B] and the law of the token when none stands [B, V].

    Example:
        >>> half = torch.full((1, 2), 0.5, dtype=torch.float64)
        >>> gamma, beta, _ = k_sequential(half, half, torch.tensor([1]))
        >>> gamma.item(), beta.item()
        (1.0, 1.0)
    """
    count = k.double().clamp(min=1.0)

    def one(gamma: torch.Tensor) -> torch.Tensor:
        return torch.minimum(q, p / gamma[:, None]).sum(-1)

    low, high = torch.ones_like(count), count
    for _ in range(32):
        middle = (low + high) / 2
        beta = one(middle)
        valid = 1.0 - (1.0 - beta).clamp(min=0.0) ** count <= middle * beta
        low, high = torch.where(valid, low, middle), torch.where(valid, middle, high)
    beta = one(high)
    some = 1.0 - (1.0 - beta).clamp(min=0.0) ** count
    scale = torch.where(beta > 0, some / beta.clamp(min=NOTHING), 0.0)
    rest = (p - torch.minimum(q, p / high[:, None]) * scale[:, None]).clamp(min=0.0)
    mass = rest.sum(-1, keepdim=True)
    return high, beta, torch.where(mass < NOTHING, p, rest / mass.clamp(min=NOTHING))


def _at(table: torch.Tensor, node: torch.Tensor) -> torch.Tensor:
    """Rows ``table[b, node[b]]`` of a [B, N, X] table."""
    return table[torch.arange(len(node), device=node.device), node]


MOST_NOISE = 2**24
"""Numbers of shared noise that are kept: 64 MiB."""


class Coupled:
    """Drafter-invariant sampling: the text depends on the seed, not on who drafted.

    Target and drafter both take ``argmax(log law + G)`` with Gumbel noise G keyed on seed, row and
    position (Daliri et al. 2024, 2408.07978). The output equals plain sampling with that noise
    token for token, whatever the drafter: reproducible serving, and an exact test.

    Args:
        seed: Key of the noise.
        own: Seeds of single requests, whose noise is keyed on theirs and the position alone.
    """

    lossless = True

    def __init__(self, seed: int, own: Mapping[int, int] | None = None) -> None:
        self.seed, self.own = seed, {} if own is None else own
        self._noise: dict[tuple[int, int, int], torch.Tensor] = {}

    def noise(self, request: int, position: int, vocab: int) -> torch.Tensor:
        """Gumbel noise float32 [V] of the token at a position of a request."""
        key = (request, position, vocab)
        if key not in self._noise:
            # a counter-based key: any position can be drawn in any order
            alone = (self.own[request], 0) if request in self.own else (self.seed, request)
            mixed = (alone[0] * 1_000_003 + alone[1]) * 1_000_003 + position
            generator = torch.Generator().manual_seed(mixed & 0x7FFF_FFFF_FFFF)
            u = torch.rand(vocab, generator=generator, dtype=torch.float64)
            gumbel = -torch.log(-torch.log(u.clamp(min=1e-300)))
            if len(self._noise) * vocab > MOST_NOISE:
                self._noise.clear()
            self._noise[key] = gumbel.float()
        return self._noise[key]

    def accept(self, tree: TokenTree, logits: torch.Tensor, context: Context) -> Verdict:
        """See :class:`isthmus.roles.Acceptance`."""
        _check_finite(logits)
        scores = torch.log_softmax(context.law.logits(logits, tree, context), -1)
        depth = tree.topology.depth.expand_as(tree.tokens).tolist()
        v = scores.shape[-1]
        noise = torch.stack(
            [
                torch.stack(
                    [self.noise(context.requests[b], context.lengths[b] + d, v) for d in depth[b]]
                )
                for b in range(tree.batch)
            ]
        )
        return match_path(tree, (scores + noise.to(scores.device)).argmax(-1))


class Typical:
    """Typical acceptance: a draft token stands when the target finds it likely enough. Lossy.

    Token x stands below a standing node when ``p(x) > min(eps, delta * exp(-H(p)))`` (Medusa,
    2401.10774, sec. 2.3.1): the less sure the target is, the more it lets pass. The longest path
    wins, the likeliest one among equals. The final token is the target's argmax, or a draw among
    its typical tokens when sampling. The mode always stands, so no round is in vain.

    Args:
        eps: A token of more probability than this always stands, 0 to 1.
        delta: Threshold by entropy, 0 to below 1.

    Raises:
        InvalidInputError: A threshold is out of range.
    """

    lossless = False

    def __init__(self, eps: float = 0.09, delta: float = 0.3) -> None:
        if not (0.0 <= eps <= 1.0 and 0.0 <= delta < 1.0):
            raise InvalidInputError(
                f"eps must be from 0 to 1 and delta from 0 to below 1, got {eps} and {delta}"
            )
        self.eps, self.delta = eps, delta

    def accept(self, tree: TokenTree, logits: torch.Tensor, context: Context) -> Verdict:
        """See :class:`isthmus.roles.Acceptance`."""
        _check_finite(logits)
        probs = context.law.probs(logits, tree, context)
        entropy = -torch.special.xlogy(probs, probs).sum(-1)
        bar = (self.delta * torch.exp(-entropy)).clamp(max=self.eps)  # [B, N]
        topology, (b, n) = tree.topology, tree.tokens.shape
        parent = topology.parent.clamp(min=0).expand(b, -1)
        rows = torch.arange(b, device=logits.device)[:, None]
        own = probs[rows, parent, tree.tokens]
        passed = own > bar.gather(1, parent)
        passed[:, 0] = True
        above = topology.ancestors.expand(b, -1, -1)
        stands = ~(above & ~(passed & tree.alive)[:, None, :]).any(-1)
        score = own.log().masked_fill(~stands, 0.0)
        score[:, 0] = 0.0
        likelihood = (above * score[:, None, :]).sum(-1)
        depth = topology.depth.expand(b, -1).masked_fill(~stands, -1)
        # the deepest level first, then the likeliest path on it
        deepest = depth == depth.amax(1, keepdim=True)
        last = likelihood.masked_fill(~deepest, -torch.inf).argmax(1)
        order = torch.where(above[rows[:, 0], last], torch.arange(n, device=logits.device), n)
        path = order.sort(1).values[:, : int(depth.amax()) + 1]
        final = probs[rows[:, 0], last]
        if context.law.greedy:
            token = final.argmax(-1)
        else:
            # the mode has p >= exp(-H), so it passes and something is left to draw
            kept = final.masked_fill(final <= bar[rows[:, 0], last][:, None], 0.0)
            token = torch.multinomial(kept, 1, generator=context.generator)[:, 0]
        return Verdict(torch.where(path < n, path, -1), token)


class Lossless:
    """The exact rule for what is at hand: Greedy, Match or Rejection.

    Args:
        seed: Where rows sample, chains and chosen trees are judged by shared noise keyed on it
            (:class:`Coupled`): the same text whoever drafts. None draws from the generator.
    """

    lossless = True
    reads_choice = True  # under a greedy law

    def __init__(self, seed: int | None = None) -> None:
        self._greedy, self._match, self._rejection = Greedy(), Match(), Rejection()
        self._coupled = None if seed is None else Coupled(seed)
        self.noise = None if self._coupled is None else self._coupled.noise

    def accept(self, tree: TokenTree, logits: torch.Tensor, context: Context) -> Verdict:
        """See :class:`isthmus.roles.Acceptance`."""
        if context.law.greedy:
            return self._greedy.accept(tree, logits, context)
        if self._coupled is not None and (tree.draw == "point" or tree.is_chain):
            return self._coupled.accept(tree, logits, context)
        rule = self._match if tree.draw == "point" else self._rejection
        return rule.accept(tree, logits, context)
