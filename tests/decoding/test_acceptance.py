"""Acceptance rules: exact enumeration, numerical traps, and proof that the checks have power."""

from typing import Any

import pytest
import torch

from isthmus.decoding.acceptance import Coupled, Greedy, Lossless, Match, Rejection, match_path
from isthmus.decoding.drafters import gumbel_top_k
from isthmus.decoding.law import Law
from isthmus.decoding.tree import Draw, TokenTree, Topology
from isthmus.errors import InvalidInputError
from isthmus.roles import Context, Verdict
from isthmus.testing import check_acceptance, emitted_laws, goodness_of_fit
from isthmus.testing.acceptances import context_for, laws


@pytest.mark.parametrize("rule", [Match(), Rejection()], ids=["match", "rejection"])
def test_contract_of_sampling_rules(rule: Any) -> None:
    check_acceptance(rule, rows=3000)


def test_contract_of_the_rest() -> None:
    check_acceptance(Greedy(), sampled=False, greedy=True)
    check_acceptance(Lossless(), greedy=True, rows=1000)
    check_acceptance(Coupled(seed=3), rows=300)


@pytest.mark.parametrize(
    ("draw", "k"), [("iid", 1), ("iid", 2), ("iid", 3), ("without", 2), ("without", 3)]
)
def test_rejection_is_exact(draw: Draw, k: int) -> None:
    for vocab in (2, 3, 4, 5):
        if k > vocab:
            continue
        p, q = laws(vocab, 60, seed=vocab)
        assert float((emitted_laws(Rejection(), p, q, draw=draw, k=k) - p).abs().max()) < 1e-12


@pytest.mark.parametrize("k", [1, 2, 3])
def test_match_is_exact_on_chosen_trees(k: int) -> None:
    p, q = laws(5, 60, seed=k)
    assert float((emitted_laws(Match(), p, q, draw="point", k=k) - p).abs().max()) < 1e-12


@pytest.mark.parametrize("k", [2, 3])
def test_forgetting_to_renormalise_is_seen(k: int) -> None:
    """The classic mistake: q stays as it was after a rejected draw without replacement."""
    p, q = laws(5, 60, seed=1)
    wrong = emitted_laws(Rejection(renormalise=False), p, q, draw="without", k=k)
    assert float((wrong - p).abs().max()) > 0.01
    with pytest.raises(AssertionError, match="the emitted law is off"):
        check_acceptance(Rejection(renormalise=False))
    # with replacement there is nothing to renormalise
    same = emitted_laws(Rejection(renormalise=False), p, q, draw="iid", k=k)
    assert float((same - p).abs().max()) < 1e-12


class NoResidual(Rejection):
    """After a rejection the token is drawn from p instead of the residual."""

    def verify(self, tree: TokenTree, law: torch.Tensor, generator: torch.Generator) -> Verdict:
        verdict = super().verify(tree, law, generator)
        last = (verdict.path >= 0).sum(1) - 1
        node = verdict.path.gather(1, last[:, None])[:, 0]
        rows = law[torch.arange(len(law)), node]
        return Verdict(verdict.path, torch.multinomial(rows, 1, generator=generator)[:, 0])


class Ratio(Rejection):
    """Accepts where u <= p / q: an impossible token passes at u = 0."""

    def verify(self, tree: TokenTree, law: torch.Tensor, generator: torch.Generator) -> Verdict:
        return super().verify(tree, law.clamp(min=1e-300), generator)


@pytest.mark.parametrize("rule", [NoResidual(), Ratio()], ids=["no-residual", "ratio"])
def test_the_check_sees_broken_rules(rule: Any) -> None:
    with pytest.raises(AssertionError):
        check_acceptance(rule, rows=2000)


def one_draft(p: list[float], q: list[float], token: int, rows: int = 1) -> tuple[Any, ...]:
    tree = TokenTree.chain(
        torch.zeros(rows, dtype=torch.int64),
        torch.full((rows, 1), token),
        q=torch.tensor(q, dtype=torch.float64).expand(rows, 1, -1),
    )
    law = torch.tensor(p, dtype=torch.float64).expand(rows, 2, -1).contiguous()
    return tree, law


