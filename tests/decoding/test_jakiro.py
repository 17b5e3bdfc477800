"""Jakiro: decoupled experts, and a last level without a pass."""

from pathlib import Path

import feature_checks
import pytest
import tiny
import torch
import torch.nn.functional as F
import trained_checks as checks

from isthmus.decoding.builders import Level
from isthmus.decoding.feature_drafter import counted
from isthmus.decoding.policy import Fixed
from isthmus.roles import Shape
from isthmus.systems.speculative.jakiro import DecoupledExperts, Jakiro, Settings


def test_learns() -> None:
    checks.learns(checks.make(Jakiro), fall=0.96)


@torch.no_grad()
def test_experts_by_hand() -> None:
    torch.manual_seed(0)
    experts = DecoupledExperts(4, 6)
    x = torch.randn(2, 3, 4)
    got = experts(x)
    for b in range(2):
        for n in range(3):
            e = [expert(x[b, n]) for expert in experts.experts]
            r = experts.router(x[b, n])
            w, v = torch.softmax(r[:2], 0), torch.softmax(r[2:], 0)
            strong = int(v[1] > v[0])
            torch.testing.assert_close(got[0, b, n], w[0] * e[0] + w[1] * e[1])
            want = v[strong] * e[strong] - v[1 - strong] * e[1 - strong]
            torch.testing.assert_close(got[1, b, n], want)
    added = DecoupledExperts(4, 6, contrast=False)
    added.load_state_dict(experts.state_dict())
    assert torch.equal(added(x)[0], got[0]) and not torch.allclose(added(x)[1], got[1])


@torch.no_grad()
def test_experts_have_no_order() -> None:
    torch.manual_seed(0)
    experts, swapped = DecoupledExperts(4, 6), DecoupledExperts(4, 6)
    weights = experts.state_dict()
    for key in list(weights):
        if key.startswith("experts"):
            number = int(key.split(".")[1])
            swapped.state_dict()[key.replace(f".{number}.", f".{1 - number}.")].copy_(weights[key])
    swapped.router.weight.copy_(experts.router.weight[[1, 0, 3, 2]])
    x = torch.randn(2, 3, 4)
    torch.testing.assert_close(experts(x), swapped(x))


@torch.no_grad()
def test_the_second_state_is_taught_one_further() -> None:
    drafter = checks.make(Jakiro, Settings(noise=0.0, token_weight=0.0))
    batch = checks.batch_of(drafter)
    f = batch.final
    nothing = torch.zeros_like(f)
    one, two = (torch.cat([f[:, k:], nothing[:, :k]], 1) for k in (1, 2))
    for first, second, want in (
        (one, two, 0.0),
        (one, one, 0.5 * F.smooth_l1_loss(f[:, 1:-1], f[:, 2:])),
        (two, two, F.smooth_l1_loss(two[:, :-1], f[:, 1:])),
    ):
        drafter.step = lambda *args, pair=(first, second): torch.cat(pair, -1)
        assert float(drafter.loss(batch)) == pytest.approx(float(want), abs=1e-12)


def test_drafting_is_what_was_trained() -> None:
    drafter = checks.make(Jakiro)
    feature_checks.drafts_as_trained(drafter)
    feature_checks.tree_as_recomputed(drafter)


@torch.no_grad()
def test_the_last_level_reads_its_parents_rows() -> None:
    drafter = checks.make(Jakiro)
    batch = checks.batch_of(drafter)
    feature_checks.take_in(drafter, checks.prefix(batch, 9))
    draw = torch.randint(3, 60, (3, 6), generator=torch.Generator().manual_seed(1))

    def level(tokens: torch.Tensor, parent: list[int], depth: int) -> Level:
        return feature_checks.level(tokens, parent, depth)

    drafter._levels = 3
    drafter.expand(level(batch.ids[:, 9:10], [0], 0))
    drafter.expand(level(draw[:, :3], [0, 0, 0], 1))
    rows = drafter._g
    with counted(drafter.body) as calls:
        got = drafter.expand(level(draw[:, 3:], [2, 0, 0], 2))
    assert not calls, "the last level takes no pass"
    want = drafter.head(rows[:, [2, 0, 0], 32:])
    torch.testing.assert_close(got, want)


def test_a_pass_less_a_round() -> None:
    for settings, fewer in ((Settings(), 1), (Settings(second_token=False), 0)):
        drafter = checks.make(Jakiro, settings)
        for levels in (1, 4):
            with counted(drafter.body) as calls:
                policy = Fixed(drafter, Shape(levels, levels, 1))
                (result,) = tiny.generate("Llama", "float64", policy, 10, [0])
            expected = 1 + sum(max(1, r.nodes - fewer * (r.nodes > 1)) for r in result.rounds)
            assert len(calls) == expected, (settings, levels)


@pytest.mark.parametrize("name", ["Llama", "GPT2", "Bart"])
def test_greedy_output_is_plain(name: str) -> None:
    shapes = (checks.CHAIN, checks.TREE, Shape(1, 1, 1), Shape(6, 2, 3))
    checks.same_as_plain(checks.make(Jakiro, name=name), name, shapes)


def test_files(tmp_path: Path) -> None:
    checks.round_trip(checks.make(Jakiro, Settings(expert_size=9)), tmp_path / "jakiro")
