"""Recursive speculation: draws without replacement in order, stochastic beams, exact rules."""

import itertools
from collections import Counter
from typing import Any

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.decoding.acceptance import KSequential, Rejection, k_sequential
from isthmus.decoding.drafters import gumbel_noise, gumbel_top_k
from isthmus.decoding.law import Law
from isthmus.decoding.policy import Fixed
from isthmus.decoding.table import TableTarget
from isthmus.decoding.tree import Draw, TokenTree, Topology
from isthmus.errors import InvalidInputError
from isthmus.roles import Context, Shape
from isthmus.systems.speculative.recursive_speculation import (
    RecursiveSpeculation,
    Settings,
    condition,
    level_acceptance,
)
from isthmus.testing import (
    check_drafter,
    emitted_laws,
    goodness_of_fit,
    string_test,
)
from isthmus.testing.acceptances import laws

V, END = 5, 4
TARGET = TableTarget(V, seed=1, sharpness=1.2, end_token=END)
DRAFT = TableTarget(V, seed=2, sharpness=1.0)
CONSTANT = Settings(tree="constant", branching=(3, 2))
BEAM = Settings(width=3, depth=3)
OFF = Settings(tree="constant", branching=(3, 2), replacement=True)


def propose(choice: Settings, rows: int, law: Law, shape: Shape | None = None) -> TokenTree:
    """Trees of many rows below the same prompt."""
    prompt = torch.tensor([0, 1, 2]).expand(rows, -1).contiguous()
    lengths = [3] * rows
    generator = torch.Generator().manual_seed(0)
    context = Context(prompt, lengths, list(lengths), law, generator, list(range(rows)))
    drafter = RecursiveSpeculation(DRAFT, choice)
    drafter.begin(context, TARGET)
    return drafter.propose(context, shape or drafter.default_shape)


@pytest.mark.parametrize("k", [2, 3])
def test_verification_without_replacement_is_exact(k: int) -> None:
    p, q = laws(4, 12, seed=k)
    assert float((emitted_laws(Rejection(), p, q, draw="without", k=k) - p).abs().max()) < 1e-12
    wrong = emitted_laws(Rejection(renormalise=False), p, q, draw="without", k=k)
    assert float((wrong - p).abs().max()) > 0.01


@pytest.mark.parametrize("k", [1, 2, 3])
def test_k_sequential_selection_is_exact(k: int) -> None:
    p, q = laws(3, 6, seed=k)
    emitted = emitted_laws(KSequential(), p, q, draw="iid", k=k)
    assert float((emitted - p).abs().max()) < 1e-12


def test_k_sequential_scale() -> None:
    """One candidate is plain rejection; with q far off p the scale nears k."""
    p, q = laws(V, 60, seed=3)
    one = torch.ones(60, dtype=torch.int64)
    gamma, beta, _ = k_sequential(p, q, one)
    assert gamma.tolist() == [1.0] * 60
    assert torch.allclose(beta, torch.minimum(p, q).sum(-1))
    gamma, beta, _ = k_sequential(p, q, 3 * one)
    assert bool((gamma >= 1).all() and (gamma <= 3).all())
    assert bool((1 - (1 - beta) ** 3 <= gamma * beta + 1e-12).all()), "no negative mass is left"
    with pytest.raises(InvalidInputError, match="with replacement"):
        tree = propose(CONSTANT, 1, Law(temperature=1.0))
        KSequential().verify(tree, torch.full((1, tree.nodes, V), 0.2), torch.Generator())