def test_an_impossible_token_never_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison u q < p is strict: at u = 0 it turns p = 0 down."""
    tree, law = one_draft([0.0, 1.0], [1.0, 0.0], token=0)
    zeros = lambda *shape, **options: torch.zeros(*shape, dtype=torch.float64)  # noqa: E731
    monkeypatch.setattr(torch, "rand", zeros)
    verdict = Rejection().verify(tree, law, torch.Generator())
    assert verdict.path.tolist() == [[0]] and verdict.token.tolist() == [1]


def test_equal_laws_up_to_rounding() -> None:
    """A residual of rounding noise is no law: then the draw is from p, never NaN."""
    p = torch.tensor([0.3, 0.3, 0.4], dtype=torch.float64)
    q = p * (1 + torch.tensor([2e-16, -2e-16, 1e-16], dtype=torch.float64))
    rows = 20_000
    generator = torch.Generator().manual_seed(0)
    for draw in ("iid", "without"):
        tokens = torch.stack([gumbel_top_k(q.log().expand(rows, -1), 2, generator)], 0)[0]
        full = torch.cat([torch.zeros(rows, 1, dtype=torch.int64), tokens], 1)
        table = q.expand(rows, 3, -1)
        tree = TokenTree(full, Topology.of([-1, 0, 0]), None, draw, table)
        law = p.expand(rows, 3, -1).contiguous()
        verdict = Rejection().verify(tree, law, generator)
        assert int(verdict.token.min()) >= 0 and int(verdict.token.max()) <= 2


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("rule", [Greedy(), Match(), Rejection(), Coupled(0), Lossless()])
def test_damaged_logits_are_refused(rule: Any, value: float) -> None:
    tree = TokenTree.root(torch.tensor([1, 2]))
    logits = torch.zeros(2, 1, 4)
    logits[1, 0, 2] = value
    temperature = 0.0 if isinstance(rule, Greedy) else 1.0
    with pytest.raises(InvalidInputError, match="not finite"):
        rule.accept(tree, logits, context_for(tree, Law(temperature=temperature)))


@pytest.mark.parametrize("rule", [Greedy(), Match(), Rejection(), Coupled(0), Lossless()])
def test_banned_tokens_do_not_alarm(rule: Any) -> None:
    tree = TokenTree.root(torch.tensor([1, 2]))
    logits = torch.full((2, 1, 4), -torch.inf)
    logits[:, 0, 3] = 0.0
    temperature = 0.0 if isinstance(rule, Greedy) else 1.0
    verdict = rule.accept(tree, logits, context_for(tree, Law(temperature=temperature)))
    assert verdict.token.tolist() == [3, 3]


def test_rules_refuse_trees_that_are_not_theirs() -> None:
    point = TokenTree.from_paths(0, [[1], [2]])
    drawn = TokenTree(
        torch.tensor([[0, 1, 1]]), Topology.of([-1, 0, 0]), None, "iid", torch.ones(1, 3, 4) / 4
    )
    law = torch.ones(1, 3, 4, dtype=torch.float64) / 4
    tree_with_q = TokenTree(point.tokens, point.topology, None, "without", torch.ones(1, 3, 4) / 4)
    with pytest.raises(InvalidInputError, match="need Rejection"):
        Match().accept(drawn, law.log(), context_for(drawn))
    Match().accept(tree_with_q, law.log(), context_for(tree_with_q))
    with pytest.raises(InvalidInputError, match="carries no q"):
        TokenTree(point.tokens, point.topology, None, "point", torch.ones(1, 3, 4) / 4)
    with pytest.raises(InvalidInputError, match="must carry it"):
        TokenTree(point.tokens, point.topology, None, "iid")


def test_acceptance_rate_is_the_best_possible() -> None:
    """Level one accepts with sum min(p, q), else the rule is lossless but slow."""
    p = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    q = torch.tensor([0.2, 0.2, 0.6], dtype=torch.float64)
    rows = 40_000
    generator = torch.Generator().manual_seed(4)
    x = torch.multinomial(q.expand(rows, -1), 1, generator=generator)
    tree = TokenTree.chain(
        torch.zeros(rows, dtype=torch.int64), x, q=q.expand(rows, 1, -1).contiguous()
    )
    verdict = Rejection().verify(tree, p.expand(rows, 2, -1).contiguous(), generator)
    share = float((verdict.path >= 0).sum(1).sub(1).double().mean())
    beta = float(torch.minimum(p, q).sum())
    assert abs(share - beta) < 4 * (beta * (1 - beta) / rows) ** 0.5


def test_gumbel_top_k_is_a_draw_without_replacement_in_order() -> None:
    q = torch.tensor([0.5, 0.25, 0.15, 0.1, 0.0], dtype=torch.float64)
    rows = 60_000
    generator = torch.Generator().manual_seed(1)
    drawn = gumbel_top_k(q.log().expand(rows, -1), 2, generator)
    assert not bool((drawn == 4).any())
    pairs = [(a, b) for a in range(4) for b in range(4) if a != b]
    counts = [int(((drawn[:, 0] == a) & (drawn[:, 1] == b)).sum()) for a, b in pairs]
    want = [float(rows * q[a] * q[b] / (1 - q[a])) for a, b in pairs]
    assert sum(counts) == rows
    assert goodness_of_fit(counts, want) > 1e-4
    # unsorted, the same set is no draw in order: sort by token instead of by noise
    mixed = drawn.sort(1).values
    counts = [int(((mixed[:, 0] == a) & (mixed[:, 1] == b)).sum()) for a, b in pairs]
    assert goodness_of_fit(counts, want) < 1e-10


def test_goodness_of_fit_agrees_with_scipy() -> None:
    scipy_stats = pytest.importorskip("scipy.stats")
    counts, want = [22, 31, 27, 20], [25.0, 25.0, 25.0, 25.0]
    expected = float(scipy_stats.chisquare(counts, want).pvalue)
    assert abs(goodness_of_fit(counts, want) - expected) < 1e-9
    # cells that expect fewer than 5 are pooled
    pooled = float(scipy_stats.chisquare([50, 44, 6], [50, 45, 5]).pvalue)
    assert abs(goodness_of_fit([50, 44, 4, 2], [50, 45, 2.5, 2.5]) - pooled) < 1e-9
    assert goodness_of_fit([5], [5.0]) == 1.0


def test_match_path_on_ragged_rows() -> None:
    tree = TokenTree(
        torch.tensor([[0, 1, 2, 3], [0, 1, 2, 3]]),
        Topology.of([-1, 0, 1, 2]),
        torch.tensor([[True] * 4, [True, True, False, True]]),
    )
    choice = torch.tensor([[1, 2, 3, 9], [1, 2, 3, 9]])
    verdict = match_path(tree, choice)
    assert verdict.path.tolist() == [[0, 1, 2, 3], [0, 1, -1, -1]]
    assert verdict.token.tolist() == [9, 2]
    bushy = TokenTree(
        torch.tensor([[0, 1, 2, 3], [0, 1, 2, 3]]), Topology.of([-1, 0, 0, 2]), tree.valid
    )
    verdict = match_path(bushy, torch.tensor([[2, 9, 3, 8], [2, 9, 3, 8]]))
    assert verdict.path.tolist() == [[0, 2, 3], [0, -1, -1]]
    assert verdict.token.tolist() == [8, 2]


def test_coupled_noise_is_a_function_of_its_key() -> None:
    one, two = Coupled(5), Coupled(5)
    late = two.noise(3, 40, 7)
    for position in range(30, 50):
        one.noise(3, position, 7)
    assert torch.equal(one.noise(3, 40, 7), late)
    assert not torch.equal(one.noise(3, 41, 7), late)
    assert not torch.equal(one.noise(4, 40, 7), late)
    assert not torch.equal(Coupled(6).noise(3, 40, 7), late)
    assert one.noise(3, 40, 5).shape == (5,)


def test_coupled_marginals() -> None:
    p = torch.tensor([0.6, 0.3, 0.1, 0.0], dtype=torch.float64)
    rows = 3000
    tree = TokenTree.root(torch.zeros(rows, dtype=torch.int64))
    rule = Coupled(8)
    context: Context = context_for(tree)
    token = rule.accept(tree, p.log().expand(rows, 1, -1), context).token
    counts = torch.bincount(token, minlength=4)
    assert int(counts[3]) == 0
    assert goodness_of_fit(counts.tolist(), (rows * p).tolist()) > 1e-4
