"""ReDrafter: the unrolled head, beams by brute force, and the trie that holds them all."""

import itertools
from pathlib import Path

import pytest
import torch
import trained_checks as checks

from isthmus.decoding.builders import Level
from isthmus.decoding.heads import beam_paths
from isthmus.roles import Shape
from isthmus.systems.speculative.redrafter import Redrafter, Settings


def drafted(drafter: Redrafter, path: torch.Tensor) -> torch.Tensor:
    """Logits [B, L, V] after each token of one path a row [B, L], root first."""
    out = []
    for depth in range(path.shape[1]):
        token, none = path[:, depth : depth + 1], torch.zeros_like(path[:, :1])
        out.append(drafter.expand(Level(token, none, torch.zeros(none.shape), depth))[:, 0])
    return torch.stack(out, 1)


@torch.no_grad()
@pytest.mark.parametrize("recurrent", [True, False])
def test_training_logits_are_those_of_drafting(recurrent: bool) -> None:
    drafter = checks.make(Redrafter, Settings(recurrent=recurrent))
    batch = checks.batch_of(drafter)
    seen: list[torch.Tensor] = []
    guess = drafter.guess
    drafter.guess = lambda *a: seen.append(guess(*a)) or seen[-1]  # type: ignore[func-returns-value]
    drafter.loss(batch)
    del drafter.guess
    for count in (1, 6, 9):
        drafter.reset(3)
        drafter.absorb(checks.prefix(batch, count))
        got = drafted(drafter, batch.ids[:, count : count + 5])
        for k in range(5):
            torch.testing.assert_close(got[:, k], seen[k][:, count - 1])


@torch.no_grad()
def test_the_state_by_hand() -> None:
    drafter = checks.make(Redrafter)
    drafter.feature = torch.zeros(1, 32, dtype=torch.float64)
    drafted(drafter, torch.tensor([[5, 8]]))
    s = torch.zeros(32, dtype=torch.float64)
    for token in (5, 8):
        known = drafter.target.model.get_input_embeddings().weight[token]
        a = drafter.state.weight @ s + drafter.state.bias + drafter.token.weight @ known
        s = a * torch.sigmoid(a)
    torch.testing.assert_close(drafter._s[0, 0], s)


@torch.no_grad()
def test_beams_by_brute_force_and_their_trie() -> None:
    """With every beam kept the best paths are the best of all; the trie loses none of them."""
    table = torch.randn(6, 6, generator=torch.Generator().manual_seed(3)).log_softmax(-1)
    roots = torch.tensor([2, 4])
    beams = beam_paths(lambda level: table[level.tokens], roots, branch=(6, 6, 6), keep=(6, 36, 5))
    for row, root in enumerate(roots.tolist()):
        scores = {
            path: sum(float(table[a, b]) for a, b in itertools.pairwise((root, *path)))
            for path in itertools.product(range(6), repeat=3)
        }
        want = sorted(scores, key=lambda p: -scores[p])[:5]
        assert [tuple(p) for p in beams[row].tolist()] == want

    drafter = checks.make(Redrafter, Settings(width=5))
    drafter.feature = torch.randn(2, 32, dtype=torch.float64)
    beams = beam_paths(drafter.expand, roots, branch=[5] * 3, keep=[5] * 3)
    tree = drafter._tree(roots, Shape(15, 3, 5))
    for row in range(2):
        one = tree.row(row)
        paths = {
            tuple(one.tokens[0, p[1:]].tolist())
            for p in one.topology.paths()
            if bool(one.alive[0, p].all()) and len(p) == 4
        }
        assert paths == {tuple(b) for b in beams[row].tolist()}
    assert max(tree.drafted()) < 15  # shared prefixes stand once


@torch.no_grad()
def test_width_one_is_the_greedy_chain() -> None:
    drafter = checks.make(Redrafter, Settings(width=1))
    drafter.feature = torch.randn(2, 32, dtype=torch.float64)
    tree = drafter._tree(torch.tensor([5, 6]), Shape(4, 4, 9))
    logits = drafted(drafter, tree.tokens[:, :4])
    assert tree.is_chain and torch.equal(tree.tokens[:, 1:], logits.argmax(-1))


def test_learns_and_the_sum_has_no_recurrence_to_learn() -> None:
    checks.learns(checks.make(Redrafter, Settings(distil=False)))
    off = checks.make(Redrafter, Settings(recurrent=False, distil=False))
    before = off.state.weight.clone()
    checks.learns(off)
    assert torch.equal(before, off.state.weight)


@pytest.mark.parametrize("name", ["Llama", "GPT2", "Bart"])
def test_greedy_output_is_plain(name: str) -> None:
    checks.same_as_plain(checks.make(Redrafter, name=name), name, (checks.CHAIN, checks.TREE))


def test_files(tmp_path: Path) -> None:
    checks.round_trip(checks.make(Redrafter, dtype="float32"), tmp_path / "redrafter")
