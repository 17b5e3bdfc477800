"""The contract of an acceptance rule: the token that comes out has the target's law."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from isthmus.decoding.law import Law
from isthmus.decoding.tree import Draw, TokenTree, Topology, chain_topology
from isthmus.errors import IsthmusError
from isthmus.roles import Acceptance, Context
from isthmus.testing.statistics import goodness_of_fit

ALMOST_ONE = 1.0 - 2.0**-53
"""The largest number below 1 that ``torch.rand`` can give in float64."""


class NotEnumerableError(Exception):
    """The rule draws in a way that :func:`emitted_laws` does not know."""


def check_acceptance(
    acceptance: Acceptance,
    *,
    sampled: bool = True,
    greedy: bool = False,
    rows: int = 5000,
    seed: int = 0,
) -> None:
    """Check that a lossless rule emits the target's law and nothing impossible.

    One level of a tree is enumerated exactly where the rule's draws allow it (see
    :func:`emitted_laws`), and deeper trees are tested statistically: chains, several candidates
    with and without replacement, and chosen trees, with zeros in p and q, equal and disjoint laws.

    Args:
        acceptance: The rule. Trees of a kind that it refuses (an IsthmusError) are left out, but
            it must take at least one kind.
        sampled: The rule serves sampling laws.
        greedy: The rule serves greedy laws.
        rows: Rows of each statistical test.
        seed: Seed of every draw.

    Raises:
        AssertionError: The emitted law is not the target's.
    """
    assert isinstance(acceptance.lossless, bool), "an acceptance rule says whether it is lossless"
    _check_refuses_nan(acceptance, Law(temperature=1.0 if sampled else 0.0))
    if greedy:
        _check_greedy(acceptance, seed)
    if not sampled:
        return
    kinds: list[tuple[Draw, int]] = [("iid", 1), ("iid", 2), ("iid", 3)]
    kinds += [("without", 2), ("without", 3), ("point", 1), ("point", 3)]
    taken = 0
    for draw, k in kinds:
        for vocab in (3, 5):
            if k > vocab:
                continue
            p, q = laws(vocab, 24, seed)
            try:
                emitted = emitted_laws(acceptance, p, q, draw=draw, k=k)
            except NotEnumerableError:
                pass
            except IsthmusError:
                continue  # not its kind of tree
            else:
                error = float((emitted - p).abs().max())
                assert error < 1e-12, (
                    f"{k} children drawn {draw!r}: the emitted law is off by {error:.1e}"
                )
                _check_zero(acceptance, p, q, draw, k)
            _check_two_levels(acceptance, p, q, draw, k, rows, seed)
            taken += 1
    assert taken, "the rule took none of the trees it was offered"


def laws(vocab: int, pairs: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Pairs of laws p, q [R, V]: random ones, with zeros, equal, disjoint and one-hot ones."""
    generator = torch.Generator().manual_seed(seed)
    shape = (pairs, vocab)
    p, q = (torch.rand(shape, generator=generator, dtype=torch.float64) ** 3 for _ in range(2))
    for law, other in ((p, 4), (q, 3)):
        holes = torch.rand(shape, generator=generator) < 0.4
        holes[::other] = False
        holes[torch.arange(pairs), torch.randint(0, vocab, (pairs,), generator=generator)] = False
        law[holes] = 0.0
    q[0] = p[0]
    p[1], q[1] = 1.0, 1.0
    p[2], q[2] = 0.0, 0.0
    p[2, 0], q[2, 1:] = 1.0, 1.0
    p[3], q[3] = 0.0, 0.0
    p[3, 1], q[3, 1] = 1.0, 1.0
    return p / p.sum(-1, keepdim=True), q / q.sum(-1, keepdim=True)


def emitted_laws(
    acceptance: Acceptance, p: torch.Tensor, q: torch.Tensor, *, draw: Draw, k: int
) -> torch.Tensor:
    """Exact law of the first token that a rule emits over k children of the root.

    All drafts are enumerated with their probability under q. For each, the rule itself is run
    with its uniform numbers set from outside: the largest one with which a child still stands is
    found by bisection, and the law of the final draw is read off.

    Args:
        acceptance: A rule that draws by one ``torch.rand`` of shape [B, K] a level, a child
            standing where its number is small enough, and ``torch.multinomial``; or by
            ``torch.multinomial`` alone.
        p: Target laws float64 [R, V].
        q: Laws of the first draw [R, V]; for ``"point"`` the children are all k-subsets in order.
        draw: How the children are obtained.
        k: Children.

    Returns:
        Emitted laws float64 [R, V]; they equal p where the rule is lossless.

    Raises:
        NotEnumerableError: The rule draws in another way.
    """
    vocab = p.shape[1]
    drafts, weights = _drafts(q, draw, k)
    r, d = weights.shape
    tokens = drafts.repeat(r, 1)
    case = _Case(acceptance, p.repeat_interleave(d, 0), q.repeat_interleave(d, 0), tokens, draw)
    laws = case.rejected() if draw != "point" and case.uniforms else case.matched()
    return (weights[:, :, None] * laws.view(r, d, vocab)).sum(1)