def test_ordered_draws_follow_the_sequential_law() -> None:
    q = torch.tensor([0.4, 0.3, 0.2, 0.1, 0.0], dtype=torch.float64)
    rows, generator = 20_000, torch.Generator().manual_seed(1)
    drawn = gumbel_top_k(q.log().expand(rows, -1), 3, generator)
    counts = Counter(map(tuple, drawn.tolist()))
    want = {}
    for a, b, c in itertools.permutations(range(4), 3):
        left = 1 - float(q[a])
        want[a, b, c] = float(q[a] * q[b] / left * q[c] / (left - float(q[b])))
    assert set(counts) <= set(want)
    assert goodness_of_fit([counts[x] for x in want], [rows * x for x in want.values()]) > 1e-4
    # unsorted it would be another law: the order of the indices is not that of the draw
    counts = Counter(map(tuple, drawn.sort(1).values.tolist()))
    assert goodness_of_fit([counts[x] for x in want], [rows * x for x in want.values()]) < 1e-10


def test_the_conditioned_values() -> None:
    """Their maximum is the parent's, excluded tokens stay out, and no precision is lost."""
    phi = torch.tensor([[0.7, 0.2, 0.1, 0.0], [1.0, 0.0, 0.0, 0.0]], dtype=torch.float64).log()
    parent = torch.tensor([1.5, -40.0], dtype=torch.float64)
    value = condition(phi, parent, torch.Generator().manual_seed(0))
    assert value.amax(1).tolist() == pytest.approx(parent.tolist(), abs=1e-12)
    assert bool((value[0, 3:] == -torch.inf).all()) and bool((value[1, 1:] == -torch.inf).all())
    # the naive formula at ordinary values
    generator = torch.Generator().manual_seed(3)
    phi = torch.randn(50, 6, dtype=torch.float64).log_softmax(-1)
    parent = torch.randn(50, dtype=torch.float64)
    got = condition(phi, parent, generator)
    free = phi + gumbel_noise(phi.shape, torch.Generator().manual_seed(3))
    most = free.amax(1, keepdim=True)
    naive = -torch.log(torch.exp(-parent[:, None]) - torch.exp(-most) + torch.exp(-free))
    assert torch.allclose(got, naive, atol=1e-9)


def test_the_beam_is_a_draw_of_paths_without_replacement() -> None:
    """A beam's leaves, in order, are drawn without replacement from the joint law of paths."""
    rows, law = 12_000, Law(temperature=1.0)
    tree = propose(Settings(width=2, depth=2), rows, law)
    q = {}
    for a in range(V):
        first = torch.softmax(DRAFT.logits(DRAFT.state(torch.tensor([[0, 1, 2]]))), -1)[0]
        second = torch.softmax(DRAFT.logits(DRAFT.state(torch.tensor([[0, 1, 2, a]]))), -1)[0]
        q |= {(a, b): float(first[a] * second[b]) for b in range(V)}
    above = tree.tokens.gather(1, tree.topology.parent[:, 3:])
    pairs = torch.stack([above, tree.tokens[:, 3:]], -1).tolist()
    counts = Counter(map(tuple, (map(tuple, row) for row in pairs)))
    want = {(x, y): q[x] * q[y] / (1 - q[x]) for x, y in itertools.permutations(q, 2)}
    assert sum(want.values()) == pytest.approx(1.0)
    assert goodness_of_fit([counts[x] for x in want], [rows * w for w in want.values()]) > 1e-4


LAWS = {
    "temperature": Law(temperature=0.8),
    "top-p": Law(temperature=0.8, top_p=0.7),
    "top-k": Law(temperature=1.0, top_k=2),
}


@pytest.mark.parametrize(
    ("choice", "law"),
    [(CONSTANT, "top-p"), (BEAM, "temperature"), (BEAM, "top-p"), (BEAM, "top-k"), (OFF, "top-p")],
)
def test_joint_law(choice: Settings, law: str) -> None:
    drafter = RecursiveSpeculation(DRAFT, choice)
    policy = Fixed(drafter, drafter.default_shape)
    result = string_test(policy, target=TARGET, law=LAWS[law], rows=1500)
    assert result.p > 1e-4 and result.impossible == 0 and result.acceptance_length > 1.3


