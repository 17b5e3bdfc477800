"""Hydra: heads that read the path, level by level as one path at a time."""

from pathlib import Path

import pytest
import tiny
import torch
import trained_checks as checks

from isthmus.decoding.builders import Level
from isthmus.decoding.heads import fill_by_level
from isthmus.roles import Shape
from isthmus.systems.speculative.hydra_heads import HydraHeads, Settings
from isthmus.testing import check_drafter

PLUS = Settings(blocks=4, prefix_layer=True, distil=True)


def chain_logits(drafter: HydraHeads, path: torch.Tensor) -> list[torch.Tensor]:
    """Logits after x_{t+1}, after x_{t+2}, ... for one path a row [B, K]."""
    out = []
    for depth in range(path.shape[1]):
        token, none = path[:, depth : depth + 1], torch.zeros_like(path[:, :1])
        out.append(drafter.expand(Level(token, none, torch.zeros(none.shape), depth))[:, 0])
    return out


@torch.no_grad()
@pytest.mark.parametrize("settings", [Settings(), PLUS])
def test_training_logits_are_those_of_drafting(settings: Settings) -> None:
    """Head by head, the loss sees what drafting computes behind the same true tokens."""
    drafter = checks.make(HydraHeads, settings)
    batch = checks.batch_of(drafter)
    seen: list[torch.Tensor] = []
    guess = drafter.guess
    drafter.guess = lambda *a: seen.append(guess(*a)) or seen[-1]  # type: ignore[func-returns-value]
    drafter.loss(batch)
    del drafter.guess
    for count in (1, 5, 9):
        drafter.reset(3)
        drafter.absorb(checks.prefix(batch, count - 1 or 1))
        if count > 1:  # in two parts, as rounds would bring them
            rest = checks.prefix(batch, count)
            last = {k: getattr(rest, k)[:, -1:] for k in ("tokens", "following", "valid")}
            features = type(rest.features)(rest.final[:, -1:])
            drafter.absorb(type(rest)(features=features, **last))
        got = chain_logits(drafter, batch.ids[:, count : count + 4])
        for k in range(4):
            torch.testing.assert_close(got[k], seen[k][:, count - 1])


@torch.no_grad()
def test_a_drafted_token_changes_what_follows() -> None:
    """The mechanism: another token at depth 1 gives other logits at depth 2; off, the same."""
    path = torch.tensor([[3, 4, 5], [3, 7, 5]])
    for use_tokens in (True, False):
        drafter = checks.make(HydraHeads, Settings(use_tokens=use_tokens))
        drafter.feature = torch.ones(2, 32, dtype=torch.float64)
        first, second, _ = chain_logits(drafter, path)
        assert torch.equal(first[0], first[1])
        assert torch.equal(second[0], second[1]) is not use_tokens


@torch.no_grad()
def test_batched_tree_equals_each_path_alone() -> None:
    drafter = checks.make(HydraHeads)
    drafter.feature = torch.randn(2, 32, dtype=torch.float64)
    plan = drafter.ranks.plan(Shape(25, 4, 10))
    tree = fill_by_level(drafter.expand, torch.tensor([5, 6]), plan)
    assert tree.nodes == 26 and tree.topology.max_depth == 4
    for path in tree.topology.paths():
        logits = chain_logits(drafter, tree.tokens[:, path[:-1]])
        for step, node in enumerate(path[1:]):
            order = logits[step].argsort(-1, descending=True)
            assert torch.equal(tree.tokens[:, node], order[:, plan.ranks[node]])


def test_blocks_begin_as_the_skip() -> None:
    fresh = HydraHeads(tiny.target("Llama", "float32"), PLUS)
    path, f = torch.randn(5, 64), torch.randn(5, 32)
    want = fresh.head(fresh.blocks[1][0].skip(torch.cat([f, path], -1)))
    torch.testing.assert_close(fresh.guess(2, f, path), want)


@pytest.mark.parametrize("settings", [Settings(), PLUS])
def test_learns(settings: Settings) -> None:
    checks.learns(checks.make(HydraHeads, settings), 20, 0.95)


@pytest.mark.parametrize("name", ["Llama", "GPT2", "Bart"])
def test_greedy_output_is_plain(name: str) -> None:
    drafter = checks.make(HydraHeads, PLUS, name)
    checks.same_as_plain(drafter, name, (checks.CHAIN, checks.TREE))


def test_contract() -> None:
    drafter = checks.make(HydraHeads, PLUS)
    check_drafter(lambda: drafter, target=drafter.target, shapes=(Shape(6, 2, 3),))


def test_files(tmp_path: Path) -> None:
    checks.round_trip(checks.make(HydraHeads, PLUS, dtype="float32"), tmp_path / "hydra")
