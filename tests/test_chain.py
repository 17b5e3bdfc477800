import itertools

import pytest
import torch

from isthmus.errors import InvalidInputError
from isthmus.nn.chain import (
    backward_messages,
    edge_marginals,
    messages,
    total,
    viterbi,
)


def chain(seed=0, batch=3, places=7, states=4, forbidden=0.0):
    """Random edges and starts; a share of the edges is forbidden."""
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, places - 1, states, states)
    edges = torch.randn(shape, generator=generator, dtype=torch.float64)
    edges[torch.rand(shape, generator=generator) < forbidden] = -torch.inf
    return edges, torch.randn(batch, states, generator=generator, dtype=torch.float64)


def paths(edges, start):
    """Every path and its score, one row of the batch at a time: int64 [P, T], float [B, P]."""
    states, steps = edges.shape[-1], edges.shape[1]
    every = torch.tensor(list(itertools.product(range(states), repeat=steps + 1)))
    score = start[:, every[:, 0]]
    for t in range(steps):
        score = score + edges[:, t, every[:, t], every[:, t + 1]]
    return every, score


def add(scores, semiring):
    return scores.amax(-1) if semiring == "max" else scores.logsumexp(-1)


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("semiring", ["max", "sum"])
@pytest.mark.parametrize("places", [1, 2, 3, 4, 6, 7])
@pytest.mark.parametrize("forbidden", [0.0, 0.4])
def test_all_that_is_added_up_is_what_enumeration_gives(scan, semiring, places, forbidden):
    edges, start = chain(places, places=places, forbidden=forbidden)
    every, score = paths(edges, start)
    torch.testing.assert_close(total(edges, start, semiring=semiring), add(score, semiring))
    before = messages(edges, start, semiring=semiring, scan=scan)
    after = backward_messages(edges, semiring=semiring, scan=scan)
    assert before.shape == after.shape == (3, places, 4)
    through = edge_marginals(edges, start, semiring=semiring, scan=scan)
    for t, i in itertools.product(range(places), range(4)):
        here = add(score[:, every[:, t] == i], semiring)
        torch.testing.assert_close((before + after)[:, t, i], here)
        for j in range(4 if t + 1 < places else 0):
            both = (every[:, t] == i) & (every[:, t + 1] == j)
            torch.testing.assert_close(through[:, t, i, j], add(score[:, both], semiring))


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("places", [1, 2, 5, 8])
def test_the_best_path_is_that_of_enumeration(scan, places):
    edges, start = chain(places, places=places, states=3)
    every, score = paths(edges, start)
    assert torch.equal(viterbi(edges, start, scan=scan), every[score.argmax(-1)])


def test_of_equal_paths_the_lowest_states_are_taken():
    assert viterbi(torch.zeros(2, 5, 3, 3)).tolist() == [[0] * 6] * 2
    assert viterbi(torch.zeros(2, 5, 3, 3), scan=True).tolist() == [[0] * 6] * 2


@pytest.mark.parametrize("scan", [False, True])
def test_a_long_chain_is_the_same_place_by_place_and_by_scan(scan):
    edges, start = chain(places=300, states=5)
    for semiring in ("max", "sum"):
        by_place = edge_marginals(edges, start, semiring=semiring)
        torch.testing.assert_close(
            edge_marginals(edges, start, semiring=semiring, scan=scan), by_place
        )
    assert torch.equal(viterbi(edges, start, scan=scan), viterbi(edges, start))


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("semiring", ["max", "sum"])
def test_gradients(scan, semiring):
    edges, start = chain(batch=2, places=5, states=3)
    edges.requires_grad_()
    start.requires_grad_()

    def marginals(e, s):
        return edge_marginals(e, s, semiring=semiring, scan=scan)

    assert torch.autograd.gradcheck(marginals, (edges, start))


def test_the_gradient_of_the_partition_is_the_probability_of_each_edge():
    edges, start = chain(forbidden=0.3)
    edges.requires_grad_()
    whole = total(edges, start)
    (gradient,) = torch.autograd.grad(whole.sum(), edges)
    held = edge_marginals(edges, start).detach()
    probability = (held - whole.detach()[:, None, None, None]).exp()
    torch.testing.assert_close(gradient, probability)
    torch.testing.assert_close(
        probability.sum((-1, -2)), torch.ones(3, edges.shape[1], dtype=torch.float64)
    )


def test_where_every_path_is_forbidden_there_is_no_nan():
    edges = torch.full((1, 3, 2, 2), -torch.inf, requires_grad=True)
    for scan in (False, True):
        assert bool((edge_marginals(edges, scan=scan) == -torch.inf).all())
    value = total(edges)
    (gradient,) = torch.autograd.grad(value.sum(), edges)
    assert value.tolist() == [-torch.inf] and not gradient.any()
    assert viterbi(edges).shape == (1, 4)


def test_what_is_no_chain_is_refused():
    edges, start = chain()
    with pytest.raises(InvalidInputError, match=r"\[B, T - 1, K, K\]"):
        messages(edges[..., :2])
    with pytest.raises(InvalidInputError, match="start must be"):
        viterbi(edges, start[:, :2])
    with pytest.raises(InvalidInputError, match="semiring"):
        total(edges, start, semiring="min")