def test_joint_law_of_k_sequential_selection_and_of_a_broken_rule() -> None:
    law = Law(temperature=1.0)
    policies = [Fixed(d, d.default_shape) for d in
                (RecursiveSpeculation(DRAFT, s) for s in (OFF, CONSTANT, BEAM))]  # fmt: skip
    options: dict[str, Any] = {"target": TARGET, "law": law, "rows": 1500}
    assert string_test(policies[0], acceptance=KSequential(), **options).p > 1e-4
    for policy in policies[1:]:
        assert string_test(policy, acceptance=Rejection(renormalise=False), **options).p < 1e-4


def test_no_node_is_wasted() -> None:
    """Siblings differ when drawn without replacement and repeat when drawn with it."""
    law = Law(temperature=0.5)
    for choice, repeats in ((CONSTANT, False), (BEAM, False), (OFF, True)):
        tree = propose(choice, 300, law)
        parent = tree.topology.parent.expand(tree.batch, -1)
        keys = (parent * V + tree.tokens)[:, 1:]
        doubled = sum(len(set(row)) < len(row) for row in keys.tolist())
        assert (doubled > 100) == repeats and (repeats or doubled == 0)


def test_the_mechanism_matters() -> None:
    """More stands without replacement than with it, for every pair of laws."""
    p, q = laws(V, 200, seed=5)
    generator = torch.Generator().manual_seed(0)

    def mean(draw: Draw) -> float:
        runs = [level_acceptance(p, q, 3, draw, generator) for _ in range(60)]
        return float(torch.stack(runs).mean())

    assert mean("without") > mean("iid") + 0.05


@settings(max_examples=6, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 3), st.sampled_from(["iid", "without"]))
def test_level_acceptance_is_that_of_the_rule(seed: int, k: int, draw: Draw) -> None:
    rows = 4000
    p, q = (x[5:6].expand(rows, -1) for x in laws(4, 6, seed=seed))
    generator = torch.Generator().manual_seed(seed)
    chances = level_acceptance(p, q, k, draw, generator)
    drawn = (torch.multinomial(q, k, True, generator=generator) if draw == "iid"
             else gumbel_top_k(q.log(), k, generator))  # fmt: skip
    table = torch.zeros(rows, k + 1, 4, dtype=torch.float64)
    table[:, 0] = q
    law = torch.full_like(table, 0.25)
    law[:, 0] = p
    tokens = torch.cat([torch.zeros(rows, 1, dtype=torch.int64), drawn], 1)
    tree = TokenTree(tokens, Topology.of([-1, *[0] * k]), None, draw, table)
    path = Rejection().verify(tree, law, generator).path
    stood = float((path >= 0).sum(1).double().mean()) - 1.0
    assert abs(float(chances.mean()) - stood) < 5 * (0.25 / rows * 2) ** 0.5


def test_contract_of_the_constant_tree() -> None:
    model = TableTarget(11, seed=4, sharpness=1.5, order=2)
    shapes = (Shape(6, 2, 3),)
    check_drafter(lambda: RecursiveSpeculation(model, CONSTANT), shapes=shapes)


@pytest.mark.parametrize("name", ["Llama", "T5"])
def test_greedy_output_of_a_network(name: str) -> None:
    drafter = RecursiveSpeculation(tiny.target(name, "float64", noise=0.3), BEAM)
    got = tiny.generate(name, "float64", Fixed(drafter, drafter.default_shape), 12, [0, 1, 2])
    for row, result in enumerate(got):
        want = tiny.reference(name, "float64", 12)[row]
        tiny.assert_same(name, "float64", row, result.tokens, want)
    assert sum(r.stats.accepted for r in got) > 0


@pytest.mark.parametrize("bad", [{"tree": "star"}, {"width": 0}, {"depth": 0}])
def test_bad_settings_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(InvalidInputError, match="must be"):
        RecursiveSpeculation(DRAFT, Settings(**bad))
    with pytest.raises(InvalidInputError, match="positive"):
        RecursiveSpeculation(DRAFT, Settings(tree="constant", branching=(2, 0)))