def _drafts(q: torch.Tensor, draw: Draw, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """All drafts [D, k] of k tokens and their probability under each q, [R, D]."""
    vocab = q.shape[1]
    if draw == "iid":
        drafts = torch.tensor(list(itertools.product(range(vocab), repeat=k)))
        return drafts, q[:, drafts].prod(-1)
    drafts = torch.tensor(list(itertools.permutations(range(vocab), k)))
    if draw == "point":
        return drafts, torch.full((len(q), len(drafts)), 1.0 / len(drafts), dtype=torch.float64)
    weights = torch.ones(len(q), len(drafts), dtype=torch.float64)
    left = q[:, None, :].repeat(1, len(drafts), 1)
    gone = torch.zeros_like(left, dtype=torch.bool)
    for i in range(k):
        total = left.sum(-1, keepdim=True)
        # with the support exhausted any of the remaining tokens may stand there
        rest = torch.where(total > 0, left, (~gone).double())
        x = drafts[None, :, i : i + 1].expand(len(q), -1, -1)
        weights *= (rest.gather(-1, x) / rest.sum(-1, keepdim=True))[..., 0]
        left, gone = left.scatter(-1, x, 0.0), gone.scatter(-1, x, True)
    return drafts, weights


class _Case:
    """A rule, and one row for every draft of every pair of laws."""

    def __init__(
        self, rule: Acceptance, p: torch.Tensor, q: torch.Tensor, tokens: torch.Tensor, draw: Draw
    ) -> None:
        self.rule, self.p, self.tokens = rule, p, tokens
        rows, k = tokens.shape
        vocab = p.shape[1]
        self.tree = _star(tokens, None if draw == "point" else q, draw)
        # the children's own laws must not matter for the first token: a uniform one
        self.logits = torch.zeros(rows, k + 1, vocab, dtype=torch.float64)
        self.logits[:, 0] = p.log()
        self.uniforms = self.run(_Draws(torch.full((rows, k), ALMOST_ONE, dtype=torch.float64)))[2]

    def run(self, draws: _Draws) -> tuple[torch.Tensor, torch.Tensor | None, int]:
        """Index of the child that stands (-1: none), law of the last draw, uniforms used."""
        context = context_for(self.tree)
        with draws:
            verdict = self.rule.accept(self.tree, self.logits, context)
        if verdict.path.shape[1] > 1:
            child = verdict.path[:, 1].clamp(min=0) - 1
        else:
            child = torch.full((len(self.tokens),), -1)
        self.final = verdict.token
        return child, draws.law, draws.calls

    def matched(self) -> torch.Tensor:
        """Laws [rows, V] of a rule that draws tokens only, one run for each value of the draw."""
        rows, vocab = self.p.shape
        out = torch.zeros(rows, vocab, dtype=torch.float64)
        for token in range(vocab):
            child, law, calls = self.run(_Draws(None, token))
            if calls or law is None:
                raise NotEnumerableError
            law = law.view(rows, -1, vocab)[:, 0]
            stands = self.tokens.gather(1, child.clamp(min=0)[:, None])[:, 0]
            emitted = torch.where(child >= 0, stands, self.final)
            out.scatter_add_(1, emitted[:, None], law[:, token : token + 1].double())
        return out

    def rejected(self) -> torch.Tensor:
        """Laws [rows, V] of a rule that compares uniform numbers, one threshold a child."""
        rows, k = self.tokens.shape
        if self.uniforms != 1:
            raise NotEnumerableError
        out = torch.zeros(rows, self.p.shape[1], dtype=torch.float64)
        reach = torch.ones(rows, dtype=torch.float64)
        for i in range(k):
            low, high = torch.zeros(rows, dtype=torch.float64), torch.ones(rows).double()
            for _ in range(54):
                middle = (low + high) / 2
                u = torch.full((rows, k), ALMOST_ONE, dtype=torch.float64)
                u[:, i] = middle
                stands = self.run(_Draws(u))[0] == i
                low, high = torch.where(stands, middle, low), torch.where(stands, high, middle)
            chance = torch.where(high == 1.0, 1.0, low)
            out.scatter_add_(1, self.tokens[:, i : i + 1], (reach * chance)[:, None])
            reach = reach * (1.0 - chance)
        u = torch.full((rows, k), ALMOST_ONE, dtype=torch.float64)
        child, law, _ = self.run(_Draws(u))
        if law is None:
            raise NotEnumerableError
        law = law.double() / law.double().sum(-1, keepdim=True)
        # a child that stands at the largest number always stands: no chance is left over
        return out + torch.where(child >= 0, 0.0, reach)[:, None] * law


class _Draws(TorchFunctionMode):
    """Answers ``torch.rand`` and ``torch.multinomial`` from outside and notes what was asked.

    Args:
        u: What ``torch.rand`` gives; None refuses.
        token: What ``torch.multinomial`` gives; None takes the most likely one.
    """

    def __init__(self, u: torch.Tensor | None, token: int | None = None) -> None:
        super().__init__()
        self.u, self.token = u, token
        self.law: torch.Tensor | None = None
        self.calls = 0

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        if name == "rand":
            if self.u is None or tuple(args) != tuple(self.u.shape):
                raise NotEnumerableError
            self.calls += 1
            return self.u.clone()
        if name == "multinomial":
            self.law = args[0].clone()
            if self.token is None:
                return args[0].argmax(-1, keepdim=True)
            return torch.full((len(args[0]), 1), self.token)
        if name in ("bernoulli", "randn", "randint", "exponential_", "uniform_", "rand_like"):
            raise NotEnumerableError
        return func(*args, **(kwargs or {}))


def _star(tokens: torch.Tensor, q: torch.Tensor | None, draw: Draw) -> TokenTree:
    """Children [B, k] of a root that is token 0."""
    rows, k = tokens.shape
    full = torch.cat([torch.zeros_like(tokens[:, :1]), tokens], 1)
    topology = chain_topology(2) if k == 1 else Topology.of([-1, *[0] * k])
    table = None
    if q is not None:
        table = torch.zeros(rows, k + 1, q.shape[1], dtype=q.dtype)
        table[:, 0] = q
    return TokenTree(full, topology, None, draw, table)


def context_for(tree: TokenTree, law: Law | None = None, seed: int = 0) -> Context:
    """A context in which the roots of a tree are the only committed tokens."""
    rows = tree.batch
    return Context(
        tree.tokens[:, :1].clone(),
        [1] * rows,
        [1] * rows,
        law or Law(temperature=1.0),
        torch.Generator().manual_seed(seed),
        list(range(rows)),
    )


def _check_zero(rule: Acceptance, p: torch.Tensor, q: torch.Tensor, draw: Draw, k: int) -> None:
    """Where every uniform number is 0, an impossible token must still not pass."""
    drafts, _ = _drafts(q, draw, k)
    d = len(drafts)
    tokens = drafts.repeat(len(p), 1)
    case = _Case(rule, p.repeat_interleave(d, 0), q.repeat_interleave(d, 0), tokens, draw)
    child, _, _ = case.run(_Draws(torch.zeros(tokens.shape, dtype=torch.float64)))
    emitted = torch.where(
        child >= 0, tokens.gather(1, child.clamp(min=0)[:, None])[:, 0], case.final
    )
    chance = case.p.gather(1, emitted[:, None])
    assert bool((chance > 0).all()), (
        f"{k} children drawn {draw!r}: a token of probability 0 was emitted at u = 0"
    )


def _check_two_levels(
    rule: Acceptance, p: torch.Tensor, q: torch.Tensor, draw: Draw, k: int, rows: int, seed: int
) -> None:
    """Two levels with k children each: the pair of tokens must have the joint law."""
    vocab = p.shape[1]
    generator = torch.Generator().manual_seed(seed)
    for pick in range(4, 8):
        root_p, root_q = p[pick], q[pick]
        # laws of the second level differ by parent token, so that a mix-up shows
        below_p, below_q = p.roll(-pick, 0)[:vocab], q.roll(-pick - 1, 0)[:vocab]
        first = _draw(root_q.expand(rows, -1), draw, k, generator)  # [B, k]
        second = torch.stack([_draw(below_q[first[:, i]], draw, k, generator) for i in range(k)], 1)
        tokens = torch.cat([torch.zeros(rows, 1, dtype=torch.int64), first, second.flatten(1)], 1)
        parents = [-1, *[0] * k, *(1 + i for i in range(k) for _ in range(k))]
        topology = chain_topology(3) if k == 1 else Topology.of(parents)
        table = torch.zeros(rows, len(parents), vocab, dtype=torch.float64)
        logits = table.clone()
        table[:, 0], logits[:, 0] = root_q, root_p.log()
        table[:, 1 : k + 1], logits[:, 1 : k + 1] = below_q[first], below_p[first].log()
        tree = TokenTree(tokens, topology, None, draw, None if draw == "point" else table)
        context = context_for(tree, seed=seed + pick)
        # rules with keyed noise must not see one key twice: each test has its own requests
        context.requests = [rows * (10 * vocab + pick) + r for r in range(rows)]
        context.noise = getattr(rule, "noise", None)
        verdict = rule.accept(tree, logits, context)
        depth = (verdict.path >= 0).sum(1) - 1
        walked = tokens.gather(1, verdict.path.clamp(min=0))
        head = torch.where(depth >= 1, walked[:, min(1, walked.shape[1] - 1)], verdict.token)
        counts = torch.bincount(head, minlength=vocab)
        where = f"{k} children drawn {draw!r}, two levels, pair {pick}"
        assert not bool((counts[root_p == 0] > 0).any()), f"{where}: an impossible first token"
        chance = goodness_of_fit(counts.tolist(), (rows * root_p).tolist())
        assert chance > 1e-6, f"{where}: wrong law of the first token (p = {chance:.1e})"
        for token in range(vocab):
            those = (head == token) & (depth >= 1)
            if int(those.sum()) < 50:
                continue
            tail = torch.where(depth >= 2, walked[:, min(2, walked.shape[1] - 1)], verdict.token)[
                those
            ]
            counts = torch.bincount(tail, minlength=vocab)
            law = below_p[token]
            assert not bool((counts[law == 0] > 0).any()), f"{where}: an impossible second token"
            chance = goodness_of_fit(counts.tolist(), (len(tail) * law).tolist())
            assert chance > 1e-6, f"{where}: wrong law of the second token (p = {chance:.1e})"


def _draw(q: torch.Tensor, draw: Draw, k: int, generator: torch.Generator) -> torch.Tensor:
    """Tokens [B, k] by the laws q [B, V]; chosen ones are the first k tokens."""
    if draw == "point":
        return torch.arange(k).expand(len(q), -1)
    if draw == "iid":
        return torch.multinomial(q, k, True, generator=generator)
    out: list[torch.Tensor] = []
    left, gone = q.clone(), torch.zeros_like(q, dtype=torch.bool)
    for _ in range(k):
        rest = torch.where(left.sum(-1, keepdim=True) > 0, left, (~gone).double())
        x = torch.multinomial(rest, 1, generator=generator)
        left, gone = left.scatter(1, x, 0.0), gone.scatter(1, x, True)
        out.append(x[:, 0])
    return torch.stack(out, 1)


def _check_greedy(rule: Acceptance, seed: int) -> None:
    """Under a greedy law the emitted token is the argmax, whatever was proposed."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 5, (64, 4), generator=generator)
    tokens[:, 2] = (tokens[:, 1] + 1) % 5
    tree = TokenTree(tokens, Topology.of([-1, 0, 0, 1]))
    logits = torch.randn(64, 4, 5, generator=generator, dtype=torch.float64)
    context = context_for(tree, Law())
    context.noise = getattr(rule, "noise", None)
    verdict = rule.accept(tree, logits, context)
    top = logits.argmax(-1)
    want = top.gather(1, _last(verdict.path))[:, 0]
    assert torch.equal(verdict.token, want), "greedy: the final token is not the argmax"
    for node in verdict.path[:, 1:].unbind(1):
        parent = tree.topology.parent[0, node.clamp(min=0)].clamp(min=0)
        carried = tokens.gather(1, node.clamp(min=0)[:, None])
        stands = carried == top.gather(1, parent[:, None])
        assert bool((stands[:, 0] | (node < 0)).all()), "greedy: a child stands that is no argmax"
    child = tokens[:, 1:3] == top[:, :1]  # nodes 1 and 2 are the root's children
    deeper = (verdict.path >= 0).sum(1) > 1
    assert torch.equal(child.any(1), deeper), "greedy: a child that is the argmax does not stand"


def _last(path: torch.Tensor) -> torch.Tensor:
    """Last accepted node [B, 1] of each path."""
    count = (path >= 0).sum(1, keepdim=True)
    return path.gather(1, count - 1)


def _check_refuses_nan(rule: Acceptance, law: Law) -> None:
    """Damaged logits must be refused with a clear error instead of giving some token."""
    tree = TokenTree.root(torch.zeros(2, dtype=torch.int64))
    logits = torch.zeros(2, 1, 5)
    logits[1] = float("nan")
    context = context_for(tree, law)
    context.noise = getattr(rule, "noise", None)
    try:
        rule.accept(tree, logits, context)
    except IsthmusError:
        return
    raise AssertionError("logits that are not numbers were not refused")
